//! Memory for the payload of a queue's requests: the guest's own pages, mapped and kept, or pages
//! of a buffer that the hypervisor copies to and from.
//!
//! A page that cannot be mapped (a bad reference, one granted read-only, a full pool) is copied,
//! and the copy's own status says what is wrong with it: so one bad reference fails one
//! request, although a mapping is all or nothing.

// Pieces of mapped pages are named by address for the kernel.
#![allow(unsafe_code)]

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::time::Duration;

use blktap::IoBuf;
use hypervisor::{Access, Buffer, CopyOp, Direction, DomId, Grants, Mapping};
use perf::Handle;
use rings::PAGE_SIZE;
use rings::persistent::{Inserted, Limits, PersistentPool, Pin, PoolCounters};

use super::slots::{Piece, Place};
use crate::config::{Config, GrantMode};
use crate::counters::QueueCounters;

/// Pages of the copy buffer: enough for eight of the largest requests Linux sends.
const COPY_PAGES: usize = 2048;
/// Pages of the buffer that indirect tables are copied to, one batch at a time.
pub(super) const TABLE_PAGES: usize = 64;

/// There are not enough free pages now.
pub(super) struct Short;

pub(super) struct Memory {
    domid: DomId,
    grants: Box<dyn Grants>,
    mode: GrantMode,
    pool: PersistentPool<Mapping>,
    idle: Duration,
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
            idle: config.persistent_idle(),
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
    /// are queued for the next [`copy`](Self::copy).
    pub(super) fn place(
        &mut self,
        slot: u32,
        pieces: &mut [Piece],
        direction: Direction,
        now: u64,
    ) -> Result<(), Short> {
        for at in 0..pieces.len() {
            match self.place_one(pieces[at].segment.gref) {
                Ok(place) => pieces[at].place = place,
                Err(Short) => {
                    self.drop_ops_of(slot);
                    self.release(&mut pieces[..at], now);
                    return Err(Short);
                }
            }
            if let (Place::Copied(page), Direction::FromGrant) = (&pieces[at].place, direction) {
                self.queue(slot, &pieces[at], *page, direction);
            }
        }
        Ok(())
    }

    fn place_one(&mut self, gref: u32) -> Result<Place, Short> {
        if self.mode == GrantMode::Persistent {
            // Pages are mapped for both directions: the frontend uses them again for either.
            let pin = self.pool.get(gref, rings::grants::Access::ReadWrite);
            if let Some(pin) = pin.or_else(|| self.map(gref)) {
                return Ok(Place::Mapped(pin));
            }
        }
        self.free.pop().map(Place::Copied).ok_or(Short)
    }

    fn map(&mut self, gref: u32) -> Option<Pin> {
        let mapping = self.grants.map(self.domid, &[gref], Access::ReadWrite).ok()?;
        self.counters.grants_mapped.add(1);
        match self.pool.insert(gref, rings::grants::Access::ReadWrite, mapping) {
            // What fell out is unmapped here.
            Inserted::Kept { pin, out: _ } => Some(pin),
            Inserted::Refused(_) => None,
        }
    }

    /// Unmaps what was not used for long.
    pub(super) fn expire(&mut self, now: u64) {
        self.pool.expire(now, drop);
    }

    /// How long the queue may sleep before [`expire`](Self::expire) must be called again.
    pub(super) fn patience(&self) -> Option<Duration> {
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

    fn drop_ops_of(&mut self, slot: u32) {
        while self.owners.last() == Some(&slot) {
            self.owners.pop();
            self.ops.pop();
        }
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
        for piece in pieces {
            match std::mem::replace(&mut piece.place, Place::Nowhere) {
                Place::Mapped(pin) => drop(self.pool.unpin(pin, now)),
                Place::Copied(page) => self.free.push(page),
                Place::Nowhere => {}
            }
        }
    }

    /// Unmaps everything. Nothing may be in flight.
    pub(super) fn close(self) {
        self.pool.close(drop);
    }
}

/// What the guest cannot guess, for the pool's hashing.
fn seed() -> u64 {
    RandomState::new().hash_one(0)
}
