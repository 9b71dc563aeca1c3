//! What all filters' queues have in common: the queue below does the work, and a filter holds
//! requests back before it, or looks at what comes out of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use perf::Handle;

use super::priority::Priority;
use crate::disk::{DiskQueue, Done, Full, Request};
use crate::engine::{EngineCounters, MAX_WATCHES};

/// What a filter changes of a queue.
pub(super) trait Around: Send {
    /// The queue below.
    fn below(&self) -> &dyn DiskQueue;
    /// The queue below.
    fn below_mut(&mut self) -> &mut dyn DiskQueue;
    /// Takes a request: fewer than the queue's depth are in flight.
    fn take(&mut self, request: &Request<'_>) -> Result<(), Full>;
    /// Requests that were taken and that the queue below does not have.
    fn held(&self) -> u32;
    /// Passes on what may go by now. Called once a batch.
    fn flow(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// Looks at `done[from..]`, which the queue below has done; may add and remove.
    fn completed(&mut self, done: &mut Vec<Done>, from: usize) {
        let _ = (done, from);
    }
    /// In how long something that is held may go; `None`: that is not a matter of time.
    fn patience(&self) -> Option<Duration> {
        None
    }
    /// A descriptor that becomes readable when something that is held may go.
    fn bell(&self) -> Option<Arc<OwnedFd>> {
        None
    }
    /// The bell was seen.
    fn rung(&mut self) {}
    /// What the queue's thread counts into from now on.
    fn count_in(&mut self, counters: &Handle<EngineCounters>) {
        let _ = counters;
    }
    /// Nothing is held back any more for time's sake: the queue is about to be dropped.
    fn hurry(&mut self) {}
}

/// A filter's queue.
pub(super) struct Wrapped<A: Around> {
    around: A,
    depth: u32,
    /// Requests taken and not yet polled as done.
    in_flight: u32,
}

impl<A: Around> Wrapped<A> {
    /// `around` holds at most `depth` requests, those of the queue below included.
    pub(super) fn new(around: A, depth: u32) -> Wrapped<A> {
        Wrapped { around, depth, in_flight: 0 }
    }

    /// Waits with the filter's bell among the descriptors.
    fn sleep(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        let (count, bell) = (fds.len(), self.around.bell());
        let Some(bell) = bell.filter(|_| self.around.held() > 0 && count < MAX_WATCHES) else {
            return self.around.below_mut().wait(fds, timeout);
        };
        let mut all = [bell.as_fd(); MAX_WATCHES];
        all[..count].copy_from_slice(fds);
        let ready = self.around.below_mut().wait(&all[..=count], timeout)?;
        if ready >> count & 1 != 0 {
            self.around.rung();
        }
        Ok(ready & !(1 << count))
    }
}

impl<A: Around> DiskQueue for Wrapped<A> {
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if self.in_flight >= self.depth {
            return Err(Full);
        }
        self.around.take(request)?;
        self.in_flight += 1;
        Ok(())
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.around.flow()?;
        self.around.below_mut().submit_all()
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        self.around.flow()?;
        let from = done.len();
        let polled = self.around.below_mut().poll(done);
        self.around.completed(done, from);
        self.in_flight -= (done.len() - from) as u32;
        polled
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        self.around.flow()?;
        let timeout = match (timeout, self.around.patience()) {
            (Some(theirs), Some(ours)) => Some(theirs.min(ours)),
            (theirs, ours) => theirs.or(ours),
        };
        self.sleep(fds, timeout)
    }
    fn unwatch(&mut self) -> io::Result<()> {
        self.around.below_mut().unwatch()
    }
    fn hurry(&mut self) {
        self.around.hurry();
        self.around.below_mut().hurry();
    }
    fn prioritize(&mut self, priority: Priority) {
        self.around.below_mut().prioritize(priority);
    }
    fn in_flight(&self) -> u32 {
        self.in_flight
    }
    fn counters(&self) -> Option<Handle<EngineCounters>> {
        self.around.below().counters()
    }
    fn count_in(&mut self, counters: Handle<EngineCounters>) {
        self.around.count_in(&counters);
        self.around.below_mut().count_in(counters);
    }
}

impl<A: Around> Drop for Wrapped<A> {
    fn drop(&mut self) {
        // Dropping a queue carries out what it took.
        self.hurry();
        while self.around.held() > 0 {
            let mut done = Vec::new();
            let moved = self.poll(&mut done).and_then(|()| match done.is_empty() {
                true => self.wait(&[], None).map(drop),
                false => Ok(()),
            });
            if moved.is_err() {
                return;
            }
        }
    }
}
