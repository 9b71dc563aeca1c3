//! A queue's end of the connection.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use rings::Pending;
use rustix::event::{EventfdFlags, eventfd};

use super::bell::Bell;
use super::memory::{HEADER, LONGEST};
use super::ring::{Broken, SIZE};
use super::session::Vring;
use crate::endpoint::{Abilities, EndpointQueue, Waits, vnet};
use crate::frame::{Checksum, Frame, GsoKind, Offload, Pool};
use crate::offload::{Leaves, pass};
use crate::proto::ETHERNET_HEADER;

/// Where the link's thread leaves a queue what it works with.
#[derive(Debug)]
pub(super) struct Port {
    /// Changes with what is left.
    version: AtomicU32,
    wire: Mutex<Option<Wire>>,
    /// Rung when frames have come.
    pub arrived: Bell,
    /// Rung when there is room for frames again.
    pub room: Bell,
}

impl Port {
    pub(super) fn new() -> io::Result<Port> {
        let (arrived, room) = (Bell::new()?, Bell::new()?);
        Ok(Port { version: AtomicU32::new(0), wire: Mutex::default(), arrived, room })
    }
    /// Gives the queue a new connection, or takes the one that it has.
    pub(super) fn put(&self, wire: Option<Wire>) {
        *self.wire.lock() = wire;
        self.version.fetch_add(1, Ordering::Release);
        self.arrived.ring();
        self.room.ring();
    }
}

/// What a queue has found wrong with a connection.
#[derive(Debug)]
pub(super) struct Trouble {
    what: Mutex<Option<String>>,
    told: OwnedFd,
}

impl Trouble {
    pub(super) fn new() -> io::Result<Trouble> {
        let told = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Trouble { what: Mutex::default(), told })
    }
    fn tell(&self, what: String) {
        *self.what.lock() = Some(what);
        if let Err(e) = rustix::io::write(&self.told, &1u64.to_ne_bytes()) {
            tracing::debug!("telling of a broken ring: {e}");
        }
    }
    pub(super) fn take(&self) -> Option<String> {
        self.what.lock().take()
    }
}

impl AsFd for Trouble {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.told.as_fd()
    }
}

/// A ring to the switch.
#[derive(Debug)]
pub(super) struct Output {
    vring: Vring,
    /// Buffers that the switch does not have.
    free: Vec<u16>,
}

impl Output {
    pub(super) fn new(vring: Vring) -> Output {
        Output { vring, free: (0..SIZE).rev().collect() }
    }

    /// Takes back what the switch has read.
    fn reap(&mut self) -> Result<(), Broken> {
        while let Some(used) = self.vring.ring.take()? {
            self.free.push(used.number);
        }
        Ok(())
    }

    /// A buffer that the switch does not have; asks to be told of one where there is none.
    fn buffer(&mut self, room: &Bell, whose: Owner) -> Result<Option<u16>, Broken> {
        loop {
            if let Some(number) = self.free.pop() {
                return Ok(Some(number));
            }
            self.reap()?;
            if !self.free.is_empty() {
                continue;
            }
            if whose == Owner::Other {
                return Ok(None);
            }
            room.still();
            if self.vring.ring.arm() == Pending::Nothing {
                return Ok(None);
            }
        }
    }
}

/// Whose a ring is of those who send through it: it tells its owner alone when there is room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    This,
    Other,
}

/// What a queue works with while there is a connection.
#[derive(Debug)]
pub(super) struct Wire {
    /// None where the switch has fewer pairs of rings than the vif has queues.
    pub input: Option<Vring>,
    /// Then it is another queue's as well.
    pub output: Arc<Mutex<Output>>,
    /// What the switch does itself.
    pub abilities: Abilities,
    pub trouble: Arc<Trouble>,
}

impl Wire {
    fn owner(&self) -> Owner {
        if self.input.is_some() { Owner::This } else { Owner::Other }
    }

    /// Whether the switch does what a frame leaves to do.
    fn does(&self, offload: &Offload) -> bool {
        let can = &self.abilities;
        match (offload.gso, offload.checksum) {
            (Some(gso), _) if gso.kind == GsoKind::TcpV4 => can.checksum && can.tso4,
            (Some(_), _) => can.checksum && can.tso6,
            (None, Checksum::Blank { .. }) => can.checksum,
            (None, Checksum::Unknown | Checksum::Valid) => true,
        }
    }
}

/// How far frames were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    All,
    /// The ring is full.
    Full,
}

/// See the module.
pub(super) struct Queue {
    ports: Arc<[Port]>,
    number: usize,
    seen: u32,
    wire: Option<Wire>,
    /// The switch took no more.
    full: bool,
    /// Frames were left in the ring.
    left: bool,
    /// What a frame was cut into.
    cut: VecDeque<Frame>,
    /// Buffers that were read, to be lent again.
    spent: Vec<u16>,
    dropped: u64,
    /// A time that has passed.
    last: Instant,
}

impl Queue {
    pub(super) fn new(ports: Arc<[Port]>, number: usize) -> io::Result<Queue> {
        if number >= ports.len() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let (wire, cut, spent) = (None, VecDeque::new(), Vec::new());
        let (full, left, last) = (false, false, Instant::now());
        Ok(Queue { ports, number, seen: 0, wire, full, left, cut, spent, dropped: 0, last })
    }

    /// Takes over what the link's thread has left.
    fn attend(&mut self) {
        let port = &self.ports[self.number];
        let version = port.version.load(Ordering::Acquire);
        if version == self.seen {
            return;
        }
        self.seen = version;
        let new = port.wire.lock().take();
        self.part();
        self.wire = new;
    }

    /// Whether the link's thread has left something new. Asked after a bell was stilled: it may have
    /// been for that.
    fn is_behind(&self) -> bool {
        self.ports[self.number].version.load(Ordering::Acquire) != self.seen
    }

    /// The connection is over. What the switch has not read is lost.
    fn part(&mut self) {
        (self.full, self.left) = (false, false);
        self.spent.clear();
        if let Some(wire) = self.wire.take()
            && wire.owner() == Owner::This
        {
            self.dropped += u64::from(wire.output.lock().vring.ring.outside());
        }
    }

    fn lose(&mut self, ring: &str, broken: Broken) {
        if let Some(wire) = &self.wire {
            wire.trouble.tell(format!("{ring} ring {}: {broken}", self.number));
        }
        self.part();
    }

    /// Does what the switch does not do of the first frame, which may become many; whether it is to be
    /// sent now.
    fn prepare(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> bool {
        let (Some(wire), Some(frame)) = (&self.wire, frames.front()) else { return false };
        if wire.does(&frame.offload) {
            return true;
        }
        let leaves = Leaves::from(wire.abilities);
        if let Some(frame) = frames.pop_front()
            && !pass(frame, &leaves, pool, &mut self.cut)
        {
            self.dropped += 1;
        }
        while let Some(frame) = self.cut.pop_back() {
            frames.push_front(frame);
        }
        false
    }

    /// Copies frames into the ring, as far as there is room.
    fn fill(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> Result<Sent, Broken> {
        let Some(wire) = &self.wire else { return Ok(Sent::All) };
        let (whose, output) = (wire.owner(), Arc::clone(&wire.output));
        let ports = Arc::clone(&self.ports);
        let mut output = output.lock();
        output.reap()?;
        // Who waits for room is the owner.
        if whose == Owner::This {
            output.vring.ring.disarm();
        }
        while !frames.is_empty() {
            if !self.prepare(frames, pool) {
                continue;
            }
            let Some(number) = output.buffer(&ports[self.number].room, whose)? else {
                return Ok(Sent::Full);
            };
            let Some(mut frame) = frames.pop_front() else { break };
            // A device is not told that a checksum is right (5.1.6.2).
            if frame.offload.checksum == Checksum::Valid {
                frame.offload.checksum = Checksum::Unknown;
            }
            if vnet::put(&mut frame, HEADER) && frame.len() <= LONGEST {
                output.vring.ring.write(number, &frame);
                output.vring.ring.lend(number, frame.len() as u32);
            } else {
                output.free.push(number);
                self.dropped += 1;
            }
            pool.give(frame);
        }
        Ok(Sent::All)
    }

    fn drop_all(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) {
        self.dropped += frames.len() as u64;
        frames.drain(..).for_each(|frame| pool.give(frame));
    }

    /// Frames out of the ring, until there are `most`; how many buffers were looked at.
    fn take(
        &mut self,
        frames: &mut VecDeque<Frame>,
        most: usize,
        pool: &mut Pool,
    ) -> Result<usize, Broken> {
        let Some(Vring { ring, .. }) = self.wire.as_mut().and_then(|wire| wire.input.as_mut())
        else {
            return Ok(0);
        };
        let mut looked = 0;
        while frames.len() < most
            && looked < usize::from(SIZE)
            && let Some(mut frame) = pool.take()
        {
            let used = match ring.take() {
                Ok(Some(used)) => used,
                nothing => {
                    pool.give(frame);
                    nothing?;
                    break;
                }
            };
            looked += 1;
            // The headroom has place for it: the frame itself stays where frames are.
            let mut good = frame.grow_front(HEADER.bytes());
            frame.set_len(used.len);
            ring.read(used.number, &mut frame);
            self.spent.push(used.number);
            good = good && vnet::take(&mut frame, used.len, HEADER) && makes_sense(&frame);
            if good {
                frames.push_back(frame);
            } else {
                self.dropped += 1;
                pool.give(frame);
            }
        }
        Ok(looked)
    }

    /// Takes what has come, and asks to be told of more where that is all.
    fn fetch(
        &mut self,
        frames: &mut VecDeque<Frame>,
        most: usize,
        pool: &mut Pool,
    ) -> Result<(), Broken> {
        self.left = false;
        let before = frames.len();
        loop {
            let looked = self.take(frames, most, pool)?;
            let arrived = &self.ports[self.number].arrived;
            let Some(input) = self.wire.as_mut().and_then(|wire| wire.input.as_mut()) else {
                arrived.still();
                self.left = self.is_behind();
                return Ok(());
            };
            if looked > 0 {
                // All at once, and not before: none comes back twice among these.
                self.spent.drain(..).for_each(|number| input.ring.lend(number, LONGEST as u32));
                input.ring.disarm();
                input.publish();
                // Nobody would come again for what is behind frames that were none.
                self.left = frames.len() == before;
                return Ok(());
            }
            arrived.still();
            if input.ring.arm() == Pending::Nothing {
                self.left = self.is_behind();
                return Ok(());
            }
            if frames.len() >= most || pool.free() == 0 {
                self.left = true;
                return Ok(());
            }
        }
    }
}

/// Whether a frame is one, and what is said of it possible.
fn makes_sense(frame: &Frame) -> bool {
    let blank = matches!(frame.offload.checksum, Checksum::Blank { .. });
    frame.len() >= ETHERNET_HEADER && (frame.offload.gso.is_none() || blank)
}

impl EndpointQueue for Queue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        self.attend();
        self.full = false;
        let sent = self.fill(frames, pool);
        if let Some(wire) = &self.wire {
            wire.output.lock().vring.publish();
        }
        match sent {
            Ok(Sent::Full) if self.wire.as_ref().is_some_and(|w| w.owner() == Owner::This) => {
                if self.is_behind() {
                    return self.send(frames, pool);
                }
                self.full = true;
                return Ok(());
            }
            Ok(_) => {}
            Err(broken) => self.lose("transmit", broken),
        }
        self.drop_all(frames, pool);
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        self.attend();
        let most = frames.len() + room;
        if let Err(broken) = self.fetch(frames, most, pool) {
            self.lose("receive", broken);
        }
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        let port = &self.ports[self.number];
        Waits {
            readable: Some(port.arrived.as_fd()),
            room: self.full.then(|| port.room.as_fd()),
            deadline: self.left.then_some(self.last),
            ..Waits::default()
        }
    }

    fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}
