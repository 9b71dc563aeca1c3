//! What went through a disk, for those who ask without knowing of engines: requests and bytes
//! read and written, and how many of them failed.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::around::{Around, Wrapped};
use super::forward_to_below;
use crate::disk::{Disk, DiskQueue, Done, Full, Op, Request};

/// Counts of one way.
#[derive(Default)]
pub struct Counts {
    requests: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
}

impl Counts {
    /// Requests that were answered with 0.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
    /// Requests that were answered with an error.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }
}

/// A disk whose reads and writes are counted. Tokens of a queue in flight together differ.
pub struct CountedDisk {
    below: Arc<dyn Disk>,
    counts: Arc<[Counts; 2]>,
}

impl CountedDisk {
    /// `below`, counted from now on.
    pub fn new(below: Arc<dyn Disk>) -> Arc<CountedDisk> {
        Arc::new(CountedDisk { below, counts: Arc::default() })
    }
    /// Of reads.
    pub fn reads(&self) -> &Counts {
        &self.counts[0]
    }
    /// Of writes.
    pub fn writes(&self) -> &Counts {
        &self.counts[1]
    }
}

impl Disk for CountedDisk {
    forward_to_below!();

    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let (below, counts) = (self.below.queue(depth)?, Arc::clone(&self.counts));
        Ok(Box::new(Wrapped::new(Counted { below, counts, going: HashMap::new() }, depth)))
    }
}

struct Counted {
    below: Box<dyn DiskQueue>,
    counts: Arc<[Counts; 2]>,
    /// Way and bytes of each token.
    going: HashMap<u64, (usize, u64)>,
}

impl Around for Counted {
    fn below(&self) -> &dyn DiskQueue {
        &*self.below
    }
    fn below_mut(&mut self) -> &mut dyn DiskQueue {
        &mut *self.below
    }
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        self.below.submit(r)?;
        let way = match r.op {
            Op::Read => 0,
            Op::Write | Op::WriteFua => 1,
            Op::Flush | Op::Discard | Op::SecureDiscard | Op::WriteZeroes => return Ok(()),
        };
        self.going.insert(r.token, (way, r.len));
        Ok(())
    }
    fn held(&self) -> u32 {
        0
    }
    fn completed(&mut self, done: &mut Vec<Done>, from: usize) {
        for d in &done[from..] {
            let Some((way, bytes)) = self.going.remove(&d.token) else { continue };
            let counts = &self.counts[way];
            if d.errno == 0 {
                counts.requests.fetch_add(1, Ordering::Relaxed);
                counts.bytes.fetch_add(bytes, Ordering::Relaxed);
            } else {
                counts.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MemDisk, blocking};

    #[test]
    fn what_went_through_is_counted() {
        let disk = CountedDisk::new(MemDisk::new(4096));
        let mut queue = disk.queue(4).expect("a queue");
        blocking::write_at(&mut *queue, 0, &[1; 1024]).expect("write");
        blocking::read_at(&mut *queue, 0, &mut [0; 512]).expect("read");
        blocking::read_at(&mut *queue, 512, &mut [0; 512]).expect("read");
        blocking::flush(&mut *queue).expect("flush");
        blocking::write_at(&mut *queue, 4096, &[1; 512]).expect_err("beyond the end");
        let of = |c: &Counts| (c.requests(), c.bytes(), c.failed());
        assert_eq!((of(disk.reads()), of(disk.writes())), ((2, 1024, 0), (1, 1024, 1)));
    }
}
