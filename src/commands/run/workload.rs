//! The verified I/O of one queue: fills its part of the disk, reads it back, reads and writes at
//! random with flushes and discards between, and reads all of it once more at the end.
// Gives the queue the addresses of its buffers.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blktap::{DiskQueue, Done, Full, Geometry, IoBuf, Op, Request};

use super::plan::{CELL, DiskPlan, Task, UNTOUCHED, Work, ZEROED};
use super::stamp;

/// Cells of the largest request: 1 MiB.
const LARGEST: u64 = (1 << 20) / CELL as u64;
/// How long the disk may take to answer anything.
const PATIENCE: Duration = Duration::from_secs(30);
/// Tries to find a place that no request in flight touches.
const TRIES: u32 = 16;

/// A queue's part of a disk.
pub struct Part {
    cells: Range<u64>,
    task: Task,
    depth: usize,
    work: u64,
    seconds: Option<f64>,
    seed: u64,
    discards: bool,
}

impl Part {
    /// The part of queue `number` of `queues`.
    pub fn of(plan: &DiskPlan, geometry: Geometry, number: usize, queues: usize) -> Part {
        let cells = plan.span.min(geometry.size) / CELL as u64;
        let (number, queues) = (number as u64, queues as u64);
        Part {
            cells: cells * number / queues..cells * (number + 1) / queues,
            task: plan.task,
            depth: plan.depth as usize,
            work: plan.work / queues,
            seconds: plan.seconds,
            seed: plan.seed,
            discards: geometry.discard.is_some_and(|n| CELL.is_multiple_of(n as usize)),
        }
    }
}

/// What to send next.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read(u64, u64),
    Write(u64, u64),
    Discard(u64, u64),
    Flush,
    /// Nothing can be sent before something is answered.
    Later,
    /// The phase is over.
    End,
}

struct Slot {
    memory: Vec<u8>,
    step: Option<Step>,
    generation: u32,
}

impl Slot {
    fn touches(&self, from: u64, count: u64) -> bool {
        match self.step {
            Some(Step::Read(at, n) | Step::Write(at, n) | Step::Discard(at, n)) => {
                at < from + count && from < at + n
            }
            _ => false,
        }
    }
}

/// See the module.
pub struct Worker<'a> {
    part: Part,
    queue: Box<dyn DiskQueue>,
    slots: Vec<Slot>,
    /// Whether a cell may read as zeroes after a discard.
    trimmed: Vec<bool>,
    generation: u32,
    random: u64,
    cursor: u64,
    scratch: Box<[u8; CELL]>,
    moved: &'a AtomicU64,
    work: Work,
}

impl<'a> Worker<'a> {
    pub fn new(part: Part, queue: Box<dyn DiskQueue>, moved: &'a AtomicU64) -> Worker<'a> {
        let cells = (part.cells.end - part.cells.start) as usize;
        let slot = |_| Slot { memory: vec![0; 1 << 20], step: None, generation: 0 };
        let sums = if part.task == Task::Read { cells } else { 0 };
        Worker {
            slots: (0..part.depth).map(slot).collect(),
            trimmed: vec![false; cells],
            generation: UNTOUCHED,
            random: stamp::mix(part.seed ^ part.cells.start),
            cursor: 0,
            scratch: Box::new([0; CELL]),
            moved,
            work: Work { cells: vec![UNTOUCHED; cells], sums: vec![0; sums], ..Work::default() },
            part,
            queue,
        }
    }

    /// Does all of it.
    pub fn run(mut self) -> io::Result<Work> {
        if self.part.task == Task::Read {
            self.phase(|w| w.sequence(Step::Read))?;
            return Ok(self.work);
        }
        self.phase(|w| w.sequence(Step::Write))?;
        self.phase(|w| w.sequence(Step::Read))?;
        let end = self.part.seconds.map(|s| Instant::now() + Duration::from_secs_f64(s));
        let mut left = self.part.work;
        self.phase(|w| w.at_random(&mut left, end))?;
        let mut flushes = 1;
        self.phase(|_| match std::mem::take(&mut flushes) {
            0 => Step::End,
            _ => Step::Flush,
        })?;
        self.phase(|w| w.sequence(Step::Read))?;
        Ok(self.work)
    }

    fn count(&self) -> u64 {
        self.part.cells.end - self.part.cells.start
    }

    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        stamp::mix(self.random)
    }

    /// 4 KiB to 1 MiB in powers of two, small ones as often as large ones.
    fn size(&mut self) -> u64 {
        1 << (self.next_random() % (u64::from(LARGEST.ilog2()) + 1))
    }

    fn sequence(&mut self, step: fn(u64, u64) -> Step) -> Step {
        if self.cursor == self.count() {
            self.cursor = 0;
            return Step::End;
        }
        let from = self.cursor;
        let count = self.size().min(self.count() - from);
        self.cursor += count;
        step(from, count)
    }

    fn at_random(&mut self, left: &mut u64, end: Option<Instant>) -> Step {
        if *left == 0 || end.is_some_and(|end| Instant::now() > end) || self.count() == 0 {
            return Step::End;
        }
        for _ in 0..TRIES {
            let count = self.size().min(self.count());
            let from = self.next_random() % (self.count() - count + 1);
            if self.slots.iter().any(|slot| slot.touches(from, count)) {
                continue;
            }
            let choice = self.next_random() % 100;
            *left = left.saturating_sub(count * CELL as u64);
            return match choice {
                0..48 => Step::Read(from, count),
                48..50 => Step::Flush,
                50..54 if self.part.discards => Step::Discard(from, count),
                _ => Step::Write(from, count),
            };
        }
        Step::Later
    }

    /// Sends what `next` says until it says that it is over, and all is answered.
    fn phase(&mut self, mut next: impl FnMut(&mut Self) -> Step) -> io::Result<()> {
        let mut done = Vec::with_capacity(self.slots.len());
        let (mut over, mut last) = (false, Instant::now());
        // A disk that has failed is not asked a thousand times more.
        while !(over || self.work.errors > 1000) || self.queue.in_flight() > 0 {
            while !over && self.work.errors <= 1000 {
                let Some(free) = self.slots.iter().position(|slot| slot.step.is_none()) else {
                    break;
                };
                match next(self) {
                    Step::End => over = true,
                    Step::Later => break,
                    step => self.send(free, step, &mut done)?,
                }
            }
            self.queue.submit_all()?;
            let before = self.work.requests;
            self.collect(&mut done)?;
            if self.work.requests != before {
                last = Instant::now();
                continue;
            }
            if self.queue.in_flight() > 0 {
                self.queue.wait(&[], Some(Duration::from_secs(1)))?;
            }
            if last.elapsed() > PATIENCE && self.queue.in_flight() > 0 {
                let text = format!("no answer within {} s", PATIENCE.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
        Ok(())
    }

    fn send(&mut self, free: usize, step: Step, done: &mut Vec<Done>) -> io::Result<()> {
        let (op, from, count) = match step {
            Step::Read(from, count) => (Op::Read, from, count),
            Step::Write(from, count) => (Op::Write, from, count),
            Step::Discard(from, count) => (Op::Discard, from, count),
            _ => (Op::Flush, 0, 0),
        };
        let first = self.part.cells.start + from;
        let len = count as usize * CELL;
        let slot = &mut self.slots[free];
        if op == Op::Write {
            self.generation += 1;
            slot.generation = self.generation;
            for (number, cell) in (first..).zip(slot.memory[..len].chunks_mut(CELL)) {
                stamp::fill(cell, self.part.seed, number, slot.generation);
            }
        }
        slot.step = Some(step);
        // SAFETY: the slot's memory is neither moved nor used before its request is answered; a
        // queue that fails before that ends this process's work, and is dropped before it.
        let bufs = [unsafe { IoBuf::new(slot.memory.as_mut_ptr(), len) }];
        let with_data = matches!(op, Op::Read | Op::Write);
        let bufs = if with_data { &bufs[..] } else { &[] };
        let offset = first * CELL as u64;
        let offset = if op == Op::Flush { 0 } else { offset };
        let request = Request { op, offset, len: len as u64, bufs, token: free as u64 };
        while self.queue.submit(&request) == Err(Full) {
            self.collect(done)?;
            if self.queue.in_flight() > 0 {
                self.queue.wait(&[], Some(Duration::from_secs(1)))?;
            }
        }
        Ok(())
    }

    fn collect(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        self.queue.poll(done)?;
        for answer in done.drain(..) {
            self.answered(&answer);
        }
        Ok(())
    }

    fn answered(&mut self, answer: &Done) {
        let slot = &mut self.slots[answer.token as usize];
        let Some(step) = slot.step.take() else {
            return self.work.complain(|| format!("token {} was answered twice", answer.token));
        };
        self.work.requests += 1;
        if answer.errno != 0 {
            let why = io::Error::from_raw_os_error(answer.errno);
            let start = self.part.cells.start;
            return self.work.complain(|| match step {
                Step::Read(at, n) => told("read", start + at, n, &why),
                Step::Write(at, n) => told("write", start + at, n, &why),
                Step::Discard(at, n) => told("discard", start + at, n, &why),
                _ => format!("flush: {why}"),
            });
        }
        match step {
            Step::Write(from, count) => {
                let range = from as usize..(from + count) as usize;
                self.work.cells[range.clone()].fill(slot.generation);
                self.trimmed[range].fill(false);
                self.moved.fetch_add(count * CELL as u64, Ordering::Relaxed);
            }
            Step::Read(from, count) => {
                let memory = std::mem::take(&mut slot.memory);
                for (at, cell) in (from..from + count).zip(memory.chunks(CELL)) {
                    self.check(at, cell);
                }
                self.slots[answer.token as usize].memory = memory;
                self.moved.fetch_add(count * CELL as u64, Ordering::Relaxed);
            }
            Step::Discard(from, count) => {
                self.trimmed[from as usize..(from + count) as usize].fill(true);
                self.work.discards += 1;
            }
            Step::Flush | Step::Later | Step::End => self.work.flushes += 1,
        }
    }

    /// Compares a cell with what it must be.
    fn check(&mut self, at: u64, found: &[u8]) {
        self.work.verified += CELL as u64;
        let (number, index) = (self.part.cells.start + at, at as usize);
        if self.part.task == Task::Read {
            self.work.sums[index] = stamp::sum(found);
            return;
        }
        if self.trimmed[index] && found.iter().all(|b| *b == 0) {
            (self.work.cells[index], self.trimmed[index]) = (ZEROED, false);
            return;
        }
        let (seed, generation) = (self.part.seed, self.work.cells[index]);
        stamp::expected(&mut self.scratch, seed, number, generation);
        if found == &self.scratch[..] {
            self.trimmed[index] = false;
            return;
        }
        let expected = &self.scratch[..];
        self.work.complain(|| {
            let text = stamp::describe(found, expected, seed, number, generation);
            format!("the guest reads: {text}")
        });
    }
}

fn told(what: &str, cell: u64, count: u64, why: &io::Error) -> String {
    format!("{what} of {} bytes at {:#x}: {why}", count * CELL as u64, cell * CELL as u64)
}
