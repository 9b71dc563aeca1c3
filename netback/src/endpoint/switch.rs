//! A switch between the vifs of one process. It learns which address is behind which port, as any
//! does, and a frame is copied into the receiver's mailbox and from there into its pages.
//!
//! What a guest can make it hold is limited: addresses by port, frames and bytes by mailbox. One
//! lock, taken once for a batch, guards the table of addresses; each mailbox has its own.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use super::{Abilities, Accepts, Endpoint, EndpointQueue, Waits};
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
    /// The mailboxes of each port's queues; none while no guest is connected.
    ports: Vec<Vec<Arc<Mailbox>>>,
    addresses: HashMap<Mac, Known>,
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
        inner.ports.push(Vec::new());
        SwitchPort { switch: self.clone(), number: inner.ports.len() - 1, mtu }
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

    /// Copies a frame to where it belongs; how many mailboxes were full.
    fn deliver(&self, frame: &Frame, from: usize, now: Instant) -> u64 {
        let mut to = [0; 6];
        to.copy_from_slice(&frame[..6]);
        let known = self
            .addresses
            .get(&to)
            .filter(|known| to[0] & 1 == 0 && now.saturating_duration_since(known.seen) < AGE);
        let only = known.map(|known| known.port);
        let mut full = 0;
        for (number, queues) in self.ports.iter().enumerate() {
            if number == from || only.is_some_and(|only| only != number) || queues.is_empty() {
                continue;
            }
            // What a guest says of its frame's hash spares looking into it: no more hangs on it
            // than the queue.
            let spread = || frame.hash.map_or_else(|| flow(frame), |hash| hash.value);
            let queue = if queues.len() == 1 { 0 } else { spread() as usize % queues.len() };
            full += u64::from(!queues[queue].put(frame));
        }
        full
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
        let mailboxes = (0..queues).map(|_| Mailbox::new().map(Arc::new));
        let mailboxes = mailboxes.collect::<io::Result<Vec<_>>>()?;
        self.switch.inner.write().ports[self.number] = mailboxes;
        Ok(())
    }
    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        let inner = self.switch.inner.read();
        let mailbox = inner.ports[self.number].get(number).cloned();
        let mailbox = mailbox.ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("queue {number} was not connected"))
        })?;
        let (switch, port) = (self.switch.clone(), self.number);
        Ok(Box::new(PortQueue { switch, port, mailbox, dropped: 0 }))
    }
    fn disconnect(&self) {
        let mut inner = self.switch.inner.write();
        inner.ports[self.number].clear();
        inner.addresses.retain(|_, known| known.port != self.number);
    }
}

struct PortQueue {
    switch: Arc<Switch>,
    port: usize,
    mailbox: Arc<Mailbox>,
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
                let mut from = [0; 6];
                from.copy_from_slice(&frame[6..12]);
                // A group sends nothing.
                if from[0] & 1 == 0 && inner.is_news(from, self.port, now) {
                    news = Some(from);
                }
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
        self.mailbox.take(frames, room, pool);
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        Waits { readable: Some(self.mailbox.fd()), ..Waits::default() }
    }

    fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
#[path = "switch_tests.rs"]
mod tests;
