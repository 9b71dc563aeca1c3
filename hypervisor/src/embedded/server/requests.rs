//! What the hypervisor does when a domain asks.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;

use rings::PAGE_SIZE;
use rustix::io::Errno;

use super::super::arena::{Region, SealLater, memfd};
use super::super::channel::Wire;
use super::super::message::{self, Endpoint, Request, VERSION, Writer};
use super::memory::{ARENA_PAGES, Sealed, frame, locate};
use super::sockets::{Outgoing, Peer, Style, pair};
use super::{Fate, Server, TURN};
use crate::core::domains::Mapped;
use crate::core::events::EventError;
use crate::core::grants::GrantError;
use crate::{Access, DomId, GrantRef, Port, Source};

/// Pages that one connection may have mapped.
const MAX_MAPPED: usize = 131_072;
/// Buffers of one connection.
const MAX_BUFFERS: usize = 1024;
/// Bytes of them together.
const MAX_BUFFER_BYTES: u64 = 256 << 20;
/// Channels that one connection may have allocated or bound.
const MAX_PORTS: usize = 512;

/// What a process holds through one connection; given back when that is closed.
#[derive(Default)]
pub(super) struct Holdings {
    pub(super) mapped: HashMap<u64, Mapped>,
    mapped_pages: usize,
    next: u64,
    /// Arenas whose descriptors it has, with their serials.
    known: HashMap<u32, u64>,
    pub(super) ports: HashSet<Port>,
    buffers: HashMap<u64, Region>,
    pub(super) refs: HashSet<GrantRef>,
    /// Domains it has created, with their serials.
    pub(super) created: Vec<(DomId, u64)>,
}

impl Holdings {
    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
    fn buffer_bytes(&self) -> u64 {
        self.buffers.values().map(|b| b.len() as u64).sum()
    }
}

type Answer = Result<Outgoing, Errno>;

fn ok() -> Writer {
    Writer::reply(0)
}

fn plain(writer: Writer) -> Answer {
    Ok(Outgoing { datagram: writer.0, fds: Vec::new() })
}

fn with_fds(writer: Writer, fds: impl IntoIterator<Item = OwnedFd>) -> Answer {
    Ok(Outgoing { datagram: writer.0, fds: fds.into_iter().collect() })
}

fn errno(e: &io::Error) -> Errno {
    match (e.raw_os_error(), e.kind()) {
        (Some(raw), _) => Errno::from_raw_os_error(raw),
        (None, io::ErrorKind::StorageFull) => Errno::NOSPC,
        _ => Errno::IO,
    }
}

fn event_errno(e: EventError) -> Errno {
    match e {
        EventError::BadDomain => Errno::SRCH,
        EventError::BadPort => Errno::INVAL,
        EventError::NoSpace => Errno::NOSPC,
    }
}

impl Server {
    pub(super) fn serve_peer(&mut self, token: u64) -> Fate {
        let Some(super::Conn::Requests(mut peer)) = self.conns.remove(&token) else {
            return Fate::Close;
        };
        let mut datagram = std::mem::take(&mut self.scratch);
        let fate = self.take_turn(token, &mut peer, &mut datagram);
        self.scratch = datagram;
        self.conns.insert(token, super::Conn::Requests(peer));
        fate
    }

    fn take_turn(&mut self, token: u64, peer: &mut Peer, datagram: &mut Vec<u8>) -> Fate {
        for _ in 0..TURN {
            let request = match peer.receive(datagram) {
                Ok(Some(len)) => Request::decode(&datagram[..len]),
                Ok(None) => return Fate::Keep,
                Err(fate) => return fate,
            };
            let Some(request) = request else { return Fate::Close };
            let reply = self.answer(token, peer, request).unwrap_or_else(|e| {
                let writer = Writer::reply(e.raw_os_error() as u32);
                Outgoing { datagram: writer.0, fds: Vec::new() }
            });
            if let Err(fate) = peer.send(reply) {
                return fate;
            }
        }
        Fate::Keep
    }

    fn answer(&mut self, token: u64, peer: &mut Peer, request: Request) -> Answer {
        match request {
            Request::Hello => {
                let mut w = ok();
                w.u32(VERSION).u16(peer.domid);
                plain(w)
            }
            Request::CreateDomain { .. }
            | Request::DestroyDomain { .. }
            | Request::ConnectDomain { .. }
            | Request::ListDomains => self.toolstack(peer, request),
            Request::Open { endpoint } => self.open(peer.domid, endpoint),
            Request::OpenArena { peer: to, access } => {
                self.open_arena(token, peer.domid, to, access)
            }
            Request::SealArena { arena } => {
                let arena = self.memory.get_mut(peer.domid, arena).ok_or(Errno::NOENT)?;
                arena.seal().map_err(|e| errno(&e))?;
                plain(ok())
            }
            Request::Grant { arena, first, count } => self.grant(peer, arena, first, count),
            Request::EndAccess { refs } => self.end_access(peer, &refs),
            Request::AllocUnbound { peer: to } => self.alloc_unbound(peer, to),
            Request::Bind { domid, port } => self.bind(peer, domid, port),
            Request::Close { port } => {
                if !peer.holds.ports.remove(&port) {
                    return Err(Errno::INVAL);
                }
                self.close_port(peer.domid, port);
                plain(ok())
            }
            Request::Map { domid, access, refs } => self.map(peer, domid, access, &refs),
            Request::Unmap { handle } => {
                let mapped = peer.holds.mapped.remove(&handle).ok_or(Errno::INVAL)?;
                peer.holds.mapped_pages -= mapped.pages();
                self.domains.unmap(&mapped);
                plain(ok())
            }
            Request::Buffer { len } => buffer(peer, len),
            Request::FreeBuffer { buffer } => {
                peer.holds.buffers.remove(&buffer).ok_or(Errno::INVAL)?;
                plain(ok())
            }
            Request::Copy { domid, buffer, ops } => self.copy(peer, domid, buffer, &ops),
            Request::Transfer { domid, buffer, ops } => self.transfer(peer, domid, buffer, &ops),
        }
    }

    fn toolstack(&mut self, peer: &mut Peer, request: Request) -> Answer {
        if peer.domid != 0 {
            return Err(Errno::PERM);
        }
        let mut w = ok();
        match request {
            Request::CreateDomain { domid, kind, name } => {
                let domid = self.create_domain(domid, kind, &name)?;
                let serial = self.domains.get(domid).map_or(0, |d| d.serial);
                peer.holds.created.retain(|(d, s)| {
                    self.domains.get(*d).is_some_and(|domain| domain.serial == *s)
                });
                peer.holds.created.push((domid, serial));
                w.u16(domid);
            }
            Request::DestroyDomain { domid } => {
                if domid == 0 || self.domains.get(domid).is_none() {
                    return Err(Errno::SRCH);
                }
                self.destroy_domain(domid);
            }
            Request::ConnectDomain { domid } => {
                self.domains.get(domid).ok_or(Errno::SRCH)?;
                return self.open(domid, Endpoint::Requests);
            }
            _ => {
                let all = self.domains.numbers();
                w.u32(all.len() as u32);
                all.into_iter().fold(&mut w, Writer::u16);
            }
        }
        plain(w)
    }

    fn open(&mut self, domid: DomId, endpoint: Endpoint) -> Answer {
        let style = match endpoint {
            Endpoint::Requests => Style::Datagrams,
            Endpoint::Store => Style::Bytes,
        };
        let (ours, theirs) = pair(style).map_err(|e| errno(&e))?;
        let added = match endpoint {
            Endpoint::Requests => self.add_peer(domid, ours),
            Endpoint::Store => self.add_store(domid, ours),
        };
        if added { with_fds(ok(), [theirs]) } else { Err(Errno::NOSPC) }
    }

    fn open_arena(&mut self, token: u64, domid: DomId, to: DomId, access: Access) -> Answer {
        let number = self.memory.open(domid, to, access, token).map_err(|e| errno(&e))?;
        let arena = self.memory.get(domid, number).ok_or(Errno::IO)?;
        let fd = arena.for_guest().map_err(|e| errno(&e))?;
        let mut w = ok();
        w.u32(number).u32(ARENA_PAGES);
        with_fds(w, [fd])
    }

    fn grant(&mut self, peer: &mut Peer, number: u32, first: u32, count: u32) -> Answer {
        let arena = self.memory.get_mut(peer.domid, number).ok_or(Errno::NOENT)?;
        let inside = first.checked_add(count).is_some_and(|end| end <= ARENA_PAGES);
        if arena.sealed == Sealed::NotYet || !inside || count as usize > message::MAX_REFS {
            return Err(Errno::INVAL);
        }
        let domain = self.domains.get_mut(peer.domid).ok_or(Errno::SRCH)?;
        let mut refs = Vec::with_capacity(count as usize);
        for page in first..first + count {
            match domain.grants.grant(arena.peer, frame(number, page), arena.access) {
                Ok(gref) => refs.push(gref),
                Err(_) => {
                    for gref in refs {
                        let _ = domain.grants.end_access(gref);
                    }
                    return Err(Errno::NOSPC);
                }
            }
        }
        arena.granted += refs.len();
        let mut w = ok();
        refs.iter().fold(&mut w, |w, gref| w.u32(*gref));
        peer.holds.refs.extend(refs);
        plain(w)
    }

    /// Ends access to one reference of a domain.
    pub(super) fn end_one(&mut self, domid: DomId, gref: GrantRef) -> Result<(), GrantError> {
        let domain = self.domains.get_mut(domid).ok_or(GrantError::BadDomain)?;
        let entry = domain.grants.entry(gref).ok_or(GrantError::BadReference)?;
        domain.grants.end_access(gref)?;
        if let Some(arena) = self.memory.get_mut(domid, locate(entry.frame).0) {
            arena.granted -= 1;
        }
        Ok(())
    }

    fn end_access(&mut self, peer: &mut Peer, refs: &[GrantRef]) -> Answer {
        let mut w = ok();
        for gref in refs {
            let ended = match peer.holds.refs.contains(gref) {
                true => self.end_one(peer.domid, *gref),
                false => Err(GrantError::NotGranted),
            };
            if ended.is_ok() {
                peer.holds.refs.remove(gref);
            }
            w.u16(ended.err().map_or(0, GrantError::code));
        }
        plain(w)
    }

    fn alloc_unbound(&mut self, peer: &mut Peer, to: DomId) -> Answer {
        if peer.holds.ports.len() >= MAX_PORTS {
            return Err(Errno::NOSPC);
        }
        let (wire, ends) = Wire::new().map_err(|e| errno(&e))?;
        let port = self.domains.events.alloc_unbound(peer.domid, to).map_err(event_errno)?;
        self.wires.insert((peer.domid, port), wire);
        peer.holds.ports.insert(port);
        let mut w = ok();
        w.u32(port);
        with_fds(w, ends)
    }

    fn bind(&mut self, peer: &mut Peer, domid: DomId, port: Port) -> Answer {
        if peer.holds.ports.len() >= MAX_PORTS && peer.domid != 0 {
            return Err(Errno::NOSPC);
        }
        let events = &mut self.domains.events;
        let local = events.bind_interdomain(peer.domid, domid, port).map_err(event_errno)?;
        let ends = self.wires.get(&(domid, port)).map(Wire::ends);
        match ends {
            Some(Ok(ends)) => {
                peer.holds.ports.insert(local);
                let mut w = ok();
                w.u32(local);
                with_fds(w, ends)
            }
            failed => {
                let _ = self.domains.events.close(peer.domid, local);
                Err(failed.and_then(Result::err).map_or(Errno::INVAL, |e| errno(&e)))
            }
        }
    }

    pub(super) fn close_port(&mut self, domid: DomId, port: Port) {
        let _ = self.domains.events.close(domid, port);
        self.wires.remove(&(domid, port));
    }

    fn map(&mut self, peer: &mut Peer, domid: DomId, access: Access, refs: &[GrantRef]) -> Answer {
        if peer.holds.mapped_pages + refs.len() > MAX_MAPPED {
            return Err(Errno::NOSPC);
        }
        let mut frames = Vec::with_capacity(refs.len());
        let mapped = match self.domains.map(peer.domid, domid, refs, access, &mut frames) {
            Ok(mapped) => mapped,
            Err((index, reason)) => {
                let mut w = Writer::reply(Errno::INVAL.raw_os_error() as u32);
                w.u32(index as u32).u16(reason.code());
                return plain(w);
            }
        };
        match self.hand_over(peer, domid, &frames) {
            Ok(mut reply) => {
                let handle = peer.holds.next();
                reply.datagram.splice(4..12, handle.to_le_bytes());
                peer.holds.mapped_pages += mapped.pages();
                peer.holds.mapped.insert(handle, mapped);
                Ok(reply)
            }
            Err(e) => {
                self.domains.unmap(&mapped);
                Err(e)
            }
        }
    }

    /// The reply to a mapping, its handle still 0: arenas that are new to this peer, and where
    /// the frames are.
    fn hand_over(&self, peer: &mut Peer, domid: DomId, frames: &[u32]) -> Answer {
        let mut fresh = Vec::new();
        for (number, _) in frames.iter().map(|f| locate(*f)) {
            let arena = self.memory.get(domid, number).ok_or(Errno::IO)?;
            let known = peer.holds.known.get(&number) == Some(&arena.serial);
            if !known && !fresh.iter().any(|(n, _, _)| *n == number) {
                let fd = arena.for_peer().map_err(|e| errno(&e))?;
                fresh.push((number, arena.serial, fd));
            }
        }
        if fresh.len() > message::MAX_FDS {
            return Err(Errno::TOOBIG);
        }
        let mut w = ok();
        w.u64(0).u32(fresh.len() as u32);
        for (number, serial, _) in &fresh {
            w.u32(*number).u32(ARENA_PAGES);
            peer.holds.known.insert(*number, *serial);
        }
        for (number, page) in frames.iter().map(|f| locate(*f)) {
            w.u32(number).u32(page);
        }
        with_fds(w, fresh.into_iter().map(|(_, _, fd)| fd))
    }

    fn copy(
        &mut self,
        peer: &mut Peer,
        domid: DomId,
        buffer: u64,
        ops: &[message::Copy],
    ) -> Answer {
        let buffer = peer.holds.buffers.get(&buffer).ok_or(Errno::INVAL)?;
        let mut w = ok();
        for op in ops {
            let done = self.copy_one(peer.domid, domid, buffer, op);
            w.u16(done.err().map_or(0, GrantError::code));
        }
        plain(w)
    }

    fn copy_one(
        &self,
        caller: DomId,
        domid: DomId,
        buffer: &Region,
        op: &message::Copy,
    ) -> Result<(), GrantError> {
        let at = usize::try_from(op.at).map_err(|_| GrantError::BadCopy)?;
        let (pages, inside) =
            self.granted(caller, (domid, op.gref), op.access, (op.offset, op.len))?;
        let len = op.len.into();
        let done = match op.access {
            Access::ReadOnly => pages.copy_to(inside, buffer, at, len),
            Access::ReadWrite => buffer.copy_to(at, pages, inside, len),
        };
        if done { Ok(()) } else { Err(GrantError::BadCopy) }
    }

    fn transfer(
        &mut self,
        peer: &mut Peer,
        domid: DomId,
        buffer: u64,
        ops: &[message::Move],
    ) -> Answer {
        let buffer = peer.holds.buffers.get(&buffer).ok_or(Errno::INVAL)?;
        let mut w = ok();
        for op in ops {
            let done = self.transfer_one(peer.domid, domid, buffer, op);
            w.u16(done.err().map_or(0, GrantError::code));
        }
        plain(w)
    }

    fn transfer_one(
        &self,
        caller: DomId,
        domid: DomId,
        buffer: &Region,
        op: &message::Move,
    ) -> Result<(), GrantError> {
        let to = (op.offset, op.len);
        let (pages, at) = self.granted(caller, (domid, op.gref), Access::ReadWrite, to)?;
        let (source, from) = match op.source {
            Source::Buffer(from) => (buffer, from),
            Source::Page { domid, gref, offset } => {
                self.granted(caller, (domid, gref), Access::ReadOnly, (offset, op.len))?
            }
        };
        let done = source.copy_to(from, pages, at, op.len.into());
        if done { Ok(()) } else { Err(GrantError::BadCopy) }
    }

    /// Where bytes of a page lie that a domain has granted to the caller.
    fn granted(
        &self,
        caller: DomId,
        (domid, gref): (DomId, GrantRef),
        access: Access,
        (offset, len): (u16, u16),
    ) -> Result<(&Region, usize), GrantError> {
        let domain = self.domains.get(domid).ok_or(GrantError::BadDomain)?;
        let (number, page) = locate(domain.grants.check(caller, gref, access)?);
        if usize::from(offset) + usize::from(len) > PAGE_SIZE {
            return Err(GrantError::BadCopy);
        }
        let arena = self.memory.get(domid, number).ok_or(GrantError::BadReference)?;
        let pages = arena.view().map_err(|_| GrantError::BadReference)?;
        Ok((pages, page as usize * PAGE_SIZE + usize::from(offset)))
    }
}

fn buffer(peer: &mut Peer, len: u64) -> Answer {
    let whole = len > 0 && len.is_multiple_of(PAGE_SIZE as u64) && len <= MAX_BUFFER_BYTES;
    if !whole {
        return Err(Errno::INVAL);
    }
    let full = peer.holds.buffers.len() >= MAX_BUFFERS
        || peer.holds.buffer_bytes() + len > MAX_BUFFER_BYTES;
    if full {
        return Err(Errno::NOSPC);
    }
    let make = || -> io::Result<(OwnedFd, Region)> {
        let fd = memfd("ringback-buffer", len as usize, SealLater::Nothing)?;
        let region = Region::map(&fd, len as usize, Access::ReadWrite)?;
        Ok((fd, region))
    };
    let (fd, region) = make().map_err(|e| errno(&e))?;
    let id = peer.holds.next();
    peer.holds.buffers.insert(id, region);
    let mut w = ok();
    w.u64(id);
    with_fds(w, [fd])
}
