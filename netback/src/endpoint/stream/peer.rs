//! Who is at the other end of a stream, and how they come there.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;
use rustix::net::{
    SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with,
    sockopt,
};

/// After which a client tries again.
const RETRY: Duration = Duration::from_secs(1);

/// Which end of a stream this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It connects to the other.
    Client,
    /// The other connects to it.
    Server,
}

/// Where the other end is, or comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// `HOST:PORT` over TCP.
    Tcp(String),
}

impl Address {
    /// An absolute path, or `HOST:PORT`.
    pub fn parse(text: &str) -> Option<Address> {
        if text.starts_with('/') {
            return Some(Address::Unix(text.into()));
        }
        let (host, port) = text.rsplit_once(':')?;
        (!host.is_empty() && port.parse::<u16>().is_ok()).then(|| Address::Tcp(text.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => path.display().fmt(f),
            Address::Tcp(text) => text.fmt(f),
        }
    }
}

/// How an end comes by its peers.
pub(in crate::endpoint) struct Dial {
    address: Address,
    way: Way,
}

enum Way {
    Connect(Vec<SocketAddrAny>),
    Accept(OwnedFd),
}

impl Dial {
    pub(in crate::endpoint) fn new(role: Role, address: Address) -> io::Result<Dial> {
        let way = match role {
            Role::Client => targets(&address).map(Way::Connect),
            Role::Server => listener(&address).map(Way::Accept),
        };
        let way = way.map_err(|e| io::Error::new(e.kind(), format!("{address}: {e}")))?;
        Ok(Dial { address, way })
    }

    pub(in crate::endpoint) fn address(&self) -> &Address {
        &self.address
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        if let (Way::Accept(_), Address::Unix(path)) = (&self.way, &self.address)
            && let Err(e) = std::fs::remove_file(path)
        {
            tracing::debug!("{}: {e}", path.display());
        }
    }
}

/// A name is looked up here alone: later nothing may wait.
fn targets(address: &Address) -> io::Result<Vec<SocketAddrAny>> {
    Ok(match address {
        Address::Unix(path) => vec![SocketAddrUnix::new(path)?.into()],
        Address::Tcp(text) => text.to_socket_addrs()?.map(|at: SocketAddr| at.into()).collect(),
    })
}

fn listener(address: &Address) -> io::Result<OwnedFd> {
    match address {
        Address::Unix(path) => {
            // What a killed predecessor left.
            let left = UnixStream::connect(path);
            if left.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
                std::fs::remove_file(path)?;
            }
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            Ok(listener.into())
        }
        Address::Tcp(text) => {
            let listener = TcpListener::bind(text)?;
            listener.set_nonblocking(true)?;
            Ok(listener.into())
        }
    }
}

/// The other end of a stream.
pub(in crate::endpoint) struct Peer {
    dial: Arc<Dial>,
    state: State,
    /// Attempts to connect; they go through the addresses.
    attempts: usize,
    /// What the log was told last, and when.
    told: Option<(Told, Instant)>,
}

/// What is told of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Here,
    Gone,
}

enum State {
    /// Nobody is there; nothing is tried before this time.
    Away {
        retry: Instant,
    },
    /// Not answered yet; the second is readable when it is.
    Coming {
        socket: OwnedFd,
        answered: OwnedFd,
    },
    There(OwnedFd),
}

impl Peer {
    pub(in crate::endpoint) fn new(dial: Arc<Dial>) -> Peer {
        Peer { dial, state: State::Away { retry: Instant::now() }, attempts: 0, told: None }
    }

    /// The connection, if there is one.
    pub(in crate::endpoint) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::There(socket) => Some(socket.as_fd()),
            State::Away { .. } | State::Coming { .. } => None,
        }
    }

    /// Readable when there is something to do.
    pub(in crate::endpoint) fn readable(&self) -> Option<BorrowedFd<'_>> {
        match (&self.state, &self.dial.way) {
            (State::There(socket), _) => Some(socket.as_fd()),
            (State::Coming { answered, .. }, _) => Some(answered.as_fd()),
            (State::Away { retry }, Way::Accept(listener)) => {
                (*retry <= Instant::now()).then(|| listener.as_fd())
            }
            (State::Away { .. }, Way::Connect(_)) => None,
        }
    }

    /// When there is something to do in any case.
    pub(in crate::endpoint) fn deadline(&self) -> Option<Instant> {
        match (&self.state, &self.dial.way) {
            (State::Away { retry }, Way::Connect(_)) => Some(*retry),
            (State::Away { retry }, Way::Accept(_)) => {
                Some(*retry).filter(|at| *at > Instant::now())
            }
            _ => None,
        }
    }

    /// Ends the connection. A server takes the next one at once.
    pub(in crate::endpoint) fn lose(&mut self, why: &str) {
        let pause = match &self.dial.way {
            Way::Accept(_) => Duration::ZERO,
            Way::Connect(_) => RETRY,
        };
        self.fail(why, pause);
    }

    /// Nobody is there, for a while; whether the log was told.
    pub(in crate::endpoint) fn fail(&mut self, why: &str, pause: Duration) -> bool {
        let now = Instant::now();
        // A client is told once of each peer that is not there; who comes and goes decides how often.
        let is_new = self.told.is_none_or(|(told, at)| told == Told::Here && now - at >= RETRY);
        if is_new {
            tracing::warn!("{}: {why}; waiting for another connection", self.dial.address);
            self.told = Some((Told::Gone, now));
        }
        self.state = State::Away { retry: now + pause };
        is_new
    }

    fn meet(&mut self, socket: OwnedFd) {
        // Of a Unix socket it is no option.
        if matches!(self.dial.address, Address::Tcp(_))
            && let Err(e) = sockopt::set_tcp_nodelay(&socket, true)
        {
            tracing::debug!("{}: {e}", self.dial.address);
        }
        let now = Instant::now();
        if self.told.is_none_or(|(told, at)| told == Told::Gone || now - at >= RETRY) {
            tracing::info!("{}: connected", self.dial.address);
            self.told = Some((Told::Here, now));
        }
        self.state = State::There(socket);
    }

    /// Brings a connection about, as far as that goes without waiting.
    pub(in crate::endpoint) fn attend(&mut self) {
        let now = Instant::now();
        match std::mem::replace(&mut self.state, State::Away { retry: now }) {
            State::There(socket) => self.state = State::There(socket),
            State::Coming { socket, answered } => match is_answered(&socket) {
                Ok(true) => self.meet(socket),
                Ok(false) => self.state = State::Coming { socket, answered },
                Err(e) => drop(self.fail(&e.to_string(), RETRY)),
            },
            State::Away { retry } => match self.seek(retry, now) {
                Ok(State::There(socket)) => self.meet(socket),
                Ok(state) => self.state = state,
                Err(e) => drop(self.fail(&e.to_string(), RETRY)),
            },
        }
    }

    fn seek(&mut self, retry: Instant, now: Instant) -> io::Result<State> {
        match &self.dial.way {
            Way::Accept(listener) if retry <= now => {
                match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(socket) => Ok(State::There(socket)),
                    Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {
                        Ok(State::Away { retry })
                    }
                    Err(e) => Err(e.into()),
                }
            }
            Way::Connect(targets) if retry <= now => {
                let Some(target) = targets.get(self.attempts % targets.len().max(1)) else {
                    return Err(io::ErrorKind::NotFound.into());
                };
                self.attempts = self.attempts.wrapping_add(1);
                begin(target)
            }
            Way::Accept(_) | Way::Connect(_) => Ok(State::Away { retry }),
        }
    }
}

/// Begins to connect.
fn begin(target: &SocketAddrAny) -> io::Result<State> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(target.address_family(), SocketType::STREAM, flags, None)?;
    match connect(&socket, target) {
        Ok(()) => Ok(State::There(socket)),
        Err(Errno::INPROGRESS) => {
            let answered = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let data = epoll::EventData::new_u64(0);
            epoll::add(&answered, &socket, data, epoll::EventFlags::OUT)?;
            Ok(State::Coming { socket, answered })
        }
        Err(e) => Err(e.into()),
    }
}

/// Whether a connection has been made; the error says that it will not be.
fn is_answered(socket: &OwnedFd) -> io::Result<bool> {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    if poll(&mut fds, Some(&now))? == 0 {
        return Ok(false);
    }
    sockopt::socket_error(socket)??;
    Ok(true)
}
