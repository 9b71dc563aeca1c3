//! Arenas: the memory that domains grant from.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use rings::PAGE_SIZE;
use rustix::fs::OFlags;

use super::super::arena::{Region, SealLater, memfd, reopen, seal_writing};
use crate::{Access, DomId};

/// Pages of an arena: as many as a grant table of the default size has references. The memory
/// is taken only when it is touched.
pub(super) const ARENA_PAGES: u32 = 32768;
const PAGE_BITS: u32 = ARENA_PAGES.trailing_zeros();
/// Arenas of one domain at a time, which bounds what it can make the hypervisor hold.
pub(super) const MAX_ARENAS: usize = 16;

/// Whether a read-only arena can be granted from yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sealed {
    NotYet,
    Done,
}

#[derive(Debug)]
pub(super) struct Arena {
    fd: OwnedFd,
    /// Tells it from another arena that has had the same number.
    pub(super) serial: u64,
    pub(super) peer: DomId,
    pub(super) access: Access,
    pub(super) sealed: Sealed,
    /// The connection that opened it.
    pub(super) owner: u64,
    /// References that grant pages of it.
    pub(super) granted: usize,
    /// This process's own view, for copies.
    view: OnceCell<Region>,
}

impl Arena {
    /// The descriptor that its guest gets.
    pub(super) fn for_guest(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }
    /// The descriptor that the peer gets: a description of its own, read-only where all grants
    /// are.
    pub(super) fn for_peer(&self) -> io::Result<OwnedFd> {
        let flags = match self.access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        reopen(&self.fd, flags)
    }
    pub(super) fn view(&self) -> io::Result<&Region> {
        if let Some(region) = self.view.get() {
            return Ok(region);
        }
        let region = Region::map(&self.fd, ARENA_PAGES as usize * PAGE_SIZE, self.access)?;
        Ok(self.view.get_or_init(|| region))
    }
    pub(super) fn seal(&mut self) -> io::Result<()> {
        if self.access == Access::ReadOnly && self.sealed == Sealed::NotYet {
            seal_writing(&self.fd)?;
            self.sealed = Sealed::Done;
        }
        Ok(())
    }
}

/// All arenas, by number.
#[derive(Debug, Default)]
pub(super) struct Memory {
    arenas: HashMap<u32, (DomId, Arena)>,
    next: u32,
    serial: u64,
}

/// The frame number of an arena's page, as grant entries hold it.
pub(super) fn frame(arena: u32, page: u32) -> u32 {
    arena << PAGE_BITS | page
}

/// Arena and page of a frame number.
pub(super) fn locate(frame: u32) -> (u32, u32) {
    (frame >> PAGE_BITS, frame & (ARENA_PAGES - 1))
}

impl Memory {
    /// A new arena and its number.
    pub(super) fn open(
        &mut self,
        domid: DomId,
        peer: DomId,
        access: Access,
        owner: u64,
    ) -> io::Result<u32> {
        let numbers = 1u32 << (32 - PAGE_BITS);
        if self.count(domid) >= MAX_ARENAS || self.arenas.len() as u32 >= numbers / 2 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        while self.arenas.contains_key(&self.next) {
            self.next = (self.next + 1) % numbers;
        }
        let number = self.next;
        self.next = (self.next + 1) % numbers;
        let (later, sealed) = match access {
            Access::ReadOnly => (SealLater::Writing, Sealed::NotYet),
            Access::ReadWrite => (SealLater::Nothing, Sealed::Done),
        };
        let name = format!("ringback-{domid}-{peer}");
        let fd = memfd(&name, ARENA_PAGES as usize * PAGE_SIZE, later)?;
        let view = OnceCell::new();
        self.serial += 1;
        let serial = self.serial;
        let arena = Arena { fd, serial, peer, access, sealed, owner, granted: 0, view };
        self.arenas.insert(number, (domid, arena));
        Ok(number)
    }

    pub(super) fn count(&self, domid: DomId) -> usize {
        self.arenas.values().filter(|(owner, _)| *owner == domid).count()
    }

    /// A domain's arena.
    pub(super) fn get(&self, domid: DomId, number: u32) -> Option<&Arena> {
        self.arenas.get(&number).filter(|(owner, _)| *owner == domid).map(|(_, arena)| arena)
    }

    pub(super) fn get_mut(&mut self, domid: DomId, number: u32) -> Option<&mut Arena> {
        let found = self.arenas.get_mut(&number).filter(|(owner, _)| *owner == domid);
        found.map(|(_, arena)| arena)
    }

    /// Forgets a domain's arenas.
    pub(super) fn remove_domain(&mut self, domid: DomId) {
        self.arenas.retain(|_, (owner, _)| *owner != domid);
    }

    /// Forgets the arenas of a connection that grant nothing any more.
    pub(super) fn remove_idle(&mut self, conn: u64) {
        self.arenas.retain(|_, (_, arena)| arena.owner != conn || arena.granted > 0);
    }
}
