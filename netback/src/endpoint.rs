//! What a vif connects to: one file each.
//!
//! An [`Endpoint`] belongs to a vif, an [`EndpointQueue`] to one of its queues' threads. Frames go
//! through it in batches; nothing in it blocks.

pub mod loopback;
pub mod named;
pub mod packet;
pub mod pcap;
pub mod stream;
pub mod switch;
pub mod tap;
pub mod user;
pub mod vhost_user;
mod vnet;
pub mod xdp;

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::config::Carrier;
use crate::frame::{Frame, Pool};
pub use crate::queue::door::{Crossing, Door};

/// What an endpoint can take over from, or leave to, the guest's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// It takes frames with [`Checksum::Blank`](crate::frame::Checksum::Blank). Others get them summed.
    pub checksum: bool,
    /// It takes unsegmented TCP over IPv4. Only with `checksum`.
    pub tso4: bool,
    /// It takes unsegmented TCP over IPv6. Only with `checksum`.
    pub tso6: bool,
    /// Longest packet without its Ethernet header, in bytes: what the guest's `mtu` key gets.
    pub mtu: u16,
}

/// What the guest's end takes of frames that come from here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepts {
    /// Frames longer than one page (`feature-sg`).
    pub scatter: bool,
    /// Blank checksums of IPv4 packets (no `feature-no-csum-offload`).
    pub checksum4: bool,
    /// Blank checksums of IPv6 packets (`feature-ipv6-csum-offload`).
    pub checksum6: bool,
    /// Unsegmented TCP over IPv4 (`feature-gso-tcpv4`).
    pub tso4: bool,
    /// Unsegmented TCP over IPv6 (`feature-gso-tcpv6`).
    pub tso6: bool,
}

/// What a vif connects to.
pub trait Endpoint: Send + Sync {
    /// What it takes.
    fn abilities(&self) -> Abilities;
    /// Most queues that it serves.
    fn most_queues(&self) -> u32 {
        u32::MAX
    }
    /// A guest has connected with so many queues and takes what `accepts` says: what is offered to
    /// the other side follows it.
    fn connect(&self, queues: usize, accepts: Accepts) -> io::Result<()>;
    /// The end that queue `number` works with, from 0 on; after [`connect`](Self::connect).
    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>>;
    /// While a guest is connected: an operator has taken the link down, or up again. Packets are
    /// dropped elsewhere; this is for who can show it to the other side.
    fn link(&self, _: Carrier) -> io::Result<()> {
        Ok(())
    }
    /// The guest is gone: queues have been dropped; the link is down.
    fn disconnect(&self);
}

/// What a queue's thread waits for besides its ring.
#[derive(Clone, Copy, Default)]
pub struct Waits<'a> {
    /// Readable when [`EndpointQueue::receive`] or [`EndpointQueue::send`] has something to do.
    pub readable: Option<BorrowedFd<'a>>,
    /// Writable when [`EndpointQueue::send`] takes more; present only while it takes none.
    pub writable: Option<BorrowedFd<'a>>,
    /// Readable when `send` takes more, likewise: of those who are told so by another descriptor.
    pub room: Option<BorrowedFd<'a>>,
    /// When `receive`, or while it takes none `send`, is to be called without any of them.
    pub deadline: Option<Instant>,
}

/// One queue's end.
pub trait EndpointQueue: Send {
    /// Takes frames from the front, as many as it can at once, in one call of the system where there
    /// is one for many. What it does not take stays. Frames that are done with go back to `pool`, now
    /// or at a later call; each is of that pool.
    ///
    /// An error ends the vif. A frame that the other side will not have is dropped and counted.
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()>;

    /// Appends frames that have come, up to `room` of them, taken from `pool`. None is no error.
    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()>;

    /// The way to this queue's guest, for an endpoint that lets other vifs copy straight to it.
    fn meet(&mut self, _: &Arc<Door>) {}

    /// Whether [`cross`](Self::cross) is of any use.
    fn crosses(&self) -> bool {
        false
    }

    /// Copies frames from the front straight into the pages of other vifs' guests. What it does not take
    /// stays, in order: [`send`](Self::send) is for the rest.
    fn cross(&mut self, _: &mut VecDeque<Frame>, _: &mut Crossing<'_>) {}

    /// What to wait for when neither has anything to do.
    fn waits(&self) -> Waits<'_>;

    /// Frames dropped since the last call, because nobody took them.
    fn take_dropped(&mut self) -> u64;
}

impl<Q: EndpointQueue + ?Sized> EndpointQueue for Box<Q> {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        (**self).send(frames, pool)
    }
    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        (**self).receive(frames, room, pool)
    }
    fn meet(&mut self, door: &Arc<Door>) {
        (**self).meet(door);
    }
    fn crosses(&self) -> bool {
        (**self).crosses()
    }
    fn cross(&mut self, frames: &mut VecDeque<Frame>, crossing: &mut Crossing<'_>) {
        (**self).cross(frames, crossing);
    }
    fn waits(&self) -> Waits<'_> {
        (**self).waits()
    }
    fn take_dropped(&mut self) -> u64 {
        (**self).take_dropped()
    }
}
