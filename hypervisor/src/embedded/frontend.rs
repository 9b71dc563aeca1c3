//! The granting side: [`Guest`] for a guest's process.
// Granted memory is reached by address; the promises are at each place.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use parking_lot::Mutex;
use rings::PAGE_SIZE;
use rings::mem::SharedMem;

use super::arena::Region;
use super::channel::Channel;
use super::link::{Link, malformed};
use super::message::{MAX_REFS, Request};
use crate::{Access, DomId, EventChannel, GrantRef, GrantedPages, Guest};

/// A guest's process on the bundled hypervisor.
#[derive(Debug)]
pub struct Frontend {
    link: Arc<Link>,
    arenas: Mutex<HashMap<(DomId, Access), Arc<Arena>>>,
}

impl Frontend {
    /// As the domain that a connection was made for.
    pub fn new(link: Arc<Link>) -> Self {
        Frontend { link, arenas: Mutex::default() }
    }

    /// Becomes readable when the hypervisor is gone or this domain has ended.
    pub fn lifeline(&self) -> io::Result<OwnedFd> {
        self.link.lifeline()
    }

    fn arena(&self, peer: DomId, access: Access) -> io::Result<Arc<Arena>> {
        let mut arenas = self.arenas.lock();
        if let Some(arena) = arenas.get(&(peer, access)) {
            return Ok(arena.clone());
        }
        let arena = Arc::new(Arena::open(self.link.clone(), peer, access)?);
        arenas.insert((peer, access), arena.clone());
        Ok(arena)
    }
}

impl Guest for Frontend {
    fn domid(&self) -> DomId {
        self.link.domid()
    }
    fn store(&self) -> io::Result<crate::store::Client> {
        self.link.store()
    }
    fn grant(
        &self,
        peer: DomId,
        pages: usize,
        access: Access,
    ) -> io::Result<Arc<dyn GrantedPages>> {
        let granted = Granted::new(self.arena(peer, access)?, pages)?;
        Ok(Arc::new(granted))
    }
    fn alloc_unbound(&self, peer: DomId) -> io::Result<Box<dyn EventChannel>> {
        let mut reply = self.link.call(&Request::AllocUnbound { peer })?;
        let port = reply.fields().u32().ok_or_else(malformed)?;
        let (read, write) = (reply.fd()?, reply.fd()?);
        Ok(Box::new(Channel::new(self.link.clone(), port, read, write)))
    }
}

/// Memory that this domain shares with one peer.
#[derive(Debug)]
struct Arena {
    id: u32,
    region: Region,
    link: Arc<Link>,
    room: Mutex<Room>,
}

/// Which pages are free, and which cannot be used again yet.
#[derive(Debug, Default)]
struct Room {
    /// Free runs: first page, pages.
    free: BTreeMap<u32, u32>,
    /// Pages from here on have never been used and read as zeroes.
    fresh: u32,
    /// Given up here, but still mapped by the peer.
    lingering: Vec<(GrantRef, u32)>,
}

impl Arena {
    fn open(link: Arc<Link>, peer: DomId, access: Access) -> io::Result<Arena> {
        let mut reply = link.call(&Request::OpenArena { peer, access })?;
        let mut fields = reply.fields();
        let (id, pages) = fields.u32().zip(fields.u32()).ok_or_else(malformed)?;
        let fd = reply.fd()?;
        let region = Region::map(&fd, pages as usize * PAGE_SIZE, Access::ReadWrite)?;
        if access == Access::ReadOnly {
            link.call(&Request::SealArena { arena: id })?;
        }
        let room = Room { free: BTreeMap::from([(0, pages)]), fresh: 0, lingering: Vec::new() };
        Ok(Arena { id, region, link, room: Mutex::new(room) })
    }

    /// Ends access to pages; those that the peer still has mapped are kept aside.
    fn end_access(&self, pages: impl Iterator<Item = (GrantRef, u32)>) -> io::Result<()> {
        let mut room = self.room.lock();
        let mut ending = std::mem::take(&mut room.lingering);
        ending.extend(pages);
        let mut result = Ok(());
        for some in ending.chunks(MAX_REFS) {
            let refs = some.iter().map(|(gref, _)| *gref).collect();
            match self.link.call(&Request::EndAccess { refs }) {
                Ok(reply) => {
                    let mut fields = reply.fields();
                    for (gref, page) in some {
                        match fields.u16() {
                            Some(0) => room.release(*page, 1),
                            _ => room.lingering.push((*gref, *page)),
                        }
                    }
                }
                Err(e) => {
                    room.lingering.extend(some);
                    result = Err(e);
                }
            }
        }
        result
    }

    /// Takes a run of pages, zeroed.
    fn take(&self, pages: u32) -> Option<u32> {
        let mut room = self.room.lock();
        let first = room.take(pages)?;
        let used = room.fresh.saturating_sub(first).min(pages);
        self.region.zero(first as usize, used as usize);
        room.fresh = room.fresh.max(first + pages);
        Some(first)
    }
}

impl Room {
    fn take(&mut self, pages: u32) -> Option<u32> {
        let (first, len) = self.free.iter().map(|(f, l)| (*f, *l)).find(|(_, l)| *l >= pages)?;
        self.free.remove(&first);
        if len > pages {
            self.free.insert(first + pages, len - pages);
        }
        Some(first)
    }
    fn release(&mut self, mut first: u32, mut pages: u32) {
        if let Some((before, len)) = self.free.range(..first).next_back().map(|(f, l)| (*f, *l))
            && before + len == first
        {
            self.free.remove(&before);
            first = before;
            pages += len;
        }
        if let Some(len) = self.free.remove(&(first + pages)) {
            pages += len;
        }
        self.free.insert(first, pages);
    }
}

/// Pages of an arena with their references.
#[derive(Debug)]
struct Granted {
    arena: Arc<Arena>,
    first: u32,
    refs: Vec<GrantRef>,
}

impl Granted {
    fn new(arena: Arc<Arena>, pages: usize) -> io::Result<Granted> {
        if pages == 0 || pages > MAX_REFS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if !arena.room.lock().lingering.is_empty() {
            arena.end_access(std::iter::empty())?;
        }
        let count = pages as u32;
        let first = arena.take(count).ok_or(io::ErrorKind::StorageFull)?;
        let request = Request::Grant { arena: arena.id, first, count };
        let refs = arena.link.call(&request).and_then(|reply| {
            let mut fields = reply.fields();
            (0..count).map(|_| fields.u32().ok_or_else(malformed)).collect()
        });
        match refs {
            Ok(refs) => Ok(Granted { arena, first, refs }),
            Err(e) => {
                arena.room.lock().release(first, count);
                Err(e)
            }
        }
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len());
        assert!(inside, "{len} bytes at {offset} are outside {} granted", self.len());
        // SAFETY: the offset was checked against this run of pages of the arena's mapping.
        unsafe { self.base().add(offset) }
    }
}

// SAFETY: base() is an address in the arena's mapping, which is writable, lives as long as the
// arena does (held here), is aligned to pages and never moves; no reference to it is made but
// to atomics.
unsafe impl SharedMem for Granted {
    fn base(&self) -> *mut u8 {
        // SAFETY: the run lies in the mapping.
        unsafe { self.arena.region.base().add(self.first as usize * PAGE_SIZE) }
    }
    fn len(&self) -> usize {
        self.refs.len() * PAGE_SIZE
    }
    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "word at {offset}");
        // SAFETY: in range and aligned; atomics may be shared with other processes.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: in range; `into` is this process's own memory.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }
    fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: in range; `from` is this process's own memory.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }
}

impl GrantedPages for Granted {
    fn refs(&self) -> &[GrantRef] {
        &self.refs
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        let pages = self.refs.iter().copied().zip(self.first..);
        if let Err(e) = self.arena.end_access(pages) {
            tracing::debug!("cannot end access to {} pages: {e}", self.refs.len());
        }
    }
}
