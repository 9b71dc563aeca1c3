//! Disks and storages that go wrong on purpose: the negative control of whoever verifies them.
// Copies payload by address to change it on its way.
#![allow(unsafe_code)]

mod storage;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use perf::Handle;

use crate::disk::{Disk, DiskQueue, Done, Full, Geometry, IoBuf, Op, Request};
use crate::engine::EngineCounters;
pub use storage::{Call, Carried, StorageFault, StorageFaults, Strikes};

/// What goes wrong, and when. Requests of an operation are counted from 0 over all queues of
/// the disk, from when the fault was set; a fault that counts happens once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The `nth` request of this operation is answered with `errno` and not carried out.
    Fail {
        /// Which operation.
        op: Op,
        /// Which request of it.
        nth: u64,
        /// A positive errno.
        errno: i32,
    },
    /// The `nth` write (`Write`, `WriteFua`) is answered with 0 and not carried out.
    LoseWrite {
        /// Which write.
        nth: u64,
    },
    /// One byte of the `nth` write arrives with its bits inverted.
    FlipByte {
        /// Which write.
        nth: u64,
        /// Which byte of it, modulo its length.
        at: usize,
    },
    /// Every flush is answered with 0 and not carried out, and every `WriteFua` is a `Write`.
    DropFlushes,
}

impl Fault {
    /// Whether requests of `op` count for it.
    fn concerns(self, op: Op) -> bool {
        match self {
            Fault::Fail { op: mine, .. } => mine == op,
            Fault::LoseWrite { .. } | Fault::FlipByte { .. } => {
                matches!(op, Op::Write | Op::WriteFua)
            }
            Fault::DropFlushes => matches!(op, Op::Flush | Op::WriteFua),
        }
    }
    /// The request that it strikes; `None`: all.
    fn nth(self) -> Option<u64> {
        match self {
            Fault::Fail { nth, .. } | Fault::LoseWrite { nth } | Fault::FlipByte { nth, .. } => {
                Some(nth)
            }
            Fault::DropFlushes => None,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    fault: Fault,
    seen: u64,
}

#[derive(Debug, Default)]
struct Plan {
    planned: Vec<Planned>,
    struck: u64,
}

impl Plan {
    /// Counts a request; the fault that strikes it.
    fn strike(&mut self, op: Op) -> Option<Fault> {
        let mut strikes = None;
        for p in self.planned.iter_mut().filter(|p| p.fault.concerns(op)) {
            if p.fault.nth().is_none_or(|nth| nth == p.seen) {
                strikes = strikes.or(Some(p.fault));
            }
            p.seen += 1;
        }
        self.struck += u64::from(strikes.is_some());
        strikes
    }
}

/// A disk in front of another one, with faults.
pub struct FaultDisk {
    inner: Arc<dyn Disk>,
    plan: Arc<Mutex<Plan>>,
}

impl FaultDisk {
    /// `inner`, going wrong as told.
    pub fn new(inner: Arc<dyn Disk>, faults: &[Fault]) -> Arc<Self> {
        let disk = FaultDisk { inner, plan: Arc::default() };
        faults.iter().for_each(|f| disk.add(*f));
        Arc::new(disk)
    }

    /// One more fault, which counts from now on.
    pub fn add(&self, fault: Fault) {
        self.plan.lock().planned.push(Planned { fault, seen: 0 });
    }

    /// How many requests were struck: a control that never struck has shown nothing.
    pub fn struck(&self) -> u64 {
        self.plan.lock().struck
    }
}

impl Disk for FaultDisk {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }
    fn refresh(&self) -> io::Result<Geometry> {
        self.inner.refresh()
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        Ok(Box::new(FaultQueue {
            inner: self.inner.queue(depth)?,
            depth,
            plan: Arc::clone(&self.plan),
            done: Vec::new(),
            altered: Vec::new(),
        }))
    }
}

struct FaultQueue {
    /// Before `altered`: dropped first, so that nothing uses the altered copies any more.
    inner: Box<dyn DiskQueue>,
    depth: u32,
    plan: Arc<Mutex<Plan>>,
    done: Vec<Done>,
    altered: Vec<(u64, Vec<u8>)>,
}

impl FaultQueue {
    fn submit_flipped(&mut self, r: &Request<'_>, at: usize) -> Result<(), Full> {
        let mut copy = Vec::with_capacity(r.bufs.iter().map(IoBuf::len).sum());
        for buf in r.bufs {
            let end = copy.len();
            copy.resize(end + buf.len(), 0u8);
            // SAFETY: the buffer is valid by its maker's promise; `copy` was made longer by its
            // length.
            unsafe { std::ptr::copy(buf.addr(), copy[end..].as_mut_ptr(), buf.len()) };
        }
        if !copy.is_empty() {
            let at = at % copy.len();
            copy[at] = !copy[at];
        }
        // SAFETY: kept in `altered` until the request is done or the queue below is gone.
        let bufs = [unsafe { IoBuf::new(copy.as_mut_ptr(), copy.len()) }];
        self.inner.submit(&Request { bufs: &bufs, ..*r })?;
        self.altered.push((r.token, copy));
        Ok(())
    }

    fn answer(&mut self, token: u64, errno: i32) -> Result<(), Full> {
        self.done.push(Done { token, errno });
        Ok(())
    }
}

impl DiskQueue for FaultQueue {
    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.in_flight() >= self.depth {
            return Err(Full);
        }
        let strikes = self.plan.lock().strike(r.op);
        match strikes {
            None => self.inner.submit(r),
            Some(Fault::Fail { errno, .. }) => self.answer(r.token, errno),
            Some(Fault::LoseWrite { .. }) => self.answer(r.token, 0),
            Some(Fault::FlipByte { at, .. }) => self.submit_flipped(r, at),
            Some(Fault::DropFlushes) if r.op == Op::Flush => self.answer(r.token, 0),
            Some(Fault::DropFlushes) => self.inner.submit(&Request { op: Op::Write, ..*r }),
        }
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.inner.submit_all()
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        done.append(&mut self.done);
        let before = done.len();
        self.inner.poll(done)?;
        for d in &done[before..] {
            if let Some(at) = self.altered.iter().position(|(token, _)| *token == d.token) {
                self.altered.swap_remove(at);
            }
        }
        Ok(())
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        let timeout = if self.done.is_empty() { timeout } else { Some(Duration::ZERO) };
        self.inner.wait(fds, timeout)
    }
    fn unwatch(&mut self) -> io::Result<()> {
        self.inner.unwatch()
    }
    fn in_flight(&self) -> u32 {
        self.inner.in_flight() + self.done.len() as u32
    }
    fn counters(&self) -> Option<Handle<EngineCounters>> {
        self.inner.counters()
    }
    fn count_in(&mut self, counters: Handle<EngineCounters>) {
        self.inner.count_in(counters);
    }
}
