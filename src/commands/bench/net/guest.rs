//! The guest's process of `ringback bench net`: our frontend, with a fixed number of packets under way
//! to a loopback and back.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hypervisor::embedded::{Frontend, Link};
use hypervisor::xenbus::queue::wait;
use netback::endpoint::Accepts;
use netback::frame::{Checksum, Gso, GsoKind};
use netback::frontend::StagingUse;
use netback::{EndpointQueue, Frame, FrontOptions, FrontQueue, NetFront, Pool};
use perf::page::Reader;
use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};

use crate::commands::bench::usage::{self, Usage};

/// Packets under way: a loopback takes no more frames than 160 at a time.
const DEPTH: usize = 128;
/// Turns between two readings of the clock.
const TURNS: u32 = 16;
/// How long packets may stay away.
const PATIENCE: Duration = Duration::from_secs(5);
/// Payload of a TCP segment, and segments of an unsegmented packet, as Linux makes them.
const SEGMENT: u16 = 1448;
const SEGMENTS: usize = 45;
/// Ethernet, IPv4 and TCP headers.
const HEADERS: usize = 14 + 20 + 20;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Packet {
    /// A frame of so many bytes that nobody looks into.
    Plain(u16),
    /// Unsegmented TCP.
    Gso,
}

/// Whether the backend keeps the guest's pages mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Staging {
    On,
    Off,
}

/// What the guest's process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub devid: u32,
    pub packet: Packet,
    pub ring_page_order: u32,
    pub staging: Staging,
    /// Seconds before the measurement, and of it.
    pub warm_up: f64,
    pub seconds: f64,
    pub backend_pid: u32,
    pub hypervisor_pid: u32,
    /// The backend's stats page.
    pub stats: PathBuf,
}

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    pub seconds: f64,
    /// Packets that went and came back.
    pub packets: u64,
    pub guest: Usage,
    pub backend: Usage,
    pub hypervisor: Usage,
    /// System calls on the data path.
    pub guest_calls: u64,
    pub backend_calls: u64,
}

impl Packet {
    /// Bytes of a frame.
    pub fn len(self) -> usize {
        match self {
            Packet::Plain(bytes) => bytes.into(),
            Packet::Gso => HEADERS + SEGMENTS * usize::from(SEGMENT),
        }
    }

    fn fill(self, frame: &mut Frame) {
        frame.set_len(self.len());
        frame.fill(0x5a);
        if self != Packet::Gso {
            // An experimental protocol (RFC 5342).
            frame[12..14].copy_from_slice(&[0x88, 0xb5]);
            return;
        }
        let headers = [
            &[0x52, 0x42, 0, 0, 0, 1, 0x52, 0x42, 0, 0, 0, 2, 8, 0, 0x45, 0][..],
            &((self.len() - 14) as u16).to_be_bytes(),
            &[0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1],
            &[0, 80, 0x9c, 0x40, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0],
        ]
        .concat();
        frame[..HEADERS].copy_from_slice(&headers);
        frame.offload.checksum = Checksum::Blank { start: 34, offset: 16 };
        frame.offload.gso = Some(Gso { kind: GsoKind::TcpV4, size: SEGMENT });
    }
}

/// Packets under way.
struct Round {
    queue: FrontQueue,
    pool: Pool,
    sent: VecDeque<Frame>,
    got: VecDeque<Frame>,
    len: usize,
    came: u64,
    sleeps: u64,
}

impl Round {
    fn new(queue: FrontQueue, packet: Packet) -> Round {
        let mut pool = Pool::private(DEPTH);
        let frames = std::iter::from_fn(|| pool.take());
        let sent = frames.map(|mut frame| {
            packet.fill(&mut frame);
            frame
        });
        let sent = sent.collect();
        let (got, len) = (VecDeque::with_capacity(DEPTH), packet.len());
        Round { queue, pool, sent, got, len, came: 0, sleeps: 0 }
    }

    /// Sends what has come back; waits if nothing has.
    fn turn(&mut self) -> io::Result<()> {
        self.queue.send(&mut self.sent, &mut self.pool)?;
        let room = self.pool.free();
        self.queue.receive(&mut self.got, room, &mut self.pool)?;
        if self.got.is_empty() {
            return self.sleep();
        }
        if self.got.iter().any(|frame| frame.len() != self.len) {
            return Err(io::Error::other("a packet has come back with another length"));
        }
        self.came += self.got.len() as u64;
        self.sent.append(&mut self.got);
        Ok(())
    }

    fn sleep(&mut self) -> io::Result<()> {
        let waits = self.queue.waits();
        let left = waits.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let Some(fd) = waits.readable else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        wait(&mut fds, Some(left.unwrap_or(PATIENCE)))?;
        self.sleeps += 1;
        if fds[0].revents().is_empty() && left.is_none() {
            let text = format!("no packet has come back: {:?}", self.queue.totals());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        Ok(())
    }

    fn keep_up(&mut self, end: Instant) -> io::Result<()> {
        while Instant::now() < end {
            (0..TURNS).try_for_each(|_| self.turn())?;
        }
        Ok(())
    }

    /// Each sleep is one poll; each notification sent a write, each received a read.
    fn calls(&self) -> u64 {
        self.sleeps + self.queue.notifications()
    }
}

/// System calls on the backend's data path: sleeps, a write or a read for each notification, and two
/// for each grant copy, which is a request to the bundled hypervisor and its answer.
fn backend_calls(stats: &mut Reader) -> io::Result<u64> {
    let s = stats.snapshot().map_err(io::Error::other)?;
    let value = |block: &str, name: &str| s.value(block, name).unwrap_or(0);
    let ring = |ring| value(ring, "notifications_sent") + value(ring, "notifications_received");
    let queue = |name| value("queue-0", name);
    let copies = queue("tx_batches") + queue("rx_batches");
    Ok(ring("tx-ring-0") + ring("rx-ring-0") + queue("sleeps") + 2 * copies)
}

/// All processes' expense at one moment.
struct Sample {
    at: Instant,
    packets: u64,
    used: [Usage; 3],
    calls: [u64; 2],
}

fn connect(guest: &Frontend, plan: &Plan) -> io::Result<NetFront> {
    let options = FrontOptions {
        accepts: Accepts {
            scatter: true,
            checksum4: true,
            checksum6: true,
            tso4: true,
            tso6: true,
        },
        max_ring_page_order: plan.ring_page_order,
        // As many as the rings have slots.
        tx_pages: u32::MAX,
        rx_pages: u32::MAX,
        staging: match plan.staging {
            Staging::On => StagingUse::Offered,
            Staging::Off => StagingUse::Never,
        },
        ..FrontOptions::default()
    };
    let front = NetFront::connect(guest, plan.devid, &options)?;
    let (pages, staged) = (512usize << plan.ring_page_order, front.staged(0).len());
    if plan.staging == Staging::On && staged != pages {
        let text = format!("the backend keeps {staged} of {pages} pages mapped");
        return Err(io::Error::other(text));
    }
    Ok(front)
}

/// Carries out a plan; standard input is the domain's connection.
pub fn run(plan: &Plan) -> io::Result<Measured> {
    let guest = Frontend::new(Link::new(io::stdin().as_fd().try_clone_to_owned()?)?);
    let front = connect(&guest, plan)?;
    let mut round = Round::new(front.queue(0)?, plan.packet);
    let stats = RefCell::new(Reader::open(&plan.stats).map_err(io::Error::other)?);
    let pids = [plan.backend_pid, plan.hypervisor_pid].map(|pid| pid.to_string());
    let sample = |round: &Round| -> io::Result<Sample> {
        let used = [usage::own()?, usage::of(&pids[0])?, usage::of(&pids[1])?];
        let calls = [round.calls(), backend_calls(&mut stats.borrow_mut())?];
        Ok(Sample { at: Instant::now(), packets: round.came, used, calls })
    };
    round.keep_up(Instant::now() + Duration::from_secs_f64(plan.warm_up))?;
    let before = sample(&round)?;
    round.keep_up(before.at + Duration::from_secs_f64(plan.seconds))?;
    let after = sample(&round)?;
    let totals = round.queue.totals();
    if totals.tx_errors + totals.tx_dropped + totals.rx_errors > 0 {
        return Err(io::Error::other(format!("packets were lost: {totals:?}")));
    }
    drop(round);
    front.close()?;
    let used = |n: usize| after.used[n].since(&before.used[n]);
    Ok(Measured {
        seconds: (after.at - before.at).as_secs_f64(),
        packets: after.packets - before.packets,
        guest: used(0),
        backend: used(1),
        hypervisor: used(2),
        guest_calls: after.calls[0] - before.calls[0],
        backend_calls: after.calls[1].saturating_sub(before.calls[1]),
    })
}
