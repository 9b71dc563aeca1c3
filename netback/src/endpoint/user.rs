//! A network of the vif's own, in this process: an address by DHCP, a gateway that answers pings,
//! and servers behind it. It needs no privilege and reaches nothing outside.
//!
//! | where | what |
//! |---|---|
//! | 10.0.2.2, fec0::2, fe80::2 | the gateway; answers pings of any size |
//! | port 67 | DHCP: the guest is 10.0.2.15/24 |
//! | port 80 | HTTP: `GET /bytes/N/SEED`, `GET /sha256/N/SEED`, `PUT` answered by its SHA-256 |
//! | port 7 | UDP echo (RFC 862) |
//!
//! The addresses are those of QEMU's user network. The guest finds its IPv6 address itself (fe80::/64,
//! or fec0::/64 by hand: there are no router advertisements).
//!
//! The network is driven by the vif's queues. One queue has it to itself; several share it behind a
//! lock, and an answer leaves by the queue whose thread made it.

mod bytes;
mod dhcp;
mod net;
mod web;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use smoltcp::wire::{EthernetAddress, Ipv4Address, Ipv6Address};

use super::{Abilities, Accepts, Endpoint, EndpointQueue, Waits};
use crate::frame::{Frame, Pool};
use crate::stack::Link;
pub use bytes::fill;
use net::{Bundle, Net};

/// The gateway, which is also all servers.
pub const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);
/// The address that the guest is given.
pub const GUEST: Ipv4Address = Ipv4Address::new(10, 0, 2, 15);
/// The gateway's by IPv6.
pub const GATEWAY6: Ipv6Address = Ipv6Address::new(0xfec0, 0, 0, 0, 0, 0, 0, 2);
const LINK_LOCAL6: Ipv6Address = Ipv6Address::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const NETMASK: Ipv4Address = Ipv4Address::new(255, 255, 255, 0);
/// The gateway's Ethernet address.
pub const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);
/// The port of the HTTP server.
pub const WEB_PORT: u16 = web::PORT;
/// The port of the UDP echo server.
pub const ECHO_PORT: u16 = 7;
/// Frames for the guest that wait in a queue. What comes beyond is dropped.
const MOST_WAITING: usize = 128;
/// Frames that are left in the pool, so that those that wait can be taken.
const RESERVE: usize = 16;

/// The endpoint; each connected guest finds the network new.
pub struct UserNet {
    mtu: u16,
    ends: Mutex<Vec<Option<End>>>,
}

impl UserNet {
    /// With the length of its packets, in bytes without the Ethernet header; 1280 at least.
    pub fn new(mtu: u16) -> UserNet {
        UserNet { mtu: mtu.max(1280), ends: Mutex::default() }
    }
}

/// A queue's access to the network.
enum End {
    Alone(Box<Net>),
    Shared(Arc<Mutex<Net>>),
}

impl End {
    fn with<R>(&mut self, f: impl FnOnce(&mut Net) -> R) -> R {
        match self {
            End::Alone(net) => f(net),
            End::Shared(net) => f(&mut net.lock()),
        }
    }
}

impl Endpoint for UserNet {
    fn abilities(&self) -> Abilities {
        Abilities { checksum: true, tso4: true, tso6: true, mtu: self.mtu }
    }

    fn connect(&self, queues: usize, accepts: Accepts) -> io::Result<()> {
        let net = Net::new(Link::new(self.mtu, accepts))?;
        *self.ends.lock() = if queues == 1 {
            vec![Some(End::Alone(Box::new(net)))]
        } else {
            let net = Arc::new(Mutex::new(net));
            (0..queues).map(|_| Some(End::Shared(net.clone()))).collect()
        };
        Ok(())
    }

    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        let end = self.ends.lock().get_mut(number).and_then(Option::take);
        let end = end.ok_or_else(|| {
            let text = format!("queue {number} is in use, or none was connected");
            io::Error::new(io::ErrorKind::NotFound, text)
        })?;
        let waiting = VecDeque::with_capacity(MOST_WAITING);
        Ok(Box::new(UserQueue { end, waiting, bundle: Bundle::default() }))
    }

    fn disconnect(&self) {
        self.ends.lock().clear();
    }
}

struct UserQueue {
    end: End,
    /// For the guest.
    waiting: VecDeque<Frame>,
    bundle: Bundle,
}

impl EndpointQueue for UserQueue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        if !frames.is_empty() {
            let room = MOST_WAITING.saturating_sub(self.waiting.len());
            let room = room.min(pool.free().saturating_sub(RESERVE));
            let (waiting, bundle) = (&mut self.waiting, &mut self.bundle);
            self.end.with(|net| net.take(frames, waiting, room, pool, bundle));
        }
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        let ready = self.waiting.len().min(room);
        frames.extend(self.waiting.drain(..ready));
        let is_due = self.bundle.deadline.is_some_and(|at| at <= Instant::now());
        if is_due && room > ready {
            let bundle = &mut self.bundle;
            self.end.with(|net| net.give(frames, room - ready, pool, bundle));
        }
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        let deadline = match self.waiting.is_empty() {
            true => self.bundle.deadline,
            false => Some(self.bundle.last),
        };
        Waits { deadline, ..Waits::default() }
    }

    fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.bundle.dropped)
    }
}

#[cfg(test)]
#[path = "user/tests.rs"]
mod tests;
