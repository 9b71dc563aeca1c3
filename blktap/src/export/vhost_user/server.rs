//! Listening, and one front-end after the other.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::blk::ID_BYTES;
use super::connection::{Cause, Connection, End};
use crate::blocking;
use crate::disk::Disk;
use crate::export::unix;

/// How long a front-end may hold up the end.
const PARTING: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// How long nobody is accepted when there are no descriptors left.
const PAUSE: Duration = Duration::from_millis(100);
/// Most queues.
pub const MAX_QUEUES: u16 = 64;

/// A disk, and how it is shown.
pub struct Export {
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// Queues that a front-end may use, from 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// What the guest sees as the disk's serial number; 20 bytes of it.
    pub serial: String,
    /// How long a queue polls before it sleeps, at most, in microseconds.
    pub poll_us: u32,
}

impl Export {
    /// With one queue.
    pub fn new(disk: Arc<dyn Disk>) -> Export {
        Export { disk, queues: 1, serial: "ringback".into(), poll_us: 50 }
    }

    pub(super) fn id(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(self.serial.bytes()).for_each(|(to, from)| *to = from);
        id
    }
}

/// Where front-ends come from.
enum Source {
    Listener(UnixListener, Option<PathBuf>),
    /// One that is there already.
    Stream(Option<UnixStream>),
}

/// A server; it serves as long as [`serve`](Self::serve) runs, whether or not there is a
/// front-end.
pub struct Server {
    export: Export,
    source: Source,
}

impl Server {
    fn checked(export: Export, source: Source) -> io::Result<Server> {
        if !(1..=MAX_QUEUES).contains(&export.queues) {
            let text = format!("{} queues: from 1 to {MAX_QUEUES}", export.queues);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(Server { export, source })
    }

    /// Listens at `path`. The socket of a server that is no more is replaced, that of a live
    /// one is left alone (AddrInUse).
    pub fn listen(export: Export, path: &Path) -> io::Result<Server> {
        let listener = unix::listen(path)?;
        Server::checked(export, Source::Listener(listener, Some(path.to_owned())))
    }

    /// Takes a socket that somebody else has made: one that listens, or one that is connected
    /// already.
    pub fn inherit(export: Export, socket: OwnedFd) -> io::Result<Server> {
        let listens = rustix::net::sockopt::socket_acceptconn(&socket)?;
        let source = if listens {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            Source::Listener(listener, None)
        } else {
            Source::Stream(Some(UnixStream::from(socket)))
        };
        Server::checked(export, source)
    }

    /// Serves until `stop` is readable (or at its end), or until the one front-end of an
    /// inherited connection has gone. Then requests that were taken are carried out and
    /// answered, the disk is flushed, and the socket is removed.
    pub fn serve(&mut self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let served = self.serve_all(stop);
        if let Source::Listener(_, Some(path)) = &self.source
            && let Err(e) = std::fs::remove_file(path)
        {
            tracing::warn!("vhost-user: {}: {e}", path.display());
        }
        served?;
        if self.export.disk.geometry().read_only {
            return Ok(());
        }
        let flushed = self.export.disk.queue(1).and_then(|mut q| blocking::flush(&mut *q));
        flushed.map_err(|e| io::Error::new(e.kind(), format!("the last flush: {e}")))
    }

    fn serve_all(&mut self, stop: BorrowedFd<'_>) -> io::Result<()> {
        for number in 0u64.. {
            let socket = match &mut self.source {
                Source::Stream(stream) => stream.take(),
                Source::Listener(listener, _) => accept(listener, stop)?,
            };
            let Some(socket) = socket else { break };
            if self.one(number, socket, stop)? == Some(End::Stopped) {
                break;
            }
        }
        Ok(())
    }

    /// One front-end, in a thread of its own: this one sees to it that it ends.
    fn one(
        &self,
        number: u64,
        socket: UnixStream,
        stop: BorrowedFd<'_>,
    ) -> io::Result<Option<End>> {
        // An answer that does not fit waits: whoever does not read holds up nobody else.
        socket.set_nonblocking(false)?;
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ours = socket.try_clone()?;
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("vhost-user".into());
            let run = || {
                let result = Connection::new(socket, &self.export, stop).and_then(|mut c| c.run());
                let end = report(number, &result);
                // Empty until now.
                let _ = rustix::io::write(&ended, &1u64.to_ne_bytes());
                end
            };
            let thread = thread.spawn_scoped(scope, run)?;
            let fds = || {
                [PollFd::new(&ended, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)]
            };
            retry(|| poll(&mut fds(), None))?;
            if retry(|| poll(&mut fds()[..1], Some(&PARTING)))? == 0 {
                // It does not read its answers.
                ours.shutdown(std::net::Shutdown::Both)?;
            }
            Ok(thread.join().unwrap_or(None))
        })
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

fn report(number: u64, result: &Result<(End, u64), Cause>) -> Option<End> {
    match result {
        Ok((end, requests)) => {
            tracing::debug!("vhost-user: front-end {number}: ended, {requests} requests");
            Some(*end)
        }
        Err(cause) => {
            tracing::warn!("vhost-user: front-end {number}: {cause}");
            None
        }
    }
}

/// The next front-end; `None` at the end.
fn accept(listener: &UnixListener, stop: BorrowedFd<'_>) -> io::Result<Option<UnixStream>> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        if !fds[0].revents().is_empty() {
            return Ok(None);
        }
        match listener.accept() {
            Ok((stream, _)) => return Ok(Some(stream)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => {
                tracing::warn!("vhost-user: accepting a connection: {e}");
                std::thread::sleep(PAUSE);
            }
        }
    }
}
