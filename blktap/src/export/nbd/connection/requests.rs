//! From the client to the disk.
// Gives the queue the addresses of the slots' memory.
#![allow(unsafe_code)]

use zerocopy::FromBytes;

use super::super::proto::{REQUEST_LEN, RequestHeader, cmd};
use super::super::request::{Force, Holes, Verdict, Work, judge};
use super::super::status::Job;
use super::slots::{Stage, Then};
use super::{Cause, Connection};
use crate::disk::{Discarded, Done, IoBuf, Op, Request};

/// Bytes that are read ahead at once.
const CACHE_PIECE: u64 = 1 << 20;

/// What a refused request was, as far as its reply depends on it.
fn refused(command: u16) -> Work {
    match command {
        cmd::READ => Work::Read,
        cmd::BLOCK_STATUS => Work::BlockStatus { one: false },
        _ => Work::Flush,
    }
}

impl Connection<'_> {
    /// Takes all requests that are there and have room. `false`: there is one that has none.
    pub(super) fn parse(&mut self) -> Result<bool, Cause> {
        loop {
            if self.skip > 0 {
                let n = self.skip.min(self.input.bytes().len());
                self.input.skip(n);
                self.skip -= n;
                if self.skip > 0 {
                    return Ok(true);
                }
            }
            if let Some((number, got)) = self.receiving {
                let slot = self.slots.get_mut(number);
                let len = slot.len as usize;
                let got = got + self.input.move_to(&mut slot.memory.bytes_mut()[got..len]);
                if got < len {
                    self.receiving = Some((number, got));
                    return Ok(true);
                }
                self.receiving = None;
                self.start(number)?;
            }
            let Ok((header, _)) = RequestHeader::read_from_prefix(self.input.bytes()) else {
                return Ok(true);
            };
            if !self.take(&header)? {
                return Ok(false);
            }
        }
    }

    /// `false`: there is no room for it.
    fn take(&mut self, header: &RequestHeader) -> Result<bool, Cause> {
        let (work, errno, skip) = match judge(header, &self.terms) {
            Verdict::Broken(why) => return Err(why.into()),
            Verdict::Disconnect => {
                self.end_input();
                return Ok(true);
            }
            Verdict::Refuse(errno, payload) => (refused(header.command.get()), errno, payload),
            Verdict::Do(work) => (work, 0, 0),
        };
        let need = if errno == 0 { self.memory_for(work, header) } else { 0 };
        let Some(number) = self.slots.take(need).map_err(Cause::Resources)? else {
            return Ok(false);
        };
        self.input.skip(REQUEST_LEN);
        self.requests += 1;
        let slot = self.slots.get_mut(number);
        (slot.cookie, slot.work) = (header.cookie.get(), work);
        (slot.offset, slot.len) = (header.offset.get(), header.len.get());
        if errno != 0 {
            self.skip = skip as usize;
            self.reply(number, errno);
        } else if matches!(work, Work::Write(_)) {
            self.receiving = Some((number, 0));
        } else {
            self.start(number)?;
        }
        Ok(true)
    }

    fn memory_for(&self, work: Work, header: &RequestHeader) -> usize {
        let (start, end) = self.around(header.offset.get(), header.len.get());
        match work {
            // Its range was checked: it is far below usize.
            Work::Read => (end - start) as usize,
            Work::Write(_) => header.len.get() as usize,
            Work::Cache => (end - start).min(CACHE_PIECE) as usize,
            _ => 0,
        }
    }

    /// The whole blocks around a range inside the disk.
    fn around(&self, offset: u64, len: u32) -> (u64, u64) {
        let block = u64::from(self.block);
        let end = offset.saturating_add(len.into());
        (offset - offset % block, end.next_multiple_of(block))
    }

    /// A request that is wholly there.
    fn start(&mut self, number: u32) -> Result<(), Cause> {
        let slot = self.slots.get_mut(number);
        let (work, block) = (slot.work, u64::from(self.block));
        let whole = slot.offset.is_multiple_of(block) && u64::from(slot.len).is_multiple_of(block);
        if slot.len == 0 && work == Work::Read {
            slot.reply_data(0..0, self.terms.replies);
            self.out.push_back(number);
            return Ok(());
        }
        if slot.len == 0 && work != Work::Flush {
            self.reply(number, 0);
            return Ok(());
        }
        let then = |force| if force == Force::Now { Then::Flush } else { Then::Reply };
        slot.stage = match work {
            Work::Write(_) | Work::WriteZeroes(..) if !whole => {
                return self.write_unaligned(number);
            }
            Work::BlockStatus { one } => {
                let (offset, len, cookie) = (slot.offset, slot.len, slot.cookie);
                let job = Job { slot: number, offset, len, one, cookie };
                if !self.status().map_err(Cause::Resources)?.ask(job) {
                    self.reply(number, libc::EIO);
                }
                return Ok(());
            }
            Work::Read => Stage::Main(Op::Read, Then::Reply),
            Work::Write(Force::Later) => Stage::Main(Op::Write, Then::Reply),
            Work::Write(Force::Now) => Stage::Main(Op::WriteFua, Then::Reply),
            Work::Flush => Stage::Main(Op::Flush, Then::Reply),
            Work::Cache => Stage::Caching(0),
            Work::Trim(force) => {
                // Only whole blocks inside; the rest may stay as it is.
                let end = (slot.offset + u64::from(slot.len)) / block * block;
                let start = slot.offset.next_multiple_of(block);
                if start >= end {
                    self.reply(number, 0);
                    return Ok(());
                }
                (slot.offset, slot.len) = (start, (end - start) as u32);
                Stage::Main(Op::Discard, then(force))
            }
            Work::WriteZeroes(force, holes) => {
                let op = if holes == Holes::Allowed && self.punches {
                    Op::Discard
                } else {
                    Op::WriteZeroes
                };
                Stage::Main(op, then(force))
            }
        };
        self.issue(number);
        Ok(())
    }

    /// Gives the queue what a slot's stage asks for, now or when it has room.
    fn issue(&mut self, number: u32) {
        if !self.waiting.is_empty() || !self.submit(number) {
            self.waiting.push_back(number);
        }
    }

    fn submit(&mut self, number: u32) -> bool {
        let slot = self.slots.get(number);
        let (start, end) = self.around(slot.offset, slot.len);
        let (op, offset, len) = match slot.stage {
            Stage::Flushing | Stage::Main(Op::Flush, _) => (Op::Flush, 0, 0),
            Stage::Main(op, _) => (op, start, end - start),
            Stage::Caching(done) => {
                let at = start + done;
                (Op::Read, at, (end - at).min(CACHE_PIECE))
            }
        };
        let memory = self.slots.get_mut(number).memory.bytes_mut();
        let buf = match op {
            // SAFETY: the slot's memory stays as it is until its reply was sent, which is after
            // its `Done`, and the queue is dropped before the slots.
            Op::Read | Op::Write | Op::WriteFua => unsafe {
                &[IoBuf::new(memory[..len as usize].as_mut_ptr(), len as usize)][..]
            },
            _ => &[],
        };
        let request = Request { op, offset, len, bufs: buf, token: number.into() };
        self.queue.submit(&request).is_ok()
    }

    /// Takes what is done, and submits what waits.
    pub(super) fn complete(&mut self) -> Result<(), Cause> {
        while let Some(number) = self.waiting.front().copied() {
            if !self.submit(number) {
                break;
            }
            self.waiting.pop_front();
        }
        let mut done = std::mem::take(&mut self.done);
        self.queue.poll(&mut done).map_err(Cause::Disk)?;
        done.drain(..).for_each(|done| self.finish(done));
        self.done = done;
        Ok(())
    }

    fn finish(&mut self, done: Done) {
        let number = done.token as u32;
        let slot = self.slots.get_mut(number);
        let next = match (slot.stage, done.errno) {
            (Stage::Caching(at), 0) => {
                let (start, end) = self.around_slot(number);
                let at = at + CACHE_PIECE;
                (start + at < end).then_some(Stage::Caching(at))
            }
            (Stage::Main(_, Then::Flush), 0) => Some(Stage::Flushing),
            (Stage::Main(Op::Discard, then), libc::EOPNOTSUPP) => match slot.work {
                Work::WriteZeroes(..) => Some(Stage::Main(Op::WriteZeroes, then)),
                // It was only a hint.
                _ => return self.reply(number, 0),
            },
            (Stage::Main(Op::Read, _), 0) => {
                let skip = (slot.offset % u64::from(self.block)) as usize;
                slot.reply_data(skip..skip + slot.len as usize, self.terms.replies);
                return self.out.push_back(number);
            }
            _ => None,
        };
        match next {
            Some(stage) => {
                self.slots.get_mut(number).stage = stage;
                self.issue(number);
            }
            None => self.reply(number, done.errno),
        }
    }

    fn around_slot(&self, number: u32) -> (u64, u64) {
        let slot = self.slots.get(number);
        self.around(slot.offset, slot.len)
    }

    /// Whether discarding is a way to zero.
    pub(super) fn punches(disk: &dyn crate::disk::Disk) -> bool {
        disk.discarded() == Discarded::Zeroes && disk.geometry().discard.is_some()
    }
}
