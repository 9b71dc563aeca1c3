//! Requests that a disk did not take: it is paused.

use hypervisor::xenbus::Fault;

use super::Worker;
use crate::proto::Abi;

impl<A: Abi> Worker<A> {
    /// Tries once more what a paused disk has refused; how many it took.
    pub(super) fn retry(&mut self) -> Result<usize, Fault> {
        let refused = self.run.refused.len();
        for _ in 0..refused {
            let Some((slot, op)) = self.run.refused.pop_front() else { break };
            self.submit(slot, op)?;
            if self.run.refused.back() == Some(&(slot, op)) {
                // Still so; it was the first of them.
                self.run.refused.rotate_right(1);
                break;
            }
        }
        let taken = refused - self.run.refused.len();
        if taken > 0 {
            self.disk.submit_all()?;
        }
        Ok(taken)
    }
}
