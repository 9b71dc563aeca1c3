//! One ring of a frontend: requests in, answers out, each answer checked as Linux's blkfront does.

mod answers;
mod issue;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blktap::{DiskQueue, Done, Full, IoBuf, Op, Request as DiskRequest};
use hypervisor::{EventChannel, GrantedPages};
use perf::Handle;
use rings::{FrontRing, Notify, Pending, RingCounters};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::pages::{Chain, Pages, Region};
use super::shared::Shared;
use crate::counters::QueueCounters;
use crate::negotiate::Protocol;
use crate::proto::{self, Abi, Native, Ring, Segment, WireSegment, X86_32, X86_64};
use hypervisor::xenbus::front::Stage;
use perf::polling::Poller;

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

    fn publish(&mut self) -> io::Result<()> {
        self.advance();
        match self.ring.publish() {
            Notify::Skip => Ok(()),
            Notify::Send => self.channel.notify(),
        }
    }

    /// Sleeps until something happens: a bit for each of `fds`.
    fn sleep(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        // What is disabled stays readable, and would let nobody sleep any more.
        let own = if self.shared.health.stage() == Stage::Broken { 0 } else { 2 };
        let limit = timeout.and_then(|t| Timespec::try_from(t).ok());
        self.counters.sleeps.add(1);
        let before = Instant::now();
        // Most sleep for the ring alone, and a long list takes as long to make as the call.
        let woken = match fds.len() {
            0 => self.poll_fds::<2>(own, fds, limit.as_ref()),
            _ => self.poll_fds::<{ MAX_FDS + 2 }>(own, fds, limit.as_ref()),
        };
        let bits = match woken {
            Ok(bits) => bits,
            Err(Errno::INTR) => return Ok(0),
            Err(e) => return Err(e.into()),
        };
        self.poller.slept(before.elapsed().as_nanos() as u64);
        if own > 0 && bits & 1 != 0 {
            match self.channel.acknowledge() {
                Ok(true) => self.ring.woken(),
                Ok(false) => {}
                Err(e) => self.shared.health.fail(format!("{}: event channel: {e}", self.name)),
            }
        }
        Ok((bits >> own) as u64)
    }

    /// A bit each for the port and the device's news (`own` of them), and for each of `fds`, in
    /// a list of `N`.
    fn poll_fds<const N: usize>(
        &self,
        own: usize,
        fds: &[BorrowedFd<'_>],
        limit: Option<&Timespec>,
    ) -> Result<u128, Errno> {
        let event = self.channel.as_fd();
        let all = |i: usize| match i {
            0 if own > 0 => event,
            1 if own > 0 => self.shared.health.wake(),
            _ => fds.get(i - own).copied().unwrap_or(event),
        };
        let mut polls: [PollFd<'_>; N] =
            std::array::from_fn(|i| PollFd::from_borrowed_fd(all(i), PollFlags::IN));
        let polls = &mut polls[..fds.len() + own];
        poll(polls, limit)?;
        let hits = polls.iter().enumerate().filter(|(_, p)| !p.revents().is_empty());
        Ok(hits.fold(0, |bits, (at, _)| bits | 1 << at))
    }

    fn look(&mut self) -> Pending {
        // What is wrong with the ring is found again, and reported, by `reap`.
        self.ring.poll().unwrap_or(Pending::Work)
    }
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
                    self.counters.polls_paid.add(u64::from(self.poller.worked()));
                    self.reap();
                    // Answers may have made room for what had to wait.
                    self.publish()?;
                } else if !self.poller.spin() {
                    break;
                }
            }
        }
        let broken = self.shared.health.stage() == Stage::Broken;
        if broken {
            self.reap();
        }
        if !self.done.is_empty() {
            return if fds.is_empty() { Ok(0) } else { self.sleep(fds, Some(Duration::ZERO)) };
        }
        if !broken && self.ring.arm() != Ok(Pending::Nothing) {
            self.reap();
            return self.publish().map(|()| 0);
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
        while self.in_use > 0 && self.shared.health.stage() != Stage::Broken {
            if self.wait(&[], Some(Duration::from_millis(100))).is_err() {
                return false;
            }
            self.reap();
        }
        self.done.clear();
        self.shared.health.stage() == Stage::Connected
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
