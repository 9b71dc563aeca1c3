//! One queue of a frontend: a pair of rings, its pages and its event channels.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use hypervisor::EventChannel;
use hypervisor::xenbus::front::{Health, Stage};
use rings::{Notify, Pending, RingCounters};
use rustix::event::epoll;

use super::receive::Receive;
use super::transmit::{Pushed, Transmit};
use super::{Device, Fault, Totals};
use crate::endpoint::{EndpointQueue, Waits};
use crate::frame::{Frame, Pool};
use crate::proto::Extra;

/// Responses that are waited for at once when there is no room for a packet.
const BATCH: u32 = 32;

/// The event channels of a queue.
pub(super) enum Channels {
    /// One for both rings.
    Shared(Box<dyn EventChannel>),
    /// One each.
    Split { tx: Box<dyn EventChannel>, rx: Box<dyn EventChannel> },
}

impl Channels {
    fn tx(&self) -> &dyn EventChannel {
        match self {
            Channels::Shared(one) => &**one,
            Channels::Split { tx, .. } => &**tx,
        }
    }
    fn rx(&self) -> &dyn EventChannel {
        match self {
            Channels::Shared(one) => &**one,
            Channels::Split { rx, .. } => &**rx,
        }
    }
    fn is_split(&self) -> bool {
        matches!(self, Channels::Split { .. })
    }
}

/// One queue in use, to be driven by one thread. Its device stays connected as long as it lives;
/// dropped, it goes back there with its rings and channels, for a backend gives up a device one of
/// whose channels closes.
pub struct FrontQueue {
    queue: Option<Queue>,
    number: usize,
    device: Arc<Device>,
}

impl FrontQueue {
    pub(super) fn new(queue: Queue, number: usize, device: Arc<Device>) -> FrontQueue {
        FrontQueue { queue: Some(queue), number, device }
    }
    fn queue(&mut self) -> io::Result<&mut Queue> {
        self.queue.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
    /// What it has counted.
    pub fn totals(&self) -> Totals {
        self.queue.as_ref().map_or_else(Totals::default, |queue| queue.totals)
    }
    /// Notifications that it has sent and received.
    pub fn notifications(&self) -> u64 {
        let count = |c: &RingCounters| c.notifications_sent.get() + c.notifications_received.get();
        self.queue.as_ref().map_or(0, |queue| {
            count(queue.transmit.ring.counters()) + count(queue.receive.ring.counters())
        })
    }
    /// Whether all that was sent has been answered.
    pub fn is_idle(&mut self) -> io::Result<bool> {
        let queue = self.queue()?;
        queue.reap()?;
        Ok(queue.transmit.is_idle())
    }
    /// The hash that came with the last packet that had one (`XEN_NETIF_EXTRA_TYPE_HASH`).
    pub fn last_hash(&self) -> Option<u32> {
        self.queue.as_ref().and_then(|queue| queue.receive.hash)
    }
    /// Tells the backend which group address is wanted (`XEN_NETIF_EXTRA_TYPE_MCAST_ADD`) or not
    /// any longer. WouldBlock: the ring is full.
    pub fn multicast(&mut self, extra: Extra) -> io::Result<()> {
        let queue = self.queue()?;
        queue.reap()?;
        match queue.transmit.push_control(extra) {
            Pushed::Yes => queue.publish(),
            Pushed::Later | Pushed::Never => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Drop for FrontQueue {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            self.device.take_back(self.number, queue);
        }
    }
}

impl EndpointQueue for FrontQueue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        self.queue()?.send(frames, pool)
    }
    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        self.queue()?.receive(frames, room, pool)
    }
    fn waits(&self) -> Waits<'_> {
        self.queue.as_ref().map_or_else(Waits::default, Queue::waits)
    }
    fn take_dropped(&mut self) -> u64 {
        self.queue.as_mut().map_or(0, |queue| std::mem::take(&mut queue.dropped))
    }
}

/// What a queue is made of.
pub(super) struct Queue {
    health: Arc<Health>,
    name: String,
    transmit: Transmit,
    receive: Receive,
    channels: Channels,
    /// Waits for all descriptors of this queue.
    any: OwnedFd,
    /// Notifications have been asked for since events were last taken.
    armed: bool,
    /// Frames were left behind for want of room.
    blocked: bool,
    /// Since when there is room for them.
    room_since: Option<Instant>,
    totals: Totals,
    /// Dropped and not yet told of.
    dropped: u64,
}

impl Queue {
    pub(super) fn new(
        health: Arc<Health>,
        name: String,
        transmit: Transmit,
        receive: Receive,
        channels: Channels,
    ) -> io::Result<Queue> {
        let any = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let fds = [Some(channels.rx().as_fd()), Some(health.wake())];
        let second = channels.is_split().then(|| channels.tx().as_fd());
        for fd in fds.into_iter().chain([second]).flatten() {
            epoll::add(&any, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        let mut queue = Queue {
            health,
            name,
            transmit,
            receive,
            channels,
            any,
            armed: false,
            blocked: false,
            room_since: None,
            totals: Totals::default(),
            dropped: 0,
        };
        queue.refill()?;
        Ok(queue)
    }

    /// Disables the device for what its backend has done.
    fn broken(&self, fault: &Fault) -> io::Error {
        self.health.fail(format!("{}: {fault}", self.name));
        io::Error::new(io::ErrorKind::InvalidData, format!("{}: {fault}", self.name))
    }

    fn check(&self) -> io::Result<()> {
        match self.health.stage() {
            Stage::Broken => {
                let why = self.health.reason().unwrap_or_default();
                Err(io::Error::new(io::ErrorKind::NotConnected, format!("{}: {why}", self.name)))
            }
            Stage::Connected | Stage::Closing => Ok(()),
        }
    }

    /// Takes events that came since they were asked for. What they told of has to be looked at.
    fn acknowledge(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.armed) {
            return Ok(());
        }
        if self.channels.rx().acknowledge()? {
            self.receive.ring.woken();
        }
        if self.channels.is_split() && self.channels.tx().acknowledge()? {
            self.transmit.ring.woken();
        }
        if self.blocked && self.arm_transmit()? {
            self.room_since = Some(Instant::now());
        }
        Ok(())
    }

    fn reap(&mut self) -> io::Result<()> {
        self.transmit.reap(&mut self.totals).map_err(|fault| self.broken(&fault))
    }

    fn publish(&mut self) -> io::Result<()> {
        match self.transmit.ring.publish() {
            Notify::Send => self.channels.tx().notify(),
            Notify::Skip => Ok(()),
        }
    }

    fn refill(&mut self) -> io::Result<()> {
        self.receive.post();
        match self.receive.ring.publish() {
            Notify::Send => self.channels.rx().notify(),
            Notify::Skip => Ok(()),
        }
    }

    /// Puts frames into the ring; whether all have found room.
    fn push(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> bool {
        while let Some(frame) = frames.front() {
            match self.transmit.push(frame) {
                Pushed::Later => return false,
                Pushed::Yes => {
                    self.totals.tx_frames += 1;
                    self.totals.tx_gso += u64::from(frame.offload.gso.is_some());
                }
                Pushed::Never => self.dropped += 1,
            }
            if let Some(done) = frames.pop_front() {
                pool.give(done);
            }
        }
        true
    }

    /// Asks to be told of room for more; whether there is some now.
    fn arm_transmit(&mut self) -> io::Result<bool> {
        let half = (self.transmit.ring.in_flight() / 2).clamp(1, BATCH);
        let wanted = NonZeroU32::new(half).unwrap_or(NonZeroU32::MIN);
        let pending = self.transmit.ring.arm_after(wanted);
        self.armed = true;
        let pending = pending.map_err(|corrupt| self.broken(&corrupt.into()))?;
        Ok(pending == Pending::Work)
    }
}

impl Queue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        self.check()?;
        (self.blocked, self.room_since) = (false, None);
        if frames.is_empty() {
            return Ok(());
        }
        loop {
            self.reap()?;
            self.blocked = !self.push(frames, pool);
            self.publish()?;
            if !self.blocked || !self.arm_transmit()? {
                return Ok(());
            }
        }
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        self.check()?;
        self.acknowledge()?;
        let before = self.totals;
        loop {
            let taken = self.receive.take(frames, room, pool, &mut self.totals);
            taken.map_err(|fault| self.broken(&fault))?;
            self.refill()?;
            // Packets that were none leave nothing to come back for.
            let came = self.totals.rx_frames != before.rx_frames;
            if came || room == 0 || pool.free() == 0 {
                break;
            }
            let pending = self.receive.ring.arm();
            self.armed = true;
            match pending.map_err(|corrupt| self.broken(&corrupt.into()))? {
                Pending::Nothing => break,
                Pending::Work => {}
            }
        }
        self.dropped += self.totals.rx_errors - before.rx_errors;
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        Waits { readable: Some(self.any.as_fd()), deadline: self.room_since, ..Waits::default() }
    }
}
