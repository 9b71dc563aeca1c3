//! Requests whose data the kernel would not move to or from the guest's own pages.
//!
//! A page that gntdev has mapped can be one that direct I/O is refused on, through no fault of
//! this guest: seen with Linux 6.1 in dom0, where the successor of a backend that was killed under
//! load had reads refused, with a warning of `follow_page_pte` in the kernel's log (a page without
//! a reference). The likely way there: where a process ends, or unmaps, in the moment between the
//! completion of a direct read and the kernel's letting go of its pages, gntdev (since 5.19) puts
//! the unmapping off, the page table's entry is still there when it is torn down, and the page
//! loses one reference too many. It goes back to the pool of pages for mappings, and whoever gets
//! it next, of any guest, has his direct I/O refused. The hypervisor's copy does not mind.

use blktap::Op;
use rustix::io::Errno;

use super::super::slots::{Place, Stage, Work};
use super::Worker;
use super::stalled::op_of;
use crate::proto::Abi;

impl<A: Abi> Worker<A> {
    /// Whether a request that has failed is done again with memory of this process's own, as the
    /// first of those that wait.
    pub(super) fn bounces(&mut self, slot: u32, errno: i32) -> bool {
        let refused = [Errno::NOMEM, Errno::FAULT].map(Errno::raw_os_error).contains(&errno);
        let s = *self.slots.get(slot);
        let moves = matches!(op_of(&s), Op::Read | Op::Write | Op::WriteFua);
        let is_mapped = |place: &Place| matches!(place, Place::Mapped(_) | Place::Lent(_));
        if !(refused && moves && self.slots.pieces(slot).iter().any(|p| is_mapped(&p.place))) {
            return false;
        }
        self.memory.release(self.slots.pieces(slot), self.run.now);
        let s = self.slots.get_mut(slot);
        (s.stage, s.copied) = (Stage::Taken, true);
        if s.work == Work::Barrier {
            self.run.barrier = false;
        }
        self.run.waiting.push_front(slot);
        self.run.freed = true;
        self.counters.bounced.add(1);
        true
    }
}
