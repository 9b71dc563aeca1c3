//! A disk that does nothing, to measure all that is not the disk.
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{Disk, DiskQueue, Done, Full, Geometry, Op, Request};

/// Answers every valid request at once and touches no payload: reads leave the buffers as they
/// are, writes are lost.
#[derive(Clone, Copy, Debug)]
pub struct NullDisk {
    geometry: Geometry,
}

impl NullDisk {
    /// A disk of `size` bytes (rounded down to whole blocks of 512).
    pub fn new(size: u64) -> Arc<Self> {
        Arc::new(NullDisk {
            geometry: Geometry {
                size: size - size % 512,
                logical_block: 512,
                physical_block: 4096,
                memory_align: 1,
                discard: Some(512),
                secure_discard: false,
                read_only: false,
            },
        })
    }
}

impl Disk for NullDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.geometry)
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let depth = depth.max(1) as usize;
        let done = Vec::with_capacity(depth);
        Ok(Box::new(NullQueue { geometry: self.geometry, depth, done }))
    }
}

struct NullQueue {
    geometry: Geometry,
    depth: usize,
    done: Vec<Done>,
}

fn answer(r: &Request<'_>, g: &Geometry) -> i32 {
    match r.op {
        Op::Flush => 0,
        Op::SecureDiscard => libc::EOPNOTSUPP,
        _ => super::check_range(r, g.size, u64::from(g.logical_block)).err().unwrap_or(0),
    }
}

impl DiskQueue for NullQueue {
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if self.done.len() >= self.depth {
            return Err(Full);
        }
        let errno = answer(request, &self.geometry);
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

/// A longer timeout is cut: the kernel's own types overflow.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 86400);

/// poll(2) on up to 64 descriptors; a bit for each that is readable, none after a signal.
pub(crate) fn wait_for(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
    if fds.is_empty() && timeout.is_none_or(|t| t.is_zero()) {
        return Ok(0);
    }
    if fds.len() > 64 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 64 descriptors"));
    }
    let timeout = timeout.map(|t| t.min(LONGEST_WAIT));
    let Some(first) = fds.first() else {
        std::thread::sleep(timeout.unwrap_or_default());
        return Ok(0);
    };
    let limit = timeout.map(|t| Timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(t.subsec_nanos()),
    });
    // Few are the rule, and a long list takes as long to make as the call.
    let woken = match fds.len() {
        ..=2 => poll_fds::<2>(fds, *first, limit.as_ref()),
        _ => poll_fds::<64>(fds, *first, limit.as_ref()),
    };
    match woken {
        Ok(bits) => Ok(bits),
        Err(Errno::INTR) => Ok(0),
        Err(e) => Err(e.into()),
    }
}

/// A bit for each of `fds` that is readable, by a list of `N`, filled up with `first`.
fn poll_fds<const N: usize>(
    fds: &[BorrowedFd<'_>],
    first: BorrowedFd<'_>,
    limit: Option<&Timespec>,
) -> Result<u64, Errno> {
    let mut polls: [PollFd<'_>; N] = std::array::from_fn(|i| {
        PollFd::from_borrowed_fd(fds.get(i).copied().unwrap_or(first), PollFlags::IN)
    });
    let polls = &mut polls[..fds.len()];
    poll(polls, limit)?;
    let hits = polls.iter().enumerate().filter(|(_, p)| !p.revents().is_empty());
    Ok(hits.fold(0, |bits, (at, _)| bits | 1 << at))
}
