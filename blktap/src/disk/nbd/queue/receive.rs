//! From the server to the caller.
// Names the callers' memory for the kernel, and copies to it by address.
#![allow(unsafe_code)]

use std::io;

use zerocopy::FromBytes;

use super::super::connect::broken;
use super::send::{gather, piece_of};
use super::{Link, NbdQueue};
use crate::disk::Op;
use crate::export::nbd::proto::{CHUNK_MAGIC, Chunk, SIMPLE_MAGIC, SimpleReply, chunk, errno_of};
use crate::export::nbd::transport::MAX_PIECES;

/// Bytes that are received at once, beside payload.
const LEN: usize = 192 << 10;
/// Longest body of a chunk that is no data.
const MAX_BODY: usize = 8192;
/// A rest of payload from this length on is received where it belongs; what follows it is read
/// only so far.
const LARGE: u64 = 32 << 10;
/// See [`LARGE`].
const AHEAD: usize = 4096;

/// Payload that is on its way.
#[derive(Clone, Copy, Debug)]
struct Payload {
    slot: u32,
    /// The next byte, from the request's first one.
    at: u64,
    left: u64,
    /// Whether nothing else follows.
    last: bool,
}

/// Bytes that were received and not yet looked at.
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    payload: Option<Payload>,
}

impl Input {
    pub fn new() -> Input {
        Input { bytes: vec![0; LEN].into_boxed_slice(), start: 0, end: 0, payload: None }
    }
    pub fn clear(&mut self) {
        (self.start, self.end, self.payload) = (0, 0, None);
    }
    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }
    fn skip(&mut self, n: usize) {
        self.start += n;
    }
}

impl NbdQueue {
    /// Takes what is there without waiting.
    pub(super) fn receive(&mut self) -> io::Result<()> {
        loop {
            let full = match self.receive_some() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                full => full?,
            };
            self.parse()?;
            if !full {
                return Ok(());
            }
        }
    }

    /// Says whether there may be more.
    fn receive_some(&mut self) -> io::Result<bool> {
        let Link::Up(member) = &mut self.link else { return Ok(false) };
        let input = &mut self.input;
        if input.start == input.end {
            (input.start, input.end) = (0, 0);
        } else if input.bytes.len() - input.end < AHEAD + MAX_BODY {
            input.bytes.copy_within(input.start..input.end, 0);
            (input.start, input.end) = (0, input.end - input.start);
        }
        let mut pieces = [piece_of(std::ptr::null(), 0); MAX_PIECES];
        let (mut count, mut wanted) = (0, 0);
        let mut whole = true;
        if let Some(payload) = input.payload {
            let bufs = &self.slots.get(payload.slot).bufs;
            let most = MAX_PIECES - 1;
            wanted = gather(bufs, payload.at, payload.left, &mut pieces[..most], &mut count);
            whole = wanted == payload.left;
        }
        let mut room = if whole { input.bytes.len() - input.end } else { 0 };
        if wanted >= LARGE {
            room = room.min(AHEAD);
        }
        pieces[count] = piece_of(input.bytes[input.end..].as_ptr(), room);
        // SAFETY: buffers that the requests' makers promised to keep, and the input's own bytes.
        let got = unsafe { member.transport.receive_raw(&pieces[..=count]) }? as u64;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let paid = got.min(wanted);
        input.end += (got - paid) as usize;
        if let Some(payload) = &mut input.payload {
            (payload.at, payload.left) = (payload.at + paid, payload.left - paid);
        }
        // TLS may hold more, of which the socket says nothing.
        Ok(got == wanted + room as u64 || !whole || member.transport.is_encrypted())
    }

    fn parse(&mut self) -> io::Result<()> {
        loop {
            if let Some(mut payload) = self.input.payload {
                self.fill(&mut payload);
                if payload.left > 0 {
                    self.input.payload = Some(payload);
                    return Ok(());
                }
                self.input.payload = None;
                if payload.last {
                    self.piece_done(payload.slot)?;
                }
                continue;
            }
            let Some(magic) = self.input.bytes().first_chunk() else { return Ok(()) };
            let taken = match u32::from_be_bytes(*magic) {
                SIMPLE_MAGIC => self.simple()?,
                CHUNK_MAGIC if self.shared.facts().structured => self.chunk()?,
                magic => return Err(broken(format!("a reply with the magic {magic:#010x}"))),
            };
            if !taken {
                return Ok(());
            }
        }
    }

    /// Copies what is there of a payload to where it belongs.
    fn fill(&mut self, payload: &mut Payload) {
        let bufs = &self.slots.get(payload.slot).bufs;
        while payload.left > 0 && !self.input.bytes().is_empty() {
            let len = payload.left.min(self.input.bytes().len() as u64);
            let mut pieces = [piece_of(std::ptr::null(), 0); 8];
            let mut count = 0;
            let found = gather(bufs, payload.at, len, &mut pieces, &mut count);
            if found == 0 {
                return;
            }
            for piece in &pieces[..count] {
                let from = &self.input.bytes()[..piece.iov_len];
                // SAFETY: the request's maker promised that the buffer can be written.
                unsafe {
                    std::ptr::copy(from.as_ptr(), piece.iov_base.cast::<u8>(), from.len());
                }
                self.input.start += piece.iov_len;
            }
            (payload.at, payload.left) = (payload.at + found, payload.left - found);
        }
    }

    fn slot_of(&self, cookie: u64) -> io::Result<u32> {
        let found = self.slots.find(cookie).filter(|number| self.slots.get(*number).sent);
        found.ok_or_else(|| broken("a reply to nothing"))
    }

    fn simple(&mut self) -> io::Result<bool> {
        let Ok((reply, _)) = SimpleReply::read_from_prefix(self.input.bytes()) else {
            return Ok(false);
        };
        let number = self.slot_of(reply.cookie.get())?;
        self.input.skip(size_of::<SimpleReply>());
        let structured = self.shared.facts().structured;
        let slot = self.slots.get_mut(number);
        let reads = slot.op == Op::Read;
        if reads && structured {
            return Err(broken("a simple reply to a read"));
        }
        slot.errno = errno_of(reply.error.get());
        if reads && slot.errno == 0 {
            slot.got = slot.piece;
            let (at, left) = (slot.at, slot.piece);
            self.input.payload = Some(Payload { slot: number, at, left, last: true });
        } else {
            self.piece_done(number)?;
        }
        Ok(true)
    }

    fn chunk(&mut self) -> io::Result<bool> {
        let Ok((head, rest)) = Chunk::read_from_prefix(self.input.bytes()) else {
            return Ok(false);
        };
        let (kind, len) = (head.kind.get(), head.len.get() as usize);
        let number = self.slot_of(head.cookie.get())?;
        let last = head.flags.get() & chunk::DONE != 0;
        // Of a chunk of data only where it begins is looked at here.
        let body = if kind == chunk::OFFSET_DATA { 8 } else { len };
        if len < body || body > MAX_BODY {
            return Err(broken(format!("a chunk of {len} bytes")));
        }
        let Some(body) = rest.get(..body) else { return Ok(false) };
        let word = |at: usize| body.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok());
        let word = |at: usize| word(at).map(u32::from_be_bytes);
        let offset = word(0).zip(word(4)).map(|(high, low)| u64::from(high) << 32 | u64::from(low));
        let short = || broken("a chunk that is cut short");
        let used = size_of::<Chunk>() + body.len();
        let slot = self.slots.get(number);
        match kind {
            chunk::NONE => {}
            chunk::OFFSET_DATA | chunk::OFFSET_HOLE if slot.op == Op::Read => {
                let hole = kind == chunk::OFFSET_HOLE;
                let bytes = if hole { word(8).ok_or_else(short)? as u64 } else { (len - 8) as u64 };
                let at = self.place(number, offset.ok_or_else(short)?, bytes)?;
                self.input.skip(used);
                self.slots.get_mut(number).got += bytes;
                if hole {
                    self.zero(number, at, bytes);
                    return self.chunk_done(number, last);
                }
                self.input.payload = Some(Payload { slot: number, at, left: bytes, last });
                return Ok(true);
            }
            _ if kind & chunk::IS_ERROR != 0 => {
                let errno = errno_of(word(0).ok_or_else(short)?);
                // An error that is none would hide one.
                self.slots.get_mut(number).errno = if errno == 0 { libc::EIO } else { errno };
            }
            _ => return Err(broken(format!("a chunk of kind {kind}"))),
        }
        self.input.skip(used);
        self.chunk_done(number, last)
    }

    fn chunk_done(&mut self, number: u32, last: bool) -> io::Result<bool> {
        if last {
            self.piece_done(number)?;
        }
        Ok(true)
    }

    /// Where in a request `len` bytes at `offset` of the disk lie.
    fn place(&self, number: u32, offset: u64, len: u64) -> io::Result<u64> {
        let slot = self.slots.get(number);
        let start = slot.offset + slot.at;
        let inside = offset
            .checked_sub(start)
            .filter(|skip| skip.checked_add(len).is_some_and(|end| end <= slot.piece) && len > 0);
        inside.map(|skip| slot.at + skip).ok_or_else(|| broken("data that was not asked for"))
    }

    fn zero(&mut self, number: u32, mut at: u64, mut len: u64) {
        let bufs = &self.slots.get(number).bufs;
        while len > 0 {
            let mut pieces = [piece_of(std::ptr::null(), 0); 8];
            let mut count = 0;
            let found = gather(bufs, at, len, &mut pieces, &mut count);
            if found == 0 {
                return;
            }
            for piece in &pieces[..count] {
                // SAFETY: the request's maker promised that the buffer can be written.
                unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
            }
            (at, len) = (at + found, len - found);
        }
    }

    /// The last chunk of a piece has come.
    fn piece_done(&mut self, number: u32) -> io::Result<()> {
        let slot = self.slots.get(number);
        if slot.op == Op::Read && slot.errno == 0 && slot.got != slot.piece {
            return Err(broken("a read without all of its data"));
        }
        self.finish_step(number);
        Ok(())
    }
}
