//! One batch of copies, in two parts.

use std::io;

use hypervisor::{Access, CopyOp, Direction, Mapping, SharedMapping};
use rings::PAGE_SIZE;
use rings::mem::{SharedMem, SharedRead};

use super::{Places, Staging};
use crate::frame::Frame;

/// Mapped pages of a guest, which it may change at any time.
pub enum Memory {
    /// It lets them be read.
    ReadOnly(Mapping),
    /// And written.
    ReadWrite(SharedMapping),
}

impl Memory {
    /// What a mapping is.
    pub(crate) fn of(mapping: Mapping) -> Option<Memory> {
        match mapping.access() {
            Access::ReadOnly => Some(Memory::ReadOnly(mapping)),
            Access::ReadWrite => mapping.into_shared().map(Memory::ReadWrite),
        }
    }
}

/// How many copies of a batch were made which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    /// In this process.
    pub staged: u64,
    /// By the hypervisor.
    pub copied: u64,
}

impl Copied {
    /// Calls to the hypervisor.
    pub(crate) fn calls(self) -> u64 {
        u64::from(self.copied > 0)
    }
}

/// What is left of a batch for the hypervisor; lists that are used again and again.
#[derive(Default)]
pub(crate) struct Split {
    rest: Vec<CopyOp>,
    places: Vec<usize>,
}

impl Staging<Memory> {
    /// Makes a batch of copies between frames and the guest's pages: by `grant_copy` what is not in
    /// pages of this table. The copies are in the frames' order. Each operation has its status
    /// afterwards; an error is `grant_copy`'s.
    pub(crate) fn copy<'a>(
        &self,
        mut frames: impl Iterator<Item = &'a mut Frame>,
        ops: &mut [CopyOp],
        split: &mut Split,
        grant_copy: impl FnOnce(&mut [CopyOp]) -> io::Result<()>,
    ) -> io::Result<Copied> {
        if self.is_empty() {
            grant_copy(ops)?;
            return Ok(Copied { staged: 0, copied: ops.len() as u64 });
        }
        let Split { rest, places } = split;
        rest.clear();
        places.clear();
        let table = self.places.lock();
        let mut frame = frames.next();
        for (number, op) in ops.iter_mut().enumerate() {
            while frame.as_ref().is_some_and(|frame| !holds(frame, op)) {
                frame = frames.next();
            }
            if frame.as_mut().is_some_and(|frame| staged(&table, frame, op)) {
                op.status = 0;
            } else {
                rest.push(*op);
                places.push(number);
            }
        }
        drop(table);
        if !rest.is_empty() {
            grant_copy(rest)?;
        }
        for (done, number) in rest.iter().zip(&*places) {
            ops[*number].status = done.status;
        }
        let copied = rest.len() as u64;
        Ok(Copied { staged: ops.len() as u64 - copied, copied })
    }
}

/// Whether a copy's local bytes are a frame's.
fn holds(frame: &Frame, op: &CopyOp) -> bool {
    let end = op.at.checked_add(usize::from(op.len));
    op.at >= frame.at() && end.is_some_and(|end| end <= frame.at() + frame.len())
}

/// Makes a copy from or to a frame if its page is in the table; whether it was.
fn staged(table: &Places<Memory>, frame: &mut Frame, op: &CopyOp) -> bool {
    let Some(place) = table.get(&op.gref) else { return false };
    let (offset, len) = (usize::from(op.offset), usize::from(op.len));
    // What leaves its page is for the grant copy to refuse.
    if offset + len > PAGE_SIZE {
        return false;
    }
    let (local, remote) = (op.at - frame.at(), place.page * PAGE_SIZE + offset);
    let bytes = &mut frame[local..][..len];
    match (op.direction, &place.run.memory) {
        (Direction::FromGrant, Memory::ReadOnly(mapping)) => mapping.copy_out(remote, bytes),
        (Direction::FromGrant, Memory::ReadWrite(shared)) => shared.read(remote, bytes),
        (Direction::ToGrant, Memory::ReadWrite(shared)) => shared.write(remote, bytes),
        // It may have been granted for writing all the same.
        (Direction::ToGrant, Memory::ReadOnly(_)) => return false,
    }
    true
}

#[cfg(test)]
#[path = "copy_tests.rs"]
mod tests;
