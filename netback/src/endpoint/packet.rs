//! A network interface of the host, by a packet socket (packet(7)): the guest is on the same wire, with
//! no bridge between. The interface is promiscuous meanwhile. What the host itself sends through the
//! interface does not reach the guest, nor the other way round, as with Linux's macvlan.
//!
//! Frames go in batches by sendmmsg and recvmmsg, each with a virtio-net header (`PACKET_VNET_HDR`),
//! so that blank checksums and unsegmented packets pass both ways. A mapped ring (`TPACKET_V3`) saves
//! that call, but its packets lie in the kernel's blocks: they would have to be copied once more, to
//! where grant copies reach them, and wait until a block is full or its time is over. The kernel takes
//! no unsegmented packets from such a ring either.
//!
//! Several queues share the interface by the packets' flows (`PACKET_FANOUT`).

mod socket;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;

use self::socket::{BATCH, Interface};
use super::vnet::{self, Size};
use super::{Abilities, Accepts, Endpoint, EndpointQueue, Waits};
use crate::filter::vlan;
use crate::frame::{Frame, Pool};

/// What an interface has of a batch before it shows whether there are many.
const FEW: usize = 8;

/// An interface of the host.
pub struct Packet {
    interface: Interface,
    sockets: Mutex<Vec<Arc<OwnedFd>>>,
}

impl Packet {
    /// The interface `name`; its error names it.
    pub fn open(name: &str) -> io::Result<Packet> {
        let interface = socket::find(name);
        let interface =
            interface.map_err(|e| io::Error::new(e.kind(), format!("interface {name}: {e}")))?;
        Ok(Packet { interface, sockets: Mutex::default() })
    }

    /// The interface's number.
    pub(super) fn index(&self) -> u32 {
        self.interface.index
    }

    /// Longest packet without its Ethernet header, as it was when opened.
    pub(super) fn mtu(&self) -> u16 {
        self.interface.mtu
    }

    /// A socket that hears nothing.
    pub(super) fn silent(&self) -> io::Result<OwnedFd> {
        socket::raw()
    }

    /// A socket that hears nothing and keeps the interface promiscuous as long as it lives.
    pub(super) fn promiscuous(&self) -> io::Result<OwnedFd> {
        let socket = self.silent()?;
        socket::promiscuous(&socket, &self.interface)?;
        Ok(socket)
    }
}

impl Endpoint for Packet {
    fn abilities(&self) -> Abilities {
        Abilities { checksum: true, tso4: true, tso6: true, mtu: self.interface.mtu }
    }

    fn connect(&self, queues: usize, _: Accepts) -> io::Result<()> {
        let mut sockets = self.sockets.lock();
        sockets.clear();
        let opened = socket::open(&self.interface, queues)?;
        sockets.extend(opened.into_iter().map(Arc::new));
        Ok(())
    }

    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        let sockets = self.sockets.lock();
        let socket = Arc::clone(sockets.get(number).ok_or(io::ErrorKind::NotFound)?);
        Ok(Box::new(PacketQueue { socket, expected: FEW, full: false, dropped: 0 }))
    }

    fn disconnect(&self) {
        self.sockets.lock().clear();
    }
}

/// One queue's socket.
struct PacketQueue {
    socket: Arc<OwnedFd>,
    /// Frames that are made ready to be filled.
    expected: usize,
    /// The interface took no more.
    full: bool,
    dropped: u64,
}

impl PacketQueue {
    /// The first frame will never be taken.
    fn refuse(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) {
        self.dropped += 1;
        frames.pop_front().into_iter().for_each(|frame| pool.give(frame));
    }
}

impl EndpointQueue for PacketQueue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        self.full = false;
        while !frames.is_empty() {
            let ready = frames.iter_mut().take(BATCH);
            let ready =
                ready.map(|frame| vnet::put(frame, Size::Short)).take_while(|put| *put).count();
            if ready == 0 {
                self.refuse(frames, pool);
                continue;
            }
            let sent = socket::send(self.socket.as_fd(), frames.range(..ready));
            let done = *sent.as_ref().unwrap_or(&0);
            frames.range_mut(done..ready).for_each(|frame| frame.trim_front(Size::Short.bytes()));
            frames.drain(..done).for_each(|frame| pool.give(frame));
            match sent {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.full = true;
                    return Ok(());
                }
                // The interface has gone.
                Err(e @ (Errno::NXIO | Errno::NODEV)) => return Err(e.into()),
                // It is down, its queue is full, or the kernel will not have this one.
                Err(
                    Errno::NETDOWN
                    | Errno::NETUNREACH
                    | Errno::NOBUFS
                    | Errno::NOMEM
                    | Errno::INVAL
                    | Errno::MSGSIZE,
                ) => self.refuse(frames, pool),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        let mut left = room;
        loop {
            let before = frames.len();
            let wanted = self.expected.min(left);
            while frames.len() < before + wanted {
                let Some(mut frame) = pool.take() else { break };
                // The headroom has place for it: the frame itself stays where frames are.
                if !frame.grow_front(Size::Short.bytes()) {
                    pool.give(frame);
                    break;
                }
                frame.set_len(usize::MAX);
                frames.push_back(frame);
            }
            let made = frames.len() - before;
            if made == 0 {
                return Ok(());
            }
            let came = self.fill(frames, before, pool)?;
            left -= came;
            if came < made {
                self.expected = (came * 2).clamp(FEW, BATCH);
                return Ok(());
            }
            self.expected = BATCH;
        }
    }

    fn waits(&self) -> Waits<'_> {
        let socket: BorrowedFd<'_> = self.socket.as_fd();
        Waits { readable: Some(socket), writable: self.full.then_some(socket), ..Waits::default() }
    }

    fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

impl PacketQueue {
    /// Fills the frames from number `first` on, and gives back those that nothing came for; how many
    /// packets came, whatever became of them.
    fn fill(
        &mut self,
        frames: &mut VecDeque<Frame>,
        first: usize,
        pool: &mut Pool,
    ) -> io::Result<usize> {
        let mut arrived = [socket::Arrived::default(); BATCH];
        let came = socket::receive(self.socket.as_fd(), frames.range(first..), &mut arrived);
        let count = *came.as_ref().unwrap_or(&0);
        frames.drain(first + count..).for_each(|frame| pool.give(frame));
        // Those that make no sense go to the end, in any order, and from there away.
        let mut good = first;
        for (number, arrived) in arrived.iter().enumerate().take(count) {
            let frame = &mut frames[first + number];
            let len = arrived.len.filter(|len| vnet::take(frame, *len, Size::Short));
            let tagged = |tag: (u16, u16)| vlan::push(frame, tag.0, tag.1);
            if len.is_some() && arrived.tag.is_none_or(tagged) {
                frames.swap(good, first + number);
                good += 1;
            }
        }
        self.dropped += (first + count - good) as u64;
        frames.drain(good..).for_each(|frame| pool.give(frame));
        match came {
            // EINVAL: a packet that the header cannot describe. It is gone.
            Err(Errno::INVAL) => {
                self.dropped += 1;
                Ok(0)
            }
            // ENETDOWN, once: the interface is down, or gone, which sending tells.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::NETDOWN) => Ok(count),
            Err(e) => Err(e.into()),
        }
    }
}
