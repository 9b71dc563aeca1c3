//! The thread that keeps a vif connected to its switch: it connects or accepts, speaks vhost-user, gives
//! the queues their rings, and takes them back when the connection ends.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::pipe::{PipeFlags, pipe_with};

use super::queue::{Port, Trouble, Wire};
use super::session;
use crate::endpoint::Accepts;
use crate::endpoint::stream::peer::{Dial, Peer};

/// How long a switch may take until its rings run.
const PATIENCE: Duration = Duration::from_secs(5);
/// After which a connection is tried again that nothing came of; doubled each time, so often.
const PAUSE: Duration = Duration::from_secs(1);
const DOUBLED: u32 = 4;

/// The running thread; ended when dropped.
pub(super) struct Link {
    /// Closed to end it.
    stop: Option<OwnedFd>,
    ports: Arc<[Port]>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    pub(super) fn start(dial: Arc<Dial>, queues: usize, accepts: Accepts) -> io::Result<Link> {
        let ports: Arc<[Port]> = (0..queues).map(|_| Port::new()).collect::<io::Result<_>>()?;
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC)?;
        let peer = Peer::new(dial.clone());
        let keeper = Keeper { dial, peer, ports: ports.clone(), accepts, stopped, failures: 0 };
        let thread = Builder::new().name("vhost-user".into()).spawn(move || keeper.run())?;
        Ok(Link { stop: Some(stop), ports, thread: Some(thread) })
    }

    pub(super) fn ports(&self) -> Arc<[Port]> {
        self.ports.clone()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a vhost-user connection has panicked");
        }
    }
}

/// Why a connection is over.
enum End {
    Stopped,
    /// The switch has closed it.
    Gone(String),
    /// Nothing came of it, or the switch has said what makes no sense.
    Bad(String),
}

fn bad(e: io::Error) -> End {
    End::Bad(e.to_string())
}

/// Which of the descriptors can be read, waited for so long.
fn readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => Ok(fds.map(|fd| !fd.revents().is_empty())),
        Err(Errno::INTR) => Ok([false; N]),
        Err(e) => Err(e.into()),
    }
}

struct Keeper {
    dial: Arc<Dial>,
    peer: Peer,
    ports: Arc<[Port]>,
    accepts: Accepts,
    /// Readable when the thread is to end.
    stopped: OwnedFd,
    /// Connections in a row that nothing came of.
    failures: u32,
}

impl Keeper {
    fn run(mut self) {
        loop {
            self.peer.attend();
            let end = match self.peer.socket().map(|socket| socket.try_clone_to_owned()) {
                Some(Ok(socket)) => self.serve(socket.into()),
                Some(Err(e)) => bad(e),
                None if self.is_stopped() => End::Stopped,
                None => continue,
            };
            match end {
                End::Stopped => return,
                End::Gone(why) => self.peer.lose(&why),
                End::Bad(why) => {
                    let pause = PAUSE * (1 << self.failures.min(DOUBLED));
                    self.failures = self.failures.saturating_add(1);
                    // The pause sees to it that there are few of these.
                    if !self.peer.fail(&why, pause) {
                        tracing::warn!("{}: {why}; nothing comes of it", self.dial.address());
                    }
                }
            }
        }
    }

    /// Waits for somebody; whether the thread is to end.
    fn is_stopped(&self) -> bool {
        let now = Instant::now();
        let wait = self.peer.deadline().map(|at| at.saturating_duration_since(now));
        let stopped = self.stopped.as_fd();
        let came = self.peer.readable().unwrap_or(stopped);
        match readable([stopped, came], wait) {
            Ok([stopped, _]) => stopped,
            Err(e) => {
                tracing::error!("{}: {e}", self.dial.address());
                true
            }
        }
    }

    /// One connection, from its first message to its end.
    fn serve(&mut self, socket: UnixStream) -> End {
        let trouble = match socket.set_nonblocking(false).and_then(|()| Trouble::new()) {
            Ok(trouble) => Arc::new(trouble),
            Err(e) => return bad(e),
        };
        let wires = match self.open(&socket, &trouble) {
            Ok(wires) => wires,
            Err(end) => return end,
        };
        self.failures = 0;
        for (port, wire) in self.ports.iter().zip(wires) {
            port.put(Some(wire));
        }
        let end = self.watch(&socket, &trouble).unwrap_or_else(bad);
        self.ports.iter().for_each(|port| port.put(None));
        end
    }

    /// Speaks to the switch until the rings run, or its time is over: in a thread of its own, which waits
    /// for answers, and is woken by the connection's end.
    fn open(&self, socket: &UnixStream, trouble: &Arc<Trouble>) -> Result<Vec<Wire>, End> {
        let own = socket.try_clone().map_err(bad)?;
        let (ended, running) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| bad(e.into()))?;
        std::thread::scope(|scope| {
            let opening = Builder::new().name("vhost-user-open".into());
            let opening = opening.spawn_scoped(scope, move || {
                let wires = session::open(own, &self.ports, self.accepts, trouble);
                drop(running);
                wires
            });
            let opening = opening.map_err(bad)?;
            let end = Instant::now() + PATIENCE;
            let waited = loop {
                let left = end.saturating_duration_since(Instant::now());
                match readable([self.stopped.as_fd(), ended.as_fd()], Some(left)) {
                    Ok([true, _]) => break Some(End::Stopped),
                    Ok([false, true]) => break None,
                    Ok(_) if left.is_zero() => {
                        break Some(End::Bad(format!("no answer within {PATIENCE:?}")));
                    }
                    Ok(_) => {}
                    Err(e) => break Some(bad(e)),
                }
            };
            if waited.is_some()
                && let Err(e) = socket.shutdown(Shutdown::Both)
            {
                tracing::debug!("{}: {e}", self.dial.address());
            }
            let opened = opening.join().map_err(|_| End::Bad("a panic".into()))?;
            match waited {
                Some(end) => Err(end),
                None => opened.map_err(|e| End::Bad(e.to_string())),
            }
        })
    }

    /// Waits for a connection's end.
    fn watch(&self, socket: &UnixStream, trouble: &Trouble) -> io::Result<End> {
        loop {
            let fds = [self.stopped.as_fd(), trouble.as_fd(), socket.as_fd()];
            let [stopped, troubled, spoken] = readable(fds, None)?;
            if stopped {
                return Ok(End::Stopped);
            }
            if let (true, Some(what)) = (troubled, trouble.take()) {
                return Ok(End::Bad(what));
            }
            if spoken {
                // Nothing was asked, and it has no channel to ask by.
                match recv(socket, &mut [0; 1][..], RecvFlags::DONTWAIT) {
                    Ok((_, 0)) => return Ok(End::Gone("it has closed".into())),
                    Ok(_) => return Ok(End::Bad("it speaks without being asked".into())),
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(e) => return Ok(End::Gone(e.to_string())),
                }
            }
        }
    }
}
