//! A queue of an NBD disk: requests out, replies in, over one connection; a new one when it is
//! lost.

mod receive;
mod reconnect;
mod send;
mod slots;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::shared::{Member, Shared};
use crate::disk::{DiskQueue, Done, Full, Geometry, MAX_SEGMENTS, Op, Request, check_range};
use crate::export::nbd::proto::can;
use receive::Input;
use reconnect::Reconnect;
use slots::Slots;

/// Most foreign descriptors of one wait.
const MAX_FDS: usize = 64;
/// How soon a thread that could not be started is tried again.
const RETRY: Duration = Duration::from_millis(10);
/// A longer timeout is cut: clocks overflow.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 86400);

/// The connection.
enum Link {
    Up(Member),
    /// A thread connects; requests wait until `end`.
    Lost {
        reconnect: Option<Reconnect>,
        end: Instant,
    },
}

/// See the module.
pub(super) struct NbdQueue {
    shared: Arc<Shared>,
    geometry: Geometry,
    link: Link,
    slots: Slots,
    /// Requests that are to be sent, and how much of the first one was.
    out: VecDeque<u32>,
    sent: usize,
    /// Whether TLS has bytes that the socket did not take.
    unsent: bool,
    input: Input,
    done: Vec<Done>,
    spare: Arc<Mutex<Option<Member>>>,
}

impl NbdQueue {
    pub fn new(
        shared: Arc<Shared>,
        member: Member,
        geometry: Geometry,
        depth: u32,
        spare: Arc<Mutex<Option<Member>>>,
    ) -> io::Result<NbdQueue> {
        Ok(NbdQueue {
            shared,
            geometry,
            link: Link::Up(member),
            slots: Slots::new(depth),
            out: VecDeque::with_capacity(depth as usize),
            sent: 0,
            unsent: false,
            input: Input::new(),
            done: Vec::with_capacity(depth as usize),
            spare,
        })
    }

    /// The answer to what need not, or cannot, be sent.
    fn judge(&self, r: &Request<'_>) -> Option<i32> {
        if r.op == Op::Flush {
            let nothing = self.geometry.read_only || !self.can(can::FLUSH);
            return Some(self.shared.lost()).filter(|lost| *lost != 0 || nothing);
        }
        let logical = u64::from(self.geometry.logical_block);
        if let Err(errno) = check_range(r, self.geometry.size, logical) {
            return Some(errno);
        }
        if r.op != Op::Read && self.geometry.read_only {
            return Some(libc::EROFS);
        }
        let transfer = matches!(r.op, Op::Read | Op::Write | Op::WriteFua);
        let sum = r.bufs.iter().try_fold(0u64, |sum, b| sum.checked_add(b.len() as u64));
        if transfer && (sum != Some(r.len) || r.bufs.len() > MAX_SEGMENTS) {
            return Some(libc::EINVAL);
        }
        match r.op {
            Op::SecureDiscard => Some(libc::EOPNOTSUPP),
            Op::Discard if !self.can(can::TRIM) => Some(libc::EOPNOTSUPP),
            _ if r.len == 0 => Some(0),
            _ => None,
        }
    }

    fn can(&self, flag: u16) -> bool {
        self.shared.facts().flags & flag != 0
    }

    /// Sends and receives what can be without waiting.
    fn pump(&mut self) {
        self.come_back();
        let result = match &self.link {
            Link::Up(_) => self.send().and_then(|()| self.receive()),
            Link::Lost { .. } => Ok(()),
        };
        if let Err(e) = result {
            self.lose(&e);
        }
        self.give_up();
    }

    fn in_flight_now(&self) -> usize {
        self.slots.used() + self.done.len()
    }

    /// How long to sleep at most.
    fn limit(&self, timeout: Option<Duration>) -> Option<Duration> {
        let waits = match &self.link {
            Link::Lost { end, .. } if self.slots.used() > 0 => {
                Some(end.saturating_duration_since(Instant::now()))
            }
            _ => None,
        };
        let zero = (!self.done.is_empty()).then_some(Duration::ZERO);
        [timeout.map(|t| t.min(LONGEST_WAIT)), waits, zero].into_iter().flatten().min()
    }

    /// Sleeps once: a bit for each of `fds`, and whether anything woke it.
    fn sleep(&self, fds: &[BorrowedFd<'_>], limit: Option<Duration>) -> io::Result<(u64, bool)> {
        let (own, what) = match &self.link {
            Link::Up(member) if self.is_sent() => (member.transport.as_fd(), PollFlags::IN),
            Link::Up(member) => (member.transport.as_fd(), PollFlags::IN | PollFlags::OUT),
            Link::Lost { reconnect: Some(thread), .. } => (thread.as_fd(), PollFlags::IN),
            Link::Lost { reconnect: None, .. } => {
                std::thread::sleep(RETRY);
                return Ok((0, true));
            }
        };
        let mut polls: [PollFd<'_>; MAX_FDS + 1] = std::array::from_fn(|at| match at {
            0 => PollFd::from_borrowed_fd(own, what),
            _ => {
                let fd = fds.get(at - 1).copied().unwrap_or(own);
                PollFd::from_borrowed_fd(fd, PollFlags::IN)
            }
        });
        let polls = &mut polls[..=fds.len()];
        let limit = limit.map(|t| Timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(t.subsec_nanos()),
        });
        match poll(polls, limit.as_ref()) {
            Ok(n) => {
                let hits = polls[1..].iter().enumerate().filter(|(_, p)| !p.revents().is_empty());
                Ok((hits.fold(0, |bits, (at, _)| bits | 1 << at), n > 0))
            }
            Err(Errno::INTR) => Ok((0, true)),
            Err(e) => Err(e.into()),
        }
    }
}

impl DiskQueue for NbdQueue {
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if self.in_flight_now() >= self.slots.depth() {
            return Err(Full);
        }
        self.come_back();
        let away = matches!(&self.link, Link::Lost { end, .. } if *end <= Instant::now());
        let answer = self.judge(request).or(away.then_some(libc::EIO));
        if let Some(errno) = answer {
            self.done.push(Done { token: request.token, errno });
            return Ok(());
        }
        let slot = self.slots.take(request, self.shared.changes()).ok_or(Full)?;
        self.prepare(slot);
        Ok(())
    }
    fn submit_all(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            self.pump();
        }
        Ok(())
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        if self.slots.used() > 0 {
            self.pump();
        }
        done.append(&mut self.done);
        Ok(())
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        if fds.len() > MAX_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 64 descriptors"));
        }
        let deadline = timeout.map(|t| Instant::now() + t.min(LONGEST_WAIT));
        self.pump();
        loop {
            if fds.is_empty()
                && self.slots.used() == 0
                && (timeout.is_none() || !self.done.is_empty())
            {
                return Ok(0);
            }
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            let (bits, woken) = self.sleep(fds, self.limit(left))?;
            self.pump();
            let late = deadline.is_some_and(|end| end <= Instant::now());
            if bits != 0 || !self.done.is_empty() || late {
                return Ok(bits);
            }
            if !woken && self.slots.used() == 0 && timeout.is_none() && fds.is_empty() {
                return Ok(0);
            }
        }
    }
    fn in_flight(&self) -> u32 {
        self.in_flight_now() as u32
    }
}

impl Drop for NbdQueue {
    fn drop(&mut self) {
        while self.slots.used() > 0 {
            self.done.clear();
            if let Err(e) = self.wait(&[], None) {
                // Nobody reads or writes the buffers but this thread.
                tracing::warn!("nbd: dropping a queue with requests: {e}");
                break;
            }
        }
        let shared = Arc::clone(&self.shared);
        if let Link::Up(_) = &self.link {
            let lost = Link::Lost { reconnect: None, end: Instant::now() };
            if let Link::Up(member) = std::mem::replace(&mut self.link, lost) {
                shared.leave(member, &self.spare);
            }
        }
    }
}
