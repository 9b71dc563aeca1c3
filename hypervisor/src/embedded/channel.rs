//! Event channels between processes: a pipe each way.
//!
//! A byte in the pipe is a pending event. Each side has open file descriptions of its own, so
//! what flags the other one sets on its ends does not matter here; filling the pipe only means
//! that an event is pending.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use super::arena::reopen;
use super::link::Link;
use super::message::Request;
use crate::{EventChannel, Port};

/// Bytes that a pipe holds: one page, so that one read empties it, and few of the pages that a
/// user's pipes may have.
const PIPE_BYTES: usize = 4096;

/// The hypervisor's part of a channel: the ends for the peer of the domain that allocated it.
/// They stay open here while no peer has bound it, so the owner's ends go on working.
#[derive(Debug)]
pub(super) struct Wire {
    read: OwnedFd,
    write: OwnedFd,
}

impl Wire {
    /// A new channel, and the ends of its owner: to read, to write.
    pub(super) fn new() -> io::Result<(Wire, [OwnedFd; 2])> {
        let pipe = || -> io::Result<(OwnedFd, OwnedFd)> {
            let ends = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
            rustix::pipe::fcntl_setpipe_size(&ends.1, PIPE_BYTES)?;
            Ok(ends)
        };
        let (peer_read, owner_write) = pipe()?;
        let (owner_read, peer_write) = pipe()?;
        Ok((Wire { read: peer_read, write: peer_write }, [owner_read, owner_write]))
    }

    /// Ends for a peer that binds, with an event pending as Xen has it.
    pub(super) fn ends(&self) -> io::Result<[OwnedFd; 2]> {
        let read = reopen(&self.read, OFlags::RDONLY | OFlags::NONBLOCK)?;
        let write = reopen(&self.write, OFlags::WRONLY | OFlags::NONBLOCK)?;
        let poke = reopen(&self.read, OFlags::WRONLY | OFlags::NONBLOCK)?;
        raise(&poke)?;
        Ok([read, write])
    }
}

fn raise(fd: &OwnedFd) -> io::Result<()> {
    match rustix::io::write(fd, &[1]) {
        // A full pipe is a pending event.
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// One side's end.
#[derive(Debug)]
pub(super) struct Channel {
    read: OwnedFd,
    write: OwnedFd,
    port: Port,
    link: Arc<Link>,
}

impl Channel {
    pub(super) fn new(link: Arc<Link>, port: Port, read: OwnedFd, write: OwnedFd) -> Self {
        Channel { read, write, port, link }
    }
}

impl EventChannel for Channel {
    fn notify(&self) -> io::Result<()> {
        raise(&self.write)
    }
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
    fn acknowledge(&self) -> io::Result<bool> {
        let mut bytes = [0; PIPE_BYTES];
        match rustix::io::read(&self.read, &mut bytes) {
            Ok(0) => Err(io::ErrorKind::BrokenPipe.into()),
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
    fn port(&self) -> Port {
        self.port
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // A hypervisor that is gone has closed the port already.
        if let Err(e) = self.link.call(&Request::Close { port: self.port }) {
            tracing::debug!("cannot close port {}: {e}", self.port);
        }
    }
}
