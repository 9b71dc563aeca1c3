//! Connecting to a server and agreeing with it: the client's side of the handshake, blocking,
//! within a time limit.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut};
use rustix::event::PollFlags;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::address::{NbdTarget, Place};
use crate::export::nbd::prepare_tcp;
use crate::export::nbd::proto::{
    BASE_ALLOCATION, FIXED_NEWSTYLE, Greeting, MAGIC, MAX_PAYLOAD, NO_ZEROES, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, OptionHeader, OptionReply, can, info, opt, rep,
};
use crate::export::nbd::transport::{Transport, Woken};

/// Longest answer to an option.
const MAX_REPLY: u32 = 64 << 10;
/// Most answers to one option.
const MAX_REPLIES: u32 = 1024;

/// What a server has said of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// Whether reads are answered by chunks.
    pub structured: bool,
    /// The number of `base:allocation`.
    pub allocation: Option<u32>,
    /// Smallest unit of a request.
    pub minimum: u32,
    /// Unit that is fast.
    pub preferred: u32,
    /// Largest payload.
    pub maximum: u32,
}

/// A connection on which requests may be sent.
pub struct Link {
    /// Its bytes.
    pub transport: Transport,
    /// The export.
    pub facts: Facts,
}

/// A server that breaks the protocol.
pub fn broken(why: impl Into<String>) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the server breaks the protocol: {}", why.into()),
    )
}

/// A connection's bytes, waited for.
pub struct Talk<'a> {
    /// Where they go.
    pub transport: &'a mut Transport,
    end: Instant,
}

impl<'a> Talk<'a> {
    /// On a connection, until `patience` is over.
    pub fn new(transport: &'a mut Transport, patience: Duration) -> Self {
        Talk { transport, end: Instant::now() + patience }
    }

    fn wait(&self, what: PollFlags) -> io::Result<()> {
        match self.transport.wait(what, None, Some(self.end))? {
            Woken::Late => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }

    /// Sends all of it.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut at = 0;
        loop {
            let sent = match at < bytes.len() {
                true => self.transport.send(&[IoSlice::new(&bytes[at..])]),
                false => self.transport.flush().map(|()| 0),
            };
            match sent {
                Ok(0) => return Ok(()),
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::OUT)?,
                Err(e) => return Err(e),
            }
        }
    }

    /// Receives so many bytes.
    pub fn receive(&mut self, into: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < into.len() {
            match self.transport.receive(&mut [IoSliceMut::new(&mut into[at..])]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::IN)?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Receives a structure.
    pub fn read<T: FromBytes + IntoBytes>(&mut self) -> io::Result<T> {
        let mut value = T::new_zeroed();
        self.receive(value.as_mut_bytes())?;
        Ok(value)
    }

    fn option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let head = OptionHeader {
            magic: OPTION_MAGIC.into(),
            option: option.into(),
            len: (data.len() as u32).into(),
        };
        self.send(&[head.as_bytes(), data].concat())
    }

    /// Hands each answer but the last to `take`. The last one: ACK, or an error.
    fn answers(
        &mut self,
        option: u32,
        mut take: impl FnMut(u32, &[u8]) -> io::Result<()>,
    ) -> io::Result<Result<(), (u32, String)>> {
        for _ in 0..MAX_REPLIES {
            let head: OptionReply = self.read()?;
            if head.magic.get() != OPTION_REPLY_MAGIC || head.option.get() != option {
                return Err(broken("an answer to something else"));
            }
            if head.len.get() > MAX_REPLY {
                return Err(broken(format!("an answer of {} bytes", head.len)));
            }
            let mut data = vec![0; head.len.get() as usize];
            self.receive(&mut data)?;
            match head.kind.get() {
                rep::ACK => return Ok(Ok(())),
                kind if kind & rep::ERROR != 0 => {
                    return Ok(Err((kind, String::from_utf8_lossy(&data).into_owned())));
                }
                kind => take(kind, &data)?,
            }
        }
        Err(broken("no end of answers"))
    }
}

fn refused(what: &str, (kind, text): (u32, String)) -> io::Error {
    let why = match kind {
        rep::ERR_UNKNOWN => "there is no such export",
        rep::ERR_TLS_REQD => "it demands TLS: use nbds",
        rep::ERR_POLICY => "its policy forbids it",
        rep::ERR_SHUTDOWN => "it is shutting down",
        _ => "it refuses",
    };
    io::Error::new(io::ErrorKind::ConnectionRefused, format!("{what}: {why} ({text})"))
}

fn socket(target: &NbdTarget, patience: Duration) -> io::Result<OwnedFd> {
    match &target.place {
        Place::Unix(path) => Ok(UnixStream::connect(path)?.into()),
        Place::Tcp(host, port) => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
            for address in (host.as_str(), *port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, patience) {
                    Ok(stream) => {
                        prepare_tcp(&stream)?;
                        return Ok(stream.into());
                    }
                    Err(e) => last = e,
                }
            }
            Err(last)
        }
    }
}

/// How reads are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// By chunks, if the server can.
    Structured,
    /// At once.
    Simple,
}

/// Connects and agrees.
pub fn connect(
    target: &NbdTarget,
    tls: Option<&Arc<ClientConfig>>,
    patience: Duration,
    replies: Replies,
) -> io::Result<Link> {
    let mut transport = Transport::new(socket(target, patience)?);
    let mut talk = Talk::new(&mut transport, patience);
    let greeting: Greeting = talk.read()?;
    let theirs = greeting.flags.get();
    if greeting.magic.get() != MAGIC || greeting.style.get() != OPTION_MAGIC {
        return Err(broken("it is no NBD server, or an oldstyle one"));
    }
    if theirs & FIXED_NEWSTYLE == 0 {
        return Err(broken("it does not speak fixed newstyle"));
    }
    let mine = theirs & (FIXED_NEWSTYLE | NO_ZEROES);
    talk.send(&u32::from(mine).to_be_bytes())?;
    if let Some(config) = tls {
        start_tls(&mut talk, target, config)?;
    }
    let structured = replies == Replies::Structured && asks_for_chunks(&mut talk)?;
    let allocation = if structured { allocation(&mut talk, &target.export)? } else { None };
    let mut facts = Facts {
        size: 0,
        flags: 0,
        structured,
        allocation,
        minimum: 512,
        preferred: 4096,
        maximum: MAX_PAYLOAD,
    };
    go(&mut talk, target, &mut facts, mine)?;
    check(&facts)?;
    Ok(Link { transport, facts })
}

/// Whether the server agrees to answer by chunks.
fn asks_for_chunks(talk: &mut Talk<'_>) -> io::Result<bool> {
    talk.option(opt::STRUCTURED_REPLY, &[])?;
    match talk.answers(opt::STRUCTURED_REPLY, |_, _| Ok(()))? {
        Err(refusal @ (rep::ERR_TLS_REQD, _)) => Err(refused("the server", refusal)),
        answer => Ok(answer.is_ok()),
    }
}

fn start_tls(
    talk: &mut Talk<'_>,
    target: &NbdTarget,
    config: &Arc<ClientConfig>,
) -> io::Result<()> {
    talk.option(opt::STARTTLS, &[])?;
    talk.answers(opt::STARTTLS, |_, _| Ok(()))?.map_err(|r| refused("TLS", r))?;
    // A Unix socket's server is on this host.
    let host = match &target.place {
        Place::Tcp(host, _) => host.clone(),
        Place::Unix(_) => "localhost".to_owned(),
    };
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    let tls = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
    talk.transport.encrypt(tls.into());
    Ok(())
}

fn allocation(talk: &mut Talk<'_>, export: &str) -> io::Result<Option<u32>> {
    let mut data = Vec::new();
    data.put_u32(export.len() as u32);
    data.put_slice(export.as_bytes());
    data.put_u32(1);
    data.put_u32(BASE_ALLOCATION.len() as u32);
    data.put_slice(BASE_ALLOCATION.as_bytes());
    talk.option(opt::SET_META_CONTEXT, &data)?;
    let mut found = None;
    let told = talk.answers(opt::SET_META_CONTEXT, |kind, mut data| {
        if kind == rep::META_CONTEXT
            && let Ok(number) = data.try_get_u32()
            && data == BASE_ALLOCATION.as_bytes()
        {
            found = Some(number);
        }
        Ok(())
    })?;
    // Without it nothing is known of holes; what is wrong with the export, GO tells.
    Ok(found.filter(|_| told.is_ok()))
}

fn go(talk: &mut Talk<'_>, target: &NbdTarget, facts: &mut Facts, flags: u16) -> io::Result<()> {
    let mut data = Vec::new();
    data.put_u32(target.export.len() as u32);
    data.put_slice(target.export.as_bytes());
    data.put_u16(1);
    data.put_u16(info::BLOCK_SIZE);
    talk.option(opt::GO, &data)?;
    let mut told = false;
    let answer = talk.answers(opt::GO, |kind, mut data| {
        if kind != rep::INFO {
            return Ok(());
        }
        let short = |_| broken("an information that is cut short");
        match data.try_get_u16().map_err(short)? {
            info::EXPORT => {
                facts.size = data.try_get_u64().map_err(short)?;
                facts.flags = data.try_get_u16().map_err(short)?;
                told = true;
            }
            info::BLOCK_SIZE => {
                facts.minimum = data.try_get_u32().map_err(short)?;
                facts.preferred = data.try_get_u32().map_err(short)?;
                facts.maximum = data.try_get_u32().map_err(short)?;
            }
            _ => {}
        }
        Ok(())
    })?;
    match answer {
        Ok(()) if told => Ok(()),
        Ok(()) => Err(broken("it does not say what the export is")),
        Err((rep::ERR_UNSUP, _)) => export_name(talk, target, facts, flags),
        Err(refusal) => Err(refused(&format!("export {:?}", target.export), refusal)),
    }
}

/// For servers without NBD_OPT_GO.
fn export_name(
    talk: &mut Talk<'_>,
    target: &NbdTarget,
    facts: &mut Facts,
    flags: u16,
) -> io::Result<()> {
    talk.option(opt::EXPORT_NAME, target.export.as_bytes())?;
    let gone = |e: io::Error| match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            io::Error::new(e.kind(), format!("export {:?}: the server hung up", target.export))
        }
        _ => e,
    };
    facts.size = talk.read::<U64>().map_err(gone)?.get();
    facts.flags = talk.read::<U16>()?.get();
    if flags & NO_ZEROES == 0 {
        talk.receive(&mut [0; 124])?;
    }
    Ok(())
}

/// What could not be worked with.
fn check(facts: &Facts) -> io::Result<()> {
    if facts.flags & can::HAS_FLAGS == 0 || i64::try_from(facts.size).is_err() {
        return Err(broken("flags or a size that cannot be"));
    }
    if !facts.minimum.is_power_of_two() || facts.minimum > 4096 {
        let text = format!("the server's smallest request, {} bytes, is too large", facts.minimum);
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    if facts.maximum < 4096.max(facts.minimum) {
        return Err(broken(format!("a largest request of {} bytes", facts.maximum)));
    }
    Ok(())
}

/// The numbers of a block status: lengths and states.
pub type Extent = [U32; 2];
