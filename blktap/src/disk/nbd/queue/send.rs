//! From the caller to the server.
// Names the callers' memory for the kernel.
#![allow(unsafe_code)]

use std::io;

use libc::iovec;
use zerocopy::IntoBytes;

use super::slots::{Slot, Step};
use super::{Link, NbdQueue};
use crate::disk::{IoBuf, Op};
use crate::export::nbd::proto::{REQUEST_MAGIC, RequestHeader, can, cmd, flag};
use crate::export::nbd::transport::MAX_PIECES;

/// Zeroes for servers that cannot write them by themselves.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// Most bytes of a request without payload: lengths on the wire have 32 bits.
const MOST: u64 = 1 << 30;

pub(super) fn piece_of(addr: *const u8, len: usize) -> iovec {
    iovec { iov_base: addr.cast_mut().cast(), iov_len: len }
}

/// Appends up to `room` pieces of memory: `len` bytes of `bufs` from byte `skip` on. How many
/// bytes they have.
pub(super) fn gather(
    bufs: &[IoBuf],
    mut skip: u64,
    len: u64,
    out: &mut [iovec],
    count: &mut usize,
) -> u64 {
    let mut left = len;
    for buf in bufs {
        let size = buf.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        if left == 0 || *count == out.len() {
            break;
        }
        let n = (size - skip).min(left);
        out[*count] = piece_of(buf.addr().cast_const().wrapping_add(skip as usize), n as usize);
        *count += 1;
        (skip, left) = (0, left - n);
    }
    len - left
}

/// Whether the bytes of a request are written by sending zeroes.
fn sends_zeroes(slot: &Slot, flags: u16) -> bool {
    slot.op == Op::WriteZeroes && flags & can::WRITE_ZEROES == 0
}

/// Bytes that follow the head of a request.
fn payload(slot: &Slot) -> u64 {
    if slot.head.command.get() == cmd::WRITE { slot.piece } else { 0 }
}

impl NbdQueue {
    /// Makes the head of a request's present piece, and queues it.
    pub(super) fn prepare(&mut self, number: u32) {
        let facts = self.shared.facts();
        let fua = if self.can(can::FUA) { flag::FUA } else { 0 };
        let slot = self.slots.get_mut(number);
        let zeroes = sends_zeroes(slot, facts.flags);
        let (command, flags, most) = match (slot.step, slot.op) {
            (Step::Flush, _) | (_, Op::Flush) => (cmd::FLUSH, 0, 0),
            (_, Op::Read) => (cmd::READ, 0, u64::from(facts.maximum.min(MOST as u32))),
            (_, Op::Write) => (cmd::WRITE, 0, facts.maximum.into()),
            (_, Op::WriteFua) => (cmd::WRITE, fua, facts.maximum.into()),
            (_, Op::WriteZeroes) if zeroes => (cmd::WRITE, 0, ZEROES.len() as u64),
            (_, Op::WriteZeroes) => (cmd::WRITE_ZEROES, 0, MOST),
            (_, Op::Discard | Op::SecureDiscard) => (cmd::TRIM, 0, MOST),
        };
        let unit = u64::from(facts.minimum.max(512));
        slot.piece = (slot.len - slot.at.min(slot.len)).min(most / unit * unit);
        (slot.got, slot.errno, slot.sent) = (0, 0, false);
        let flushing = command == cmd::FLUSH;
        slot.head = RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: (u64::from(slot.serial) << 32 | u64::from(number)).into(),
            offset: if flushing { 0 } else { slot.offset + slot.at }.into(),
            len: (slot.piece as u32).into(),
        };
        self.out.push_back(number);
    }

    /// Whether a forced write needs a flush of its own.
    pub(super) fn flushes_after(&self, number: u32) -> bool {
        let forced = self.slots.get(number).op == Op::WriteFua;
        forced && !self.can(can::FUA) && self.can(can::FLUSH)
    }

    /// Sends what can be sent without waiting.
    pub(super) fn send(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match self.send_some() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                sent => sent?,
            }
        }
        let Link::Up(member) = &mut self.link else { return Ok(()) };
        match member.transport.flush() {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
            flushed => {
                self.unsent = flushed.is_err();
                Ok(())
            }
        }
    }

    /// Whether all was sent.
    pub(super) fn is_sent(&self) -> bool {
        self.out.is_empty() && !self.unsent
    }

    fn send_some(&mut self) -> io::Result<()> {
        let Link::Up(member) = &mut self.link else { return Ok(()) };
        let mut pieces = [piece_of(std::ptr::null(), 0); MAX_PIECES];
        let (mut count, mut skip) = (0, self.sent as u64);
        for number in &self.out {
            let slot = self.slots.get(*number);
            let head = slot.head.as_bytes();
            let cut = head.len().min(skip as usize);
            if count == pieces.len() {
                break;
            }
            if cut < head.len() {
                pieces[count] = piece_of(head[cut..].as_ptr(), head.len() - cut);
                count += 1;
            }
            skip -= cut as u64;
            let left = payload(slot) - skip;
            let put = if slot.op == Op::WriteZeroes {
                let zeroes = &ZEROES[..left as usize];
                if left > 0 && count < pieces.len() {
                    pieces[count] = piece_of(zeroes.as_ptr(), zeroes.len());
                    count += 1;
                    left
                } else {
                    0
                }
            } else {
                gather(&slot.bufs, slot.at + skip, left, &mut pieces, &mut count)
            };
            skip = 0;
            if put < left {
                break;
            }
        }
        // SAFETY: heads are the slots', which stay; payload is what the requests' makers
        // promised to keep.
        let sent = unsafe { member.transport.send_raw(&pieces[..count]) }?;
        self.sent += sent;
        while let Some(number) = self.out.front() {
            let slot = self.slots.get_mut(*number);
            let whole = size_of::<RequestHeader>() + payload(slot) as usize;
            if self.sent < whole {
                break;
            }
            self.sent -= whole;
            slot.sent = true;
            self.out.pop_front();
        }
        Ok(())
    }
}
