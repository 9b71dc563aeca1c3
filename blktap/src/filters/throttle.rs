//! Limits of requests and bytes a second, for a disk or for several together.
//!
//! What goes beyond a limit waits in the queue, in its order, reads and writes apart; a flush
//! waits for nothing. A discard counts as a write without bytes, zeroing as a write of all its
//! bytes. Without a limit a queue looks at one number for each request, and does no more.

mod bucket;
mod group;
mod limits;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use perf::Handle;

use super::around::{Around, Wrapped};
use super::forward_to_below;
use super::held::{Held, Line};
use crate::disk::{Disk, DiskQueue, Full, Op, Request};
use crate::engine::EngineCounters;
use group::{Asker, Load, State, Turn, Way};
pub use group::{Group, Groups};
pub use limits::{Limit, Limits};

/// A disk whose rates are limited.
pub struct ThrottleDisk {
    below: Arc<dyn Disk>,
    group: Arc<Group>,
    number: u64,
}

impl ThrottleDisk {
    /// `below`, with the limits of `group`, which it shares with the group's other disks.
    pub fn new(below: Arc<dyn Disk>, group: Arc<Group>) -> Arc<ThrottleDisk> {
        let number = group.number();
        Arc::new(ThrottleDisk { below, group, number })
    }

    /// The limits, to be looked at and changed.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }
}

impl Disk for ThrottleDisk {
    forward_to_below!();

    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let asker = Asker { disk: self.number, queue: self.group.number() };
        let below = self.below.queue(depth)?;
        self.group.join(asker);
        let queue = Throttled {
            below,
            group: Arc::clone(&self.group),
            asker,
            lines: [Line::default(), Line::default()],
            first: Way::Read,
            again: Duration::ZERO,
            counters: Handle::default(),
            granted: [0; 2],
            counted: [0; 2],
            hurries: false,
        };
        Ok(Box::new(Wrapped::new(queue, depth)))
    }
}

/// Which way a request counts for; `None`: it is not limited.
fn way_of(op: Op) -> Option<Way> {
    match op {
        Op::Read => Some(Way::Read),
        Op::Write | Op::WriteFua | Op::Discard | Op::SecureDiscard | Op::WriteZeroes => {
            Some(Way::Write)
        }
        Op::Flush => None,
    }
}

fn load_of(held: &Held, way: Way) -> Load {
    let bytes = match held.op {
        Op::Discard | Op::SecureDiscard | Op::Flush => 0,
        _ => held.len,
    };
    Load { way, bytes }
}

struct Throttled {
    below: Box<dyn DiskQueue>,
    group: Arc<Group>,
    asker: Asker,
    /// Reads and writes that wait.
    lines: [Line; 2],
    /// Which of the lines is asked for first.
    first: Way,
    /// When to ask again.
    again: Duration,
    counters: Handle<EngineCounters>,
    /// How many of those that wait may go, and wait for room below.
    granted: [usize; 2],
    /// How many of those that wait have been counted.
    counted: [usize; 2],
    hurries: bool,
}

impl Throttled {
    /// Asks for what waits, a read and a write in turn.
    fn ask(&mut self) {
        let group = Arc::clone(&self.group);
        // One reading of the clock and one lock for all that waits.
        let (now, mut state) = (Instant::now(), group.lock());
        state.advance(now);
        let mut went = self.granted;
        let mut open = self.lines.each_ref().map(|line| !line.is_empty());
        self.again = Duration::MAX;
        while open != [false; 2] {
            let way = if open[self.first as usize] { self.first } else { self.first.other() };
            self.first = way.other();
            self.ask_one(way, now, &mut state, &mut went, &mut open);
        }
        self.granted = went;
    }

    fn ask_one(
        &mut self,
        way: Way,
        now: Instant,
        state: &mut State,
        went: &mut [usize; 2],
        open: &mut [bool; 2],
    ) {
        let at = way as usize;
        let Some(held) = self.lines[at].get(went[at]) else {
            state.leave(self.asker, way);
            open[at] = false;
            return;
        };
        match state.ask(self.asker, load_of(held, way), now) {
            Turn::Go => went[at] += 1,
            Turn::Wait(again) => {
                self.again = self.again.min(again);
                open[at] = false;
            }
        }
    }
}

impl Around for Throttled {
    fn below(&self) -> &dyn DiskQueue {
        &*self.below
    }
    fn below_mut(&mut self) -> &mut dyn DiskQueue {
        &mut *self.below
    }
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let Some(way) = way_of(r.op) else { return self.below.submit(r) };
        if !self.group.is_on() && self.lines[way as usize].is_empty() {
            return self.below.submit(r);
        }
        self.lines[way as usize].push(r);
        Ok(())
    }
    fn held(&self) -> u32 {
        (self.lines[0].len() + self.lines[1].len()) as u32
    }
    fn flow(&mut self) -> io::Result<()> {
        if self.held() == 0 {
            return Ok(());
        }
        if self.hurries || !self.group.is_on() {
            self.granted = self.lines.each_ref().map(Line::len);
        } else {
            self.ask();
        }
        for (at, line) in self.lines.iter_mut().enumerate() {
            let mut went = 0;
            // A disk that is paused has no room until it goes on.
            while self.granted[at] > 0 && line.pass(&mut *self.below).is_ok() {
                (went, self.granted[at]) = (went + 1, self.granted[at] - 1);
            }
            let known = self.counted[at].saturating_sub(went);
            self.counters.throttled.add((line.len() - known) as u64);
            self.counted[at] = line.len();
        }
        Ok(())
    }
    fn patience(&self) -> Option<Duration> {
        // Who has no room below is woken from there.
        let granted = (self.granted[0] + self.granted[1]) as u32;
        (self.held() > granted).then_some(self.again)
    }
    fn count_in(&mut self, counters: &Handle<EngineCounters>) {
        self.counters = counters.clone();
    }
    fn hurry(&mut self) {
        self.hurries = true;
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        self.group.part(self.asker);
    }
}

#[cfg(test)]
mod tests;
