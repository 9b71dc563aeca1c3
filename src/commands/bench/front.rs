//! The guest's process of `ringback bench blk`: our frontend, driven through its `Disk`.
// Gives the queue the addresses of its buffers.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blkback::frontend::{BlkFront, FrontCounters, FrontOptions};
use blktap::{Disk, DiskQueue, Done, IoBuf, Request};
use hypervisor::embedded::{Frontend, Link};
use perf::page::Reader;
use serde::{Deserialize, Serialize};

use super::load::{self, BLOCK, Client, Load, Measured, Op};
use super::usage::{self, Usage};

/// What the guest's process is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    pub devid: u32,
    pub load: Load,
    pub backend_pid: u32,
    /// The backend's stats page.
    pub stats: PathBuf,
    /// How long the frontend polls, where it is not its default.
    pub poll_us: Option<u32>,
    /// Stay connected for so many seconds without a request instead.
    pub idle: Option<f64>,
}

/// A queue, a buffer for each slot of the load, and what the two do for a client.
pub struct Through {
    queue: Box<dyn DiskQueue>,
    bufs: Vec<[IoBuf; 1]>,
    done: Vec<Done>,
}

impl Through {
    /// The buffers outlive the queue.
    pub fn new(queue: Box<dyn DiskQueue>, bufs: Vec<[IoBuf; 1]>) -> Through {
        let done = Vec::with_capacity(bufs.len());
        Through { queue, bufs, done }
    }

    pub fn send(&mut self, op: Op, offset: u64, slot: u32) -> io::Result<()> {
        let op = match op {
            Op::Read => blktap::Op::Read,
            Op::Write => blktap::Op::Write,
        };
        let bufs = &self.bufs[slot as usize];
        let request = Request { op, offset, len: BLOCK, bufs, token: u64::from(slot) };
        self.queue.submit(&request).map_err(|_| io::Error::other("the queue is full"))
    }

    pub fn collect(&mut self, answered: &mut Vec<u32>) -> io::Result<()> {
        loop {
            self.queue.wait(&[], None)?;
            self.queue.poll(&mut self.done)?;
            for done in self.done.drain(..) {
                if done.errno != 0 {
                    return Err(io::Error::from_raw_os_error(done.errno));
                }
                answered.push(done.token as u32);
            }
            if !answered.is_empty() {
                return Ok(());
            }
        }
    }
}

struct Front {
    through: Through,
    counters: FrontCounters,
}

impl Client for Front {
    fn send(&mut self, op: Op, offset: u64, slot: u32) -> io::Result<()> {
        self.through.send(op, offset, slot)
    }

    fn collect(&mut self, answered: &mut Vec<u32>) -> io::Result<()> {
        self.through.collect(answered)
    }

    /// Each sleep is one poll; each notification sent a write, each received a read.
    fn calls(&self) -> Option<u64> {
        let (ring, queue) = (&self.counters.ring, &self.counters.queue);
        let events = ring.notifications_sent.get() + ring.notifications_received.get();
        Some(events + queue.sleeps.get())
    }
}

/// System calls on the backend's data path: enters of its engine and writes beside it, or sleeps
/// where it has none, and a write or a read for each notification.
fn backend_calls(stats: &mut Reader) -> io::Result<u64> {
    let s = stats.snapshot().map_err(io::Error::other)?;
    let value = |block: &str, name: &str| s.value(block, name).unwrap_or(0);
    let events = value("ring-0", "notifications_sent") + value("ring-0", "notifications_received");
    let sleeps = match value("engine-0", "enters") {
        0 => value("queue-0", "sleeps"),
        enters => enters + value("engine-0", "inline_writes"),
    };
    Ok(events + sleeps)
}

/// Carries out a plan; standard input is the domain's connection.
pub fn run(plan: &Plan) -> io::Result<Measured> {
    let link = Link::new(io::stdin().as_fd().try_clone_to_owned()?)?;
    let guest = Arc::new(Frontend::new(link));
    let default = FrontOptions::default();
    let poll_us = plan.poll_us.unwrap_or(default.poll_us);
    let options = FrontOptions { max_queues: 1, poll_us, ..default };
    let front = BlkFront::connect(guest, plan.devid, options)?;
    let depth = plan.load.depth;
    let queue = front.queue(depth)?;
    let memory = front.buffer(depth as usize * BLOCK as usize)?;
    let buf = |n: u32| {
        let at = (n as u64 * BLOCK) as usize;
        // SAFETY: within the buffer, which outlives the queue's use of it in this function.
        [unsafe { IoBuf::new(memory.base().add(at), BLOCK as usize) }]
    };
    let bufs = (0..depth).map(buf).collect();
    let counters = front.counters()[0].clone();
    let mut client = Front { through: Through::new(queue, bufs), counters };
    let stats = std::cell::RefCell::new(Reader::open(&plan.stats).map_err(io::Error::other)?);
    let pid = plan.backend_pid.to_string();
    let backend = || -> io::Result<(Usage, Option<u64>)> {
        Ok((usage::of(&pid)?, Some(backend_calls(&mut stats.borrow_mut())?)))
    };
    let measured = match plan.idle {
        None => load::drive(&mut client, plan.load, &backend)?,
        Some(seconds) => idle(&mut client, plan.load, seconds, &backend)?,
    };
    drop(client);
    front.close()?;
    Ok(measured)
}

/// Some load first, so that all has been used; then nothing.
fn idle(
    client: &mut Front,
    load: Load,
    seconds: f64,
    backend: &load::Backend<'_>,
) -> io::Result<Measured> {
    load::drive(client, load, backend)?;
    // Whoever still polls gives up.
    std::thread::sleep(Duration::from_millis(500));
    let (before, calls) = backend()?;
    let (guest, guest_calls) = (usage::own()?, client.calls());
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let (after, calls_after) = backend()?;
    Ok(Measured {
        seconds,
        requests: 0,
        guest: usage::own()?.since(&guest),
        backend: after.since(&before),
        guest_calls: client.calls().zip(guest_calls).map(|(a, b)| a - b),
        backend_calls: calls_after.zip(calls).map(|(a, b)| a - b),
    })
}
