//! One thread's queue of a live disk.
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use perf::Handle;

use super::control::{Mode, Shared, Station, Wanted};
use super::fan;
use super::tracked::Requests;
use crate::disk::{Disk, DiskQueue, Done, Full, Request, wait_for};
use crate::engine::EngineCounters;
use crate::filters::priority::Priority;

/// No generation.
const NEVER: u64 = u64::MAX;
/// How long to wait before a queue that could not be made is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// A queue of a [`LiveDisk`](super::LiveDisk).
pub(super) struct LiveQueue {
    /// First: dropped before the requests whose memory it uses.
    inner: Option<Box<dyn DiskQueue>>,
    requests: Requests,
    /// While this is the generation, requests pass through.
    pass_at: u64,
    /// The last generation that was looked at.
    seen: u64,
    wanted: Wanted,
    /// How the queue works now.
    mode: Mode,
    reported: bool,
    /// Whether a request was refused since the last wait, though there is room.
    refused: bool,
    /// When to try again to make a queue of the disk.
    again: Option<Instant>,
    depth: u32,
    priority: Option<Priority>,
    /// Whether the queue is about to be dropped.
    hurries: bool,
    shared: Arc<Shared>,
    station: Arc<Station>,
    counters: Option<Handle<EngineCounters>>,
}

impl LiveQueue {
    pub(super) fn new(shared: Arc<Shared>, depth: u32) -> io::Result<LiveQueue> {
        let (station, seen, wanted) = shared.enter()?;
        let mut queue = LiveQueue {
            inner: None,
            requests: Requests::new(Arc::clone(&station), depth),
            pass_at: NEVER,
            seen,
            wanted,
            mode: Mode::Paused,
            reported: false,
            refused: false,
            again: None,
            depth,
            priority: None,
            hurries: false,
            shared,
            station,
            counters: None,
        };
        if queue.wanted.mode() != Mode::Paused {
            queue.inner = Some(queue.make()?);
        }
        queue.settle();
        Ok(queue)
    }

    /// A queue of the present disk.
    fn make(&self) -> io::Result<Box<dyn DiskQueue>> {
        let current = self.shared.current.read();
        let disk: &Arc<dyn Disk> = current.as_ref().ok_or_else(super::no_disk)?;
        let mut inner = disk.queue(self.depth)?;
        if let Some(counters) = &self.counters {
            inner.count_in(counters.clone());
        }
        if let Some(priority) = self.priority {
            inner.prioritize(priority);
        }
        Ok(inner)
    }

    /// Looks whether something else is wanted, and goes as far towards it as what is in flight
    /// allows. Before anything that was polled could lead to new requests.
    fn look(&mut self) {
        if self.shared.generation() != self.seen {
            (self.seen, self.wanted) = self.shared.look();
            (self.pass_at, self.reported) = (NEVER, false);
            if self.mode == Mode::Tracked {
                match &self.wanted {
                    Wanted::Tracked(tracking) => self.requests.adopt(tracking),
                    Wanted::Pass => self.requests.release(),
                    // What is held goes on by the rules that are in force.
                    Wanted::Paused => {}
                }
            }
        }
        if !self.reported {
            self.settle();
        }
    }

    fn settle(&mut self) {
        let wanted = self.wanted.mode();
        if self.mode != wanted && !self.switch(wanted) {
            return;
        }
        if self.mode == Mode::Tracked && self.requests.changes_in_window() {
            return;
        }
        self.reported = true;
        self.shared.report(&self.station, self.seen);
        if self.mode == Mode::Pass {
            self.pass_at = self.seen;
        }
    }

    /// Goes over to another way of working; `false`: not yet.
    fn switch(&mut self, wanted: Mode) -> bool {
        if self.in_flight() > 0 {
            return false;
        }
        if wanted == Mode::Paused {
            self.inner = None;
        } else if self.inner.is_none() {
            if self.again.is_some_and(|again| Instant::now() < again) {
                return false;
            }
            match self.make() {
                Ok(inner) => (self.inner, self.again) = (Some(inner), None),
                Err(e) => {
                    tracing::error!("a queue of a live disk, which is tried again: {e}");
                    self.again = Some(Instant::now() + AGAIN);
                    return false;
                }
            }
        }
        match &self.wanted {
            Wanted::Tracked(tracking) => self.requests.adopt(tracking),
            _ => self.requests.forget(),
        }
        self.mode = wanted;
        true
    }

    fn passes(&self) -> bool {
        self.shared.generation() == self.pass_at
    }

    fn submit_slowly(&mut self, request: &Request<'_>) -> Result<(), Full> {
        self.look();
        let result = match (&mut self.inner, self.mode) {
            _ if self.mode != self.wanted.mode() => Err(Full),
            (Some(inner), Mode::Pass) => inner.submit(request),
            (Some(inner), Mode::Tracked) => self.requests.submit(&mut **inner, request),
            _ => Err(Full),
        };
        let held_up = self.mode != self.wanted.mode() || self.mode == Mode::Paused;
        self.refused |= result.is_err() && held_up;
        result
    }

    /// How long a sleep may last.
    fn limit(&self, timeout: Option<Duration>) -> Option<Duration> {
        let again = self.again.map(|again| again.saturating_duration_since(Instant::now()));
        let ready = self.requests.has_ready().then_some(Duration::ZERO);
        [timeout, again, ready].into_iter().flatten().min()
    }
}

impl DiskQueue for LiveQueue {
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        match &mut self.inner {
            Some(inner) if self.shared.generation() == self.pass_at => inner.submit(request),
            _ => self.submit_slowly(request),
        }
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.inner.as_mut().map_or(Ok(()), |inner| inner.submit_all())
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        if !self.passes() {
            self.look();
        }
        match (&mut self.inner, self.mode) {
            (Some(inner), Mode::Tracked) => self.requests.poll(&mut **inner, done),
            (Some(inner), _) => inner.poll(done),
            (None, _) => Ok(()),
        }
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        if !self.passes() {
            self.look();
        }
        let refused = std::mem::take(&mut self.refused);
        if fds.is_empty() && timeout.is_none() && self.in_flight() == 0 && !refused {
            return Ok(0);
        }
        if refused && self.mode == self.wanted.mode() && self.mode != Mode::Paused {
            // It has gone on meanwhile.
            return Ok(0);
        }
        if self.hurries && self.inner.is_none() && self.in_flight() == 0 {
            return Err(super::no_disk());
        }
        let timeout = self.limit(timeout);
        let event = self.station.event();
        let inner = &mut self.inner;
        let bits = fan::with_one_more(fds, event, |all| match inner {
            Some(inner) => inner.wait(all, timeout),
            None => wait_for(all, timeout),
        })?;
        if bits & 1 << fds.len() != 0 {
            self.station.calm();
        }
        Ok(bits & !(1 << fds.len()))
    }
    fn unwatch(&mut self) -> io::Result<()> {
        self.inner.as_mut().map_or(Ok(()), |inner| inner.unwatch())
    }
    fn hurry(&mut self) {
        self.hurries = true;
        if let Some(inner) = &mut self.inner {
            inner.hurry();
        }
    }
    fn prioritize(&mut self, priority: Priority) {
        self.priority = Some(priority);
        if let Some(inner) = &mut self.inner {
            inner.prioritize(priority);
        }
    }
    fn in_flight(&self) -> u32 {
        match (&self.inner, self.mode) {
            (_, Mode::Tracked) => self.requests.in_flight(),
            (Some(inner), _) => inner.in_flight(),
            (None, _) => 0,
        }
    }
    fn counters(&self) -> Option<Handle<EngineCounters>> {
        self.inner.as_ref().and_then(|inner| inner.counters())
    }
    fn count_in(&mut self, counters: Handle<EngineCounters>) {
        if let Some(inner) = &mut self.inner {
            inner.count_in(counters.clone());
        }
        self.counters = Some(counters);
    }
}

impl Drop for LiveQueue {
    fn drop(&mut self) {
        // What it took is carried out, except what a job holds back.
        self.inner = None;
        self.requests.wait_for_second();
        self.shared.leave(&self.station);
    }
}
