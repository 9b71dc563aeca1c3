//! Long work: how far it is, and whether it is to end.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;

use super::Result;
use crate::signals;

/// How often progress is shown.
const SHOWN: Duration = Duration::from_millis(100);

/// Shows progress, and hears of signals: the first ends the work at a consistent point, the
/// second ends the process.
pub struct Work {
    stop: Receiver<()>,
    stopped: bool,
    shows: Shows,
    last: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shows {
    Nothing,
    /// On a terminal the line is written over.
    Line,
    /// Elsewhere each is a line of its own, for whole percents.
    Lines(u64),
}

impl Work {
    /// With progress if standard error is a terminal or `asked`.
    pub fn new(asked: bool) -> Result<Work> {
        let shows = match (std::io::stderr().is_terminal(), asked) {
            (true, _) => Shows::Line,
            (false, true) => Shows::Lines(u64::MAX),
            (false, false) => Shows::Nothing,
        };
        Ok(Work { stop: signals::stop()?, stopped: false, shows, last: None })
    }

    /// Shows that `done` of `total` is done; `Break` if the work is to end.
    pub fn tick(&mut self, done: u64, total: u64) -> ControlFlow<()> {
        self.show(done, total);
        self.stopped |= self.stop.try_recv().is_ok();
        if self.stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// As `tick`, as a result.
    pub fn go_on(&mut self, done: u64, total: u64) -> Result<()> {
        match self.tick(done, total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err("interrupted".into()),
        }
    }

    /// Takes the line away, so that others can write.
    pub fn clear(&self) {
        if self.last.is_some() && self.shows == Shows::Line {
            err!("\r\x1b[K");
        }
    }

    /// The work is done.
    pub fn end(&mut self) {
        if self.last.is_none() {
            return;
        }
        match self.shows {
            Shows::Line => self.clear(),
            Shows::Lines(shown) if shown != 100 => errln!("(100.00/100%)"),
            _ => {}
        }
    }

    fn show(&mut self, done: u64, total: u64) {
        let now = Instant::now();
        if self.shows == Shows::Nothing || self.last.is_some_and(|l| now - l < SHOWN) {
            return;
        }
        self.last = Some(now);
        let percent = if total == 0 { 100.0 } else { done as f64 * 100.0 / total as f64 };
        let percent = percent.min(100.0);
        match &mut self.shows {
            Shows::Line => err!("\r\x1b[K({percent:.2}/100%)"),
            Shows::Lines(shown) if *shown != percent as u64 => {
                *shown = percent as u64;
                errln!("({percent:.2}/100%)");
            }
            _ => {}
        }
    }
}
