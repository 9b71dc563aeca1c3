//! How a queue's way to its guest is reached: by the queue's own thread, and by those of other vifs that
//! copy packets from their guest's pages straight into this one's ([`Crossing`]). One at a time.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use hypervisor::{CopyOp, DomId, Grants, Source, Transfer};
use parking_lot::{Mutex, MutexGuard};

use super::to_guest::ToGuest;
use crate::frame::{Frame, HEAD, Pool};
use crate::tx;

/// The way to the guest of one queue, while there is one.
pub struct Door(Mutex<Option<ToGuest>>);

impl Door {
    /// Puts the leading frames, at most `count`, into the guest's pages, and gives them back to their
    /// pool; how many. None where others wait already, which `is_clear` tells of those in the
    /// endpoint, or where the guest wants something done with them first: then they go the long way.
    pub fn pass(
        &self,
        frames: &mut VecDeque<Frame>,
        count: usize,
        is_clear: impl FnOnce() -> bool,
        crossing: &mut Crossing<'_>,
    ) -> usize {
        let mut way = self.0.lock();
        let Some(way) = way.as_mut().filter(|_| is_clear()) else { return 0 };
        let passed = way.cross(frames, count, crossing);
        frames.drain(..passed).for_each(|frame| crossing.pool.give(frame));
        passed
    }
}

/// The queue's own hold of its door; nobody gets through once it is dropped.
pub(crate) struct Doorkeeper(Arc<Door>);

impl Doorkeeper {
    pub(crate) fn new(way: ToGuest) -> Doorkeeper {
        Doorkeeper(Arc::new(Door(Mutex::new(Some(way)))))
    }
    /// For others.
    pub(crate) fn door(&self) -> &Arc<Door> {
        &self.0
    }
    /// The way, which is there as long as this is.
    pub(crate) fn open(&self) -> MutexGuard<'_, Option<ToGuest>> {
        self.0.0.lock()
    }
}

impl Drop for Doorkeeper {
    fn drop(&mut self) {
        *self.0.0.lock() = None;
    }
}

/// What a sender's queue brings along.
pub struct Crossing<'a> {
    pub(crate) grants: &'a dyn Grants,
    pub(crate) domid: DomId,
    pub(crate) pool: &'a mut Pool,
    pub(crate) packets: &'a tx::Batch,
    pub(crate) lists: &'a mut Lists,
    /// Of packets that went: how many.
    pub(crate) crossed: u64,
    /// A call that failed: of what it was to copy nothing is known.
    pub(crate) error: Option<io::Error>,
}

/// Used again and again.
#[derive(Default)]
pub(crate) struct Lists {
    transfers: Vec<Transfer>,
    /// Of each the copy that it is a part of, and that one's packet where only its head was here.
    of: Vec<(usize, Option<usize>)>,
    /// Packets of which a part could not be copied.
    pub failed: Vec<usize>,
}

/// GNTST_general_error of grant_table.h.
const UNKNOWN: i16 = -1;

impl Crossing<'_> {
    /// Makes copies into pages of `domid`: of frames that are here, and of those of which only the head
    /// is here from the sender's pages. `ops` are as if all of them were here, in the frames' order.
    pub(crate) fn copy<'f>(
        &mut self,
        domid: DomId,
        frames: impl Iterator<Item = &'f Frame>,
        ops: &mut [CopyOp],
    ) {
        let Lists { transfers, of, failed } = &mut *self.lists;
        transfers.clear();
        of.clear();
        let mut number = 0;
        for frame in frames {
            let bytes = frame.at()..frame.at() + frame.len();
            while let Some(op) = ops.get(number).filter(|op| bytes.contains(&op.at)) {
                split(frame, op, (self.domid, self.packets), transfers);
                of.resize(transfers.len(), (number, frame.beyond));
                number += 1;
            }
        }
        let result = self.grants.transfer(domid, self.pool.buffer(), transfers);
        for (done, (number, packet)) in transfers.iter().zip(&*of) {
            let status = if result.is_ok() { done.status } else { UNKNOWN };
            if status != 0 {
                ops[*number].status = status;
                failed.extend(packet);
            }
        }
        self.error = self.error.take().or(result.err());
    }
}

/// Appends what a copy from a frame into another guest's page is made of.
fn split(
    frame: &Frame,
    op: &CopyOp,
    (domid, packets): (DomId, &tx::Batch),
    transfers: &mut Vec<Transfer>,
) {
    let first = op.at - frame.at();
    let mut push = |source, at: usize, len| {
        // Within the page, as the copy is.
        let offset = op.offset + (at - first) as u16;
        transfers.push(Transfer { source, gref: op.gref, offset, len, status: 0 });
    };
    let packet = frame.beyond.and_then(|number| packets.packets().get(number));
    let Some(packet) = packet else {
        return push(Source::Buffer(op.at), first, op.len);
    };
    let end = first + usize::from(op.len);
    if first < HEAD {
        push(Source::Buffer(op.at), first, (end.min(HEAD) - first) as u16);
    }
    for part in packets.parts(packet, first.max(HEAD)..end) {
        let source = Source::Page { domid, gref: part.gref, offset: part.offset };
        push(source, part.at, part.len);
    }
}

#[cfg(test)]
#[path = "door_tests.rs"]
mod tests;
