//! Writes that do not keep to the disk's blocks, of clients that did not ask for block sizes:
//! the blocks at both ends are read, changed and written. One request at a time, and over all
//! connections only one such write, so that none undoes another's bytes.

use std::io;

use super::super::request::{Force, Work};
use super::{Cause, Connection};
use crate::blocking;
use crate::disk::Op;

impl Connection<'_> {
    pub(super) fn write_unaligned(&mut self, number: u32) -> Result<(), Cause> {
        // What is in flight may be of the same blocks.
        self.complete()?;
        while self.queue.in_flight() > 0 || !self.waiting.is_empty() {
            self.queue.wait(&[], None).map_err(Cause::Disk)?;
            self.complete()?;
        }
        let export = self.export;
        let alone = export.unaligned.lock();
        let result = self.patch(number);
        drop(alone);
        let errno = result.map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0);
        self.reply(number, errno);
        Ok(())
    }

    fn patch(&mut self, number: u32) -> io::Result<()> {
        let slot = self.slots.get(number);
        let (start, end) = (slot.offset, slot.offset + u64::from(slot.len));
        let block = u64::from(self.block);
        let (force, zeroes) = match slot.work {
            Work::WriteZeroes(force, _) => (force, true),
            Work::Write(force) => (force, false),
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        let mut at = start;
        while at < end {
            // A part of a block, or all whole blocks.
            let first = at - at % block;
            let whole = if at == first { (end - at) / block * block } else { 0 };
            let next = if whole > 0 { at + whole } else { end.min(first + block) };
            let payload = (at - start) as usize..(next - start) as usize;
            match (whole, zeroes) {
                (0, _) => {
                    let mut bytes = vec![0; block as usize];
                    blocking::read_at(&mut *self.queue, first, &mut bytes)?;
                    let part = &mut bytes[(at - first) as usize..(next - first) as usize];
                    match zeroes {
                        true => part.fill(0),
                        false => {
                            part.copy_from_slice(&self.slots.get(number).memory.bytes()[payload])
                        }
                    }
                    blocking::write_at(&mut *self.queue, first, &bytes)?;
                }
                (_, true) => blocking::range(&mut *self.queue, Op::WriteZeroes, at, whole)?,
                (_, false) => {
                    let bytes = &self.slots.get(number).memory.bytes()[payload];
                    blocking::write_at(&mut *self.queue, at, bytes)?;
                }
            }
            at = next;
        }
        if force == Force::Now { blocking::flush(&mut *self.queue) } else { Ok(()) }
    }
}
