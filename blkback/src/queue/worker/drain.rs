//! The end of a queue: what is in flight is answered, and what was answered is safe.

use std::io;

use blktap::Op;
use hypervisor::xenbus::Fault;

use super::Worker;
use crate::proto::Abi;

impl<A: Abi> Worker<A> {
    /// Waits for all that is in flight and answers it.
    pub(super) fn drain(&mut self) -> Result<(), Fault> {
        self.disk.hurry();
        while self.disk.in_flight() > 0 {
            self.disk.wait(&[], None)?;
            self.reap()?;
            self.count_finished();
            self.run.done.clear();
        }
        self.give_up();
        self.publish()?;
        if self.told.flushing() { self.flush() } else { Ok(()) }
    }

    /// Leaves what was answered safe on the disk.
    fn flush(&mut self) -> Result<(), Fault> {
        let request =
            blktap::Request { op: Op::Flush, offset: 0, len: 0, bufs: &[], token: u64::MAX };
        if self.disk.submit(&request).is_ok() {
            while self.disk.in_flight() > 0 {
                self.disk.wait(&[], None)?;
                self.disk.poll(&mut self.run.done)?;
            }
        }
        let failed = self.run.done.drain(..).find(|done| done.errno != 0);
        match failed {
            Some(done) => Err(io::Error::from_raw_os_error(done.errno).into()),
            None => Ok(()),
        }
    }
}
