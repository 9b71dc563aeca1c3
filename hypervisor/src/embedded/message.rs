//! The requests between a domain's process and the bundled hypervisor, and their replies.
//!
//! A request is one datagram: an operation (u16) and its fields; a reply starts with a status
//! (u32: 0 or an errno), then the fields. Numbers are little-endian. Descriptors go only from
//! the hypervisor to the process.

#[cfg(test)]
mod tests;

use crate::core::domains::Kind;
use crate::{Access, DomId, GrantRef, Port, Source};

/// Longest datagram either way.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// References in one request to map, grant or end access.
pub const MAX_REFS: usize = 4096;
/// Operations in one copy request.
pub const MAX_COPIES: usize = 2048;
/// Descriptors in one reply.
pub const MAX_FDS: usize = 8;
/// Version of this format; both ends must have the same.
pub const VERSION: u32 = 2;

/// What [`Request::Open`] opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// One more connection for requests, of the same domain.
    Requests,
    /// A connection to the store.
    Store,
}

/// One grant copy; see [`CopyOp`](crate::CopyOp).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// The granted page.
    pub gref: GrantRef,
    /// First byte in the page.
    pub offset: u16,
    /// Bytes.
    pub len: u16,
    /// First byte in the buffer.
    pub at: u64,
    /// What is done to the page: read (into the buffer) or written.
    pub access: Access,
}

/// One copy into a page; see [`Transfer`](crate::Transfer).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// From here.
    pub source: Source,
    /// The page that is written.
    pub gref: GrantRef,
    /// First byte in the page.
    pub offset: u16,
    /// Bytes.
    pub len: u16,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Who am I? Reply: version u32, domid u16.
    Hello,
    /// Domain 0 only. Reply: domid u16.
    CreateDomain {
        /// Number wanted; `None` for the next one.
        domid: Option<DomId>,
        /// What for.
        kind: Kind,
        /// Its name, at most 255 bytes.
        name: String,
    },
    /// Domain 0 only.
    DestroyDomain {
        /// Which.
        domid: DomId,
    },
    /// Domain 0 only: a connection that acts as the domain. One descriptor.
    ConnectDomain {
        /// Which.
        domid: DomId,
    },
    /// Domain 0 only. Reply: count u32, then u16 each.
    ListDomains,
    /// A further connection. One descriptor.
    Open {
        /// Of what kind.
        endpoint: Endpoint,
    },
    /// Memory to grant from. Reply: arena u32, pages u32; one descriptor.
    OpenArena {
        /// To whom it will be granted.
        peer: DomId,
        /// What the peer may do.
        access: Access,
    },
    /// The process has mapped its read-only arena: nobody can map it writable from now on.
    SealArena {
        /// Which.
        arena: u32,
    },
    /// Grants pages of an arena. Reply: a reference u32 each.
    Grant {
        /// From where.
        arena: u32,
        /// First page.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Ends access. Reply: a status u16 each, 0 or [`GrantError::code`].
    ///
    /// [`GrantError::code`]: crate::core::grants::GrantError::code
    EndAccess {
        /// Which.
        refs: Vec<GrantRef>,
    },
    /// A port that `peer` may bind. Reply: port u32; two descriptors, one to read, one to write.
    AllocUnbound {
        /// Who may bind.
        peer: DomId,
    },
    /// Binds another domain's port. Reply: port u32; two descriptors as above.
    Bind {
        /// Whose.
        domid: DomId,
        /// Which.
        port: Port,
    },
    /// Closes a port of this connection.
    Close {
        /// Which.
        port: Port,
    },
    /// Maps references. Reply: handle u64; number of arenas that are new to this connection
    /// u32, for each its number u32 and pages u32, with a descriptor each; then arena u32 and
    /// page u32 for each reference. On a refusal the status is EINVAL, and index u32 and
    /// reason u16 follow.
    Map {
        /// Whose references.
        domid: DomId,
        /// For what.
        access: Access,
        /// Which.
        refs: Vec<GrantRef>,
    },
    /// Gives a mapping back.
    Unmap {
        /// Its handle.
        handle: u64,
    },
    /// Memory for copies. Reply: buffer u64; one descriptor.
    Buffer {
        /// Bytes.
        len: u64,
    },
    /// Frees such memory.
    FreeBuffer {
        /// Which.
        buffer: u64,
    },
    /// Copies. Reply: a status u16 each, 0 or a reason.
    Copy {
        /// Whose pages.
        domid: DomId,
        /// Which buffer.
        buffer: u64,
        /// What.
        ops: Vec<Copy>,
    },
    /// Copies into pages from a buffer and from other pages. Reply: as to `Copy`.
    Transfer {
        /// Whose pages are written.
        domid: DomId,
        /// Which buffer.
        buffer: u64,
        /// What.
        ops: Vec<Move>,
    },
}

/// Puts numbers into a datagram.
#[derive(Debug, Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// A datagram that starts with a status.
    pub fn reply(status: u32) -> Self {
        Writer(status.to_le_bytes().to_vec())
    }
    /// Appends.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    /// Appends.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    /// Appends.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
}

/// Takes numbers out of a datagram; `None` where it is too short.
#[derive(Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
    /// Takes.
    pub fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }
    /// Takes.
    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
    /// Takes.
    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
    fn refs(&mut self) -> Option<Vec<GrantRef>> {
        let count = self.u32()? as usize;
        if count > MAX_REFS || self.0.len() != 4 * count {
            return None;
        }
        (0..count).map(|_| self.u32()).collect()
    }
    fn access(&mut self) -> Option<Access> {
        match self.u16()? {
            0 => Some(Access::ReadOnly),
            1 => Some(Access::ReadWrite),
            _ => None,
        }
    }
}

fn access_code(access: Access) -> u16 {
    match access {
        Access::ReadOnly => 0,
        Access::ReadWrite => 1,
    }
}

/// Stands for "the next one" where a domain's number is asked for.
const ANY_DOMID: u16 = 0xffff;

impl Request {
    /// As a datagram.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Request::Hello => w.u16(0).u32(VERSION),
            Request::CreateDomain { domid, kind, name } => {
                w.u16(1).u16(domid.unwrap_or(ANY_DOMID)).u16(match kind {
                    Kind::Guest => 0,
                    Kind::Driver => 1,
                });
                w.0.extend_from_slice(name.as_bytes());
                &mut w
            }
            Request::DestroyDomain { domid } => w.u16(2).u16(*domid),
            Request::ConnectDomain { domid } => w.u16(3).u16(*domid),
            Request::ListDomains => w.u16(4),
            Request::Open { endpoint: Endpoint::Requests } => w.u16(5).u16(0),
            Request::Open { endpoint: Endpoint::Store } => w.u16(5).u16(1),
            Request::OpenArena { peer, access } => w.u16(6).u16(*peer).u16(access_code(*access)),
            Request::SealArena { arena } => w.u16(7).u32(*arena),
            Request::Grant { arena, first, count } => w.u16(8).u32(*arena).u32(*first).u32(*count),
            Request::EndAccess { refs } => put_refs(w.u16(9), refs),
            Request::AllocUnbound { peer } => w.u16(10).u16(*peer),
            Request::Bind { domid, port } => w.u16(11).u16(*domid).u32(*port),
            Request::Close { port } => w.u16(12).u32(*port),
            Request::Map { domid, access, refs } => {
                put_refs(w.u16(13).u16(*domid).u16(access_code(*access)), refs)
            }
            Request::Unmap { handle } => w.u16(14).u64(*handle),
            Request::Buffer { len } => w.u16(15).u64(*len),
            Request::FreeBuffer { buffer } => w.u16(16).u64(*buffer),
            Request::Copy { domid, buffer, ops } => {
                w.u16(17).u16(*domid).u64(*buffer).u32(ops.len() as u32);
                for op in ops {
                    w.u32(op.gref).u16(op.offset).u16(op.len).u64(op.at);
                    w.u16(access_code(op.access));
                }
                &mut w
            }
            Request::Transfer { domid, buffer, ops } => {
                w.u16(18).u16(*domid).u64(*buffer).u32(ops.len() as u32);
                for op in ops {
                    match op.source {
                        Source::Buffer(at) => w.u16(0).u64(at as u64),
                        Source::Page { domid, gref, offset } => {
                            w.u16(1).u16(domid).u32(gref).u16(offset)
                        }
                    };
                    w.u32(op.gref).u16(op.offset).u16(op.len);
                }
                &mut w
            }
        };
        w.0
    }

    /// From a datagram; `None` where it is none of these, too long, or has something left over.
    pub fn decode(datagram: &[u8]) -> Option<Request> {
        let mut r = Reader(datagram);
        let request = match r.u16()? {
            0 => (r.u32()? == VERSION).then_some(Request::Hello)?,
            1 => decode_create(&mut r)?,
            2 => Request::DestroyDomain { domid: r.u16()? },
            3 => Request::ConnectDomain { domid: r.u16()? },
            4 => Request::ListDomains,
            5 => Request::Open {
                endpoint: match r.u16()? {
                    0 => Endpoint::Requests,
                    1 => Endpoint::Store,
                    _ => return None,
                },
            },
            6 => Request::OpenArena { peer: r.u16()?, access: r.access()? },
            7 => Request::SealArena { arena: r.u32()? },
            8 => Request::Grant { arena: r.u32()?, first: r.u32()?, count: r.u32()? },
            9 => Request::EndAccess { refs: r.refs()? },
            10 => Request::AllocUnbound { peer: r.u16()? },
            11 => Request::Bind { domid: r.u16()?, port: r.u32()? },
            12 => Request::Close { port: r.u32()? },
            13 => Request::Map { domid: r.u16()?, access: r.access()?, refs: r.refs()? },
            14 => Request::Unmap { handle: r.u64()? },
            15 => Request::Buffer { len: r.u64()? },
            16 => Request::FreeBuffer { buffer: r.u64()? },
            17 => decode_copy(&mut r)?,
            18 => decode_transfer(&mut r)?,
            _ => return None,
        };
        r.0.is_empty().then_some(request)
    }
}

fn put_refs<'a>(w: &'a mut Writer, refs: &[GrantRef]) -> &'a mut Writer {
    w.u32(refs.len() as u32);
    refs.iter().fold(w, |w, gref| w.u32(*gref))
}

fn decode_create(r: &mut Reader<'_>) -> Option<Request> {
    let domid = Some(r.u16()?).filter(|d| *d != ANY_DOMID);
    let kind = match r.u16()? {
        0 => Kind::Guest,
        1 => Kind::Driver,
        _ => return None,
    };
    let name = str::from_utf8(std::mem::take(&mut r.0)).ok()?;
    (name.len() <= 255).then(|| Request::CreateDomain { domid, kind, name: name.to_owned() })
}

fn decode_copy(r: &mut Reader<'_>) -> Option<Request> {
    let (domid, buffer, count) = (r.u16()?, r.u64()?, r.u32()? as usize);
    if count > MAX_COPIES {
        return None;
    }
    let op = |_| {
        Some(Copy {
            gref: r.u32()?,
            offset: r.u16()?,
            len: r.u16()?,
            at: r.u64()?,
            access: r.access()?,
        })
    };
    let ops = (0..count).map(op).collect::<Option<Vec<_>>>()?;
    Some(Request::Copy { domid, buffer, ops })
}

fn decode_transfer(r: &mut Reader<'_>) -> Option<Request> {
    let (domid, buffer, count) = (r.u16()?, r.u64()?, r.u32()? as usize);
    if count > MAX_COPIES {
        return None;
    }
    let op = |_| {
        let source = match r.u16()? {
            0 => Source::Buffer(usize::try_from(r.u64()?).ok()?),
            1 => Source::Page { domid: r.u16()?, gref: r.u32()?, offset: r.u16()? },
            _ => return None,
        };
        Some(Move { source, gref: r.u32()?, offset: r.u16()?, len: r.u16()? })
    };
    let ops = (0..count).map(op).collect::<Option<Vec<_>>>()?;
    Some(Request::Transfer { domid, buffer, ops })
}
