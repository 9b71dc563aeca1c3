//! Listening, and a thread for each connection.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::sockopt;
use rustls::ServerConfig;

use super::connection::{Cause, Connection, SLOTS};
use super::handshake::Offer;
use super::negotiate::negotiate;
use super::proto::{MAX_PAYLOAD, MAX_STRING, can};
use super::transport::Transport;
use crate::blocking;
use crate::disk::Disk;
use crate::export::unix;
use crate::storage::Access;

/// Bytes that a socket is asked to hold of replies.
const SEND_BUFFER: usize = 2 << 20;
/// How long nobody is accepted when there are no descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// How many clients may have an export at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Many, and each sees what the others have flushed (NBD_FLAG_CAN_MULTI_CONN).
    Many,
    /// One: the disk has one queue.
    One,
}

/// A disk under a name.
pub struct Export {
    /// What clients ask for; clients that name nothing ask for the empty name.
    pub name: String,
    /// A text for people.
    pub description: String,
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// What clients may do, if the disk can.
    pub access: Access,
    /// How many at once.
    pub clients: Clients,
    pub(super) unaligned: Mutex<()>,
}

impl Export {
    /// For reading and writing by many.
    pub fn new(name: impl Into<String>, disk: Arc<dyn Disk>) -> Export {
        Export {
            name: name.into(),
            description: String::new(),
            disk,
            access: Access::ReadWrite,
            clients: Clients::Many,
            unaligned: Mutex::new(()),
        }
    }

    fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly || self.disk.geometry().read_only
    }

    /// As a new connection sees it.
    pub(super) fn offer(&self) -> Offer {
        // A file that has grown: those who come now see it.
        let geometry = self.disk.refresh().unwrap_or_else(|e| {
            tracing::warn!("nbd: export {:?}: looking at its size: {e}", self.name);
            self.disk.geometry()
        });
        let mut flags = can::HAS_FLAGS | can::FLUSH | can::CACHE;
        if self.clients == Clients::Many {
            flags |= can::MULTI_CONN;
        }
        if self.is_read_only() {
            flags |= can::READ_ONLY;
        } else {
            flags |= can::FUA | can::WRITE_ZEROES;
            flags |= if geometry.discard.is_some() { can::TRIM } else { 0 };
        }
        Offer {
            name: self.name.clone(),
            description: self.description.clone(),
            size: geometry.size,
            flags,
            minimum: geometry.logical_block,
            preferred: geometry.physical_block.clamp(4096, MAX_PAYLOAD),
            bitmaps: self.disk.bitmaps(),
        }
    }
}

/// What a server limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once; further ones wait until one ends. Each holds at most 33 MiB, and a
    /// descriptor table's worth of its disk's queue.
    pub connections: usize,
    /// How long a handshake may take.
    pub handshake: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { connections: 64, handshake: Duration::from_secs(10) }
    }
}

enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

/// A server; it serves as long as [`serve`](Self::serve) runs, whether or not there are clients.
pub struct Server {
    exports: Vec<Export>,
    tls: Option<Arc<ServerConfig>>,
    limits: Limits,
    listeners: Vec<Listener>,
}

/// What the connections' threads share.
struct Scene<'a> {
    exports: &'a [Export],
    tls: Option<&'a Arc<ServerConfig>>,
    patience: Duration,
    stop: BorrowedFd<'a>,
    /// Written when a connection ends.
    ended: OwnedFd,
    open: AtomicUsize,
    number: AtomicU64,
}

impl Server {
    /// With these exports, whose names must differ. `tls` is demanded of all clients.
    pub fn new(
        exports: Vec<Export>,
        tls: Option<Arc<ServerConfig>>,
        limits: Limits,
    ) -> io::Result<Server> {
        let wrong = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        for (number, export) in exports.iter().enumerate() {
            if export.name.len() > MAX_STRING || export.description.len() > MAX_STRING {
                return wrong("an export's name or description is longer than 4096 bytes".into());
            }
            if exports[..number].iter().any(|other| other.name == export.name) {
                return wrong(format!("two exports have the name {:?}", export.name));
            }
        }
        if exports.is_empty() || limits.connections == 0 {
            return wrong("nothing to serve".into());
        }
        Ok(Server { exports, tls, limits, listeners: Vec::new() })
    }

    /// Listens at `path`. The socket of a server that is no more is replaced, that of a live
    /// one is left alone (AddrInUse).
    pub fn listen_unix(&mut self, path: &Path) -> io::Result<()> {
        let listener = unix::listen(path)?;
        self.listeners.push(Listener::Unix(listener, path.to_owned()));
        Ok(())
    }

    /// Listens at a host's TCP port (0: any that is free): the addresses that it got.
    pub fn listen_tcp(&mut self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{host}:{port}: {e}"));
        let mut got = Vec::new();
        for address in (host, port).to_socket_addrs().map_err(named)? {
            let listener = TcpListener::bind(address).map_err(named)?;
            listener.set_nonblocking(true)?;
            got.push(listener.local_addr()?);
            self.listeners.push(Listener::Tcp(listener));
        }
        Ok(got)
    }

    /// Serves until `stop` is readable (or at its end). Then requests that were taken are
    /// carried out and answered, every disk is flushed, and the sockets are removed.
    pub fn serve(&self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let scene = Scene {
            exports: &self.exports,
            tls: self.tls.as_ref(),
            patience: self.limits.handshake,
            stop,
            ended: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            open: AtomicUsize::new(0),
            number: AtomicU64::new(0),
        };
        let served = std::thread::scope(|scope| self.accept_all(scope, &scene));
        for listener in &self.listeners {
            if let Listener::Unix(_, path) = listener
                && let Err(e) = fs::remove_file(path)
            {
                tracing::warn!("nbd: {}: {e}", path.display());
            }
        }
        served?;
        self.exports.iter().filter(|e| !e.is_read_only()).try_for_each(|export| {
            let flushed = export.disk.queue(1).and_then(|mut q| blocking::flush(&mut *q));
            flushed.map_err(|e| {
                io::Error::new(e.kind(), format!("export {:?}: the last flush: {e}", export.name))
            })
        })
    }

    fn accept_all<'s>(
        &'s self,
        scope: &'s std::thread::Scope<'s, '_>,
        scene: &'s Scene<'s>,
    ) -> io::Result<()> {
        loop {
            let full = scene.open.load(Ordering::Acquire) >= self.limits.connections;
            let mut fds = vec![
                PollFd::from_borrowed_fd(scene.stop, PollFlags::IN),
                PollFd::new(&scene.ended, PollFlags::IN),
            ];
            if !full {
                fds.extend(self.listeners.iter().map(|l| {
                    let fd = match l {
                        Listener::Unix(listener, _) => listener.as_fd(),
                        Listener::Tcp(listener) => listener.as_fd(),
                    };
                    PollFd::from_borrowed_fd(fd, PollFlags::IN)
                }));
            }
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return Ok(());
            }
            if ready[1] {
                let mut count = [0; 8];
                rustix::io::read(&scene.ended, &mut count)?;
            }
            for (listener, _) in self.listeners.iter().zip(&ready[2..]).filter(|(_, ready)| **ready)
            {
                if scene.open.load(Ordering::Acquire) < self.limits.connections {
                    listener.accept().map_or_else(pause, |got| start(scope, scene, got));
                }
            }
        }
    }
}

/// Nothing came, after all, or there are no descriptors.
fn pause(e: io::Error) {
    if e.kind() != io::ErrorKind::WouldBlock && e.kind() != io::ErrorKind::ConnectionAborted {
        tracing::warn!("nbd: accepting a connection: {e}");
        std::thread::sleep(PAUSE);
    }
}

impl Listener {
    fn accept(&self) -> io::Result<(OwnedFd, String)> {
        match self {
            Listener::Unix(listener, path) => {
                let (stream, _) = listener.accept()?;
                // As much as the system's limit allows.
                let _ = sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER);
                Ok((stream.into(), path.display().to_string()))
            }
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                prepare_tcp(&stream)?;
                Ok((stream.into(), peer.to_string()))
            }
        }
    }
}

/// Small replies go out at once, and a client's host that is gone is noticed.
pub(crate) fn prepare_tcp(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    Ok(sockopt::set_socket_keepalive(stream, true)?)
}

fn start<'s>(
    scope: &'s std::thread::Scope<'s, '_>,
    scene: &'s Scene<'s>,
    (socket, peer): (OwnedFd, String),
) {
    let number = scene.number.fetch_add(1, Ordering::Relaxed);
    scene.open.fetch_add(1, Ordering::AcqRel);
    let place = Place(scene);
    let thread = std::thread::Builder::new().name(format!("nbd-{number}"));
    let run = move || {
        let _place = place;
        match scene.connection(Transport::new(socket)) {
            Ok(Some(requests)) => {
                tracing::debug!("nbd: connection {number} ({peer}): ended, {requests} requests");
            }
            Ok(None) => tracing::debug!("nbd: connection {number} ({peer}): ended, no export"),
            // Some hang up without waiting for the last answer.
            Err(Cause::Socket(e))
                if matches!(
                    e.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                tracing::debug!("nbd: connection {number} ({peer}): {e}");
            }
            Err(cause) => tracing::warn!("nbd: connection {number} ({peer}): {cause}"),
        }
    };
    if let Err(e) = thread.spawn_scoped(scope, run) {
        tracing::warn!("nbd: no thread for connection {number}: {e}");
    }
}

/// One of the connections that are allowed.
struct Place<'a>(&'a Scene<'a>);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
        // It cannot be full: each connection adds one.
        let _ = rustix::io::write(&self.0.ended, &1u64.to_ne_bytes());
    }
}

impl Scene<'_> {
    fn connection(&self, mut transport: Transport) -> Result<Option<u64>, Cause> {
        let agreed = negotiate(&mut transport, self.exports, self.tls, self.stop, self.patience)?;
        let Some(agreed) = agreed else {
            transport.close();
            return Ok(None);
        };
        let export = &self.exports[agreed.session.export];
        tracing::debug!("nbd: export {:?}: up to {SLOTS} requests", export.name);
        Connection::new(transport, agreed, export, self.stop)?.run().map(Some)
    }
}
