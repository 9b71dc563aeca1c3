//! The loop of one queue: take a batch, validate, place, submit, reap, answer, notify once.

mod bounced;
mod drain;
mod refused;
mod stalled;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blktap::filters::stall::Stall;
use blktap::{DiskQueue, Done, IoBuf, Op};
use hypervisor::xenbus::Fault;
use hypervisor::xenbus::queue::Shared;
use hypervisor::{Direction, EventChannel};
use perf::Handle;
use perf::polling::Pollers;
use rings::{Notify, Pending};

use super::memory::{Memory, TABLE_PAGES};
use super::slots::{Place, Slot, Slots, Stage, Work};
use super::{Served, Told};
use crate::config::Config;
use crate::counters::QueueCounters;
use crate::proto::{
    self, Abi, Body, Checked, Limits, RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY, Request, Response,
    SEGMENT_BYTES, SEGMENTS_PER_PAGE, Segment, WireSegment,
};
use zerocopy::FromBytes;

/// Requests taken from the ring in one go. A frontend that polls works on one batch of answers
/// while this end works on the next: null disk, depth 32, 170 ns a request without that, 80 to 110
/// with it. Smaller ones cost more enters of io_uring.
const BATCH: usize = 16;
/// A frontend that sleeps is woken once for up to so many answers,
const ANSWERS: u32 = 64;
/// unless that makes the first of them wait longer than about what waking it takes, in ns. A
/// frontend that sleeps while a page cache's 32 reads are made, and is woken at their end, finds
/// that its sleeps are long and does not poll: 0.31 million requests a second instead of 0.76.
const HELD: u64 = 10_000;
/// Wake-ups without a request after which the next ones are put off (XSA-332).
const SPURIOUS_STREAK: u32 = 32;
/// How long they are put off.
const BACK_OFF: Duration = Duration::from_millis(1);

/// An indirect request whose table is on its way.
struct IndirectTable {
    slot: u32,
    op: proto::Indirect,
    sector: u64,
    segments: usize,
    /// First of its pages in the table area.
    first: usize,
}

impl IndirectTable {
    /// Bytes of the table's page `page`.
    fn bytes_of(&self, page: usize) -> usize {
        (self.segments - page * SEGMENTS_PER_PAGE).min(SEGMENTS_PER_PAGE) * SEGMENT_BYTES
    }
}

/// BLKIF_RSP_* of an errno.
fn status_of(errno: i32) -> i16 {
    if errno == rustix::io::Errno::OPNOTSUPP.raw_os_error() { RSP_EOPNOTSUPP } else { RSP_ERROR }
}

/// One queue with all that it needs.
pub(super) struct Worker<A: Abi> {
    pub name: String,
    pub ring: Served<A>,
    pub channel: Box<dyn EventChannel>,
    pub disk: Box<dyn DiskQueue>,
    pub memory: Memory,
    pub slots: Slots,
    pub shared: Arc<Shared<Config>>,
    pub told: Arc<Told>,
    pub stall: Arc<Stall>,
    pub limits: Limits,
    pub counters: Handle<QueueCounters>,
    pub pollers: Pollers,
    pub run: Run,
}

/// What the loop remembers between rounds.
pub(super) struct Run {
    clock: Instant,
    now: u64,
    done: Vec<Done>,
    bufs: Vec<IoBuf>,
    /// Slots of this batch whose data are to be placed and sent.
    fresh: Vec<u32>,
    /// Indirect requests of this batch.
    tables: Vec<IndirectTable>,
    /// Slots that wait for memory or behind a barrier, in order.
    waiting: VecDeque<u32>,
    /// Requests that a paused disk did not take, in order.
    refused: VecDeque<(u32, Op)>,
    /// Requests that have failed and wait, with their errors.
    stalled: Vec<(u32, Op, i32)>,
    /// Answered, and still to be counted.
    finished: Vec<u32>,
    /// Answered but not yet released reads of this round.
    reads: Vec<u32>,
    /// Something has ended since the last try to start those that wait.
    freed: bool,
    /// A barrier is running: nothing may pass it.
    barrier: bool,
    unpublished: u32,
    /// When the first of them was taken.
    held_since: u64,
    spurious: u32,
    /// The port has an event that is not acknowledged.
    rung: bool,
    changes: u64,
    segments: Vec<Segment>,
    page: Vec<u8>,
}

impl Run {
    /// For a queue of `slots` requests of up to `segments` segments.
    pub(super) fn new(slots: usize, segments: usize) -> Run {
        Run {
            clock: Instant::now(),
            now: 0,
            done: Vec::with_capacity(slots),
            bufs: Vec::with_capacity(segments),
            fresh: Vec::with_capacity(slots),
            tables: Vec::with_capacity(BATCH),
            waiting: VecDeque::with_capacity(slots),
            refused: VecDeque::new(),
            stalled: Vec::new(),
            finished: Vec::with_capacity(slots),
            reads: Vec::with_capacity(slots),
            freed: false,
            barrier: false,
            unpublished: 0,
            held_since: 0,
            spurious: 0,
            rung: false,
            changes: 0,
            segments: Vec::with_capacity(segments),
            page: vec![0; rings::PAGE_SIZE],
        }
    }
}

impl<A: Abi> Worker<A> {
    /// Serves until told to stop or until the frontend breaks the protocol; then waits for what
    /// is in flight and unmaps.
    pub(super) fn run(mut self) -> Result<(), Fault> {
        let result = self.serve();
        let drained = self.drain();
        // The disk's queue goes first: nothing may be in flight when pages are unmapped.
        drop(self.disk);
        self.memory.close();
        #[cfg(feature = "test-faults")]
        {
            crate::leak::keep("grant", self.ring);
            crate::leak::keep("port", self.channel);
        }
        result.and(drained)
    }

    fn serve(&mut self) -> Result<(), Fault> {
        while !self.shared.stopping() {
            let worked = self.round()?;
            if worked {
                self.counters.polls_paid.add(self.pollers.worked());
                continue;
            }
            // Also while the disk works: what it completes shows in its ring's memory.
            if self.pollers.of(self.disk.in_flight()).spin() {
                continue;
            }
            self.sleep()?;
        }
        Ok(())
    }

    /// One round; whether there was anything to do.
    fn round(&mut self) -> Result<bool, Fault> {
        self.reap()?;
        let done = !self.run.done.is_empty();
        self.run.done.clear();
        // Before the next requests: those that the page cache serves take their time in `take`.
        self.publish_batch()?;
        // And before the books are kept, for which the frontend need not wait.
        self.count_finished();
        let moved = self.take()?;
        if moved == 0 && !done {
            return Ok(false);
        }
        self.run.spurious = 0;
        Ok(true)
    }

    /// Takes over knobs that were changed meanwhile.
    fn take_knobs(&mut self) {
        if let Some(config) = self.shared.changed(&mut self.run.changes) {
            self.pollers.set_max(config.poll_us);
            self.memory.set_limits(&config);
            self.disk.prioritize(config.io_priority);
        }
    }

    fn read_clock(&mut self) {
        self.run.now = self.run.clock.elapsed().as_nanos() as u64;
    }

    // ---- from the ring to the disk

    /// How many requests were taken or started.
    fn take(&mut self) -> Result<usize, Fault> {
        if self.stall.stands() {
            return Ok(0);
        }
        self.bring_back();
        let mut taken = 0;
        let mut table_pages = 0;
        while taken < BATCH && table_pages < TABLE_PAGES - 8 && self.run.waiting.is_empty() {
            let Some(entry) = self.ring.take().map_err(|e| self.corrupt(&e))? else { break };
            if taken == 0 {
                self.read_clock();
                self.limits.sectors = self.told.sectors();
                self.take_knobs();
            }
            taken += 1;
            let slot = self.slots.hold(entry.slot);
            self.accept(slot, &A::parse(&entry.req), &mut table_pages);
        }
        self.fetch_tables()?;
        let retried = self.retry()?;
        // Whoever waits for memory or a barrier can start when something has ended: not before,
        // for each look for memory counts. What was started may have ended at once, by a bad
        // reference, and nobody else starts those behind it.
        let stuck = self.run.waiting.is_empty() || !std::mem::take(&mut self.run.freed);
        let started = match self.run.fresh.is_empty() && stuck {
            true => 0,
            false => self.start()?,
        };
        Ok(taken + retried + started)
    }

    fn corrupt(&self, e: &rings::Corrupt) -> Fault {
        Fault(format!("{}: {e}", self.name))
    }

    fn channel_fault(&self, e: &io::Error) -> Fault {
        Fault(format!("{}: event channel: {e}", self.name))
    }

    /// Checks one request and gives it its slot.
    fn accept(&mut self, slot: u32, request: &Request, table_pages: &mut usize) {
        *self.slots.get_mut(slot) = Slot::taken(request.answer(RSP_OKAY), self.run.now);
        match proto::validate(request, &self.limits) {
            Err(refusal) => self.answer(slot, refusal.status()),
            Ok(Checked::Nothing) => self.answer(slot, RSP_OKAY),
            Ok(Checked::Transfer { op, range, segments }) => {
                let Body::Direct { segments: all, .. } = &request.body else { return };
                self.fill(slot, &all[..segments]);
                self.begin(slot, op.into(), range.offset()..range.offset() + range.bytes());
            }
            Ok(Checked::Flush { op }) => self.begin(slot, op.into(), 0..0),
            Ok(Checked::Discard { range, kind }) => {
                self.begin(slot, kind.into(), range.offset()..range.offset() + range.bytes());
            }
            Ok(Checked::Indirect { op, sector, segments, pages }) => {
                let Body::Indirect { grefs, .. } = &request.body else { return };
                self.counters.indirect.add(1);
                let table = IndirectTable { slot, op, sector, segments, first: *table_pages };
                for (page, gref) in grefs[..pages].iter().enumerate() {
                    let bytes = table.bytes_of(page);
                    self.memory.queue_table(slot, *gref, *table_pages + page, bytes);
                }
                *table_pages += pages;
                self.run.tables.push(table);
            }
        }
    }

    fn begin(&mut self, slot: u32, work: Work, range: std::ops::Range<u64>) {
        let s = self.slots.get_mut(slot);
        (s.work, s.offset, s.len) = (work, range.start, range.end - range.start);
        self.run.fresh.push(slot);
    }

    fn fill(&mut self, slot: u32, segments: &[Segment]) {
        self.slots.get_mut(slot).segments = segments.len() as u16;
        for (piece, segment) in self.slots.room(slot).iter_mut().zip(segments) {
            (piece.segment, piece.place) = (*segment, Place::Nowhere);
        }
    }

    /// Brings the batch's indirect tables here, each page once, and judges their segments.
    fn fetch_tables(&mut self) -> Result<(), Fault> {
        if self.run.tables.is_empty() {
            return Ok(());
        }
        let slots = &mut self.slots;
        self.memory.copy(|slot, _| slots.get_mut(slot).answer.status = RSP_ERROR)?;
        let tables = std::mem::take(&mut self.run.tables);
        for table in &tables {
            self.read_table(table);
        }
        self.run.tables = tables;
        self.run.tables.clear();
        Ok(())
    }

    fn read_table(&mut self, table: &IndirectTable) {
        let slot = table.slot;
        if self.slots.get(slot).answer.status != RSP_OKAY {
            return self.answer(slot, RSP_ERROR);
        }
        let mut segments = std::mem::take(&mut self.run.segments);
        segments.clear();
        for page in 0..table.segments.div_ceil(SEGMENTS_PER_PAGE) {
            let bytes = &mut self.run.page[..table.bytes_of(page)];
            self.memory.table(table.first + page, bytes);
            let wire = <[WireSegment]>::ref_from_bytes(bytes).unwrap_or_default();
            segments.extend(wire.iter().map(|w| Segment::from(*w)));
        }
        match proto::validate_segments(table.sector, &segments, &self.limits) {
            Ok(range) => {
                self.fill(slot, &segments);
                let bytes = range.offset()..range.offset() + range.bytes();
                self.begin(slot, table.op.into(), bytes);
            }
            Err(refusal) => self.answer(slot, refusal.status()),
        }
        self.run.segments = segments;
    }

    /// Places and sends what waits and what is fresh, in order; how many.
    fn start(&mut self) -> Result<usize, Fault> {
        self.run.waiting.extend(self.run.fresh.drain(..));
        // Whoever waits holds up all behind it: so a barrier keeps its place.
        let mut ready = 0;
        while let Some(&slot) = self.run.waiting.get(ready) {
            if !self.may_start(slot, ready) || !self.place(slot) {
                break;
            }
            ready += 1;
            self.run.barrier = self.slots.get(slot).work == Work::Barrier;
        }
        self.counters.oo_req.add((self.run.waiting.len() - ready) as u64);
        let slots = &mut self.slots;
        self.memory.copy(|slot, _| slots.get_mut(slot).answer.status = RSP_ERROR)?;
        for _ in 0..ready {
            if let Some(slot) = self.run.waiting.pop_front() {
                self.send(slot)?;
            }
        }
        self.disk.submit_all()?;
        Ok(ready)
    }

    /// A barrier waits until it is alone; nothing starts beside one.
    fn may_start(&self, slot: u32, started: usize) -> bool {
        let alone = started == 0 && self.disk.in_flight() == 0 && self.run.refused.is_empty();
        !self.run.barrier && (alone || self.slots.get(slot).work != Work::Barrier)
    }

    fn place(&mut self, slot: u32) -> bool {
        let direction = match self.slots.get(slot).work {
            Work::Read => Direction::ToGrant,
            _ => Direction::FromGrant,
        };
        let copied = self.slots.get(slot).copied;
        self.memory.place(slot, self.slots.pieces(slot), direction, copied, self.run.now).is_ok()
    }

    fn send(&mut self, slot: u32) -> Result<(), Fault> {
        if self.slots.get(slot).answer.status != RSP_OKAY {
            self.finish(slot);
            return Ok(());
        }
        let s = *self.slots.get(slot);
        let (stage, op) = match s.work {
            Work::Read => (Stage::Running, Op::Read),
            Work::Write => (Stage::Running, Op::Write),
            Work::Flush if s.segments > 0 => (Stage::PreFlush, Op::Flush),
            Work::Flush => (Stage::Running, Op::Flush),
            Work::Barrier => (Stage::PreFlush, Op::Flush),
            Work::Discard => (Stage::Running, Op::Discard),
            Work::SecureDiscard => (Stage::Running, Op::SecureDiscard),
        };
        self.slots.get_mut(slot).stage = stage;
        self.submit(slot, op)
    }

    fn submit(&mut self, slot: u32, op: Op) -> Result<(), Fault> {
        self.run.bufs.clear();
        let s = *self.slots.get(slot);
        if matches!(op, Op::Read | Op::Write | Op::WriteFua) {
            for piece in self.slots.pieces(slot) {
                self.run.bufs.push(self.memory.io_buf(piece)?);
            }
        }
        let (offset, len) = if op == Op::Flush { (0, 0) } else { (s.offset, s.len) };
        let request =
            blktap::Request { op, offset, len, bufs: &self.run.bufs, token: u64::from(slot) };
        // One request a slot, and the queue was made for as many: it is paused.
        if self.disk.submit(&request).is_err() {
            self.run.refused.push_back((slot, op));
        }
        Ok(())
    }

    // ---- from the disk to the ring

    fn reap(&mut self) -> Result<(), Fault> {
        self.disk.poll(&mut self.run.done)?;
        for at in 0..self.run.done.len() {
            let Done { token, errno } = self.run.done[at];
            self.completed(token as u32, errno)?;
        }
        if !self.run.reads.is_empty() {
            self.copy_out()?;
        }
        Ok(())
    }

    fn completed(&mut self, slot: u32, errno: i32) -> Result<(), Fault> {
        if errno != 0 && (self.bounces(slot, errno) || self.stalls(slot, errno)) {
            return Ok(());
        }
        let s = self.slots.get_mut(slot);
        if errno != 0 {
            s.answer.status = status_of(errno);
        } else if s.stage == Stage::PreFlush {
            s.stage = Stage::Running;
            if s.segments > 0 {
                let op = if s.work == Work::Barrier { Op::WriteFua } else { Op::Write };
                return self.submit(slot, op);
            }
        }
        let s = self.slots.get(slot);
        let to_copy = s.work == Work::Read && s.answer.status == RSP_OKAY;
        if to_copy && self.slots.pieces(slot).iter().any(|p| matches!(p.place, Place::Copied(_))) {
            self.memory.queue_out(slot, self.slots.pieces(slot));
            self.run.reads.push(slot);
        } else {
            self.finish(slot);
        }
        Ok(())
    }

    fn copy_out(&mut self) -> Result<(), Fault> {
        let slots = &mut self.slots;
        self.memory.copy(|slot, _| slots.get_mut(slot).answer.status = RSP_ERROR)?;
        for at in 0..self.run.reads.len() {
            self.finish(self.run.reads[at]);
        }
        self.run.reads.clear();
        Ok(())
    }

    /// Gives a slot's memory back and answers it.
    fn finish(&mut self, slot: u32) {
        self.memory.release(self.slots.pieces(slot), self.run.now);
        self.run.freed = true;
        let s = self.slots.get(slot);
        let status = s.answer.status;
        if s.work == Work::Barrier {
            self.run.barrier = false;
        }
        self.run.finished.push(slot);
        self.answer(slot, status);
    }

    /// Counts what was finished since the last time: its slots are free, and nobody has taken
    /// them yet. One reading of the clock for all.
    fn count_finished(&mut self) {
        if self.run.finished.is_empty() {
            return;
        }
        self.read_clock();
        for slot in &self.run.finished {
            self.count(self.slots.get(*slot));
        }
        self.run.finished.clear();
    }

    fn count(&self, s: &Slot) {
        let (c, took, sectors) = (&self.counters, self.run.now - s.taken_at, s.len / 512);
        match s.work {
            Work::Read => {
                c.rd_req.add(1);
                c.rd_sect.add(sectors);
                c.latency_read.record(took);
            }
            Work::Write | Work::Barrier => {
                c.wr_req.add(1);
                c.wr_sect.add(sectors);
                c.barriers.add(u64::from(s.work == Work::Barrier));
                c.latency_write.record(took);
            }
            Work::Flush => {
                c.f_req.add(1);
                c.latency_flush.record(took);
            }
            Work::Discard | Work::SecureDiscard => {
                c.ds_req.add(1);
                c.latency_discard.record(took);
            }
        }
        if s.segments > 0 && s.len > c.largest.get() {
            c.largest.set(s.len);
        }
    }

    fn answer(&mut self, slot: u32, status: i16) {
        if status != RSP_OKAY {
            self.counters.errors.add(1);
        }
        let response = Response { status, ..self.slots.get(slot).answer };
        if self.run.unpublished == 0 {
            self.run.held_since = self.slots.get(slot).taken_at;
        }
        if let Some(token) = self.slots.free(slot) {
            self.ring.respond(token, &A::encode_response(&response));
            self.run.unpublished += 1;
        }
    }

    /// Publishes, unless that means waking a frontend which has more for this end to do first.
    fn publish_batch(&mut self) -> Result<(), Fault> {
        let few = (1..ANSWERS).contains(&self.run.unpublished);
        if few && self.ring.is_awaited() && self.run.waiting.is_empty() {
            let more = self.ring.peek().map_err(|e| self.corrupt(&e))?;
            if more == Pending::Work {
                self.read_clock();
                if self.run.now - self.run.held_since < HELD {
                    return Ok(());
                }
            }
        }
        self.publish()
    }

    fn publish(&mut self) -> Result<(), Fault> {
        if self.run.unpublished == 0 {
            return Ok(());
        }
        self.run.unpublished = 0;
        match self.ring.publish() {
            Notify::Send => self.channel.notify().map_err(|e| self.channel_fault(&e)),
            Notify::Skip => Ok(()),
        }
    }

    // ---- sleep

    /// Waits for the frontend, the disk or the device's control.
    fn sleep(&mut self) -> Result<(), Fault> {
        if self.run.spurious >= SPURIOUS_STREAK {
            self.disk.wait(&[self.shared.wake()], Some(BACK_OFF))?;
        }
        // Only now, after the ring's work: the port stays masked while the queue works.
        // And only where it has rung: on a busy ring most sleeps end by the disk.
        if std::mem::take(&mut self.run.rung) {
            self.channel.acknowledge().map_err(|e| self.channel_fault(&e))?;
        }
        let pending = self.ring.arm().map_err(|e| self.corrupt(&e))?;
        // While requests wait for those before them, or for the disk, no more are taken from the ring.
        let takes = self.run.waiting.is_empty() && !self.stall.stands();
        if pending == Pending::Work && takes {
            return Ok(());
        }
        self.counters.sleeps.add(1);
        self.take_knobs();
        let before = self.run.clock.elapsed().as_nanos() as u64;
        self.memory.expire(before);
        let timeout = self.memory.patience();
        let in_flight = self.disk.in_flight();
        let ready = self.disk.wait(&[self.channel.as_fd(), self.shared.wake()], timeout)?;
        self.read_clock();
        self.pollers.of(in_flight).slept(self.run.now - before);
        if ready & 1 != 0 {
            self.run.spurious += 1;
            self.run.rung = true;
            self.ring.woken();
        }
        if ready & 2 != 0 {
            self.shared.woken();
        }
        Ok(())
    }
}
