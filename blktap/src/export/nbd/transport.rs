//! A connection's bytes: a non-blocking socket, plain or under TLS.

mod raw;

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recvmsg, sendmsg,
    shutdown,
};
use rustls::Connection;

/// Encrypted bytes that wait to be sent, at most.
const TLS_BUFFER: usize = 256 << 10;
/// Pieces of one send.
pub const MAX_PIECES: usize = 64;

/// See the module.
pub struct Transport {
    fd: OwnedFd,
    tls: Option<Box<Connection>>,
}

/// What a wait has ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The socket is ready, or broken: trying will say.
    Ready,
    /// The other descriptor is readable.
    Stop,
    /// It is too late.
    Late,
}

/// A socket as a reader and writer for rustls.
struct Raw<'a>(BorrowedFd<'a>);

impl Read for Raw<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        receive_plain(self.0, &mut [IoSliceMut::new(into)])
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        send_plain(self.0, &[IoSlice::new(from)])
    }
    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        send_plain(self.0, &from[..from.len().min(MAX_PIECES)])
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn receive_plain(fd: BorrowedFd<'_>, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    let mut none = RecvAncillaryBuffer::default();
    loop {
        match recvmsg(fd, into, &mut none, RecvFlags::DONTWAIT) {
            Err(Errno::INTR) => {}
            got => return Ok(got?.bytes),
        }
    }
}

fn send_plain(fd: BorrowedFd<'_>, from: &[IoSlice<'_>]) -> io::Result<usize> {
    let mut none = SendAncillaryBuffer::default();
    loop {
        match sendmsg(fd, from, &mut none, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return Ok(sent?),
        }
    }
}

fn would_block() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

impl Transport {
    /// A connected socket.
    pub fn new(fd: OwnedFd) -> Self {
        Transport { fd, tls: None }
    }

    /// From now on the bytes are TLS's.
    pub fn encrypt(&mut self, mut tls: Connection) {
        tls.set_buffer_limit(Some(TLS_BUFFER));
        self.tls = Some(Box::new(tls));
    }

    /// The socket itself; nothing is encrypted.
    pub fn into_socket(self) -> OwnedFd {
        self.fd
    }

    /// Whether the bytes are TLS's.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Fills `into` with what has come: 0 at the end, `WouldBlock` where there is nothing. If
    /// it is filled wholly there may be more, of which the socket says nothing.
    pub fn receive(&mut self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return receive_plain(self.fd.as_fd(), into) };
        let mut total = 0;
        for piece in into {
            let mut at = 0;
            while at < piece.len() {
                match receive_tls(tls, self.fd.as_fd(), &mut piece[at..]) {
                    Ok(0) => return Ok(total),
                    Ok(n) => (at, total) = (at + n, total + n),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock && total > 0 => {
                        return Ok(total);
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(total)
    }

    /// Takes bytes of at most [`MAX_PIECES`] pieces: how many, or `WouldBlock`.
    pub fn send(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return send_plain(self.fd.as_fd(), from) };
        flush_tls(tls, self.fd.as_fd())?;
        let taken = tls.writer().write_vectored(from)?;
        match self.flush() {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
            _ if taken == 0 => Err(would_block()),
            _ => Ok(taken),
        }
    }

    /// Sends what was encrypted: `WouldBlock` where the socket is full.
    pub fn flush(&mut self) -> io::Result<()> {
        self.tls.as_mut().map_or(Ok(()), |tls| flush_tls(tls, self.fd.as_fd()))
    }

    /// Waits until something can be received or (`PollFlags::OUT`) sent.
    pub fn wait(
        &self,
        what: PollFlags,
        stop: Option<BorrowedFd<'_>>,
        end: Option<Instant>,
    ) -> io::Result<Woken> {
        let me = PollFd::new(&self.fd, what);
        let other = PollFd::from_borrowed_fd(stop.unwrap_or(self.fd.as_fd()), PollFlags::IN);
        let mut fds = [me, other];
        let fds = if stop.is_some() { &mut fds[..] } else { &mut fds[..1] };
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(fds, left.as_ref()) {
            Ok(0) => Ok(Woken::Late),
            Ok(_) if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) => Ok(Woken::Stop),
            // A signal: whoever tries will wait again.
            Ok(_) | Err(Errno::INTR) => Ok(Woken::Ready),
            Err(e) => Err(e.into()),
        }
    }

    /// Says goodbye where TLS asks for it, and ends both directions. What fails here is over
    /// anyway.
    pub fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
        }
        let _ = self.flush();
        let _ = shutdown(&self.fd, Shutdown::Both);
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn receive_tls(tls: &mut Connection, fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match tls.reader().read(into) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // Closed without TLS's goodbye: what a killed peer leaves, and the protocol has an
            // end of its own.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
            got => return got,
        }
        let ended = tls.read_tls(&mut Raw(fd))? == 0;
        let state = tls.process_new_packets().map(drop);
        // An alert says why, if there is something wrong.
        let sent = flush_tls(tls, fd);
        state.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        match sent {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
            _ if ended && tls.is_handshaking() => return Ok(0),
            _ => {}
        }
    }
}

fn flush_tls(tls: &mut Connection, fd: BorrowedFd<'_>) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(&mut Raw(fd))?;
    }
    Ok(())
}
