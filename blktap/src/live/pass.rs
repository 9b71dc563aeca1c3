//! One pass over a live disk: window by window, what a plan names is read and written.
// Gives queues the addresses of its memory.
#![allow(unsafe_code)]

use std::io;
use std::ops::{ControlFlow, Range};

use super::{LiveError, Tracked};
use crate::blocking;
use crate::copy::{Before, CopyError, Part, Plan, Tick, What, find_zeroes};
use crate::disk::{Disk, DiskQueue, Done, IoBuf, Op, Request};

/// Bytes of a window. A guest's change waits for the copying of so many.
pub const WINDOW: u64 = 4 << 20;
/// Largest request.
const PIECE: u64 = 1 << 20;
/// So many zero bytes in a row are not written as data.
const SPARSE: usize = 4096;
/// Requests in flight: a window in pieces, or in its shortest runs.
const DEPTH: u32 = 64;

/// Why a pass ended early.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The disk could not be brought to wait for a window.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// A disk has failed, or the caller ended it.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// A change of the guest's could not be made on the second disk.
    #[error("{0}")]
    Second(String),
}

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// What a pass reads and writes by.
pub struct Pass {
    /// First: dropped before the memory that they use.
    source: Box<dyn DiskQueue>,
    target: Box<dyn DiskQueue>,
    pages: Vec<Page>,
    before: Before,
    parts: Vec<Part>,
    runs: Vec<Part>,
    done: Vec<Done>,
}

/// Which of both disks.
#[derive(Clone, Copy)]
enum Side {
    Source,
    Target,
}

impl Pass {
    /// From `source`, the disk that is live, to `target`, which holds `before`.
    pub fn new(source: &dyn Disk, target: &dyn Disk, before: Before) -> Result<Pass, PassError> {
        let open = |what| move |source| CopyError::Other { what, source };
        Ok(Pass {
            source: source.queue(DEPTH).map_err(open("open a queue of the source"))?,
            target: target.queue(DEPTH).map_err(open("open a queue of the target"))?,
            pages: vec![Page([0; 4096]); (WINDOW / 4096) as usize],
            before,
            parts: Vec::new(),
            runs: Vec::new(),
            done: Vec::new(),
        })
    }

    /// Goes once over the disk, and makes the target durable. Afterwards the window is behind
    /// the disk's end. The bytes that were written.
    pub fn run(
        &mut self,
        tracked: &mut Tracked,
        plan: Plan<'_>,
        tick: Tick<'_>,
    ) -> Result<u64, PassError> {
        let size = tracked.live().geometry().size;
        let mut written = 0;
        loop {
            let window = tracked.advance(WINDOW)?;
            if window.is_empty() {
                break;
            }
            written += self.window(&window, plan)?;
            if let Some(why) = tracked.failure() {
                return Err(PassError::Second(why));
            }
            if tick(window.end.min(size)) == ControlFlow::Break(()) {
                return Err(CopyError::Stopped.into());
            }
        }
        self.flush()?;
        Ok(written)
    }

    /// Makes the target durable.
    pub fn flush(&mut self) -> Result<(), PassError> {
        let what = "flush the target";
        let flushed = blocking::flush(&mut *self.target);
        Ok(flushed.map_err(|source| CopyError::Other { what, source })?)
    }

    fn window(&mut self, window: &Range<u64>, plan: Plan<'_>) -> Result<u64, PassError> {
        self.parts.clear();
        let mut planned = window.start;
        while planned < window.end {
            let from = self.parts.len();
            plan(planned..window.end, &mut self.parts).map_err(|source| CopyError::Other {
                what: "find out what is to be copied",
                source,
            })?;
            let more: u64 = self.parts[from..].iter().map(|p| p.len).sum();
            if more == 0 {
                let source = io::Error::other("a plan that does not go on");
                return Err(CopyError::Other { what: "plan", source }.into());
            }
            planned += more;
        }
        let (mut at, parts) = (window.start, std::mem::take(&mut self.parts));
        for part in &parts {
            let end = (at + part.len).min(window.end);
            if part.what == What::Data {
                self.pieces(Side::Source, Op::Read, at..end, window.start)?;
            }
            at = end;
        }
        self.finish(Side::Source, window)?;
        let (mut at, mut written) = (window.start, 0);
        for part in &parts {
            let end = (at + part.len).min(window.end);
            written += self.write(part.what, at..end, window.start)?;
            at = end;
        }
        self.parts = parts;
        self.finish(Side::Target, window)?;
        Ok(written)
    }

    fn write(&mut self, what: What, range: Range<u64>, base: u64) -> Result<u64, PassError> {
        if what == What::Data {
            let mut runs = std::mem::take(&mut self.runs);
            runs.clear();
            find_zeroes(range.start, self.bytes(&range, base), SPARSE, &mut runs);
            let (mut at, mut written) = (range.start, 0);
            for run in &runs {
                match run.what {
                    What::Data => {
                        self.pieces(Side::Target, Op::Write, at..at + run.len, base)?;
                        written += run.len;
                    }
                    _ => self.zero(at..at + run.len)?,
                }
                at += run.len;
            }
            self.runs = runs;
            return Ok(written);
        }
        if what == What::Zero {
            self.zero(range)?;
        }
        Ok(0)
    }

    fn zero(&mut self, range: Range<u64>) -> Result<(), PassError> {
        if self.before == Before::Zeroes {
            return Ok(());
        }
        self.send(Side::Target, Op::WriteZeroes, &range, &[])
    }

    fn bytes(&self, range: &Range<u64>, base: u64) -> &[u8] {
        let from = (range.start - base) as usize;
        let len = (range.end - range.start) as usize;
        let memory: &[Page] = &self.pages;
        // SAFETY: pages of plain bytes in a row, of which a window has as many as it has bytes.
        let all =
            unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), WINDOW as usize) };
        &all[from..from + len]
    }

    /// Sends a range, in pieces, to or from its place in memory.
    fn pieces(
        &mut self,
        side: Side,
        op: Op,
        range: Range<u64>,
        base: u64,
    ) -> Result<(), PassError> {
        let mut at = range.start;
        while at < range.end {
            let end = (at / PIECE * PIECE + PIECE).min(range.end);
            let from = (at - base) as usize;
            assert!(from as u64 + (end - at) <= WINDOW, "a piece outside of the window");
            let addr = self.pages.as_mut_ptr().cast::<u8>().wrapping_add(from);
            // SAFETY: inside the pages, which live longer than both queues.
            let buf = unsafe { IoBuf::new(addr, (end - at) as usize) };
            self.send(side, op, &(at..end), &[buf])?;
            at = end;
        }
        Ok(())
    }

    fn queue(&mut self, side: Side) -> &mut dyn DiskQueue {
        match side {
            Side::Source => &mut *self.source,
            Side::Target => &mut *self.target,
        }
    }

    fn send(
        &mut self,
        side: Side,
        op: Op,
        range: &Range<u64>,
        bufs: &[IoBuf],
    ) -> Result<(), PassError> {
        let request =
            Request { op, offset: range.start, len: range.end - range.start, bufs, token: 0 };
        while self.queue(side).submit(&request).is_err() {
            self.reap(side, range)?;
        }
        Ok(())
    }

    /// Waits for all that is in flight.
    fn finish(&mut self, side: Side, window: &Range<u64>) -> Result<(), PassError> {
        while self.queue(side).in_flight() > 0 {
            self.reap(side, window)?;
        }
        Ok(())
    }

    fn reap(&mut self, side: Side, about: &Range<u64>) -> Result<(), PassError> {
        let mut done = std::mem::take(&mut self.done);
        let queue = self.queue(side);
        let result = queue.wait(&[], None).and_then(|_| queue.poll(&mut done));
        let errno = done.drain(..).map(|d| d.errno).find(|e| *e != 0);
        self.done = done;
        let result = result.and(errno.map_or(Ok(()), |e| Err(io::Error::from_raw_os_error(e))));
        let (offset, len) = (about.start, about.end - about.start);
        Ok(result.map_err(|source| match side {
            Side::Source => CopyError::Read { offset, len, source },
            Side::Target => CopyError::Write { offset, len, source },
        })?)
    }
}
