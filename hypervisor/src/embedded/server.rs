//! The hypervisor's process: one thread, one epoll set, no call that blocks.
//!
//! A client that sends nonsense loses its connection; one that does not read its replies is not
//! listened to until it does; one that asks without end gets its share of each round.

mod lifetime;
mod memory;
mod requests;
mod sockets;
mod stores;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::Timespec;

use super::channel::Wire;
use crate::core::domains::Domains;
use crate::core::xenstore::{ConnId, Store};
use crate::{DomId, Port};
use lifetime::Leaving;
use memory::Memory;
use sockets::Peer;
use stores::StoreConn;

/// Name of the request socket in the run folder.
pub const HYPERVISOR_SOCKET: &str = "hypervisor.sock";
/// Name of the store's socket in the run folder.
pub const STORE_SOCKET: &str = "xenstored.sock";

/// Messages that one connection may have handled before the others get their turn.
const TURN: usize = 16;
/// Connections of domain 0.
const MAX_PRIVILEGED: usize = 4096;
/// Connections of another domain.
const MAX_CONNECTIONS: usize = 128;

const STOP: u64 = 0;
const REQUESTS: u64 = 1;
const STORES: u64 = 2;
const FIRST_CONN: u64 = 16;

/// A connection.
enum Conn {
    Requests(Box<Peer>),
    Store(Box<StoreConn>),
}

impl Conn {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Conn::Requests(peer) => peer.socket.as_fd(),
            Conn::Store(conn) => conn.socket.as_fd(),
        }
    }
    fn domid(&self) -> DomId {
        match self {
            Conn::Requests(peer) => peer.domid,
            Conn::Store(conn) => conn.domid,
        }
    }
    /// What this connection waits for.
    fn interest(&self) -> EventFlags {
        match self {
            Conn::Requests(peer) => peer.interest(),
            Conn::Store(conn) => conn.interest(),
        }
    }
}

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Keep,
    Close,
}

/// The hypervisor of one run folder. Its sockets' names are removed when it is dropped.
pub struct Server {
    epoll: OwnedFd,
    sockets: Sockets,
    domains: Domains,
    store: Store,
    /// The server's own connection to its store, with domain 0's rights.
    own: ConnId,
    memory: Memory,
    /// Channels by the domain and port that allocated them.
    wires: HashMap<(DomId, Port), Wire>,
    conns: HashMap<u64, Conn>,
    interests: HashMap<u64, EventFlags>,
    by_store_id: HashMap<ConnId, u64>,
    next_conn: u64,
    leaving: Vec<Leaving>,
    /// Room for a datagram.
    scratch: Vec<u8>,
}

/// The listening sockets and their names.
struct Sockets {
    requests: OwnedFd,
    stores: OwnedFd,
    /// Given up for a moment when descriptors run out, so that a waiting connection can be
    /// taken and closed instead of waking us for ever.
    spare: Option<OwnedFd>,
    names: [PathBuf; 2],
    /// On the run folder; let go after the names are removed.
    _lock: OwnedFd,
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(e) = std::fs::remove_file(name) {
                tracing::debug!("cannot remove {}: {e}", name.display());
            }
        }
    }
}

/// Serves a run folder until `stop` is readable or closed at its other end. The folder is made
/// if it is missing; it must be this user's own, with nobody else let in. AddrInUse: another
/// hypervisor serves it. What a killed predecessor left is removed.
pub fn serve(run_dir: &Path, stop: BorrowedFd<'_>) -> io::Result<()> {
    Server::new(run_dir)?.run(stop)
}

/// Removes the sockets of a run folder whose hypervisor is gone. AddrInUse: it lives.
pub fn sweep(run_dir: &Path) -> io::Result<()> {
    sockets::sweep(run_dir).map(drop)
}

impl Server {
    /// Listens in a run folder; see [`serve`].
    pub fn new(run_dir: &Path) -> io::Result<Server> {
        let lock = sockets::prepare(run_dir)?;
        sockets::raise_descriptor_limit();
        let names = [run_dir.join(HYPERVISOR_SOCKET), run_dir.join(STORE_SOCKET)];
        let requests = sockets::listen(&names[0], sockets::Style::Datagrams)?;
        let stores = sockets::listen(&names[1], sockets::Style::Bytes)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &requests, EventData::new_u64(REQUESTS), EventFlags::IN)?;
        epoll::add(&epoll, &stores, EventData::new_u64(STORES), EventFlags::IN)?;
        let mut store = Store::new();
        let own = store.connect(0);
        let spare = sockets::spare();
        let mut server = Server {
            epoll,
            sockets: Sockets { requests, stores, spare, names, _lock: lock },
            domains: Domains::new(),
            store,
            own,
            memory: Memory::default(),
            wires: HashMap::new(),
            conns: HashMap::new(),
            interests: HashMap::new(),
            by_store_id: HashMap::new(),
            next_conn: FIRST_CONN,
            leaving: Vec::new(),
            scratch: Vec::new(),
        };
        server.first_nodes();
        Ok(server)
    }

    /// Serves until `stop` is readable or closed at its other end.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> io::Result<()> {
        epoll::add(&self.epoll, stop, EventData::new_u64(STOP), EventFlags::IN)?;
        let mut events = Vec::with_capacity(256);
        loop {
            events.clear();
            let timeout = self.timeout();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            for event in &events {
                match event.data.u64() {
                    STOP => return Ok(()),
                    REQUESTS => self.accept(REQUESTS),
                    STORES => self.accept(STORES),
                    token => self.serve_conn(token, event.flags),
                }
            }
            self.see_off();
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let first = self.leaving.iter().map(|l| l.until).min()?;
        let left = first.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        Timespec::try_from(left).ok()
    }

    fn accept(&mut self, listener: u64) {
        for _ in 0..TURN {
            let Some(socket) = self.sockets.accept(listener) else { return };
            match listener {
                REQUESTS => self.add_peer(0, socket),
                _ => self.add_store(0, socket),
            };
        }
    }

    fn add_peer(&mut self, domid: DomId, socket: OwnedFd) -> bool {
        self.add(Conn::Requests(Box::new(Peer::new(domid, socket))))
    }

    fn add_store(&mut self, domid: DomId, socket: OwnedFd) -> bool {
        let id = self.store.connect(domid);
        let token = self.next_conn;
        let added = self.add(Conn::Store(Box::new(StoreConn::new(domid, id, socket))));
        match added {
            true => drop(self.by_store_id.insert(id, token)),
            false => self.store.disconnect(id),
        }
        added
    }

    /// Takes a connection in, unless its domain has too many.
    fn add(&mut self, conn: Conn) -> bool {
        let domid = conn.domid();
        let limit = if domid == 0 { MAX_PRIVILEGED } else { MAX_CONNECTIONS };
        if self.conns.values().filter(|c| c.domid() == domid).count() >= limit {
            return false;
        }
        let (token, interest) = (self.next_conn, conn.interest());
        if epoll::add(&self.epoll, conn.fd(), EventData::new_u64(token), interest).is_err() {
            return false;
        }
        self.next_conn += 1;
        self.conns.insert(token, conn);
        self.interests.insert(token, interest);
        true
    }

    fn serve_conn(&mut self, token: u64, flags: EventFlags) {
        // It may have been closed by an event before this one in the same round.
        let fate = match self.conns.get(&token) {
            None => return,
            Some(Conn::Requests(_)) => self.serve_peer(token),
            Some(Conn::Store(_)) => self.serve_store(token, flags),
        };
        self.settle(token, fate);
        self.deliver_events();
    }

    /// After a connection was served: closes it or sets what it waits for.
    fn settle(&mut self, token: u64, fate: Fate) {
        if fate == Fate::Close {
            return self.close_conn(token);
        }
        let Some(conn) = self.conns.get(&token) else { return };
        let wanted = conn.interest();
        if self.interests.get(&token) != Some(&wanted) {
            let data = EventData::new_u64(token);
            if epoll::modify(&self.epoll, conn.fd(), data, wanted).is_err() {
                return self.close_conn(token);
            }
            self.interests.insert(token, wanted);
        }
    }

    fn close_conn(&mut self, token: u64) {
        let Some(conn) = self.conns.remove(&token) else { return };
        self.interests.remove(&token);
        let _ = epoll::delete(&self.epoll, conn.fd());
        match conn {
            Conn::Store(conn) => {
                self.by_store_id.remove(&conn.id);
                self.store.disconnect(conn.id);
            }
            Conn::Requests(peer) => {
                let domid = peer.domid;
                self.release_peer(token, *peer);
                self.end_if_alone(domid);
            }
        }
    }
}
