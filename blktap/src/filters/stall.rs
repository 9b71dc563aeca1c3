//! Errors that stop a disk instead of reaching who uses it: the request keeps its place, the disk
//! stands, and when the cause is remedied (a full file system has room again) it is tried once
//! more.
//!
//! A [`Stall`] is what the queues of a disk share. Who knows a request until it is answered asks
//! it for a verdict on each error, and pays nothing for those that succeed: so the block
//! backend's queues do it. [`StallDisk`] keeps the requests for those who do not.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::around::{Around, Wrapped};
use super::bells::{Bells, Flag};
use super::forward_to_below;
use crate::disk::{Disk, DiskQueue, Done, Full, IoBuf, Op, Request};

/// What becomes of a request that has failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// It is answered with the error.
    #[default]
    Report,
    /// It waits, and so does the disk.
    Pause,
}

impl std::str::FromStr for Policy {
    type Err = String;
    fn from_str(text: &str) -> Result<Policy, String> {
        match text {
            "report" => Ok(Policy::Report),
            "pause" => Ok(Policy::Pause),
            _ => Err("write report or pause".into()),
        }
    }
}

/// Which errors stop a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policies {
    /// Errors for which there is no other policy.
    pub on_error: Policy,
    /// No room: ENOSPC and EDQUOT.
    pub on_enospc: Policy,
}

impl Default for Policies {
    /// A full file system stops the disk, as QEMU has it.
    fn default() -> Policies {
        Policies { on_error: Policy::Report, on_enospc: Policy::Pause }
    }
}

impl Policies {
    /// For an errno.
    pub fn of(&self, errno: i32) -> Policy {
        match errno {
            // The request's own fault, which no time heals.
            libc::EINVAL | libc::EROFS | libc::EOPNOTSUPP => Policy::Report,
            libc::ENOSPC | libc::EDQUOT => self.on_enospc,
            _ => self.on_error,
        }
    }
}

/// Why a disk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The first error.
    pub errno: i32,
    /// Requests that have failed and wait.
    pub requests: u64,
}

impl Standing {
    /// The error in words.
    pub fn error(&self) -> String {
        io::Error::from_raw_os_error(self.errno).to_string()
    }
}

struct State {
    policies: Policies,
    standing: Option<Standing>,
}

/// See the module.
pub struct Stall {
    name: String,
    /// As the state has it, for a look without its lock.
    stands: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    bells: Bells,
}

impl Stall {
    /// For the disk that log lines call `name`.
    pub fn new(name: String, policies: Policies) -> Arc<Stall> {
        let state = Mutex::new(State { policies, standing: None });
        let stands = AtomicBool::new(false);
        let (changed, bells) = (Condvar::new(), Bells::default());
        Arc::new(Stall { name, stands, state, changed, bells })
    }

    /// Other policies, for errors that are still to come.
    pub fn set(&self, policies: Policies) {
        self.state.lock().policies = policies;
    }

    /// The end: nothing stops the disk any more, and what waits is tried once more.
    pub fn end(&self) {
        self.set(Policies { on_error: Policy::Report, on_enospc: Policy::Report });
        self.go_on();
    }

    /// Whether requests are to wait.
    pub fn stands(&self) -> bool {
        self.stands.load(Ordering::Acquire)
    }

    /// Why it stands.
    pub fn standing(&self) -> Option<Standing> {
        self.state.lock().standing
    }

    /// Waits until it stands, at most for `limit`.
    pub fn wait(&self, limit: Duration) -> Option<Standing> {
        let mut state = self.state.lock();
        if state.standing.is_none() {
            self.changed.wait_for(&mut state, limit);
        }
        state.standing
    }

    /// What becomes of a request that has failed with `errno`. After [`Policy::Pause`] the caller
    /// keeps it until the disk stands no more.
    pub fn judge(&self, op: Op, offset: u64, len: u64, errno: i32) -> Policy {
        let mut state = self.state.lock();
        let policy = state.policies.of(errno);
        if policy == Policy::Report {
            return policy;
        }
        match &mut state.standing {
            Some(standing) => standing.requests += 1,
            None => {
                let standing = Standing { errno, requests: 1 };
                let (name, error) = (&self.name, standing.error());
                tracing::error!(
                    "{name}: {op:?} of {len} bytes at {offset}: {error}: the disk is paused; when \
                     that is remedied, `ringback disk resume`"
                );
                state.standing = Some(standing);
                self.stands.store(true, Ordering::Release);
                self.changed.notify_all();
            }
        }
        policy
    }

    /// What waits is to be tried again; whether the disk stood. Queues that sleep elsewhere than
    /// in a [`StallDisk`] are woken by the caller.
    pub fn go_on(&self) -> bool {
        let stood = {
            let mut state = self.state.lock();
            self.stands.store(false, Ordering::Release);
            state.standing.take()
        };
        if stood.is_some() {
            tracing::info!("{}: goes on", self.name);
            self.bells.ring();
        }
        stood.is_some()
    }
}

/// A disk that stands where an error is to stop it.
pub struct StallDisk {
    below: Arc<dyn Disk>,
    stall: Arc<Stall>,
}

impl StallDisk {
    /// `below`, stopped by errors as `stall` says.
    pub fn new(below: Arc<dyn Disk>, stall: Arc<Stall>) -> Arc<StallDisk> {
        Arc::new(StallDisk { below, stall })
    }
}

impl Disk for StallDisk {
    forward_to_below!();

    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let (below, stall) = (self.below.queue(depth)?, Arc::clone(&self.stall));
        let flag = stall.bells.join()?;
        let kept = Kept { below, stall, flag, all: Vec::new(), free: Vec::new() };
        let around = Stalling { kept, waiting: VecDeque::new(), ready: Vec::new(), hurried: false };
        Ok(Box::new(Wrapped::new(around, depth)))
    }
}

/// A request until it is answered.
struct Entry {
    op: Op,
    offset: u64,
    len: u64,
    token: u64,
    bufs: Vec<IoBuf>,
}

struct Kept {
    below: Box<dyn DiskQueue>,
    stall: Arc<Stall>,
    flag: Arc<Flag>,
    all: Vec<Entry>,
    free: Vec<u32>,
}

impl Kept {
    fn put(&mut self, r: &Request<'_>) -> u32 {
        let Request { op, offset, len, token, .. } = *r;
        let at = self.free.pop().unwrap_or_else(|| {
            self.all.push(Entry { op, offset, len, token, bufs: Vec::new() });
            self.all.len() as u32 - 1
        });
        let entry = &mut self.all[at as usize];
        (entry.op, entry.offset, entry.len, entry.token) = (op, offset, len, token);
        entry.bufs.clear();
        entry.bufs.extend_from_slice(r.bufs);
        at
    }

    fn send(&mut self, at: u32) -> Result<(), Full> {
        let Entry { op, offset, len, bufs, .. } = &self.all[at as usize];
        let (op, offset, len, token) = (*op, *offset, *len, u64::from(at));
        self.below.submit(&Request { op, offset, len, bufs, token })
    }
}

struct Stalling {
    kept: Kept,
    /// What is to be sent, in order, with the error that it has met before.
    waiting: VecDeque<(u32, Option<i32>)>,
    /// What is answered without the queue below.
    ready: Vec<Done>,
    hurried: bool,
}

impl Stalling {
    fn stands(&self) -> bool {
        self.kept.stall.stands() && !self.hurried
    }
    fn answer(&mut self, at: u32, errno: i32) -> Done {
        self.kept.free.push(at);
        Done { token: self.kept.all[at as usize].token, errno }
    }
}

impl Around for Stalling {
    fn below(&self) -> &dyn DiskQueue {
        &*self.kept.below
    }
    fn below_mut(&mut self) -> &mut dyn DiskQueue {
        &mut *self.kept.below
    }
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let at = self.kept.put(r);
        if self.stands() || !self.waiting.is_empty() {
            self.waiting.push_back((at, None));
            return Ok(());
        }
        let sent = self.kept.send(at);
        if sent.is_err() {
            self.kept.free.push(at);
        }
        sent
    }
    fn held(&self) -> u32 {
        (self.waiting.len() + self.ready.len()) as u32
    }
    fn flow(&mut self) -> io::Result<()> {
        if self.stands() {
            return Ok(());
        }
        while let Some(&(at, errno)) = self.waiting.front() {
            match errno.filter(|_| self.hurried) {
                // Nobody will remedy it in time.
                Some(errno) => {
                    let done = self.answer(at, errno);
                    self.ready.push(done);
                }
                None if self.kept.send(at).is_err() => return Ok(()),
                None => {}
            }
            self.waiting.pop_front();
        }
        Ok(())
    }
    fn completed(&mut self, done: &mut Vec<Done>, from: usize) {
        let mut to = from;
        for n in from..done.len() {
            let Done { token, errno } = done[n];
            let at = token as u32;
            let Entry { op, offset, len, .. } = self.kept.all[at as usize];
            let fails = errno != 0 && !self.hurried;
            if fails && self.kept.stall.judge(op, offset, len, errno) == Policy::Pause {
                self.waiting.push_back((at, Some(errno)));
                continue;
            }
            done[to] = self.answer(at, errno);
            to += 1;
        }
        done.truncate(to);
        done.append(&mut self.ready);
    }
    fn patience(&self) -> Option<Duration> {
        (!self.ready.is_empty()).then_some(Duration::ZERO)
    }
    fn bell(&self) -> Option<Arc<std::os::fd::OwnedFd>> {
        Some(Arc::clone(&self.kept.flag.bell))
    }
    fn rung(&mut self) {
        self.kept.flag.calm();
    }
    fn hurry(&mut self) {
        self.hurried = true;
    }
}

#[cfg(test)]
#[path = "stall_tests.rs"]
mod tests;
