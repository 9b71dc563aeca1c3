//! The writing half of a copy, on the caller's thread.
// Names the buffers' memory to a queue.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use super::pipe::{Ends, Next};
use super::{Before, Copied, CopyError, CopyOptions, Order, Part, Piece, Tick, What};
use crate::blocking;
use crate::disk::{Disk, DiskQueue, Done, IoBuf, Op, Request};

/// Requests in flight.
const DEPTH: u32 = 128;
/// How long to sleep before the caller is asked whether to go on.
const TICK: Duration = Duration::from_millis(100);
/// Longest stretch that is zeroed by one request: so that an end is not far.
const ZERO_STEP: u64 = 64 << 20;

/// A piece that is being written.
struct Active {
    piece: Piece,
    /// The next of its runs, how much of that was sent, and where it goes on.
    run: usize,
    sent: u64,
    at: u64,
    pending: u32,
}

pub(super) struct Writer {
    /// First: dropped before the buffers that it writes from.
    queue: Box<dyn DiskQueue>,
    active: Vec<Option<Active>>,
    /// Those with runs that were not sent yet.
    unsent: VecDeque<usize>,
    /// Those that came before their turn.
    early: BTreeMap<u64, Piece>,
    next: u64,
    order: Order,
    before: Before,
    done: Vec<Done>,
    copied: Copied,
    bytes_done: u64,
}

impl Writer {
    pub(super) fn new(disk: &dyn Disk, options: &CopyOptions) -> Result<Writer, CopyError> {
        let queue = disk.queue(DEPTH).map_err(CopyError::other("open a queue of the target"))?;
        Ok(Writer {
            queue,
            active: Vec::new(),
            unsent: VecDeque::new(),
            early: BTreeMap::new(),
            next: 0,
            order: options.order,
            before: options.before,
            done: Vec::new(),
            copied: Copied::default(),
            bytes_done: 0,
        })
    }

    pub(super) fn run(mut self, ends: Ends, tick: Tick<'_>) -> Result<Copied, CopyError> {
        loop {
            ends.read.calm();
            let ended = self.receive(&ends)?;
            self.send()?;
            self.queue.submit_all().map_err(CopyError::other("write"))?;
            let progress = self.reap(&ends)?;
            if ended && self.active.iter().all(Option::is_none) {
                break;
            }
            if tick(self.bytes_done) == ControlFlow::Break(()) {
                return Err(CopyError::Stopped);
            }
            if !progress {
                let wait = self.queue.wait(&[ends.read.event()], Some(TICK));
                wait.map_err(CopyError::other("wait for writes"))?;
            }
        }
        blocking::flush(&mut *self.queue).map_err(CopyError::other("flush the target"))?;
        Ok(self.copied)
    }

    /// Takes what was read; whether that was all.
    fn receive(&mut self, ends: &Ends) -> Result<bool, CopyError> {
        loop {
            match ends.read.next() {
                Next::Item(piece) => {
                    let piece = piece?;
                    self.early.insert(piece.number, piece);
                }
                Next::Nothing => return Ok(false),
                Next::End => return Ok(true),
            }
            while let Some(first) = self.early.first_entry() {
                if self.order == Order::Ascending && *first.key() != self.next {
                    break;
                }
                self.next += 1;
                let piece = first.remove();
                self.activate(piece);
            }
        }
    }

    fn activate(&mut self, piece: Piece) {
        let at = piece.offset;
        let active = Some(Active { piece, run: 0, sent: 0, at, pending: 0 });
        let index = match self.active.iter().position(Option::is_none) {
            Some(free) => {
                self.active[free] = active;
                free
            }
            None => {
                self.active.push(active);
                self.active.len() - 1
            }
        };
        self.unsent.push_back(index);
    }

    /// Sends what the queue has room for, in order.
    fn send(&mut self) -> Result<(), CopyError> {
        while let Some(&index) = self.unsent.front() {
            let Some(active) = &mut self.active[index] else { return Ok(()) };
            while let Some(run) = active.piece.runs.get(active.run).copied() {
                let step = active.step(run, self.before);
                if let Some(op) = step.op {
                    let skip = (active.at - active.piece.offset) as usize;
                    let addr = active.piece.buffer.addr().wrapping_add(skip);
                    // SAFETY: the buffer stays in `active` until the request is done; the queue
                    // is dropped before it. A run of data lies inside it.
                    let buf = [unsafe { IoBuf::new(addr, step.len as usize) }];
                    let bufs = if op == Op::Write { &buf[..] } else { &[] };
                    let (offset, len) = (active.at, step.len);
                    let request = Request { op, offset, len, bufs, token: index as u64 };
                    if self.queue.in_flight() >= DEPTH || self.queue.submit(&request).is_err() {
                        return Ok(());
                    }
                    active.pending += 1;
                }
                match step.op {
                    Some(Op::Write) => self.copied.written += step.len,
                    _ => self.copied.sparse += step.len,
                }
                active.advance(run, step.len);
            }
            self.unsent.pop_front();
            if active.pending == 0 {
                // Nothing of it was to be written: it ends with the next look.
                active.pending = 1;
                self.done.push(Done { token: index as u64, errno: 0 });
            }
        }
        Ok(())
    }

    /// Ends what is done; whether anything was.
    fn reap(&mut self, ends: &Ends) -> Result<bool, CopyError> {
        self.queue.poll(&mut self.done).map_err(CopyError::other("write"))?;
        let any = !self.done.is_empty();
        for done in self.done.drain(..) {
            let Some(place) = self.active.get_mut(done.token as usize) else { continue };
            let Some(active) = place else { continue };
            let (offset, len) = (active.piece.offset, active.piece.len);
            if done.errno != 0 {
                let source = io::Error::from_raw_os_error(done.errno);
                return Err(CopyError::Write { offset, len, source });
            }
            active.pending -= 1;
            let sent = active.run >= active.piece.runs.len();
            if sent && active.pending == 0 {
                self.bytes_done += len;
                if let Some(active) = place.take() {
                    // The reader may have ended already.
                    ends.free.send(active.piece.buffer);
                }
            }
        }
        Ok(any)
    }
}

/// A request, or nothing to be done for so many bytes.
struct Step {
    op: Option<Op>,
    len: u64,
}

impl Active {
    fn step(&self, run: Part, before: Before) -> Step {
        let left = run.len - self.sent;
        match run.what {
            What::Data => Step { op: Some(Op::Write), len: left },
            What::Zero if before == Before::Unknown => {
                Step { op: Some(Op::WriteZeroes), len: left.min(ZERO_STEP) }
            }
            What::Zero | What::Skip => Step { op: None, len: left },
        }
    }

    fn advance(&mut self, run: Part, len: u64) {
        self.sent += len;
        self.at += len;
        if self.sent >= run.len {
            self.run += 1;
            self.sent = 0;
        }
    }
}
