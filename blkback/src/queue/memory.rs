//! Memory for the payload of a queue's requests: the guest's own pages, mapped and kept or mapped
//! for one request, or pages of a buffer that the hypervisor copies to and from.
//!
//! A page that cannot be mapped (a bad reference, one granted read-only, a full pool) is copied,
//! and the copy's own status says what is wrong with it: so one bad reference fails one
//! request, although a mapping is all or nothing.

// Pieces of mapped pages are named by address for the kernel.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use blktap::IoBuf;
use hypervisor::{Access, Buffer, CopyOp, Direction, DomId, Grants, Mapping};
use perf::Handle;
use rings::PAGE_SIZE;
use rings::persistent::{Inserted, Limits, PersistentPool, PoolCounters};

use super::slots::{Piece, Place};
use crate::config::{Config, GrantMode};
use crate::counters::QueueCounters;

/// Pages of the copy buffer: enough for eight of the largest requests Linux sends.
const COPY_PAGES: usize = 2048;
/// Pages of the buffer that indirect tables are copied to, one batch at a time.
pub(super) const TABLE_PAGES: usize = 64;

/// Pages of one mapping. Many pages in one call are cheap to map and to unmap; a mapping stays
/// until its last page leaves the pool, so this is also by how much the pool's limit can be
/// exceeded at worst.
const CHUNK: usize = 16;

/// The kernel lets go of a page a moment after it has said that direct I/O is complete. What is
/// unmapped within that moment is spoilt for whoever maps it next (see `worker/bounced.rs`), so
/// nothing is before this time. Longer than Xen's scheduler lets others run in its middle (30 ms).
const LET_GO: Duration = Duration::from_millis(50);

/// Of so many pages that a full pool does not have, so many come into it, as one mapping; the
/// others are copied. A guest that goes round more pages than the pool has would otherwise find
/// none of them again, each mapped and unmapped for one use: 1056 entries and 1500 pages in turn
/// have no hit by strict least-recently-used replacement, and 0.6 of all by this.
const ADMITTED: usize = 16 * CHUNK;

/// One page of a mapping.
pub(super) struct Page {
    mapping: Arc<Mapping>,
    index: usize,
}

impl Page {
    fn base(&self) -> *mut u8 {
        assert!(self.index < self.mapping.pages());
        // SAFETY: within the mapping by the assertion.
        unsafe { self.mapping.base().add(self.index * PAGE_SIZE) }
    }
}

/// There are not enough free pages now.
pub(super) struct Short;

pub(super) struct Memory {
    domid: DomId,
    grants: Box<dyn Grants>,
    mode: GrantMode,
    pool: PersistentPool<Page>,
    limit: usize,
    /// Pages that a full pool did not have, since one of them was last mapped.
    turned_away: usize,
    /// Entries that the pool was made with.
    made: usize,
    idle: Duration,
    /// Pages that have left the pool, and when, oldest first.
    leaving: VecDeque<(u64, Page)>,
    /// The time, as last told.
    now: u64,
    /// First the tables, then the payload; made when first needed.
    buffer: Option<Buffer>,
    buffer_pages: usize,
    free: Vec<u32>,
    ops: Vec<CopyOp>,
    /// Which slot each of `ops` belongs to.
    owners: Vec<u32>,
    counters: Handle<QueueCounters>,
}

impl Memory {
    pub(super) fn new(
        domid: DomId,
        grants: Box<dyn Grants>,
        mode: GrantMode,
        config: &Config,
        counters: Handle<QueueCounters>,
        pool_counters: Handle<PoolCounters>,
    ) -> Memory {
        let payload = COPY_PAGES.max(config.max_indirect_segments as usize);
        Memory {
            domid,
            grants,
            mode,
            pool: PersistentPool::new(
                Limits {
                    entries: if mode == GrantMode::Persistent {
                        config.max_persistent_grants
                    } else {
                        0
                    },
                    idle: config.persistent_idle().as_nanos() as u64,
                    seed: seed(),
                },
                pool_counters,
            ),
            limit: config.max_persistent_grants as usize,
            turned_away: 0,
            made: config.max_persistent_grants as usize,
            idle: config.persistent_idle(),
            leaving: VecDeque::with_capacity(ADMITTED),
            now: 0,
            buffer: None,
            buffer_pages: TABLE_PAGES + payload,
            free: (TABLE_PAGES as u32..(TABLE_PAGES + payload) as u32).rev().collect(),
            ops: Vec::with_capacity(TABLE_PAGES + payload),
            owners: Vec::with_capacity(TABLE_PAGES + payload),
            counters,
        }
    }

    fn buffer(&mut self) -> io::Result<&Buffer> {
        if self.buffer.is_none() {
            self.buffer = Some(self.grants.buffer(self.buffer_pages * PAGE_SIZE)?);
        }
        self.buffer.as_ref().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Finds places for all segments of a slot, or for none. A write's segments that are copied
    /// are queued for the next [`copy`](Self::copy), and with `copied` all are.
    pub(super) fn place(
        &mut self,
        slot: u32,
        pieces: &mut [Piece],
        direction: Direction,
        copied: bool,
        now: u64,
    ) -> Result<(), Short> {
        self.now = now;
        match if copied { GrantMode::Copy } else { self.mode } {
            GrantMode::Persistent => self.place_mapped(pieces),
            GrantMode::Map => self.map_missing(pieces, pieces.len(), direction.access()),
            GrantMode::Copy => {}
        }
        let copied = pieces.iter().filter(|p| p.is_nowhere()).count();
        if copied > self.free.len() {
            self.release(pieces, now);
            return Err(Short);
        }
        for piece in pieces.iter_mut().filter(|p| p.is_nowhere()) {
            if let Some(page) = self.free.pop() {
                piece.place = Place::Copied(page);
                if direction == Direction::FromGrant {
                    self.queue(slot, piece, page, direction);
                }
            }
        }
        Ok(())
    }

    /// Finds what is mapped, and maps what is not while the pool has room.
    fn place_mapped(&mut self, pieces: &mut [Piece]) {
        let mut missing = 0;
        for piece in pieces.iter_mut() {
            // Pages are mapped for both directions: the frontend uses them again for either.
            match self.pool.get(piece.segment.gref, Access::ReadWrite) {
                Some(pin) => piece.place = Place::Mapped(pin),
                None => missing += 1,
            }
        }
        if missing > 0 {
            self.make_room(missing);
            let room = self.limit.saturating_sub(self.pool.len());
            self.map_missing(pieces, missing.min(room), Access::ReadWrite);
        }
    }

    /// Maps up to `most` of the segments that have no place. What cannot be mapped keeps none.
    fn map_missing(&mut self, pieces: &mut [Piece], most: usize, access: Access) {
        let mut left = most;
        let mut from = 0;
        while left > 0 && from < pieces.len() {
            let mut refs = [0; CHUNK];
            let (mut count, mut to) = (0, from);
            while to < pieces.len() && count < left.min(CHUNK) {
                if pieces[to].is_nowhere() {
                    refs[count] = pieces[to].segment.gref;
                    count += 1;
                }
                to += 1;
            }
            if count == 0 {
                break;
            }
            self.map_chunk(&mut pieces[from..to], &refs[..count], access);
            left -= count;
            from = to;
        }
    }

    fn map_chunk(&mut self, pieces: &mut [Piece], refs: &[u32], access: Access) {
        let Ok(mapping) = self.grants.map(self.domid, refs, access) else { return };
        self.counters.grants_mapped.add(refs.len() as u64);
        let mapping = Arc::new(mapping);
        let missing = pieces.iter_mut().filter(|p| p.is_nowhere());
        for (index, piece) in missing.enumerate() {
            let page = Page { mapping: mapping.clone(), index };
            if self.mode == GrantMode::Map {
                piece.place = Place::Lent(page);
                continue;
            }
            if let Inserted::Kept { pin, out } = self.pool.insert(piece.segment.gref, access, page)
            {
                piece.place = Place::Mapped(pin);
                // Unmapped with the last page of its mapping.
                self.leaving.extend(out.map(|page| (self.now, page)));
            }
        }
    }

    /// Makes room in a full pool, now and then: the longest unused go. They were mapped and used
    /// together, so they mostly leave as whole mappings.
    fn make_room(&mut self, wanted: usize) {
        self.let_go();
        if self.pool.len() + wanted <= self.limit {
            return;
        }
        self.turned_away += wanted;
        if self.turned_away >= ADMITTED {
            self.turned_away = 0;
            let idle = self.idle.as_nanos() as u64;
            let kept = self.limit.saturating_sub(wanted.min(CHUNK));
            self.limit_pool(kept, idle);
            self.limit_pool(self.limit, idle);
        }
    }

    fn limit_pool(&mut self, kept: usize, idle: u64) {
        let (leaving, now) = (&mut self.leaving, self.now);
        self.pool.set_limits(kept as u32, idle, |page| leaving.push_back((now, page)));
    }

    /// Unmaps what has left the pool long enough ago.
    fn let_go(&mut self) {
        let gone = |since: u64| self.now.saturating_sub(since) >= LET_GO.as_nanos() as u64;
        while self.leaving.front().is_some_and(|(since, _)| gone(*since)) {
            self.leaving.pop_front();
        }
    }

    /// Takes over changed limits; a pool cannot become larger than it was made.
    pub(super) fn set_limits(&mut self, config: &Config) {
        if self.mode != GrantMode::Persistent {
            return;
        }
        self.limit = (config.max_persistent_grants as usize).min(self.made);
        self.idle = config.persistent_idle();
        self.limit_pool(self.limit, self.idle.as_nanos() as u64);
    }

    /// Unmaps what was not used for long.
    pub(super) fn expire(&mut self, now: u64) {
        self.now = now;
        self.let_go();
        self.pool.expire(now, drop);
    }

    /// How long the queue may sleep before [`expire`](Self::expire) must be called again.
    pub(super) fn patience(&self) -> Option<Duration> {
        if !self.leaving.is_empty() {
            return Some(LET_GO);
        }
        (!self.pool.is_empty()).then_some(self.idle / 2)
    }

    /// Queues the copies of a read's segments towards the guest.
    pub(super) fn queue_out(&mut self, slot: u32, pieces: &[Piece]) {
        for piece in pieces {
            if let Place::Copied(page) = &piece.place {
                self.queue(slot, piece, *page, Direction::ToGrant);
            }
        }
    }

    fn queue(&mut self, slot: u32, piece: &Piece, page: u32, direction: Direction) {
        let (start, len) = (piece.segment.offset(), piece.segment.len());
        self.ops.push(CopyOp {
            gref: piece.segment.gref,
            offset: start as u16,
            len: len as u16,
            at: page as usize * PAGE_SIZE + start,
            direction,
            status: 0,
        });
        self.owners.push(slot);
    }

    /// Carries out all queued copies and tells each slot that had a failing one, at least once.
    pub(super) fn copy(&mut self, mut failed: impl FnMut(u32, i16)) -> io::Result<()> {
        if self.ops.is_empty() {
            return Ok(());
        }
        self.buffer()?;
        let Some(buffer) = &self.buffer else { return Ok(()) };
        self.grants.copy(self.domid, buffer, &mut self.ops)?;
        self.counters.grants_copied.add(self.ops.len() as u64);
        for (op, slot) in self.ops.iter().zip(&self.owners) {
            if op.status != 0 {
                failed(*slot, op.status);
            }
        }
        self.ops.clear();
        self.owners.clear();
        Ok(())
    }

    /// Queues the copy of one page of an indirect table to table page `page`.
    pub(super) fn queue_table(&mut self, slot: u32, gref: u32, page: usize, len: usize) {
        self.ops.push(CopyOp {
            gref,
            offset: 0,
            len: len as u16,
            at: page * PAGE_SIZE,
            direction: Direction::FromGrant,
            status: 0,
        });
        self.owners.push(slot);
    }

    /// Copies out a table page that [`copy`](Self::copy) brought.
    pub(super) fn table(&self, page: usize, into: &mut [u8]) {
        let Some(buffer) = &self.buffer else { return into.fill(0) };
        assert!(page < TABLE_PAGES && into.len() <= PAGE_SIZE);
        // SAFETY: in bounds by the assertion, and the buffer is this process's own; nobody writes
        // to it while no copy runs, and copies are made by this thread.
        unsafe {
            let from = buffer.base().add(page * PAGE_SIZE);
            std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len());
        }
    }

    /// Where a placed segment's bytes are.
    pub(super) fn io_buf(&mut self, piece: &Piece) -> io::Result<IoBuf> {
        let base = match &piece.place {
            Place::Mapped(pin) => {
                let mapping = self.pool.handle(pin);
                mapping.ok_or(io::ErrorKind::InvalidInput)?.base()
            }
            Place::Lent(page) => page.base(),
            Place::Copied(page) => {
                let offset = *page as usize * PAGE_SIZE;
                let buffer = self.buffer()?;
                assert!(offset < buffer.len());
                // SAFETY: in bounds by the assertion.
                unsafe { buffer.base().add(offset) }
            }
            Place::Nowhere => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let (start, len) = (piece.segment.offset(), piece.segment.len());
        assert!(start + len <= PAGE_SIZE);
        // SAFETY: within one page of a mapping that stays pinned, or of the buffer, until the
        // slot is released, which happens after its Done.
        Ok(unsafe { IoBuf::new(base.add(start), len) })
    }

    /// Gives the places of answered segments back.
    pub(super) fn release(&mut self, pieces: &mut [Piece], now: u64) {
        self.now = now;
        for piece in pieces {
            match std::mem::replace(&mut piece.place, Place::Nowhere) {
                Place::Mapped(pin) => {
                    self.leaving.extend(self.pool.unpin(pin, now).map(|page| (now, page)));
                }
                Place::Copied(page) => self.free.push(page),
                // Unmapped with the last of its mapping: all are this request's.
                Place::Lent(page) => drop(page),
                Place::Nowhere => {}
            }
        }
    }

    /// Unmaps everything. Nothing may be in flight.
    pub(super) fn close(self) {
        if !(self.pool.is_empty() && self.leaving.is_empty()) {
            std::thread::sleep(LET_GO);
        }
        self.pool.close(drop);
    }
}

/// What the guest cannot guess, for the pool's hashing.
fn seed() -> u64 {
    RandomState::new().hash_one(0)
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
