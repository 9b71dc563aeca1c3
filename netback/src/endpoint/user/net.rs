//! The network itself: smoltcp with its sockets.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet,
};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::{Duration as StackDuration, Instant as StackInstant};
use smoltcp::wire::{IpAddress, IpCidr, IpEndpoint};

use super::web::{Turn, Web};
use super::{ECHO_PORT, GATEWAY, GATEWAY_MAC, GATEWAY6, LINK_LOCAL6, dhcp, web};
use crate::frame::{Frame, Pool};
use crate::stack::{self, FrameDevice, Link, Port};

/// Connections to the HTTP server at a time.
const CONNECTIONS: usize = 16;
/// Longest datagram of the echo server, and how many wait.
const DATAGRAM: usize = 65_507;
const DATAGRAMS: usize = 64;
/// How long fragments wait for the others.
const REASSEMBLY: StackDuration = StackDuration::from_secs(5);

/// What belongs to one queue and goes along with each call.
pub(super) struct Bundle {
    /// When the network wants to be called again.
    pub deadline: Option<Instant>,
    /// When it was called last.
    pub last: Instant,
    pub dropped: u64,
    /// Empty at all times.
    nothing: VecDeque<Frame>,
    scratch: Vec<u8>,
}

impl Default for Bundle {
    fn default() -> Self {
        let (nothing, scratch) = Default::default();
        Bundle { deadline: None, last: Instant::now(), dropped: 0, nothing, scratch }
    }
}

/// See the module.
pub(super) struct Net {
    link: Link,
    start: Instant,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: SocketHandle,
    echo: SocketHandle,
    connections: Vec<(SocketHandle, Web)>,
}

impl Net {
    pub(super) fn new(link: Link) -> io::Result<Net> {
        let mut seed = [0; 8];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        let mut config = Config::new(GATEWAY_MAC.into());
        config.random_seed = u64::from_ne_bytes(seed);
        let mut interface = stack::interface(config, link);
        interface.set_reassembly_timeout(REASSEMBLY);
        let own = [
            IpCidr::new(GATEWAY.into(), 24),
            IpCidr::new(GATEWAY6.into(), 64),
            IpCidr::new(LINK_LOCAL6.into(), 64),
        ];
        interface.update_ip_addrs(|all| all.extend(own));
        let mut sockets = SocketSet::new(Vec::new());
        let port_taken = || io::Error::other("a port of the user-mode network is taken");
        let dhcp = sockets.add(dhcp::socket().ok_or_else(port_taken)?);
        let echo = sockets.add(echo_socket().ok_or_else(port_taken)?);
        let connection = |_| (sockets.add(web::socket()), Web::new());
        let connections = (0..CONNECTIONS).map(connection).collect();
        let mut net =
            Net { link, start: Instant::now(), interface, sockets, dhcp, echo, connections };
        net.serve();
        Ok(net)
    }

    fn since_start(&self, now: Instant) -> StackInstant {
        StackInstant::ZERO + StackDuration::from(now.saturating_duration_since(self.start))
    }

    /// Takes all frames of the guest; answers that are made at once go to `waiting`.
    pub(super) fn take(
        &mut self,
        frames: &mut VecDeque<Frame>,
        waiting: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
        bundle: &mut Bundle,
    ) {
        let now = Instant::now();
        let at = self.since_start(now);
        let mut port = Port::new(FrameDevice {
            incoming: frames,
            outgoing: waiting,
            room,
            pool,
            link: self.link,
            dropped: &mut bundle.dropped,
            scratch: &mut bundle.scratch,
        });
        loop {
            let fragment = port.next_is_fragment();
            let (interface, sockets) = (&mut self.interface, &mut self.sockets);
            if interface.poll_ingress_single(at, &mut port, sockets)
                == PollIngressSingleResult::None
            {
                break;
            }
            if fragment {
                // smoltcp has memory for one long answer.
                while interface.poll_egress(at, &mut port, sockets) != PollResult::None {}
            }
        }
        drop(port);
        self.settle(now, bundle);
    }

    /// Makes frames for the guest, up to `room`.
    pub(super) fn give(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
        bundle: &mut Bundle,
    ) {
        let now = Instant::now();
        let at = self.since_start(now);
        self.interface.poll_maintenance(at);
        let before = frames.len();
        loop {
            self.serve();
            let room = room.saturating_sub(frames.len() - before);
            let mut port = Port::new(FrameDevice {
                incoming: &mut bundle.nothing,
                outgoing: frames,
                room,
                pool,
                link: self.link,
                dropped: &mut bundle.dropped,
                scratch: &mut bundle.scratch,
            });
            let result = self.interface.poll_egress(at, &mut port, &mut self.sockets);
            drop(port);
            if result == PollResult::None {
                break;
            }
        }
        self.settle(now, bundle);
    }

    /// Lets the servers work, and notes when to be called next.
    fn settle(&mut self, now: Instant, bundle: &mut Bundle) {
        bundle.last = now;
        let turn = self.serve();
        let at = self.since_start(now);
        let next = self.interface.poll_delay(at, &self.sockets);
        let next = next.map(|wait| now + Duration::from(wait));
        bundle.deadline = if turn == Turn::Continues { Some(now) } else { next };
    }

    fn serve(&mut self) -> Turn {
        let mut turn = Turn::Waits;
        dhcp::serve(self.sockets.get_mut(self.dhcp), self.link.mtu);
        echo(self.sockets.get_mut(self.echo));
        let mut free = 0;
        for (handle, web) in &mut self.connections {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(*handle);
            if web.serve(socket) == Turn::Continues {
                turn = Turn::Continues;
            }
            free += usize::from(socket.state() == tcp::State::Listen);
        }
        if free == 0 {
            self.reuse();
        }
        turn
    }

    /// Ends the wait for late packets of one connection, so that another can be made.
    fn reuse(&mut self) {
        for (handle, web) in &mut self.connections {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(*handle);
            if Web::lingers(socket) {
                socket.abort();
                web.serve(socket);
                return;
            }
        }
    }
}

fn echo_socket() -> Option<udp::Socket<'static>> {
    let buffer = || {
        let list = vec![udp::PacketMetadata::EMPTY; DATAGRAMS];
        udp::PacketBuffer::new(list, vec![0; 4 * DATAGRAM])
    };
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(ECHO_PORT).ok()?;
    Some(socket)
}

/// Sends each datagram back where it came from; what there is no room for is lost.
fn echo(socket: &mut udp::Socket<'_>) {
    while socket.can_recv() && socket.can_send() {
        let mut copy = Vec::new();
        let Ok((bytes, from)) = socket.recv() else { return };
        copy.extend_from_slice(bytes);
        let IpEndpoint { addr, port } = from.endpoint;
        let to_us = from.local_address.is_some_and(is_own);
        if !to_us || addr.is_unspecified() || port == 0 {
            continue;
        }
        if let Err(e) = socket.send_slice(&copy, from) {
            tracing::debug!("an answer of the echo server: {e}");
        }
    }
}

/// Whether an address is one of ours, and not everybody's.
fn is_own(address: IpAddress) -> bool {
    [GATEWAY.into(), GATEWAY6.into(), LINK_LOCAL6.into()].contains(&address)
}
