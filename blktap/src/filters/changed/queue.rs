//! A queue of a disk that logs its changes.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::around::Around;
use super::super::bells::Flag;
use super::super::held::{Held, Line};
use super::{Log, Shared};
use crate::disk::{DiskQueue, Done, Full, Op, Request};

/// See the module.
pub(super) struct Changed {
    below: Box<dyn DiskQueue>,
    shared: Arc<Shared>,
    flag: Arc<Flag>,
    /// The flag's value.
    busy: bool,
    /// The log as of the epoch `seen`.
    seen: u64,
    log: Option<Arc<Log>>,
    /// What waits for claims, or for the log to be changed.
    line: Line,
    /// For how many of these, from the first, claims were asked for, and the log's rounds then.
    asked: usize,
    rounds: u64,
    ready: Vec<Done>,
}

/// What becomes of a request.
enum Fate {
    Goes,
    Waits,
    Fails(i32),
}

/// Whether it changes the disk's content.
fn changes(op: Op) -> bool {
    match op {
        Op::Write | Op::WriteFua | Op::WriteZeroes | Op::Discard | Op::SecureDiscard => true,
        Op::Read | Op::Flush => false,
    }
}

impl Changed {
    pub(super) fn new(below: Box<dyn DiskQueue>, shared: Arc<Shared>, flag: Arc<Flag>) -> Changed {
        Changed {
            below,
            shared,
            flag,
            busy: false,
            // No log was ever looked at.
            seen: u64::MAX,
            log: None,
            line: Line::default(),
            asked: 0,
            rounds: 0,
            ready: Vec::new(),
        }
    }

    /// Makes sure that the log stays while requests are passed on. `false`: it is being changed.
    fn enter(&mut self) -> bool {
        if !self.busy {
            self.busy = true;
            // Before the epoch is looked at: whoever changes it looks at the flag afterwards.
            self.flag.busy.store(true, Ordering::SeqCst);
        }
        let epoch = self.shared.epoch.load(Ordering::SeqCst);
        if epoch == self.seen {
            return true;
        }
        if epoch % 2 == 1 {
            self.settle();
            return false;
        }
        self.log = self.shared.logs.lock().now.clone();
        (self.seen, self.asked, self.rounds) = (epoch, 0, u64::MAX);
        true
    }

    /// Lets the log be changed when nothing is in flight.
    fn settle(&mut self) {
        if self.busy && self.below.in_flight() == 0 {
            self.busy = false;
            self.flag.busy.store(false, Ordering::SeqCst);
        }
    }

    fn fate(&self, op: Op, offset: u64, len: u64) -> Fate {
        let Some(log) = self.log.as_ref().filter(|_| changes(op)) else { return Fate::Goes };
        let end = offset.checked_add(len).filter(|end| *end <= log.header().disk_size);
        match end {
            // The disk is perhaps longer by now: the log must know first.
            None => Fate::Fails(libc::EINVAL),
            Some(end) if log.admits(&(offset..end)) => Fate::Goes,
            Some(_) => Fate::Waits,
        }
    }

    /// Asks for the claims of all that has come since the last time.
    fn ask(&mut self) {
        let Some(log) = &self.log else { return };
        if self.asked >= self.line.len() {
            return;
        }
        let fresh = (self.asked..self.line.len()).filter_map(|at| self.line.get(at));
        // What misses the disk fails later, and claims nothing.
        let range = |held: &Held| {
            let end = held.offset.checked_add(held.len)?;
            (changes(held.op) && end <= log.header().disk_size).then_some(held.offset..end)
        };
        log.want(fresh.filter_map(range));
        self.asked = self.line.len();
    }

    /// Passes on what waits, as far as it may go.
    fn pass(&mut self) {
        while let Some(first) = self.line.get(0) {
            match self.fate(first.op, first.offset, first.len) {
                Fate::Goes => {
                    if self.line.pass(&mut *self.below).is_err() {
                        // A disk that is paused has no room until it goes on: look again then.
                        self.rounds = u64::MAX;
                        return;
                    }
                }
                Fate::Fails(errno) => self.fail(errno),
                Fate::Waits => match self.log.as_ref().and_then(|log| log.failed()) {
                    Some(errno) if self.asked > 0 => self.fail(errno),
                    _ => return,
                },
            }
            self.asked = self.asked.saturating_sub(1);
        }
    }

    /// Answers the first that waits.
    fn fail(&mut self, errno: i32) {
        if let Some(token) = self.line.drop_first() {
            self.ready.push(Done { token, errno });
        }
    }
}

impl Around for Changed {
    fn below(&self) -> &dyn DiskQueue {
        &*self.below
    }
    fn below_mut(&mut self) -> &mut dyn DiskQueue {
        &mut *self.below
    }
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if !self.enter() {
            self.line.push(r);
            return Ok(());
        }
        match self.fate(r.op, r.offset, r.len) {
            Fate::Goes => return self.below.submit(r),
            Fate::Fails(errno) => self.ready.push(Done { token: r.token, errno }),
            Fate::Waits => self.line.push(r),
        }
        Ok(())
    }
    fn held(&self) -> u32 {
        (self.line.len() + self.ready.len()) as u32
    }
    fn flow(&mut self) -> io::Result<()> {
        if self.line.is_empty() || !self.enter() {
            return Ok(());
        }
        let rounds = self.log.as_ref().map_or(0, |log| log.rounds());
        if rounds != self.rounds {
            self.rounds = rounds;
            self.pass();
        }
        self.ask();
        self.settle();
        Ok(())
    }
    fn completed(&mut self, done: &mut Vec<Done>, _from: usize) {
        done.append(&mut self.ready);
        self.settle();
    }
    fn patience(&self) -> Option<Duration> {
        (!self.ready.is_empty()).then_some(Duration::ZERO)
    }
    fn bell(&self) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.flag.bell))
    }
    fn rung(&mut self) {
        self.flag.calm();
    }
}
