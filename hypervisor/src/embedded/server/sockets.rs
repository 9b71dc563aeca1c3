//! Sockets: names, listening, datagrams with descriptors.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use rustix::event::epoll::EventFlags;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::process::{Resource, Rlimit};

use super::super::message::{MAX_FDS, MAX_MESSAGE};
use super::requests::Holdings;
use super::{Fate, HYPERVISOR_SOCKET, REQUESTS, STORE_SOCKET, Sockets};
use crate::DomId;

/// What a socket carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Datagrams,
    Bytes,
}

/// Makes or checks the run folder, takes it for this process, and removes what a dead
/// predecessor left in it. The folder is this process's for as long as the lock lives.
pub(super) fn prepare(run_dir: &Path) -> io::Result<OwnedFd> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", run_dir.display()));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir).map_err(named)?;
    let meta = std::fs::metadata(run_dir)?;
    if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
        let why = format!("{} must be this user's with mode 0700", run_dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    sweep(run_dir)
}

/// Removes sockets that nobody listens on any more. The lock on the folder, which a process
/// loses when it dies however it dies, says whether somebody does.
pub(super) fn sweep(run_dir: &Path) -> io::Result<OwnedFd> {
    let lock = OwnedFd::from(std::fs::File::open(run_dir)?);
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::AGAIN) => {
            let why = format!("{} is served by another hypervisor", run_dir.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, why));
        }
        Err(e) => return Err(e.into()),
    }
    for name in [HYPERVISOR_SOCKET, STORE_SOCKET] {
        match std::fs::remove_file(run_dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(lock)
}

/// Each connection, channel and arena takes descriptors: as many as are allowed.
pub(super) fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(e) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!("cannot raise the limit of open files: {e}");
    }
}

pub(super) fn listen(path: &Path, style: Style) -> io::Result<OwnedFd> {
    let kind = match style {
        Style::Datagrams => SocketType::SEQPACKET,
        Style::Bytes => SocketType::STREAM,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    let named = |e: Errno| {
        let e = io::Error::from(e);
        io::Error::new(e.kind(), format!("{}: {e}", path.display()))
    };
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?).map_err(named)?;
    rustix::net::listen(&socket, 128).map_err(named)?;
    Ok(socket)
}

pub(super) fn spare() -> Option<OwnedFd> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).ok().map(|(read, _)| read)
}

/// Two ends of a connection that has no name: ours, theirs.
pub(super) fn pair(style: Style) -> io::Result<(OwnedFd, OwnedFd)> {
    let kind = match style {
        Style::Datagrams => SocketType::SEQPACKET,
        Style::Bytes => SocketType::STREAM,
    };
    Ok(rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?)
}

impl Sockets {
    /// A waiting connection. Only this user and root can reach the sockets in their folder.
    pub(super) fn accept(&mut self, listener: u64) -> Option<OwnedFd> {
        let listening = if listener == REQUESTS { &self.requests } else { &self.stores };
        match rustix::net::accept_with(listening, SocketFlags::CLOEXEC) {
            Ok(socket) => Some(socket),
            Err(Errno::MFILE | Errno::NFILE) => {
                self.spare = None;
                drop(rustix::net::accept_with(listening, SocketFlags::CLOEXEC));
                self.spare = spare();
                tracing::warn!("out of descriptors: a connection was refused");
                None
            }
            Err(_) => None,
        }
    }
}

/// A datagram that could not be sent yet.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) datagram: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// A request connection.
pub(super) struct Peer {
    pub(super) domid: DomId,
    pub(super) socket: OwnedFd,
    /// The reply to the last request; no further one is taken until it is sent.
    waiting: Option<Outgoing>,
    /// What its process holds through it.
    pub(super) holds: Holdings,
}

impl Peer {
    pub(super) fn new(domid: DomId, socket: OwnedFd) -> Self {
        Peer { domid, socket, waiting: None, holds: Holdings::default() }
    }

    pub(super) fn interest(&self) -> EventFlags {
        if self.waiting.is_some() { EventFlags::OUT } else { EventFlags::IN }
    }

    /// The next request, if there is one and the last has been answered. Descriptors that come
    /// with it are dropped by the kernel, since no room is given for them.
    pub(super) fn receive(&mut self, into: &mut Vec<u8>) -> Result<Option<usize>, Fate> {
        if let Some(reply) = self.waiting.take() {
            self.send(reply)?;
        }
        if self.waiting.is_some() {
            return Ok(None);
        }
        into.resize(MAX_MESSAGE + 1, 0);
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        match rustix::net::recv(&self.socket, &mut into[..], flags) {
            Ok((_, len)) if len > 0 && len <= MAX_MESSAGE => Ok(Some(len)),
            Ok(_) => Err(Fate::Close),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(_) => Err(Fate::Close),
        }
    }

    /// Sends a reply, or keeps it until there is room.
    pub(super) fn send(&mut self, reply: Outgoing) -> Result<(), Fate> {
        let fds: Vec<_> = reply.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Fate::Close);
        }
        let iov = [IoSlice::new(&reply.datagram)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::sendmsg(&self.socket, &iov, &mut control, flags) {
            Ok(_) => Ok(()),
            Err(Errno::AGAIN | Errno::INTR) => {
                self.waiting = Some(reply);
                Ok(())
            }
            Err(e) => {
                tracing::debug!("domain {}: cannot answer: {e}", self.domid);
                Err(Fate::Close)
            }
        }
    }
}
