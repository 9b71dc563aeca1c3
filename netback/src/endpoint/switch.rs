//! A switch between the vifs of one process. It learns which address is behind which port, as any
//! does.
//!
//! A frame for an address that is known is copied by the sender's thread from its guest's pages into the
//! receiver's, in one step, if the receiver has pages and nothing waits for them. All others are copied
//! into the receiver's mailbox, for its own thread: so nobody waits for a guest that gives no pages.
//!
//! What a guest can make it hold is limited: addresses by port, frames and bytes by mailbox. One
//! lock, taken once for a batch, guards the table of addresses; each mailbox has its own.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use super::{Abilities, Accepts, Crossing, Door, Endpoint, EndpointQueue, Waits};
use crate::frame::{Frame, Pool};
use crate::mailbox::Mailbox;
use crate::proto::ETHERNET_HEADER;
use crate::stack::flow;

type Mac = [u8; 6];

/// Addresses that one port may have; frames to others behind it go to all.
const ADDRESSES: usize = 256;
/// How long an address is known that sends nothing (IEEE 802.1D's default).
const AGE: Duration = Duration::from_secs(300);

/// See the module.
#[derive(Default)]
pub struct Switch {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Each port's queues; none while no guest is connected.
    ports: Vec<Vec<Arc<Inlet>>>,
    /// Ports that nobody has.
    free: Vec<usize>,
    addresses: HashMap<Mac, Known>,
}

/// Where a queue of a port gets its frames.
struct Inlet {
    mailbox: Mailbox,
    /// The way to its guest, once there is one.
    door: OnceLock<Arc<Door>>,
}

#[derive(Clone, Copy)]
struct Known {
    port: usize,
    seen: Instant,
}

impl Switch {
    /// One without ports.
    pub fn new() -> Arc<Switch> {
        Arc::default()
    }

    /// A new port, for one vif.
    pub fn port(self: &Arc<Self>, mtu: u16) -> SwitchPort {
        let mut inner = self.inner.write();
        let number = inner.free.pop().unwrap_or(inner.ports.len());
        if number == inner.ports.len() {
            inner.ports.push(Vec::new());
        }
        SwitchPort { switch: self.clone(), number, mtu }
    }
}

impl Inner {
    /// Whether an address is not known to be behind `port`, or has not been for long.
    fn is_news(&self, mac: Mac, port: usize, now: Instant) -> bool {
        let fresh = |known: &Known| {
            known.port == port && now.saturating_duration_since(known.seen) < AGE / 10
        };
        !self.addresses.get(&mac).is_some_and(fresh)
    }

    /// Notes that an address is behind a port.
    fn learn(&mut self, mac: Mac, port: usize, now: Instant) {
        if self.addresses.get(&mac).is_none_or(|known| known.port != port) {
            let behind = |known: &Known| known.port == port;
            if self.addresses.values().filter(|known| behind(known)).count() >= ADDRESSES {
                let old = |known: &Known| now.saturating_duration_since(known.seen) >= AGE;
                self.addresses.retain(|_, known| !(behind(known) && old(known)));
                if self.addresses.values().filter(|known| behind(known)).count() >= ADDRESSES {
                    return;
                }
            }
        }
        self.addresses.insert(mac, Known { port, seen: now });
    }

    /// The only port that a frame is for.
    fn only(&self, frame: &Frame, now: Instant) -> Option<usize> {
        let mut to = [0; 6];
        to.copy_from_slice(&frame[..6]);
        let known = self.addresses.get(&to).filter(|_| to[0] & 1 == 0)?;
        (now.saturating_duration_since(known.seen) < AGE).then_some(known.port)
    }

    /// The queue of a port that a frame goes to, if any is connected.
    fn inlet(&self, port: usize, frame: &Frame) -> Option<&Arc<Inlet>> {
        let queues = self.ports.get(port)?;
        // What a guest says of its frame's hash spares looking into it: no more hangs on it
        // than the queue.
        let spread = || frame.hash.map_or_else(|| flow(frame), |hash| hash.value);
        let queue = if queues.len() < 2 { 0 } else { spread() as usize % queues.len() };
        queues.get(queue)
    }

    /// Copies a frame to where it belongs; how many mailboxes were full.
    fn deliver(&self, frame: &Frame, from: usize, now: Instant) -> u64 {
        let only = self.only(frame, now);
        let ports = (0..self.ports.len())
            .filter(|port| *port != from && only.is_none_or(|only| only == *port));
        let inlets = ports.filter_map(|port| self.inlet(port, frame));
        inlets.map(|inlet| u64::from(!inlet.mailbox.put(frame))).sum()
    }

    /// The queue that the first frames are for, and how many they are.
    fn first(
        &self,
        frames: &VecDeque<Frame>,
        from: usize,
        now: Instant,
    ) -> Option<(Arc<Inlet>, usize)> {
        let inlet = |frame: &Frame| {
            let frame = Some(frame).filter(|frame| frame.len() >= ETHERNET_HEADER)?;
            let port = self.only(frame, now).filter(|port| *port != from)?;
            self.inlet(port, frame)
        };
        let first = inlet(frames.front()?)?;
        let same = |frame: &&Frame| inlet(frame).is_some_and(|inlet| Arc::ptr_eq(inlet, first));
        Some((first.clone(), frames.iter().take_while(same).count()))
    }

    /// An address of which it is news that it is behind `port`.
    fn news(&self, frame: &Frame, port: usize, now: Instant) -> Option<Mac> {
        let mut from = [0; 6];
        from.copy_from_slice(frame.get(6..12)?);
        // A group sends nothing.
        (from[0] & 1 == 0 && self.is_news(from, port, now)).then_some(from)
    }
}

/// A port of a [`Switch`].
pub struct SwitchPort {
    switch: Arc<Switch>,
    number: usize,
    mtu: u16,
}

impl Endpoint for SwitchPort {
    fn abilities(&self) -> Abilities {
        // What the receiver cannot take is done for it on its own side.
        Abilities { checksum: true, tso4: true, tso6: true, mtu: self.mtu }
    }
    fn connect(&self, queues: usize, _: Accepts) -> io::Result<()> {
        let inlets = (0..queues).map(|_| {
            let mailbox = Mailbox::new()?;
            Ok(Arc::new(Inlet { mailbox, door: OnceLock::new() }))
        });
        let inlets = inlets.collect::<io::Result<Vec<_>>>()?;
        self.switch.inner.write().ports[self.number] = inlets;
        Ok(())
    }
    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        let inner = self.switch.inner.read();
        let inlet = inner.ports[self.number].get(number).cloned();
        let inlet = inlet.ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("queue {number} was not connected"))
        })?;
        let (switch, port) = (self.switch.clone(), self.number);
        Ok(Box::new(PortQueue { switch, port, inlet, dropped: 0 }))
    }
    fn disconnect(&self) {
        let mut inner = self.switch.inner.write();
        inner.ports[self.number].clear();
        inner.addresses.retain(|_, known| known.port != self.number);
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        self.disconnect();
        self.switch.inner.write().free.push(self.number);
    }
}

struct PortQueue {
    switch: Arc<Switch>,
    port: usize,
    inlet: Arc<Inlet>,
    dropped: u64,
}

impl EndpointQueue for PortQueue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        if frames.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let news = {
            let inner = self.switch.inner.read();
            let mut news = None;
            for frame in frames.iter().filter(|frame| frame.len() >= ETHERNET_HEADER) {
                news = inner.news(frame, self.port, now).or(news);
                self.dropped += inner.deliver(frame, self.port, now);
            }
            news
        };
        // One address a batch is enough: others come again.
        if let Some(mac) = news {
            self.switch.inner.write().learn(mac, self.port, now);
        }
        frames.drain(..).for_each(|frame| pool.give(frame));
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        self.inlet.mailbox.take(frames, room, pool);
        Ok(())
    }

    fn meet(&mut self, door: &Arc<Door>) {
        // Each queue has one.
        _ = self.inlet.door.set(door.clone());
    }

    fn crosses(&self) -> bool {
        true
    }

    fn cross(&mut self, frames: &mut VecDeque<Frame>, crossing: &mut Crossing<'_>) {
        let Some(first) = frames.front() else { return };
        let now = Instant::now();
        let news = self.switch.inner.read().news(first, self.port, now);
        if let Some(mac) = news {
            self.switch.inner.write().learn(mac, self.port, now);
        }
        loop {
            let first = self.switch.inner.read().first(frames, self.port, now);
            let Some((inlet, count)) = first else { return };
            let Some(door) = inlet.door.get() else { return };
            let is_clear = || inlet.mailbox.is_empty();
            if door.pass(frames, count, is_clear, crossing) < count {
                return;
            }
        }
    }

    fn waits(&self) -> Waits<'_> {
        Waits { readable: Some(self.inlet.mailbox.fd()), ..Waits::default() }
    }

    fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
#[path = "switch_tests.rs"]
mod tests;
