//! A disk that sees how many of its queues work at once.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use blktap::{Disk, DiskQueue, Done, Full, Geometry, Region, Request};

#[derive(Default)]
struct Counts {
    working: AtomicUsize,
    most: AtomicUsize,
}

pub struct Counted<D> {
    disk: Arc<D>,
    counts: Arc<Counts>,
}

impl<D: Disk> Counted<D> {
    pub fn new(disk: Arc<D>) -> Arc<Self> {
        Arc::new(Counted { disk, counts: Arc::default() })
    }
    /// Most queues that had requests in flight at one time.
    pub fn most_at_once(&self) -> usize {
        self.counts.most.load(Ordering::Acquire)
    }
}

impl<D: Disk> Disk for Counted<D> {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    fn refresh(&self) -> io::Result<Geometry> {
        self.disk.refresh()
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let queue = self.disk.queue(depth)?;
        Ok(Box::new(Queue { queue, counts: Arc::clone(&self.counts), works: false }))
    }
    fn map(&self, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        self.disk.map(range, out)
    }
}

struct Queue {
    queue: Box<dyn DiskQueue>,
    counts: Arc<Counts>,
    works: bool,
}

impl Queue {
    fn rest(&mut self) {
        if std::mem::take(&mut self.works) {
            self.counts.working.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl DiskQueue for Queue {
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        self.queue.submit(request)?;
        if !std::mem::replace(&mut self.works, true) {
            let now = self.counts.working.fetch_add(1, Ordering::AcqRel) + 1;
            self.counts.most.fetch_max(now, Ordering::AcqRel);
        }
        Ok(())
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.queue.submit_all()
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        self.queue.poll(done)?;
        if self.queue.in_flight() == 0 {
            self.rest();
        }
        Ok(())
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        self.queue.wait(fds, timeout)
    }
    fn unwatch(&mut self) -> io::Result<()> {
        self.queue.unwatch()
    }
    fn in_flight(&self) -> u32 {
        self.queue.in_flight()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.rest();
    }
}
