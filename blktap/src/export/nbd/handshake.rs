//! The server's side of the handshake (fixed newstyle) as a pure state machine: bytes of the
//! client in, bytes for the client and what follows from them out.

mod options;

use bytes::Buf;
use zerocopy::{FromBytes, IntoBytes};

use super::proto::{
    BASE_ALLOCATION, DIRTY_BITMAP, FIXED_NEWSTYLE, Greeting, MAGIC, MAX_STRING, NO_ZEROES,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReply, can, opt, rep,
};
use super::request::{Replies, Terms};

/// Longest data of an option that is read.
pub const MAX_OPTION: usize = 64 << 10;
/// Most options of one handshake: each may be answered with all exports.
pub const MAX_OPTIONS: u32 = 128;

/// An export as the handshake presents it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// What clients ask for.
    pub name: String,
    /// A text for people.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Transmission flags; [`can::DF`] is added where replies are structured.
    pub flags: u16,
    /// Smallest unit of a request, for clients that ask for it.
    pub minimum: u32,
    /// Unit that is fast.
    pub preferred: u32,
    /// Names of dirty bitmaps.
    pub bitmaps: Vec<String>,
}

/// Whether the connection is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Security {
    /// No, and it cannot be.
    Plain,
    /// Not yet, and nothing is told before it is.
    Demanded,
    /// It is.
    Encrypted,
}

/// A metadata context; its number on the wire is its place in [`Session::contexts`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:dirty-bitmap:` and this name.
    Bitmap(String),
}

impl Context {
    fn name(&self) -> String {
        match self {
            Context::Allocation => BASE_ALLOCATION.to_owned(),
            Context::Bitmap(name) => format!("{DIRTY_BITMAP}{name}"),
        }
    }
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Which of the offers.
    pub export: usize,
    /// What requests must keep to.
    pub terms: Terms,
    /// What block status tells of.
    pub contexts: Vec<Context>,
}

/// What follows from a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is no whole message yet.
    More,
    /// It was answered.
    Next,
    /// After what is to be sent, TLS begins; the handshake goes on inside it.
    StartTls,
    /// After what is to be sent, requests begin.
    Begin(Session),
    /// After what is to be sent, the connection ends, as the client wants.
    Abort,
}

/// Why a handshake ends at once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Bits that nobody has offered.
    #[error("unknown handshake flags {0:#x}")]
    Flags(u32),
    /// Not [`OPTION_MAGIC`].
    #[error("an option with the magic {0:#018x}")]
    Magic(u64),
    /// More data than [`MAX_OPTION`].
    #[error("option {option} with {len} bytes of data, more than {MAX_OPTION}")]
    TooLong {
        /// Its number.
        option: u32,
        /// Bytes.
        len: u32,
    },
    /// More than [`MAX_OPTIONS`].
    #[error("more than {MAX_OPTIONS} options")]
    TooMany,
    /// NBD_OPT_EXPORT_NAME has no answer that says no.
    #[error("no export of the name {0:?}")]
    Unknown(String),
    /// As before.
    #[error("NBD_OPT_EXPORT_NAME before TLS")]
    TlsRequired,
    /// As before.
    #[error("an export name that is too long, or not UTF-8")]
    Name,
}

/// One connection's handshake.
#[derive(Debug)]
pub struct Handshake<'a> {
    offers: &'a [Offer],
    security: Security,
    flags: Option<u32>,
    options: u32,
    replies: Replies,
    chosen: Option<(usize, Vec<Context>)>,
    /// Bytes for the client; whoever sends them takes them out.
    pub out: Vec<u8>,
}

impl<'a> Handshake<'a> {
    /// Begins one, with the greeting in `out`.
    pub fn new(offers: &'a [Offer], security: Security) -> Self {
        let greeting = Greeting {
            magic: MAGIC.into(),
            style: OPTION_MAGIC.into(),
            flags: (FIXED_NEWSTYLE | NO_ZEROES).into(),
        };
        let (flags, options, replies, chosen) = (None, 0, Replies::Simple, None);
        let out = greeting.as_bytes().to_vec();
        Handshake { offers, security, flags, options, replies, chosen, out }
    }

    /// Goes on after [`Step::StartTls`], encrypted. What was agreed on before is forgotten.
    pub fn encrypted(&mut self) {
        self.security = Security::Encrypted;
        (self.replies, self.chosen) = (Replies::Simple, None);
    }

    /// Looks at `input`: how many bytes of it were used, and what follows.
    pub fn advance(&mut self, input: &[u8]) -> Result<(usize, Step), Broken> {
        let mut rest = input;
        if self.flags.is_none() {
            let Ok(flags) = rest.try_get_u32() else { return Ok((0, Step::More)) };
            if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
                return Err(Broken::Flags(flags));
            }
            self.flags = Some(flags);
            return Ok((4, Step::Next));
        }
        let Ok((header, rest)) = OptionHeader::ref_from_prefix(input) else {
            return Ok((0, Step::More));
        };
        let (option, len) = (header.option.get(), header.len.get());
        if header.magic.get() != OPTION_MAGIC {
            return Err(Broken::Magic(header.magic.get()));
        }
        if len as usize > MAX_OPTION {
            return Err(Broken::TooLong { option, len });
        }
        if self.options == MAX_OPTIONS {
            return Err(Broken::TooMany);
        }
        let Some(data) = rest.get(..len as usize) else { return Ok((0, Step::More)) };
        self.options += 1;
        let step = self.option(option, data)?;
        Ok((size_of::<OptionHeader>() + data.len(), step))
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<Step, Broken> {
        match option {
            opt::ABORT => {
                self.reply(option, rep::ACK, &[]);
                return Ok(Step::Abort);
            }
            opt::STARTTLS => return Ok(self.start_tls(data)),
            opt::EXPORT_NAME if self.security == Security::Demanded => {
                return Err(Broken::TlsRequired);
            }
            _ if self.security == Security::Demanded => {
                self.refuse(option, rep::ERR_TLS_REQD, "this server demands TLS: NBD_OPT_STARTTLS");
            }
            opt::EXPORT_NAME => return self.export_name(data),
            opt::GO | opt::INFO => return Ok(self.info(option, data)),
            opt::LIST if data.is_empty() => self.list(),
            opt::STRUCTURED_REPLY if data.is_empty() => {
                self.replies = Replies::Structured;
                self.reply(option, rep::ACK, &[]);
            }
            opt::LIST | opt::STRUCTURED_REPLY => {
                self.refuse(option, rep::ERR_INVALID, "this option has no data");
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.contexts(option, data),
            _ => self.refuse(option, rep::ERR_UNSUP, "unknown option"),
        }
        Ok(Step::Next)
    }

    fn start_tls(&mut self, data: &[u8]) -> Step {
        let option = opt::STARTTLS;
        match self.security {
            _ if !data.is_empty() => {
                self.refuse(option, rep::ERR_INVALID, "this option has no data");
            }
            Security::Plain => self.refuse(option, rep::ERR_POLICY, "this server has no TLS"),
            Security::Encrypted => self.refuse(option, rep::ERR_INVALID, "TLS is in use already"),
            Security::Demanded => {
                self.reply(option, rep::ACK, &[]);
                return Step::StartTls;
            }
        }
        Step::Next
    }

    /// The oldest way to begin: it can only be granted, or the connection ends.
    fn export_name(&mut self, data: &[u8]) -> Result<Step, Broken> {
        let name = std::str::from_utf8(data).ok().filter(|n| n.len() <= MAX_STRING);
        let name = name.ok_or(Broken::Name)?;
        let export = self.find(name).ok_or_else(|| Broken::Unknown(name.to_owned()))?;
        let session = self.session(export, 1);
        self.out.extend_from_slice(&session.terms.size.to_be_bytes());
        self.out.extend_from_slice(&session.terms.flags.to_be_bytes());
        if self.flags.is_some_and(|f| f & u32::from(NO_ZEROES) == 0) {
            self.out.extend_from_slice(&[0; 124]);
        }
        Ok(Step::Begin(session))
    }

    fn session(&mut self, export: usize, alignment: u32) -> Session {
        // Chosen for another export, they are not for this one.
        let chosen = self.chosen.take().filter(|(of, _)| *of == export);
        let contexts = chosen.map_or_else(Vec::new, |(_, contexts)| contexts);
        let offer = &self.offers[export];
        let terms = Terms {
            size: offer.size,
            flags: self.flags_of(offer),
            alignment,
            replies: self.replies,
            contexts: contexts.len(),
        };
        Session { export, terms, contexts }
    }

    fn flags_of(&self, offer: &Offer) -> u16 {
        offer.flags | if self.replies == Replies::Structured { can::DF } else { 0 }
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.offers.iter().position(|offer| offer.name == name)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let head = OptionReply {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            kind: kind.into(),
            // Names and texts, each of limited length.
            len: (data.len() as u32).into(),
        };
        self.out.extend_from_slice(head.as_bytes());
        self.out.extend_from_slice(data);
    }

    fn refuse(&mut self, option: u32, kind: u32, why: &str) {
        self.reply(option, kind, why.as_bytes());
    }
}
