//! A process's connection to the hypervisor.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};

use super::message::{Endpoint, MAX_FDS, MAX_MESSAGE, Reader, Request, VERSION};
use crate::DomId;

/// What came back: the fields after the status, and descriptors.
#[derive(Debug)]
pub(super) struct Reply {
    /// 0, or an errno.
    pub(super) status: u32,
    /// Fields.
    pub(super) body: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Reply {
    /// The next descriptor.
    pub(super) fn fd(&mut self) -> io::Result<OwnedFd> {
        self.fds.pop_front().ok_or_else(malformed)
    }
    /// The fields.
    pub(super) fn fields(&self) -> Reader<'_> {
        Reader(&self.body)
    }
}

pub(super) fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the hypervisor's answer is malformed")
}

/// A connection on which one request at a time is answered.
#[derive(Debug)]
pub struct Link {
    socket: Mutex<OwnedFd>,
    domid: DomId,
}

impl Link {
    /// Connects to a hypervisor's socket, as domain 0.
    pub fn connect(socket: &Path) -> io::Result<Arc<Link>> {
        let told = |e: rustix::io::Errno| {
            let e = io::Error::from(e);
            io::Error::new(e.kind(), format!("hypervisor at {}: {e}", socket.display()))
        };
        let fd = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(socket).map_err(told)?).map_err(told)?;
        Link::new(fd)
    }

    /// Speaks over a socket that is connected already; it says which domain this is.
    pub fn new(fd: OwnedFd) -> io::Result<Arc<Link>> {
        let mut link = Link { socket: Mutex::new(fd), domid: 0 };
        let reply = link.call(&Request::Hello)?;
        let mut fields = reply.fields();
        let (version, domid) = (fields.u32(), fields.u16());
        if version != Some(VERSION) {
            return Err(io::Error::other("the hypervisor is of another version"));
        }
        link.domid = domid.ok_or_else(malformed)?;
        Ok(Arc::new(link))
    }

    /// The domain that this connection acts as.
    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// Another connection of the same domain. Becomes readable when the hypervisor is gone or
    /// the domain has ended, for nobody asks anything on it.
    pub fn lifeline(&self) -> io::Result<OwnedFd> {
        self.call(&Request::Open { endpoint: Endpoint::Requests })?.fd()
    }

    /// Another connection of the same domain, for requests of its own.
    pub(super) fn another(&self) -> io::Result<Arc<Link>> {
        Link::new(self.lifeline()?)
    }

    /// A connection to the store, in which relative paths start in the domain's folder.
    pub(super) fn store(&self) -> io::Result<crate::store::Client> {
        let fd = self.call(&Request::Open { endpoint: Endpoint::Store })?.fd()?;
        crate::store::Client::new(fd)
    }

    /// Asks, and waits for the answer; a refusal is an error.
    pub(super) fn call(&self, request: &Request) -> io::Result<Reply> {
        let reply = self.ask(request)?;
        match reply.status {
            0 => Ok(reply),
            errno => Err(io::Error::from_raw_os_error(errno as i32)),
        }
    }

    /// Asks, and waits for the answer, whatever it is.
    pub(super) fn ask(&self, request: &Request) -> io::Result<Reply> {
        let datagram = request.encode();
        if datagram.len() > MAX_MESSAGE {
            return Err(io::Error::from_raw_os_error(rustix::io::Errno::TOOBIG.raw_os_error()));
        }
        let socket = self.socket.lock();
        let mut no_fds = Default::default();
        let iov = [IoSlice::new(&datagram)];
        retry(|| rustix::net::sendmsg(&*socket, &iov, &mut no_fds, SendFlags::NOSIGNAL))
            .map_err(gone)?;
        receive(&socket)
    }
}

fn retry<T>(
    mut call: impl FnMut() -> Result<T, rustix::io::Errno>,
) -> Result<T, rustix::io::Errno> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other,
        }
    }
}

fn gone(e: rustix::io::Errno) -> io::Error {
    match e {
        rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => {
            io::Error::new(io::ErrorKind::BrokenPipe, "the hypervisor is gone")
        }
        e => e.into(),
    }
}

fn receive(socket: &OwnedFd) -> io::Result<Reply> {
    let mut body = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = retry(|| {
        let mut iov = [IoSliceMut::new(&mut body)];
        rustix::net::recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)
    })
    .map_err(gone)?;
    let mut fds = VecDeque::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.bytes == 0 {
        return Err(gone(rustix::io::Errno::PIPE));
    }
    body.truncate(got.bytes);
    let cut = got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    let status = Reader(&body).u32().filter(|_| !cut).ok_or_else(malformed)?;
    body.drain(..4);
    Ok(Reply { status, body, fds })
}
