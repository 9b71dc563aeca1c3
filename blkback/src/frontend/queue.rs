//! One ring of a frontend: requests in, answers out, each answer checked as Linux's blkfront does.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blktap::{DiskQueue, Done, Full, IoBuf, MAX_SEGMENTS, Op, Request as DiskRequest};
use hypervisor::{EventChannel, GrantedPages};
use perf::Handle;
use rings::{FrontRing, Notify, Pending, RingCounters};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::pages::{Chain, Cursor, Pages, Region, Way};
use super::shared::{Shared, Stage};
use crate::counters::QueueCounters;
use crate::negotiate::Protocol;
use crate::proto::{
    self, Abi, Body, DISCARD_SECURE, DirectOp, Native, RSP_EOPNOTSUPP, RSP_OKAY, Request, Ring,
    SECTOR, Segment, WireSegment, X86_32, X86_64,
};
use crate::queue::poll::Poller;
use rings::PAGE_SIZE;

/// Most descriptors beside the queue's own in one `wait`.
const MAX_FDS: usize = 64;

/// What a ring is made of.
pub(super) struct Parts {
    pub name: String,
    pub ring: Arc<dyn GrantedPages>,
    pub channel: Box<dyn EventChannel>,
    pub payload: Arc<dyn GrantedPages>,
    pub shared: Arc<Shared>,
    /// Segments that an indirect request may have; 0 where there are none.
    pub max_indirect: usize,
    pub poll_us: u32,
    pub ring_counters: Handle<RingCounters>,
    pub counters: Handle<QueueCounters>,
}

/// A queue whose ABI does not matter to its user.
pub(super) trait AnyQueue: DiskQueue {
    /// Holds at most `depth` requests from now on.
    fn set_depth(&mut self, depth: u32);
    /// Waits until nothing is in flight and says whether the queue can be used again.
    fn drain(&mut self) -> bool;
}

/// How a job's bytes reach the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Payload {
    /// By copy through the queue's pages.
    Copied,
    /// The caller's memory is granted.
    Granted,
    /// One page of zeroes, again and again.
    Zeroes,
    /// There is none.
    Without,
}

/// A caller's request; it becomes one or more requests in the ring.
struct Job {
    used: bool,
    op: Op,
    offset: u64,
    len: u64,
    token: u64,
    payload: Payload,
    bufs: Vec<IoBuf>,
    /// Bytes that are in the ring or answered.
    issued: u64,
    /// Requests in the ring.
    calls: u32,
    errno: i32,
    /// A flush must follow.
    flush_after: bool,
}

/// A request in the ring.
#[derive(Clone, Copy)]
struct Call {
    id: u64,
    used: bool,
    operation: u8,
    job: u32,
    chain: Chain,
    /// The part of the job's buffers.
    skip: u64,
    len: u64,
}

/// See the module.
pub(super) struct Queue<A: Abi> {
    name: String,
    ring: FrontRing<Ring<A>, Arc<dyn GrantedPages>>,
    channel: Box<dyn EventChannel>,
    shared: Arc<Shared>,
    pages: Pages,
    zeroes: Chain,
    regions: Vec<Region>,
    regions_seen: u64,
    jobs: Vec<Job>,
    free_jobs: Vec<u32>,
    /// The job that is not wholly in the ring; nothing passes it.
    staged: Option<u32>,
    /// Jobs whose flush waits for room.
    flushes: Vec<u32>,
    calls: Vec<Call>,
    free_calls: Vec<u32>,
    done: Vec<Done>,
    segments: Vec<Segment>,
    table: Vec<WireSegment>,
    max_segments: usize,
    depth: usize,
    in_use: usize,
    poller: Poller,
    counters: Handle<QueueCounters>,
}

fn unfit(e: rings::SizeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, e.to_string())
}

/// Makes granted pages an empty ring, before the backend maps them.
pub(super) fn initialise(protocol: Protocol, memory: Arc<dyn GrantedPages>) -> io::Result<()> {
    fn as_ring<A: Abi>(memory: Arc<dyn GrantedPages>) -> io::Result<()> {
        FrontRing::<Ring<A>, _>::init(memory, Handle::default()).map(drop).map_err(unfit)
    }
    match protocol {
        Protocol::X86_64 => as_ring::<X86_64>(memory),
        Protocol::X86_32 => as_ring::<X86_32>(memory),
        Protocol::Native => as_ring::<Native>(memory),
    }
}

fn io_error() -> i32 {
    Errno::IO.raw_os_error()
}

impl<A: Abi> Queue<A> {
    pub(super) fn new(parts: Parts) -> io::Result<Queue<A>> {
        let ring = FrontRing::attach(parts.ring, 0, parts.ring_counters).map_err(unfit)?;
        let slots = ring.slots();
        let job = || Job {
            used: false,
            op: Op::Flush,
            offset: 0,
            len: 0,
            token: 0,
            payload: Payload::Without,
            bufs: Vec::with_capacity(16),
            issued: 0,
            calls: 0,
            errno: 0,
            flush_after: false,
        };
        let call = |index| Call {
            id: index,
            used: false,
            operation: 0,
            job: 0,
            chain: Chain::EMPTY,
            skip: 0,
            len: 0,
        };
        let max_segments = parts.max_indirect.max(proto::MAX_SEGMENTS);
        let mut pages = Pages::new(parts.payload);
        let zeroes = pages.take(1);
        Ok(Queue {
            name: parts.name,
            ring,
            channel: parts.channel,
            shared: parts.shared,
            pages,
            zeroes,
            regions: Vec::new(),
            regions_seen: 0,
            jobs: (0..slots).map(|_| job()).collect(),
            free_jobs: (0..slots).rev().collect(),
            staged: None,
            flushes: Vec::with_capacity(slots as usize),
            calls: (0..u64::from(slots)).map(call).collect(),
            free_calls: (0..slots).rev().collect(),
            done: Vec::with_capacity(slots as usize),
            segments: Vec::with_capacity(max_segments),
            table: Vec::with_capacity(max_segments),
            max_segments,
            depth: slots as usize,
            in_use: 0,
            poller: Poller::new(parts.poll_us),
            counters: parts.counters,
        })
    }

    // ---- from the caller to the ring

    /// What can be said of a request without asking the backend.
    fn judge(&self, r: &DiskRequest<'_>) -> Result<Payload, i32> {
        let errno = |e: Errno| Err(e.raw_os_error());
        match self.shared.stage() {
            Stage::Connected => {}
            Stage::Closing => return errno(Errno::NODEV),
            Stage::Broken => return errno(Errno::IO),
        }
        let info = &self.shared.info;
        if r.op == Op::Flush {
            return Ok(Payload::Without);
        }
        blktap::check_range(r, self.shared.sectors() * SECTOR, u64::from(info.sector_size))?;
        if r.op != Op::Read && info.is_read_only() {
            return errno(Errno::ROFS);
        }
        match r.op {
            Op::Discard if info.discard.is_none() => return errno(Errno::OPNOTSUPP),
            Op::SecureDiscard if !info.secure_discard => return errno(Errno::OPNOTSUPP),
            Op::Discard | Op::SecureDiscard | Op::Flush => return Ok(Payload::Without),
            Op::WriteZeroes => return Ok(Payload::Zeroes),
            Op::Read | Op::Write | Op::WriteFua => {}
        }
        let sum = r.bufs.iter().try_fold(0u64, |sum, b| sum.checked_add(b.len() as u64));
        if sum != Some(r.len) || r.bufs.len() > MAX_SEGMENTS {
            return errno(Errno::INVAL);
        }
        Ok(if self.is_granted(r.bufs) { Payload::Granted } else { Payload::Copied })
    }

    /// Whether all of it lies, in whole sectors, in memory that the backend can reach.
    fn is_granted(&self, bufs: &[IoBuf]) -> bool {
        let sectors = |n: usize| n.is_multiple_of(SECTOR as usize);
        !self.regions.is_empty()
            && bufs.iter().all(|b| {
                let whole = sectors(b.addr() as usize) && sectors(b.len());
                whole && self.regions.iter().any(|r| r.find(b.addr(), b.len()).is_some())
            })
    }

    fn take_job(&mut self, r: &DiskRequest<'_>, payload: Payload) -> Result<u32, Full> {
        let number = self.free_jobs.pop().ok_or(Full)?;
        self.in_use += 1;
        let flush_after = r.op == Op::WriteFua && self.flush_op().is_some();
        let job = &mut self.jobs[number as usize];
        job.bufs.clear();
        job.bufs.extend(r.bufs.iter().filter(|b| !b.is_empty()));
        (job.used, job.op, job.token, job.payload) = (true, r.op, r.token, payload);
        (job.offset, job.len, job.issued) = (r.offset, r.len, 0);
        (job.calls, job.errno) = (0, 0);
        job.flush_after = flush_after;
        Ok(number)
    }

    fn flush_op(&self) -> Option<DirectOp> {
        let info = &self.shared.info;
        match (info.flush, info.barrier) {
            (true, _) => Some(DirectOp::Flush),
            (false, true) => Some(DirectOp::Barrier),
            // Without either the disk has no cache that could be flushed.
            (false, false) => None,
        }
    }

    /// Puts as much of the staged job, and of flushes that wait, into the ring as there is room.
    fn advance(&mut self) {
        while let Some(job) = self.flushes.last().copied() {
            if !self.push_flush(job) {
                return;
            }
            self.flushes.pop();
        }
        while let Some(job) = self.staged {
            if !self.push_part(job) {
                return;
            }
            let j = &self.jobs[job as usize];
            if j.issued == j.len {
                self.staged = None;
            }
        }
    }

    fn push_flush(&mut self, job: u32) -> bool {
        let Some(op) = self.flush_op() else { return false };
        let body =
            Body::Direct { op, sector: 0, nr_segments: 0, segments: [Segment::default(); 11] };
        self.push(job, op.code(), Chain::EMPTY, 0, body)
    }

    /// The next part of a job; `false` where there is no room.
    fn push_part(&mut self, number: u32) -> bool {
        let job = &self.jobs[number as usize];
        match job.op {
            Op::Flush => self.push_flush(number),
            Op::Discard | Op::SecureDiscard => {
                let flag = if job.op == Op::SecureDiscard { DISCARD_SECURE } else { 0 };
                let (sector, count, len) = (job.offset / SECTOR, job.len / SECTOR, job.len);
                let body = Body::Discard { sector, count, flag };
                self.push(number, proto::OP_DISCARD, Chain::EMPTY, len, body)
            }
            Op::Read => self.push_transfer(number, DirectOp::Read),
            Op::Write | Op::WriteFua | Op::WriteZeroes => {
                self.push_transfer(number, DirectOp::Write)
            }
        }
    }

    fn push_transfer(&mut self, number: u32, op: DirectOp) -> bool {
        if self.ring.free() == 0 {
            return false;
        }
        let Some((chain, len)) = self.gather(number) else { return false };
        let job = &self.jobs[number as usize];
        if op == DirectOp::Write && job.payload == Payload::Copied {
            self.pages.copy(chain, &job.bufs, job.issued as usize, len as usize, Way::In);
        }
        let sector = (job.offset + job.issued) / SECTOR;
        let count = self.segments.len();
        if count <= proto::MAX_SEGMENTS {
            let mut segments = [Segment::default(); proto::MAX_SEGMENTS];
            segments[..count].copy_from_slice(&self.segments);
            let body = Body::Direct { op, sector, nr_segments: count as u8, segments };
            return self.push(number, op.code(), chain, len, body);
        }
        self.counters.indirect.add(1);
        self.table.clear();
        self.table.extend(self.segments.iter().map(|s| WireSegment::from(*s)));
        let table = self.pages.take(1);
        self.pages.write(table, self.table.as_bytes());
        let mut grefs = [0; proto::MAX_INDIRECT_PAGES];
        grefs[0] = self.pages.refs(table).next().unwrap_or(0);
        // Behind the payload, which is copied from the chain's beginning.
        let chain = self.pages.join(chain, table);
        let body = Body::Indirect { inner: op.code(), nr_segments: count as u16, sector, grefs };
        self.push(number, op.code(), chain, len, body)
    }

    /// Finds the segments of a job's next part: the pages taken for it and its bytes. `None`
    /// where there are not enough pages.
    fn gather(&mut self, number: u32) -> Option<(Chain, u64)> {
        let job = &self.jobs[number as usize];
        let left = job.len - job.issued;
        self.segments.clear();
        if job.payload == Payload::Granted {
            // One more for a table.
            let room = self.pages.free() > 0;
            return room.then(|| (Chain::EMPTY, self.gather_granted(number)));
        }
        let len = left.min((self.max_segments * PAGE_SIZE) as u64);
        let count = (len as usize).div_ceil(PAGE_SIZE);
        let table = usize::from(count > proto::MAX_SEGMENTS);
        let owned = if job.payload == Payload::Copied { count } else { 0 };
        if owned + table > self.pages.free() {
            return None;
        }
        let chain = self.pages.take(owned);
        let zero = self.pages.refs(self.zeroes).next().unwrap_or(0);
        let refs = self.pages.refs(chain).chain(std::iter::repeat(zero));
        for (at, gref) in refs.take(count).enumerate() {
            let bytes = (len as usize - at * PAGE_SIZE).min(PAGE_SIZE);
            self.segments.push(segment(gref, 0, bytes));
        }
        Some((chain, len))
    }

    /// As [`gather`](Self::gather), of memory that is granted: each piece of a page a segment.
    fn gather_granted(&mut self, number: u32) -> u64 {
        let job = &self.jobs[number as usize];
        let mut caller = Cursor::at(&job.bufs, job.issued as usize);
        let (mut len, left) = (0, (job.len - job.issued) as usize);
        while len < left && self.segments.len() < self.max_segments {
            let Some((addr, room)) = caller.room() else { break };
            let to_end = PAGE_SIZE - addr as usize % PAGE_SIZE;
            let bytes = room.min(to_end).min(left - len);
            let Some((gref, at)) = self.regions.iter().find_map(|r| r.find(addr, bytes)) else {
                break;
            };
            self.segments.push(segment(gref, at, bytes));
            caller.skip(bytes);
            len += bytes;
        }
        // A request ends at a whole block; segments are whole sectors.
        let block = self.shared.info.sector_size as usize;
        while !len.is_multiple_of(block) {
            let Some(last) = self.segments.last_mut() else { break };
            let excess = (len % block).min(last.len());
            len -= excess;
            match last.len() - excess {
                0 => drop(self.segments.pop()),
                rest => *last = segment(last.gref, last.offset(), rest),
            }
        }
        len as u64
    }

    /// Writes one request into the ring.
    fn push(&mut self, job: u32, operation: u8, chain: Chain, len: u64, body: Body) -> bool {
        let Some(number) = self.free_calls.last().copied().filter(|_| self.ring.free() > 0) else {
            self.pages.give(chain);
            return false;
        };
        let id = self.calls[number as usize].id;
        // One answer for each slot is in flight at most, so the ring has room.
        if self.ring.push(&A::encode(&Request { id, handle: 0, body })).is_err() {
            self.pages.give(chain);
            return false;
        }
        self.free_calls.pop();
        let j = &mut self.jobs[job as usize];
        let skip = j.issued;
        j.issued += len;
        j.calls += 1;
        self.calls[number as usize] = Call { id, used: true, operation, job, chain, skip, len };
        self.count(operation, len);
        true
    }

    fn count(&self, operation: u8, len: u64) {
        let c = &self.counters;
        match operation {
            proto::OP_READ => {
                c.rd_req.add(1);
                c.rd_sect.add(len / SECTOR);
            }
            proto::OP_WRITE => {
                c.wr_req.add(1);
                c.wr_sect.add(len / SECTOR);
            }
            proto::OP_DISCARD => c.ds_req.add(1),
            proto::OP_WRITE_BARRIER => c.barriers.add(1),
            _ => c.f_req.add(1),
        }
    }

    // ---- from the ring to the caller

    /// Takes all answers that are there; whether there was any.
    fn reap(&mut self) -> bool {
        let mut any = false;
        if self.shared.stage() == Stage::Broken {
            return self.give_up();
        }
        loop {
            match self.ring.take() {
                Ok(Some(raw)) => {
                    any = true;
                    if let Err(why) = self.answered(&A::parse_response(&raw)) {
                        self.shared.fail(format!("{}: {why}", self.name));
                        return self.give_up();
                    }
                }
                Ok(None) => break,
                Err(e) => {
                    self.shared.fail(format!("{}: {e}", self.name));
                    return self.give_up();
                }
            }
        }
        if any {
            self.advance();
        }
        any
    }

    fn answered(&mut self, rsp: &proto::Response) -> Result<(), String> {
        let number = (rsp.id & u64::from(u32::MAX)) as usize;
        let known = self.calls.get(number).filter(|c| c.used && c.id == rsp.id);
        let Some(call) = known.copied() else {
            return Err(format!("the backend answered a request {:#x} that is not open", rsp.id));
        };
        if rsp.operation != call.operation {
            return Err(format!(
                "the backend answered operation {} with operation {}",
                call.operation, rsp.operation
            ));
        }
        let errno = match rsp.status {
            RSP_OKAY => 0,
            RSP_EOPNOTSUPP => Errno::OPNOTSUPP.raw_os_error(),
            _ => io_error(),
        };
        let job = &mut self.jobs[call.job as usize];
        if errno == 0 && job.op == Op::Read && job.payload == Payload::Copied {
            let (skip, len) = (call.skip as usize, call.len as usize);
            self.pages.copy(call.chain, &job.bufs, skip, len, Way::Out);
        }
        if errno != 0 {
            self.counters.errors.add(1);
            job.errno = errno;
        }
        job.calls -= 1;
        self.pages.give(call.chain);
        // A second answer to this one does not pass for an answer to the slot's next request.
        let next = call.id.wrapping_add(1 << 32);
        self.calls[number] = Call { id: next, used: false, chain: Chain::EMPTY, ..call };
        self.free_calls.push(number as u32);
        self.settle(call.job);
        Ok(())
    }

    /// Ends a job when all of it is answered.
    fn settle(&mut self, number: u32) {
        let job = &mut self.jobs[number as usize];
        if job.calls > 0 || self.staged == Some(number) {
            // A failed part stops the rest.
            let stop = job.calls == 0 && job.errno != 0;
            if !stop {
                return;
            }
            self.staged = None;
        }
        if std::mem::take(&mut job.flush_after) && job.errno == 0 {
            self.flushes.push(number);
            return;
        }
        self.finish(number);
    }

    fn finish(&mut self, number: u32) {
        let job = &mut self.jobs[number as usize];
        job.used = false;
        job.bufs.clear();
        self.done.push(Done { token: job.token, errno: job.errno });
        self.in_use -= 1;
        self.free_jobs.push(number);
    }

    /// The disk is disabled: nothing that is open will be answered.
    fn give_up(&mut self) -> bool {
        let any = self.in_use > 0;
        self.staged = None;
        self.flushes.clear();
        for number in 0..self.jobs.len() as u32 {
            if self.jobs[number as usize].used {
                self.jobs[number as usize].errno = io_error();
                self.finish(number);
            }
        }
        any
    }

    // ---- waiting

    fn publish(&mut self) -> io::Result<()> {
        self.advance();
        match self.ring.publish() {
            Notify::Skip => Ok(()),
            Notify::Send => self.channel.notify(),
        }
    }

    /// Sleeps until something happens: a bit for each of `fds`.
    fn sleep(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        let limit = timeout.and_then(|t| Timespec::try_from(t).ok());
        self.counters.sleeps.add(1);
        let before = Instant::now();
        // Most sleep for the ring alone, and a long list takes as long to make as the call.
        let woken = match fds.len() {
            0 => self.poll_fds::<2>(fds, limit.as_ref()),
            _ => self.poll_fds::<{ MAX_FDS + 2 }>(fds, limit.as_ref()),
        };
        let bits = match woken {
            Ok(bits) => bits,
            Err(Errno::INTR) => return Ok(0),
            Err(e) => return Err(e.into()),
        };
        self.poller.slept(before.elapsed().as_nanos() as u64);
        if bits & 1 != 0 {
            match self.channel.acknowledge() {
                Ok(true) => self.ring.woken(),
                Ok(false) => {}
                Err(e) => self.shared.fail(format!("{}: event channel: {e}", self.name)),
            }
        }
        Ok((bits >> 2) as u64)
    }

    /// A bit each for the port, the device's news, and each of `fds`, in a list of `N`.
    fn poll_fds<const N: usize>(
        &self,
        fds: &[BorrowedFd<'_>],
        limit: Option<&Timespec>,
    ) -> Result<u128, Errno> {
        let event = self.channel.as_fd();
        let all = |i: usize| match i {
            0 => event,
            1 => self.shared.wake(),
            _ => fds.get(i - 2).copied().unwrap_or(event),
        };
        let mut polls: [PollFd<'_>; N] =
            std::array::from_fn(|i| PollFd::from_borrowed_fd(all(i), PollFlags::IN));
        let polls = &mut polls[..fds.len() + 2];
        poll(polls, limit)?;
        let hits = polls.iter().enumerate().filter(|(_, p)| !p.revents().is_empty());
        Ok(hits.fold(0, |bits, (at, _)| bits | 1 << at))
    }

    fn look(&mut self) -> Pending {
        // What is wrong with the ring is found again, and reported, by `reap`.
        self.ring.poll().unwrap_or(Pending::Work)
    }
}

fn segment(gref: u32, at: usize, bytes: usize) -> Segment {
    let first = at / SECTOR as usize;
    let last = first + bytes / SECTOR as usize - 1;
    Segment { gref, first_sect: first as u8, last_sect: last as u8 }
}

impl<A: Abi> DiskQueue for Queue<A> {
    fn submit(&mut self, request: &DiskRequest<'_>) -> Result<(), Full> {
        if self.staged.is_some() || self.in_use + self.done.len() >= self.depth {
            return Err(Full);
        }
        if self.regions_seen != self.shared.regions.generation() {
            (self.regions, self.regions_seen) = self.shared.regions.all();
        }
        let payload = match self.judge(request) {
            Ok(_) if request.len == 0 && request.op != Op::Flush => Err(0),
            Ok(_) if request.op == Op::Flush && self.flush_op().is_none() => Err(0),
            other => other,
        };
        match payload {
            Err(errno) => self.done.push(Done { token: request.token, errno }),
            Ok(payload) => {
                let job = self.take_job(request, payload)?;
                if request.op == Op::Flush {
                    self.jobs[job as usize].len = 0;
                    if !self.push_flush(job) {
                        self.flushes.push(job);
                    }
                } else {
                    self.staged = Some(job);
                    self.advance();
                }
            }
        }
        Ok(())
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.publish()
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        self.reap();
        self.publish()?;
        done.append(&mut self.done);
        Ok(())
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        if fds.len() > MAX_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 64 descriptors"));
        }
        self.publish()?;
        if self.in_use > 0 && timeout != Some(Duration::ZERO) {
            while self.done.is_empty() {
                if self.look() == Pending::Work {
                    self.poller.worked(&self.counters);
                    self.reap();
                } else if !self.poller.spin(&self.counters) {
                    break;
                }
            }
        }
        let broken = self.shared.stage() == Stage::Broken && self.reap();
        if !self.done.is_empty() || broken {
            return if fds.is_empty() { Ok(0) } else { self.sleep(fds, Some(Duration::ZERO)) };
        }
        match self.ring.arm() {
            Ok(Pending::Nothing) => {}
            Ok(Pending::Work) | Err(_) => {
                self.reap();
                return self.publish().map(|()| 0);
            }
        }
        if self.in_use == 0 && fds.is_empty() && timeout.is_none() {
            return Ok(0);
        }
        self.sleep(fds, timeout)
    }
    fn in_flight(&self) -> u32 {
        (self.in_use + self.done.len()) as u32
    }
}

impl<A: Abi> AnyQueue for Queue<A> {
    fn set_depth(&mut self, depth: u32) {
        self.depth = (depth.max(1) as usize).min(self.jobs.len());
    }
    fn drain(&mut self) -> bool {
        while self.in_use > 0 && self.shared.stage() != Stage::Broken {
            if self.wait(&[], Some(Duration::from_millis(100))).is_err() {
                return false;
            }
            self.reap();
        }
        self.done.clear();
        self.shared.stage() == Stage::Connected
    }
}
