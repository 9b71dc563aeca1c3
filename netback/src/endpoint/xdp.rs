//! A network interface of the host, by AF_XDP (the kernel's networking/af_xdp.rst): a program in the
//! driver hands each packet that comes to a socket of this process, in memory that both share, before
//! the host's network stack sees it. The interface is the guest's alone: what comes over it does not
//! reach the host. It is promiscuous meanwhile.
//!
//! Each hardware queue has a socket of its own; a vif's queue N serves the hardware queues N, N + the
//! vif's queues and so on, and sends through the first of them. Packets come and go with one copy
//! between the driver's frames and those that grant copies reach. There is no segmentation and no word on
//! checksums: both are done before, and `unfinished` finds what a virtual interface leaves to do.
//!
//! Where the interface or the kernel cannot, it is a [`Packet`] endpoint with a warning that says why.
//! A driver without XDP of its own counts as one that cannot: the kernel's stand-in sees packets after
//! they have been made the stack's, which a packet socket does as fast, with offloads.

mod device;
mod memory;
mod program;
mod ring;
mod socket;
mod unfinished;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::epoll;
use rustix::net::netdevice::index_to_name_inlined;

use self::program::Program;
use self::socket::{LONGEST, Sent, Socket, Use};
use super::packet::Packet;
use super::{Abilities, Accepts, Endpoint, EndpointQueue, Waits};
use crate::frame::{Frame, Pool};

/// Bytes before a packet: an Ethernet header and two VLAN tags.
const HEADERS: usize = 14 + 2 * 4;
/// The shortest frame: its header alone.
const SHORTEST: usize = 14;
/// When to offer the kernel again what it has not taken.
const RETRY: Duration = Duration::from_micros(250);

/// An interface of the host.
pub struct Xdp {
    name: String,
    /// As it was when opened.
    mtu: u16,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    serving: Serving,
    /// Why it was no AF_XDP the last time.
    why: Option<String>,
}

#[derive(Default)]
enum Serving {
    #[default]
    Nobody,
    Sockets(Sockets),
    /// Without AF_XDP.
    Packet(Packet),
}

/// All that stands while a guest is connected; it goes in this order.
struct Sockets {
    /// The program, in the driver.
    _link: OwnedFd,
    _promiscuous: OwnedFd,
    queues: Vec<Option<XdpQueue>>,
    mtu: u16,
}

/// An interface that can do AF_XDP as far as that can be known before there are sockets.
struct Able {
    packet: Packet,
    queues: device::Queues,
    program: Program,
}

fn cannot(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why)
}

impl Able {
    fn look(name: &str) -> io::Result<Able> {
        let packet = Packet::open(name)?;
        let mtu = packet.mtu();
        if usize::from(mtu) + HEADERS > LONGEST {
            let most = LONGEST - HEADERS;
            return Err(cannot(format!("its MTU is {mtu}, and a frame has room for {most}")));
        }
        let asked = packet.silent()?;
        let queues = device::queues(asked.as_fd(), name)
            .map_err(|e| cannot(format!("its driver does not tell its queues: {e}")))?;
        if queues.rx == 0 || queues.tx == 0 {
            return Err(cannot(format!("it has {queues:?}")));
        }
        if !device::leaves_tags(asked.as_fd(), name)? {
            let how = format!("`ethtool -K {name} rxvlan off` ends that");
            return Err(cannot(format!("its driver takes VLAN tags out of packets ({how})")));
        }
        let program = Program::load(queues.rx)
            .map_err(|e| cannot(format!("the kernel takes no program: {e}")))?;
        Ok(Able { packet, queues, program })
    }

    /// The most queues of a vif: each sends through a hardware queue of its own.
    fn most_queues(&self) -> u32 {
        self.queues.rx.min(self.queues.tx)
    }

    /// Makes the sockets of a vif with so many queues, and has the driver use them.
    fn connect(&self, name: &str, queues: usize) -> io::Result<Sockets> {
        if queues > self.most_queues() as usize {
            return Err(cannot(format!("it has {:?} for {queues} of the guest", self.queues)));
        }
        let interface = self.packet.index();
        let mut of_each: Vec<Vec<Socket>> = (0..queues).map(|_| Vec::new()).collect();
        for number in 0..self.queues.rx {
            let sockets = &mut of_each[number as usize % queues];
            let what_for = if sockets.is_empty() { Use::Both } else { Use::Receive };
            let socket = Socket::open(interface, number, what_for)?;
            self.program.direct(number, socket.as_fd())?;
            sockets.push(socket);
        }
        let zero_copy = of_each.iter().flatten().all(|s| s.is_zero_copy().unwrap_or(false));
        let queues = of_each.into_iter().map(|sockets| XdpQueue::new(name, sockets, &self.packet));
        let queues = queues.map(|queue| queue.map(Some)).collect::<io::Result<_>>()?;
        let promiscuous = self.packet.promiscuous()?;
        // From now on packets come here.
        let link = self.program.attach(interface).map_err(|e| {
            let why = match e.raw_os_error() {
                Some(libc::EBUSY | libc::EEXIST) => "it has an XDP program already",
                _ => "its driver takes no program",
            };
            cannot(format!("{why}: {e}"))
        })?;
        tracing::debug!(
            "{name}: {:?}, {}",
            self.queues,
            if zero_copy { "zero copy" } else { "copied" }
        );
        Ok(Sockets { _link: link, _promiscuous: promiscuous, queues, mtu: self.packet.mtu() })
    }
}

impl Xdp {
    /// The interface `name`; its error names it.
    pub fn open(name: &str) -> io::Result<Xdp> {
        let mtu = Packet::open(name)?.mtu();
        Ok(Xdp { name: name.to_owned(), mtu, state: Mutex::default() })
    }
}

impl Endpoint for Xdp {
    fn abilities(&self) -> Abilities {
        match &self.state.lock().serving {
            Serving::Nobody => Abilities { mtu: self.mtu, ..Abilities::default() },
            Serving::Sockets(sockets) => Abilities { mtu: sockets.mtu, ..Abilities::default() },
            Serving::Packet(packet) => packet.abilities(),
        }
    }

    fn most_queues(&self) -> u32 {
        Able::look(&self.name).map_or(u32::MAX, |able| able.most_queues())
    }

    fn connect(&self, queues: usize, accepts: Accepts) -> io::Result<()> {
        let mut state = self.state.lock();
        state.serving = Serving::Nobody;
        let name = &self.name;
        match Able::look(name).and_then(|able| able.connect(name, queues)) {
            Ok(sockets) => (state.serving, state.why) = (Serving::Sockets(sockets), None),
            // A packet socket would hear nothing either.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
                let why = format!("interface {name} is another's by AF_XDP: {e}");
                return Err(io::Error::new(e.kind(), why));
            }
            Err(e) => {
                let packet = Packet::open(name)?;
                packet.connect(queues, accepts)?;
                state.serving = Serving::Packet(packet);
                // The guest decides how often it connects.
                let why = e.to_string();
                if state.why.as_ref() != Some(&why) {
                    tracing::warn!("interface {name}: no AF_XDP but a packet socket, for {why}");
                    state.why = Some(why);
                }
            }
        }
        Ok(())
    }

    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        match &mut self.state.lock().serving {
            Serving::Nobody => Err(io::ErrorKind::NotConnected.into()),
            Serving::Sockets(sockets) => {
                let queue = sockets.queues.get_mut(number).and_then(Option::take);
                Ok(Box::new(queue.ok_or(io::ErrorKind::NotFound)?))
            }
            Serving::Packet(packet) => packet.queue(number),
        }
    }

    fn disconnect(&self) {
        self.state.lock().serving = Serving::Nobody;
    }
}

/// One queue of a vif, with its hardware queues.
struct XdpQueue {
    name: String,
    interface: u32,
    /// The first one sends.
    sockets: Vec<Socket>,
    /// Readable when one of several sockets is.
    any: Option<OwnedFd>,
    /// Where receiving goes on, so that each has its turn.
    turn: usize,
    /// Longest frame.
    longest: usize,
    /// The kernel took no more.
    full: bool,
    /// The interface was down the last time: packets to it are dropped.
    down: bool,
    dropped: u64,
}

impl XdpQueue {
    fn new(name: &str, sockets: Vec<Socket>, packet: &Packet) -> io::Result<XdpQueue> {
        let mut any = None;
        if sockets.len() > 1 {
            let all = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            for socket in &sockets {
                epoll::add(&all, socket, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
            }
            any = Some(all);
        }
        Ok(XdpQueue {
            name: name.to_owned(),
            interface: packet.index(),
            sockets,
            any,
            turn: 0,
            longest: usize::from(packet.mtu()) + HEADERS,
            full: false,
            down: false,
            dropped: 0,
        })
    }

    /// Shows the kernel what is to go.
    fn flush(&mut self) -> io::Result<()> {
        let Some(sender) = self.sockets.first_mut() else { return Ok(()) };
        self.down = match sender.flush() {
            Ok(sent) => sent == Sent::Down,
            // A driver that is being set up anew says the same as one that is gone.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
                if index_to_name_inlined(&*sender, self.interface).is_err() {
                    let why = format!("interface {} is gone: {e}", self.name);
                    return Err(io::Error::new(e.kind(), why));
                }
                true
            }
            Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", self.name))),
        };
        Ok(())
    }

    /// Whether there are packets that the kernel has not taken, and whether they are more than half of
    /// what it may have: then its socket is not writable.
    fn unsent(&self) -> (bool, bool) {
        let unsent = self.sockets.first().map(Socket::unsent);
        // An index that cannot be is an error of the next call.
        let (unsent, all) = unsent.and_then(Result::ok).unwrap_or_default();
        (unsent > 0, unsent > all / 2)
    }

    /// Takes packets of one socket, up to `room`; how many.
    fn receive_of(
        &mut self,
        socket: usize,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<usize> {
        let Some(socket) = self.sockets.get_mut(socket) else { return Ok(0) };
        let mut came = 0;
        while came < room && pool.free() > 0 {
            let Some((at, len)) = socket.receive()? else { break };
            let Some(mut frame) = pool.take() else { break };
            frame.set_len(len);
            came += 1;
            if socket.take(at, &mut frame)? && len >= SHORTEST {
                frame.offload.checksum = unfinished::look(&mut frame);
                frames.push_back(frame);
            } else {
                self.dropped += 1;
                pool.give(frame);
            }
        }
        if came > 0 {
            socket.taken()?;
        }
        Ok(came)
    }
}

impl EndpointQueue for XdpQueue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        self.full = false;
        // What is still there from before; also whether the interface is up again.
        if self.unsent().0 {
            self.flush()?;
        }
        let Some(sender) = self.sockets.first_mut() else { return Ok(()) };
        sender.reclaim()?;
        while let Some(frame) = frames.front() {
            let fits = (SHORTEST..=self.longest).contains(&frame.len());
            if !fits || self.down {
                self.dropped += 1;
            } else if !sender.put(frame)? {
                self.full = true;
                break;
            }
            frames.pop_front().into_iter().for_each(|frame| pool.give(frame));
        }
        self.flush()
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        if self.unsent().0 && !self.down {
            self.flush()?;
        }
        let mut left = room;
        for _ in 0..self.sockets.len() {
            let turn = self.turn;
            self.turn = (turn + 1) % self.sockets.len();
            left -= self.receive_of(turn, frames, left, pool)?;
            if left == 0 {
                break;
            }
        }
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        let own: Option<BorrowedFd<'_>> = self.sockets.first().map(AsFd::as_fd);
        let readable = self.any.as_ref().map(AsFd::as_fd).or(own);
        let (some, many) = self.unsent();
        // The kernel says that it has room where it had little; of a driver that is busy it says nothing.
        let writable = own.filter(|_| self.full && many);
        let again = self.full || some && !self.down;
        let deadline = again.then(|| Instant::now() + RETRY);
        Waits { readable, writable, deadline, ..Waits::default() }
    }

    fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}
