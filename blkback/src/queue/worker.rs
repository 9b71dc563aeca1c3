//! The loop of one queue: take a batch, validate, place, submit, reap, answer, notify once.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blktap::{DiskQueue, Done, IoBuf, Op};
use hypervisor::xenbus::Fault;
use hypervisor::{Direction, EventChannel, Mapping};
use perf::Handle;
use rings::{BackRing, Notify, Pending, Table};

use super::Shared;
use super::memory::{Memory, TABLE_PAGES};
use super::poll::Poller;
use super::slots::{Place, Slot, Slots, Stage, Work};
use crate::counters::QueueCounters;
use crate::proto::{self, Abi, Checked, INDIRECT_PER_PAGE, Limits, Segment, status};

/// Requests taken from the ring in one go.
const BATCH: usize = 64;
/// Wake-ups without a request after which the next ones are put off (XSA-332).
const SPURIOUS_STREAK: u32 = 32;
/// How long they are put off.
const BACK_OFF: Duration = Duration::from_millis(1);

/// One queue with all that it needs.
pub(super) struct Worker<P: Abi> {
    pub name: String,
    pub ring: BackRing<P, Mapping, Table<P::Req>>,
    pub channel: Box<dyn EventChannel>,
    pub disk: Box<dyn DiskQueue>,
    pub memory: Memory,
    pub slots: Slots,
    pub shared: Arc<Shared>,
    pub limits: Limits,
    pub counters: Handle<QueueCounters>,
    pub poller: Poller,
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
    /// Indirect requests of this batch: slot, its request, first table page.
    tables: Vec<(u32, proto::Indirect, usize)>,
    /// Slots that wait for memory or behind a barrier, in order.
    waiting: VecDeque<u32>,
    /// Answered but not yet released reads of this round.
    reads: Vec<u32>,
    /// A barrier is running: nothing may pass it.
    barrier: bool,
    unpublished: u32,
    spurious: u32,
    table: Vec<u8>,
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
            reads: Vec::with_capacity(slots),
            barrier: false,
            unpublished: 0,
            spurious: 0,
            table: vec![0; rings::PAGE_SIZE],
        }
    }
}

impl<P: Abi> Worker<P> {
    /// Serves until told to stop or until the frontend breaks the protocol; then waits for what
    /// is in flight and unmaps.
    pub(super) fn run(mut self) -> Result<(), Fault> {
        let result = self.serve();
        let drained = self.drain();
        // The disk's queue goes first: nothing may be in flight when pages are unmapped.
        drop(self.disk);
        self.memory.close();
        result.and(drained)
    }

    fn serve(&mut self) -> Result<(), Fault> {
        while !self.shared.stopping() {
            let worked = self.round()?;
            if worked {
                self.poller.worked(&self.counters);
                continue;
            }
            if self.disk.in_flight() == 0 && self.poller.spin(&self.counters) {
                continue;
            }
            self.sleep()?;
        }
        Ok(())
    }

    /// One round; whether there was anything to do.
    fn round(&mut self) -> Result<bool, Fault> {
        self.reap()?;
        let taken = self.take()?;
        let done = !self.run.done.is_empty();
        self.run.done.clear();
        self.publish()?;
        if taken == 0 && !done {
            return Ok(false);
        }
        self.run.spurious = 0;
        Ok(true)
    }

    fn read_clock(&mut self) {
        self.run.now = self.run.clock.elapsed().as_nanos() as u64;
    }

    // ---- from the ring to the disk

    fn take(&mut self) -> Result<usize, Fault> {
        let mut taken = 0;
        let mut table_pages = 0;
        while taken < BATCH && table_pages < TABLE_PAGES - 8 && self.run.waiting.is_empty() {
            let Some(entry) = self.ring.take().map_err(|e| self.corrupt(&e))? else { break };
            if taken == 0 {
                self.read_clock();
            }
            taken += 1;
            let slot = self.slots.hold(entry.slot);
            self.accept(slot, &P::parse(&entry.req), &mut table_pages);
        }
        self.fetch_tables()?;
        if !self.run.fresh.is_empty() || !self.run.waiting.is_empty() {
            self.start()?;
        }
        Ok(taken)
    }

    fn corrupt(&self, e: &rings::Corrupt) -> Fault {
        Fault(format!("{}: {e}", self.name))
    }

    /// Checks one request and gives it its slot.
    fn accept(&mut self, slot: u32, request: &proto::Request, table_pages: &mut usize) {
        self.limits.sectors = self.shared.sectors();
        let fill = Slot {
            stage: Stage::Taken,
            work: Work::Read,
            op: request.echo(),
            id: request.id,
            offset: 0,
            len: 0,
            segments: 0,
            status: status::OKAY,
            taken_at: self.run.now,
        };
        *self.slots.get_mut(slot) = fill;
        match proto::validate(request, &self.limits) {
            Err(refusal) => self.answer(slot, refusal.status()),
            Ok(Checked::Inline { work, range, segments }) => {
                self.set(slot, work.into(), range);
                self.fill(slot, segments.iter().copied());
                self.run.fresh.push(slot);
            }
            Ok(Checked::Indirect(indirect)) => {
                self.counters.indirect.add(1);
                self.run.tables.push((slot, indirect, *table_pages));
                *table_pages += indirect.pages();
            }
            Ok(Checked::Flush) => {
                self.set(slot, Work::Flush, 0..0);
                self.run.fresh.push(slot);
            }
            Ok(Checked::Discard { range, secure }) => {
                let work = if secure { Work::SecureDiscard } else { Work::Discard };
                self.set(slot, work, range);
                self.run.fresh.push(slot);
            }
        }
    }

    fn set(&mut self, slot: u32, work: Work, range: std::ops::Range<u64>) {
        let s = self.slots.get_mut(slot);
        (s.work, s.offset, s.len) = (work, range.start, range.end - range.start);
    }

    fn fill(&mut self, slot: u32, segments: impl Iterator<Item = Segment>) {
        let mut count = 0;
        for (piece, segment) in self.slots.room(slot).iter_mut().zip(segments) {
            (piece.segment, piece.place) = (segment, Place::Nowhere);
            count += 1;
        }
        self.slots.get_mut(slot).segments = count;
    }

    /// Brings the batch's indirect tables here, once, and reads their segments.
    fn fetch_tables(&mut self) -> Result<(), Fault> {
        if self.run.tables.is_empty() {
            return Ok(());
        }
        let tables = std::mem::take(&mut self.run.tables);
        for (slot, indirect, first) in &tables {
            for (i, (gref, bytes)) in indirect.tables().enumerate() {
                self.memory.queue_table(*slot, gref, first + i, bytes);
            }
        }
        let slots = &mut self.slots;
        self.memory.copy(|slot, _| slots.get_mut(slot).status = status::ERROR)?;
        for (slot, indirect, first) in &tables {
            self.read_table(*slot, indirect, *first);
        }
        self.run.tables = tables;
        self.run.tables.clear();
        Ok(())
    }

    fn read_table(&mut self, slot: u32, indirect: &proto::Indirect, first: usize) {
        if self.slots.get(slot).status != status::OKAY {
            return self.answer(slot, status::ERROR);
        }
        let (mut table, mut count) = (std::mem::take(&mut self.run.table), 0);
        for (i, (_, bytes)) in indirect.tables().enumerate() {
            self.memory.table(first + i, &mut table[..bytes]);
            let room = &mut self.slots.room(slot)[i * INDIRECT_PER_PAGE..];
            for (piece, segment) in room.iter_mut().zip(proto::segments(&table[..bytes])) {
                (piece.segment, piece.place) = (segment, Place::Nowhere);
                count += 1;
            }
        }
        self.run.table = table;
        self.slots.get_mut(slot).segments = count;
        let all = self.slots.pieces(slot).iter().map(|p| p.segment);
        match proto::validate_indirect(indirect, all, &self.limits) {
            Ok((work, range)) => {
                self.set(slot, work.into(), range);
                self.run.fresh.push(slot);
            }
            Err(refusal) => {
                self.slots.get_mut(slot).segments = 0;
                self.answer(slot, refusal.status());
            }
        }
    }

    /// Places and sends what waits and what is fresh, in order.
    fn start(&mut self) -> Result<(), Fault> {
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
        self.memory.copy(|slot, _| slots.get_mut(slot).status = status::ERROR)?;
        for _ in 0..ready {
            if let Some(slot) = self.run.waiting.pop_front() {
                self.send(slot)?;
            }
        }
        self.disk.submit_all()?;
        Ok(())
    }

    /// A barrier waits until it is alone; nothing starts beside one.
    fn may_start(&self, slot: u32, started: usize) -> bool {
        let alone = started == 0 && self.disk.in_flight() == 0;
        !self.run.barrier && (alone || self.slots.get(slot).work != Work::Barrier)
    }

    fn place(&mut self, slot: u32) -> bool {
        let direction = match self.slots.get(slot).work {
            Work::Read => Direction::ToGrant,
            _ => Direction::FromGrant,
        };
        self.memory.place(slot, self.slots.pieces(slot), direction, self.run.now).is_ok()
    }

    fn send(&mut self, slot: u32) -> Result<(), Fault> {
        if self.slots.get(slot).status != status::OKAY {
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
        // One request a slot, and the queue was made for as many.
        self.disk.submit(&request).map_err(|_| Fault(format!("{}: the disk is full", self.name)))
    }

    // ---- from the disk to the ring

    fn reap(&mut self) -> Result<(), Fault> {
        self.disk.poll(&mut self.run.done)?;
        if self.run.done.is_empty() {
            return Ok(());
        }
        self.read_clock();
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
        let s = self.slots.get_mut(slot);
        if errno != 0 {
            s.status = proto::status_of(errno);
        } else if s.stage == Stage::PreFlush {
            s.stage = Stage::Running;
            if s.segments > 0 {
                let op = if s.work == Work::Barrier { Op::WriteFua } else { Op::Write };
                return self.submit(slot, op);
            }
        }
        let s = self.slots.get(slot);
        let to_copy = s.work == Work::Read && s.status == status::OKAY;
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
        self.memory.copy(|slot, _| slots.get_mut(slot).status = status::ERROR)?;
        for at in 0..self.run.reads.len() {
            self.finish(self.run.reads[at]);
        }
        self.run.reads.clear();
        Ok(())
    }

    /// Gives a slot's memory back and answers it.
    fn finish(&mut self, slot: u32) {
        self.memory.release(self.slots.pieces(slot), self.run.now);
        let s = *self.slots.get(slot);
        self.count(&s);
        if s.work == Work::Barrier {
            self.run.barrier = false;
        }
        self.answer(slot, s.status);
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
        let s = self.slots.get(slot);
        if status != status::OKAY {
            self.counters.errors.add(1);
        }
        let response = P::response(s.id, s.op, status);
        if let Some(token) = self.slots.free(slot) {
            self.ring.respond(token, &response);
            self.run.unpublished += 1;
        }
    }

    fn publish(&mut self) -> Result<(), Fault> {
        if self.run.unpublished == 0 {
            return Ok(());
        }
        self.run.unpublished = 0;
        match self.ring.publish() {
            Notify::Send => self.channel.notify().map_err(Fault::from),
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
        if self.channel.acknowledge()? {
            self.ring.woken();
        }
        if self.ring.arm().map_err(|e| self.corrupt(&e))? == Pending::Work {
            return Ok(());
        }
        self.counters.sleeps.add(1);
        let before = self.run.clock.elapsed().as_nanos() as u64;
        self.memory.expire(before);
        let timeout = self.memory.patience();
        let ready = self.disk.wait(&[self.channel.as_fd(), self.shared.wake()], timeout)?;
        self.read_clock();
        self.poller.slept(self.run.now - before);
        if ready & 1 != 0 {
            self.run.spurious += 1;
        }
        Ok(())
    }

    /// Waits for all that is in flight and answers it, and leaves the disk flushed.
    fn drain(&mut self) -> Result<(), Fault> {
        while self.disk.in_flight() > 0 {
            self.disk.wait(&[], None)?;
            self.reap()?;
            self.run.done.clear();
        }
        self.publish()?;
        let request =
            blktap::Request { op: Op::Flush, offset: 0, len: 0, bufs: &[], token: u64::MAX };
        if self.disk.submit(&request).is_ok() {
            while self.disk.in_flight() > 0 {
                self.disk.wait(&[], None)?;
                self.disk.poll(&mut self.run.done)?;
            }
        }
        let failed = self.run.done.drain(..).find(|done| done.errno != 0);
        match failed {
            Some(done) => Err(io::Error::from_raw_os_error(done.errno).into()),
            None => Ok(()),
        }
    }
}
