//! A disk in memory, for tests and examples.
// Payload is copied to and from named memory by address.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::null::wait_for;
use super::{Disk, DiskQueue, Done, Full, Geometry, Op, Request, check_range};

/// What a [`MemDisk`] does with writes until a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Volatility {
    /// Every write is durable at once.
    Durable,
    /// Writes are lost in a [power cut](MemDisk::power_cut) until a flush covers them.
    Cached,
}

struct Bytes {
    now: Vec<u8>,
    /// As of the last flush, where writes are cached.
    flushed: Option<Vec<u8>>,
}

/// A disk in memory. Requests are carried out by `submit`, one at a time over all queues.
pub struct MemDisk {
    bytes: Arc<Mutex<Bytes>>,
}

impl MemDisk {
    /// A disk of `size` zero bytes (rounded down to whole blocks of 512).
    pub fn new(size: usize) -> Arc<Self> {
        Self::with(size, Volatility::Durable)
    }

    /// A disk of `size` zero bytes (rounded down to whole blocks of 512) that may have a cache.
    /// A cached one copies all its bytes at each flush: keep it small.
    pub fn with(size: usize, volatility: Volatility) -> Arc<Self> {
        let now = vec![0; size - size % 512];
        let flushed = (volatility == Volatility::Cached).then(|| now.clone());
        Arc::new(MemDisk { bytes: Arc::new(Mutex::new(Bytes { now, flushed })) })
    }

    /// Loses what no flush and no forced write has made durable.
    pub fn power_cut(&self) {
        let bytes = &mut *self.bytes.lock();
        if let Some(flushed) = &bytes.flushed {
            bytes.now.clone_from(flushed);
        }
    }

    /// Looks at, or changes, the disk's bytes behind its users' back.
    pub fn with_bytes<R>(&self, f: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        f(&mut self.bytes.lock().now)
    }
}

impl Disk for MemDisk {
    fn geometry(&self) -> Geometry {
        let len = self.bytes.lock().now.len() as u64;
        Geometry {
            size: len - len % 512,
            logical_block: 512,
            physical_block: 512,
            memory_align: 1,
            discard: Some(512),
            secure_discard: false,
            read_only: false,
        }
    }
    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.geometry())
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let depth = depth.max(1) as usize;
        let bytes = Arc::clone(&self.bytes);
        Ok(Box::new(MemQueue { bytes, depth, done: Vec::with_capacity(depth) }))
    }
}

struct MemQueue {
    bytes: Arc<Mutex<Bytes>>,
    depth: usize,
    done: Vec<Done>,
}

fn perform(bytes: &mut Bytes, r: &Request<'_>) -> Result<(), i32> {
    let Bytes { now: disk, flushed } = bytes;
    match r.op {
        Op::Flush => {
            if let Some(flushed) = flushed {
                flushed.clone_from(disk);
            }
            return Ok(());
        }
        Op::SecureDiscard => return Err(libc::EOPNOTSUPP),
        _ => check_range(r, (disk.len() - disk.len() % 512) as u64, 512)?,
    }
    // In range, so it fits usize.
    let range = r.offset as usize..(r.offset + r.len) as usize;
    let part = &mut disk[range.clone()];
    if matches!(r.op, Op::Discard | Op::WriteZeroes) {
        part.fill(0);
        return Ok(());
    }
    let sum = r.bufs.iter().try_fold(0u64, |sum, b| sum.checked_add(b.len() as u64));
    if sum != Some(r.len) {
        return Err(libc::EINVAL);
    }
    let mut rest = part;
    for buf in r.bufs {
        let (here, after) = rest.split_at_mut(buf.len());
        // SAFETY: whoever made the buffer promised that it is valid until the request is done;
        // `here` has its length. The other side may change its bytes: they are copied once.
        unsafe {
            match r.op {
                Op::Read => std::ptr::copy(here.as_ptr(), buf.addr(), here.len()),
                _ => std::ptr::copy(buf.addr(), here.as_mut_ptr(), here.len()),
            }
        }
        rest = after;
    }
    if let (Op::WriteFua, Some(flushed)) = (r.op, flushed) {
        // A disk whose bytes were made longer behind its back has no flushed copy of the rest.
        if let Some(durable) = flushed.get_mut(range.clone()) {
            durable.copy_from_slice(&disk[range]);
        }
    }
    Ok(())
}

impl DiskQueue for MemQueue {
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if self.done.len() >= self.depth {
            return Err(Full);
        }
        let errno = perform(&mut self.bytes.lock(), request).err().unwrap_or(0);
        self.done.push(Done { token: request.token, errno });
        Ok(())
    }
    fn submit_all(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        done.append(&mut self.done);
        Ok(())
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        let ready = !self.done.is_empty();
        wait_for(fds, if ready { Some(Duration::ZERO) } else { timeout })
    }
    fn in_flight(&self) -> u32 {
        self.done.len() as u32
    }
}
