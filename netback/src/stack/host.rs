//! A host with a TCP/IP stack at one end of something that carries frames.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet,
};
use smoltcp::socket::dhcpv4;
use smoltcp::time::{Duration as StackDuration, Instant as StackInstant};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

use super::{FrameDevice, Link, Port, interface};
use crate::endpoint::EndpointQueue;
use crate::frame::{Frame, Pool};

/// Frames taken at a time.
const BATCH: usize = 64;

/// See the module. Its sockets are smoltcp's.
pub struct Host<Q> {
    queue: Q,
    pool: Pool,
    link: Link,
    start: Instant,
    interface: Interface,
    /// Its sockets.
    pub sockets: SocketSet<'static>,
    incoming: VecDeque<Frame>,
    outgoing: VecDeque<Frame>,
    dropped: u64,
    scratch: Vec<u8>,
}

impl<Q: EndpointQueue> Host<Q> {
    /// At `queue`, with its frames in `pool`. `random` makes its ports and sequence numbers differ
    /// from another host's.
    pub fn new(queue: Q, pool: Pool, link: Link, mac: EthernetAddress, random: u64) -> Self {
        let mut config = Config::new(mac.into());
        config.random_seed = random;
        Host {
            queue,
            pool,
            link,
            start: Instant::now(),
            interface: interface(config, link),
            sockets: SocketSet::new(Vec::new()),
            incoming: VecDeque::with_capacity(BATCH),
            outgoing: VecDeque::with_capacity(BATCH),
            dropped: 0,
            scratch: Vec::new(),
        }
    }

    /// The queue that carries its frames.
    pub fn queue(&mut self) -> &mut Q {
        &mut self.queue
    }
    /// Gives it an address.
    pub fn set_address(&mut self, address: IpCidr) {
        self.interface.update_ip_addrs(|all| {
            if all.push(address).is_err() {
                tracing::warn!("no room for the address {address}");
            }
        });
    }
    /// smoltcp's interface, which some calls of its sockets take.
    pub fn interface(&mut self) -> &mut Interface {
        &mut self.interface
    }
    /// The same together with the sockets.
    pub fn parts(&mut self) -> (&mut Interface, &mut SocketSet<'static>) {
        (&mut self.interface, &mut self.sockets)
    }
    /// Frames that were lost here since the last call: wrong checksums, no room.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped) + self.queue.take_dropped()
    }

    fn now(&self) -> StackInstant {
        StackInstant::ZERO + StackDuration::from(self.start.elapsed())
    }

    /// Moves what can be moved in both directions; whether there was anything.
    pub fn turn(&mut self) -> io::Result<bool> {
        let now = self.now();
        self.interface.poll_maintenance(now);
        let mut moved = false;
        loop {
            let room = BATCH - self.incoming.len().min(BATCH);
            self.queue.receive(&mut self.incoming, room, &mut self.pool)?;
            let came = !self.incoming.is_empty();
            let made = self.work(now);
            self.queue.send(&mut self.outgoing, &mut self.pool)?;
            moved |= came || made;
            if !came && (!made || !self.outgoing.is_empty()) {
                return Ok(moved);
            }
        }
    }

    /// Lets the stack take what has come and make what is to go; whether it has made anything.
    fn work(&mut self, now: StackInstant) -> bool {
        let before = self.outgoing.len();
        let mut port = Port::new(FrameDevice {
            incoming: &mut self.incoming,
            room: BATCH.saturating_sub(before),
            outgoing: &mut self.outgoing,
            pool: &mut self.pool,
            link: self.link,
            dropped: &mut self.dropped,
            scratch: &mut self.scratch,
        });
        let (interface, sockets) = (&mut self.interface, &mut self.sockets);
        loop {
            let fragment = port.next_is_fragment();
            if interface.poll_ingress_single(now, &mut port, sockets)
                == PollIngressSingleResult::None
            {
                break;
            }
            if fragment {
                while interface.poll_egress(now, &mut port, sockets) != PollResult::None {}
            }
        }
        while interface.poll_egress(now, &mut port, sockets) != PollResult::None {}
        drop(port);
        self.outgoing.len() > before
    }

    /// Sleeps until there is something to do, at most for `limit`.
    pub fn sleep(&mut self, limit: Duration) -> io::Result<()> {
        let now = self.now();
        let own = self.interface.poll_delay(now, &self.sockets).map(Duration::from);
        // What the stack would send at once cannot leave before the other end has made room.
        let own = own.filter(|_| self.outgoing.is_empty());
        let waits = self.queue.waits();
        let queue = waits.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let limit = [own, queue].into_iter().flatten().fold(limit, Duration::min);
        let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let ins = waits.readable.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN));
        let outs = waits.writable.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::OUT));
        let mut fds: Vec<PollFd<'_>> = ins.chain(outs).collect();
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Works until `done` gives something, at most for `limit` (TimedOut, naming `what`).
    pub fn until<R>(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&mut Self) -> io::Result<Option<R>>,
    ) -> io::Result<R> {
        let end = Instant::now() + limit;
        loop {
            self.turn()?;
            if let Some(result) = done(self)? {
                // What that has left to be sent.
                self.turn()?;
                return Ok(result);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = format!("{what}: not within {} s", limit.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            // Nothing that comes meanwhile may wait for the next wake-up.
            if !self.turn()? {
                self.sleep(left)?;
            }
        }
    }

    /// Asks for an address by DHCP, and takes it and the router that comes with it.
    pub fn configure(&mut self, limit: Duration) -> io::Result<Ipv4Address> {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        let found = self.until("an address by DHCP", limit, |host| Ok(host.lease(handle)));
        self.sockets.remove(handle);
        found
    }

    fn lease(&mut self, handle: SocketHandle) -> Option<Ipv4Address> {
        let event = self.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll();
        let Some(dhcpv4::Event::Configured(found)) = event else { return None };
        let (address, router) = (found.address, found.router);
        self.set_address(address.into());
        if let Some(router) = router
            && self.interface.routes_mut().add_default_ipv4_route(router).is_err()
        {
            tracing::warn!("no room for a route by {router}");
        }
        Some(address.address())
    }
}
