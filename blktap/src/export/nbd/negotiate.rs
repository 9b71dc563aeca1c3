//! The handshake on a socket: within a time limit, with TLS where it is demanded.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustls::{ServerConfig, ServerConnection};

use super::connection::{Cause, SLOTS};
use super::handshake::{Handshake, Offer, Security, Session, Step};
use super::server::Export;
use super::transport::{Transport, Woken};
use crate::disk::DiskQueue;

/// Bytes that are received at once.
const PIECE: usize = 4096;
/// A queue that another connection has just left may take so long to come free.
const QUEUE_PATIENCE: Duration = Duration::from_secs(3);

/// What a handshake has led to.
pub struct Agreed {
    /// What was agreed on.
    pub session: Session,
    /// Bytes that came behind it.
    pub rest: Vec<u8>,
    /// The disk's queue.
    pub queue: Box<dyn DiskQueue>,
}

struct Talk<'a> {
    transport: &'a mut Transport,
    stop: BorrowedFd<'a>,
    end: Instant,
    patience: Duration,
    input: Vec<u8>,
}

/// What ends a talk.
enum Heard {
    Bytes,
    End,
}

/// Carries out a handshake. `None`: the client or the server has ended it.
pub fn negotiate(
    transport: &mut Transport,
    exports: &[Export],
    tls: Option<&Arc<ServerConfig>>,
    stop: BorrowedFd<'_>,
    patience: Duration,
) -> Result<Option<Agreed>, Cause> {
    let offers: Vec<Offer> = exports.iter().map(Export::offer).collect();
    let security = if tls.is_some() { Security::Demanded } else { Security::Plain };
    let mut handshake = Handshake::new(&offers, security);
    let end = Instant::now() + patience;
    let mut talk = Talk { transport, stop, end, patience, input: Vec::new() };
    loop {
        if !talk.say(&mut handshake.out)? {
            return Ok(None);
        }
        let (used, step) = handshake.advance(&talk.input)?;
        talk.input.drain(..used);
        match step {
            Step::Next => {}
            Step::More => match talk.hear()? {
                Heard::Bytes => {}
                Heard::End => return Ok(None),
            },
            Step::Abort => {
                talk.say(&mut handshake.out)?;
                return Ok(None);
            }
            Step::StartTls => {
                talk.say(&mut handshake.out)?;
                if !talk.input.is_empty() {
                    return Err(Cause::Unencrypted);
                }
                let Some(config) = tls else { return Ok(None) };
                let tls = ServerConnection::new(Arc::clone(config));
                talk.transport.encrypt(tls.map_err(tls_error)?.into());
                handshake.encrypted();
            }
            Step::Begin(session) => {
                // Before the answer: a client that was told yes expects to be served.
                let queue = queue(&exports[session.export]).map_err(Cause::Queue)?;
                if !talk.say(&mut handshake.out)? {
                    return Ok(None);
                }
                return Ok(Some(Agreed { session, rest: talk.input, queue }));
            }
        }
    }
}

fn tls_error(e: rustls::Error) -> Cause {
    Cause::Socket(io::Error::new(io::ErrorKind::InvalidData, e))
}

fn queue(export: &Export) -> io::Result<Box<dyn DiskQueue>> {
    let end = Instant::now() + QUEUE_PATIENCE;
    loop {
        match export.disk.queue(SLOTS) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            made => return made,
        }
    }
}

impl Talk<'_> {
    /// Sends and empties `out`. `false`: the server ends.
    fn say(&mut self, out: &mut Vec<u8>) -> Result<bool, Cause> {
        let mut at = 0;
        loop {
            let sent = match at < out.len() {
                true => self.transport.send(&[IoSlice::new(&out[at..])]),
                false => self.transport.flush().map(|()| 0),
            };
            match sent {
                Ok(0) => break,
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait(PollFlags::OUT)? {
                        return Ok(false);
                    }
                }
                Err(e) => return Err(Cause::Socket(e)),
            }
        }
        out.clear();
        Ok(true)
    }

    fn hear(&mut self) -> Result<Heard, Cause> {
        let len = self.input.len();
        // No more than a longest option and a piece: longer ones are refused by their heads.
        self.input.resize(len + PIECE, 0);
        loop {
            match self.transport.receive(&mut [IoSliceMut::new(&mut self.input[len..])]) {
                Ok(0) => return Ok(Heard::End),
                Ok(n) => {
                    self.input.truncate(len + n);
                    return Ok(Heard::Bytes);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait(PollFlags::IN)? {
                        return Ok(Heard::End);
                    }
                }
                Err(e) => return Err(Cause::Socket(e)),
            }
        }
    }

    fn wait(&self, what: PollFlags) -> Result<bool, Cause> {
        if Instant::now() >= self.end {
            return Err(Cause::Late(self.patience));
        }
        match self.transport.wait(what, Some(self.stop), Some(self.end)).map_err(Cause::Socket)? {
            Woken::Ready => Ok(true),
            Woken::Stop => Ok(false),
            Woken::Late => Err(Cause::Late(self.patience)),
        }
    }
}
