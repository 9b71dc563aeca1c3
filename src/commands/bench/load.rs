//! The load of one measurement: random 4 KiB requests, a fixed number of them in flight. The
//! same loop drives our frontend and a peer's client.

use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::usage::{self, Usage};

/// Bytes of a request.
pub const BLOCK: u64 = 4096;
/// Answers are collected so often between two readings of the clock.
const ROUNDS: u32 = 16;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    Read,
    Write,
}

/// How long and how much.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Load {
    pub op: Op,
    pub depth: u32,
    /// Bytes of the disk that are used, from its beginning.
    pub span: u64,
    /// Seconds before the measurement.
    pub warm_up: f64,
    /// Seconds of the measurement.
    pub seconds: f64,
}

/// Whoever takes requests at the guest's end.
pub trait Client {
    /// Takes a request; `slot` is below the load's depth, and free.
    fn send(&mut self, op: Op, offset: u64, slot: u32) -> io::Result<()>;
    /// Sends what was taken, waits for at least one answer, and tells the slots of all.
    fn collect(&mut self, answered: &mut Vec<u32>) -> io::Result<()>;
    /// System calls of this end so far, where they are counted.
    fn calls(&self) -> Option<u64>;
}

/// Both ends' expense at one moment.
struct Sample {
    at: Instant,
    answered: u64,
    guest: Usage,
    backend: Usage,
    guest_calls: Option<u64>,
    backend_calls: Option<u64>,
}

/// One measurement, as the guest's process reports it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    pub seconds: f64,
    pub requests: u64,
    pub guest: Usage,
    pub backend: Usage,
    /// System calls on the data path, where they are counted.
    pub guest_calls: Option<u64>,
    pub backend_calls: Option<u64>,
}

/// What the backend's side has used so far, and its calls.
pub type Backend<'a> = dyn Fn() -> io::Result<(Usage, Option<u64>)> + 'a;

struct Driver<'a, C> {
    client: &'a mut C,
    load: Load,
    random: u64,
    answered: Vec<u32>,
    count: u64,
}

impl<C: Client> Driver<'_, C> {
    fn send(&mut self, slot: u32) -> io::Result<()> {
        // xorshift: a few cycles, and the same places for all.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let blocks = self.load.span / BLOCK;
        // Without the division of a remainder.
        let block = (u128::from(self.random) * u128::from(blocks)) >> 64;
        self.client.send(self.load.op, block as u64 * BLOCK, slot)
    }

    /// Keeps the load up until `end`.
    fn keep_up(&mut self, end: Instant) -> io::Result<()> {
        loop {
            for _ in 0..ROUNDS {
                self.collect()?;
                for at in 0..self.answered.len() {
                    self.send(self.answered[at])?;
                }
            }
            if Instant::now() >= end {
                return Ok(());
            }
        }
    }

    fn collect(&mut self) -> io::Result<()> {
        self.answered.clear();
        self.client.collect(&mut self.answered)?;
        self.count += self.answered.len() as u64;
        Ok(())
    }

    fn sample(&self, backend: &Backend<'_>) -> io::Result<Sample> {
        let (usage, calls) = backend()?;
        Ok(Sample {
            at: Instant::now(),
            answered: self.count,
            guest: usage::own()?,
            backend: usage,
            guest_calls: self.client.calls(),
            backend_calls: calls,
        })
    }
}

/// Runs a load and measures it.
pub fn drive<C: Client>(client: &mut C, load: Load, backend: &Backend<'_>) -> io::Result<Measured> {
    let answered = Vec::with_capacity(load.depth as usize);
    let random = 0x2545_f491_4f6c_dd1d;
    let mut driver = Driver { client, load, random, answered, count: 0 };
    (0..load.depth).try_for_each(|slot| driver.send(slot))?;
    driver.keep_up(Instant::now() + Duration::from_secs_f64(load.warm_up))?;
    let before = driver.sample(backend)?;
    driver.keep_up(before.at + Duration::from_secs_f64(load.seconds))?;
    let after = driver.sample(backend)?;
    let mut open = u64::from(load.depth) + after.answered;
    while driver.count < open {
        driver.collect()?;
        open = open.max(driver.count);
    }
    let calls = |after: Option<u64>, before: Option<u64>| Some(after? - before?);
    Ok(Measured {
        seconds: (after.at - before.at).as_secs_f64(),
        requests: after.answered - before.answered,
        guest: after.guest.since(&before.guest),
        backend: after.backend.since(&before.backend),
        guest_calls: calls(after.guest_calls, before.guest_calls),
        backend_calls: calls(after.backend_calls, before.backend_calls),
    })
}
