//! A disk that carries requests out late and in an order of its own.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blktap::disk::MemDisk;
use blktap::{Disk, DiskQueue, Done, Full, Geometry, IoBuf, Op, Request};

/// A random number that follows from the last one.
pub fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

pub struct LateDisk {
    pub inner: Arc<MemDisk>,
    /// While set nothing is carried out.
    pub stuck: Arc<AtomicBool>,
    /// Requests that were carried out.
    pub carried: Arc<AtomicU64>,
    seeds: AtomicU64,
}

impl LateDisk {
    pub fn new(size: usize, seed: u64) -> Arc<LateDisk> {
        let (stuck, carried) = (Arc::default(), Arc::default());
        Arc::new(LateDisk { inner: MemDisk::new(size), stuck, carried, seeds: seed.into() })
    }
    pub fn bytes(&self) -> Vec<u8> {
        self.inner.with_bytes(|bytes| bytes.clone())
    }
}

impl Disk for LateDisk {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }
    fn refresh(&self) -> io::Result<Geometry> {
        self.inner.refresh()
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        Ok(Box::new(LateQueue {
            inner: self.inner.queue(depth)?,
            depth,
            taken: Vec::new(),
            stuck: self.stuck.clone(),
            carried: self.carried.clone(),
            seed: self.seeds.fetch_add(0x9e37_79b9, Ordering::Relaxed) | 1,
        }))
    }
}

struct Taken {
    op: Op,
    offset: u64,
    len: u64,
    bufs: Vec<IoBuf>,
    token: u64,
}

struct LateQueue {
    inner: Box<dyn DiskQueue>,
    depth: u32,
    taken: Vec<Taken>,
    stuck: Arc<AtomicBool>,
    carried: Arc<AtomicU64>,
    seed: u64,
}

impl DiskQueue for LateQueue {
    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.in_flight() >= self.depth {
            return Err(Full);
        }
        let (op, offset, len, token) = (r.op, r.offset, r.len, r.token);
        self.taken.push(Taken { op, offset, len, bufs: r.bufs.to_vec(), token });
        Ok(())
    }
    fn submit_all(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        while !self.taken.is_empty() && !self.stuck.load(Ordering::Relaxed) {
            let at = next(&mut self.seed) as usize % (2 * self.taken.len());
            if at >= self.taken.len() {
                break;
            }
            let t = self.taken.swap_remove(at);
            let r =
                Request { op: t.op, offset: t.offset, len: t.len, bufs: &t.bufs, token: t.token };
            self.inner.submit(&r).expect("room");
            self.carried.fetch_add(1, Ordering::Relaxed);
        }
        self.inner.poll(done)
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        let soon = Duration::from_micros(50);
        let timeout = match self.taken.is_empty() {
            true => timeout,
            false => Some(timeout.unwrap_or(soon).min(soon)),
        };
        self.inner.wait(fds, timeout)
    }
    fn in_flight(&self) -> u32 {
        self.taken.len() as u32 + self.inner.in_flight()
    }
}
