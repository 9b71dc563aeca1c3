//! Using what other domains granted.
// Mappings and buffers cross the seam by address; the promises are in their constructors.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rings::PAGE_SIZE;

use super::arena::Region;
use super::link::{Link, Reply, malformed};
use super::message::{Copy, MAX_COPIES, MAX_REFS, Move, Request};
use crate::core::grants::GrantError;
use crate::{
    Access, Buffer, CopyOp, Direction, DomId, GrantRef, Grants, Mapping, Source, Transfer,
};

/// One reference of a batch was refused, so nothing of it was mapped. The source of the
/// [`io::Error`] that `map` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("grant reference {gref}: {reason}")]
pub struct Refused {
    /// Which.
    pub gref: GrantRef,
    /// Why; [`GrantError::gntst`] is Xen's number for it.
    pub reason: GrantError,
}

/// A handle with a connection of its own.
#[derive(Debug)]
pub(super) struct GrantHandle {
    link: Arc<Link>,
    /// Arenas that the hypervisor has handed over on this connection. It does so once each.
    arenas: Mutex<HashMap<u32, OwnedFd>>,
}

/// Where a reference's page is.
#[derive(Clone, Copy, Debug)]
struct Place {
    arena: u32,
    page: usize,
}

impl GrantHandle {
    pub(super) fn new(link: Arc<Link>) -> Self {
        GrantHandle { link, arenas: Mutex::default() }
    }

    /// Keeps the arenas that came with a reply and says where its pages are.
    fn places(&self, reply: &mut Reply, count: usize) -> io::Result<(u64, Vec<Place>)> {
        let body = std::mem::take(&mut reply.body);
        let mut fields = super::message::Reader(&body);
        let handle = fields.u64().ok_or_else(malformed)?;
        let fresh = fields.u32().ok_or_else(malformed)?;
        let mut arenas = self.arenas.lock();
        for _ in 0..fresh {
            let (arena, _pages) = fields.u32().zip(fields.u32()).ok_or_else(malformed)?;
            arenas.insert(arena, reply.fd()?);
        }
        let place = |_| {
            let (arena, page) = fields.u32().zip(fields.u32()).ok_or_else(malformed)?;
            Ok(Place { arena, page: page as usize })
        };
        Ok((handle, (0..count).map(place).collect::<io::Result<_>>()?))
    }

    /// One run of addresses with each page at its place; neighbours go in one call.
    fn lay_out(&self, places: &[Place], access: Access) -> io::Result<Region> {
        let mut region = Region::reserve(places.len())?;
        let arenas = self.arenas.lock();
        let mut at = 0;
        let follows = |a: &Place, b: &Place| a.arena == b.arena && a.page + 1 == b.page;
        for run in places.chunk_by(follows) {
            let fd = arenas.get(&run[0].arena).ok_or_else(malformed)?;
            region.place(at, fd, run[0].page, run.len(), access)?;
            at += run.len();
        }
        Ok(region)
    }

    fn copy_some(&self, domid: DomId, buffer: u64, ops: &mut [CopyOp]) -> io::Result<()> {
        let wire = ops.iter().map(|op| Copy {
            gref: op.gref,
            offset: op.offset,
            len: op.len,
            at: op.at as u64,
            access: match op.direction {
                Direction::FromGrant => Access::ReadOnly,
                Direction::ToGrant => Access::ReadWrite,
            },
        });
        let request = Request::Copy { domid, buffer, ops: wire.collect() };
        let reply = self.link.call(&request)?;
        statuses(&reply, ops.iter_mut().map(|op| &mut op.status))
    }

    fn transfer_some(&self, domid: DomId, buffer: u64, ops: &mut [Transfer]) -> io::Result<()> {
        let wire = ops.iter().map(|op| {
            let Transfer { source, gref, offset, len, .. } = *op;
            Move { source, gref, offset, len }
        });
        let request = Request::Transfer { domid, buffer, ops: wire.collect() };
        let reply = self.link.call(&request)?;
        statuses(&reply, ops.iter_mut().map(|op| &mut op.status))
    }
}

/// What has become of each copy of a batch.
fn statuses<'a>(reply: &Reply, ops: impl Iterator<Item = &'a mut i16>) -> io::Result<()> {
    let mut fields = reply.fields();
    for status in ops {
        let code = fields.u16().ok_or_else(malformed)?;
        *status = match code {
            0 => 0,
            code => GrantError::from_code(code).map_or(-1, GrantError::gntst),
        };
    }
    Ok(())
}

fn in_page(offset: u16, len: u16) -> bool {
    usize::from(offset) + usize::from(len) <= PAGE_SIZE
}

fn in_buffer(at: usize, len: u16, buffer: &Buffer) -> bool {
    at.checked_add(len.into()).is_some_and(|end| end <= buffer.len())
}

fn refusal(reply: &Reply, refs: &[GrantRef]) -> io::Error {
    let mut fields = reply.fields();
    let index = fields.u32().and_then(|i| refs.get(i as usize));
    let reason = fields.u16().and_then(GrantError::from_code);
    match index.zip(reason) {
        Some((gref, reason)) => {
            io::Error::new(io::ErrorKind::InvalidInput, Refused { gref: *gref, reason })
        }
        None => io::Error::from_raw_os_error(reply.status as i32),
    }
}

impl Grants for GrantHandle {
    fn map(&self, domid: DomId, refs: &[GrantRef], access: Access) -> io::Result<Mapping> {
        if refs.is_empty() || refs.len() > MAX_REFS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let request = Request::Map { domid, access, refs: refs.to_vec() };
        let mut reply = self.link.ask(&request)?;
        if reply.status != 0 {
            return Err(refusal(&reply, refs));
        }
        let (handle, places) = self.places(&mut reply, refs.len())?;
        let link = self.link.clone();
        let unmap = move || link.call(&Request::Unmap { handle }).map(|_| ());
        let region = match self.lay_out(&places, access) {
            Ok(region) => region,
            Err(e) => {
                unmap()?;
                return Err(e);
            }
        };
        let base = region.base();
        let drop_both = move || {
            drop(region);
            unmap()
        };
        // SAFETY: the region is a page-aligned mapping of that many pages with that access,
        // owned by the closure that unmaps it.
        Ok(unsafe { Mapping::new(base, refs.len(), access, Box::new(drop_both)) })
    }

    fn copy(&self, domid: DomId, buffer: &Buffer, ops: &mut [CopyOp]) -> io::Result<()> {
        let inside = |op: &CopyOp| in_page(op.offset, op.len) && in_buffer(op.at, op.len, buffer);
        if !ops.iter().all(inside) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        ops.chunks_mut(MAX_COPIES).try_for_each(|some| self.copy_some(domid, buffer.id, some))
    }

    fn transfer(&self, domid: DomId, buffer: &Buffer, ops: &mut [Transfer]) -> io::Result<()> {
        let inside = |op: &Transfer| {
            in_page(op.offset, op.len)
                && match op.source {
                    Source::Buffer(at) => in_buffer(at, op.len, buffer),
                    Source::Page { offset, .. } => in_page(offset, op.len),
                }
        };
        if !ops.iter().all(inside) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        ops.chunks_mut(MAX_COPIES).try_for_each(|some| self.transfer_some(domid, buffer.id, some))
    }

    fn buffer(&self, len: usize) -> io::Result<Buffer> {
        let len = len.next_multiple_of(PAGE_SIZE);
        let mut reply = self.link.call(&Request::Buffer { len: len as u64 })?;
        let id = reply.fields().u64().ok_or_else(malformed)?;
        // First, so that the buffer is freed over there where mapping it fails.
        let mut owner = Lent { region: None, id, link: self.link.clone() };
        let region = Region::map(&reply.fd()?, len, Access::ReadWrite)?;
        let base = region.base();
        owner.region = Some(region);
        // SAFETY: the region is page-aligned readable and writable memory that its owner keeps.
        Ok(unsafe { Buffer::new(base, len, id, Box::new(owner)) })
    }
}

/// Memory that the hypervisor copies to and from; freed on both sides when dropped.
struct Lent {
    region: Option<Region>,
    id: u64,
    link: Arc<Link>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.region = None;
        if let Err(e) = self.link.call(&Request::FreeBuffer { buffer: self.id }) {
            tracing::debug!("cannot free buffer {}: {e}", self.id);
        }
    }
}
