//! Requests that have failed and keep their place until the disk is resumed.

use blktap::Op;
use blktap::filters::stall::Policy;

use super::super::slots::{Slot, Stage, Work};
use super::{Worker, status_of};
use crate::proto::Abi;

/// What of a request is on the disk.
pub(super) fn op_of(s: &Slot) -> Op {
    match (s.stage, s.work) {
        (Stage::PreFlush, _) => Op::Flush,
        (_, Work::Read) => Op::Read,
        (_, Work::Flush) if s.segments == 0 => Op::Flush,
        (_, Work::Write | Work::Flush) => Op::Write,
        (_, Work::Barrier) => Op::WriteFua,
        (_, Work::Discard) => Op::Discard,
        (_, Work::SecureDiscard) => Op::SecureDiscard,
    }
}

impl<A: Abi> Worker<A> {
    /// Whether a request that has failed is kept. One of a queue that ends is not.
    pub(super) fn stalls(&mut self, slot: u32, errno: i32) -> bool {
        if self.shared.stopping() {
            return false;
        }
        let s = self.slots.get(slot);
        let op = op_of(s);
        if self.stall.judge(op, s.offset, s.len, errno) == Policy::Report {
            return false;
        }
        self.run.stalled.push((slot, op, errno));
        self.counters.stalled.set(self.run.stalled.len() as u64);
        true
    }

    /// Has what failed tried again, before what comes after it.
    pub(super) fn bring_back(&mut self) {
        if self.run.stalled.is_empty() {
            return;
        }
        for (slot, op, _) in self.run.stalled.drain(..).rev() {
            self.run.refused.push_front((slot, op));
        }
        self.counters.stalled.set(0);
    }

    /// Answers what failed with its error: nobody will resume the disk in time.
    pub(super) fn give_up(&mut self) {
        for (slot, _, errno) in std::mem::take(&mut self.run.stalled) {
            self.slots.get_mut(slot).answer.status = status_of(errno);
            self.finish(slot);
        }
        self.counters.stalled.set(0);
        self.count_finished();
    }
}
