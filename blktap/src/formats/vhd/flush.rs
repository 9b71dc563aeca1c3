//! Making data durable, then what names them.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

use super::{FULL, Table, UNUSED, sector_of};
use crate::formats::{ImageError, Leases};
use crate::storage::Storage;

/// What the file does not have yet.
#[derive(Default)]
pub(super) struct Changes {
    /// Entries of the block table.
    pub table: BTreeMap<u32, u32>,
    /// Blocks whose bitmaps have new bits.
    pub bitmaps: BTreeSet<u32>,
    /// Blocks that the file's table may still name: sector, and when leases on them have ended.
    pub freed: Vec<(u32, u64)>,
}

/// The changes, with their counts, which are read without the lock.
#[derive(Default)]
pub(super) struct Dirty {
    changes: Mutex<Changes>,
    made: AtomicU64,
    flushed: AtomicU64,
}

impl Dirty {
    /// The changes, to add one.
    pub fn changes(&self) -> MutexGuard<'_, Changes> {
        let changes = self.changes.lock();
        self.made.fetch_add(1, Ordering::Release);
        changes
    }
    /// Whether a block's bitmap has bits that the file does not have.
    pub fn has_bitmap(&self, block: u32) -> bool {
        self.changes.lock().bitmaps.contains(&block)
    }
    pub fn is_dirty(&self) -> bool {
        self.made.load(Ordering::Acquire) != self.flushed.load(Ordering::Acquire)
    }
    /// The changes, and the count that says that they are flushed.
    fn take(&self) -> (Changes, u64) {
        let mut changes = self.changes.lock();
        (std::mem::take(&mut changes), self.made.load(Ordering::Acquire))
    }
}

/// Flushes one after the other; those who come while one runs share the next.
#[derive(Default)]
pub(super) struct Flushes {
    asked: AtomicU64,
    /// All up to this number are done; an error stays.
    done: Mutex<(u64, bool)>,
}

impl Flushes {
    pub fn run(&self, flush: impl FnOnce() -> Result<(), ImageError>) -> Result<(), ImageError> {
        let mine = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut done = self.done.lock();
        let (upto, failed) = *done;
        if failed {
            let source = std::io::Error::other("an earlier flush failed");
            return Err(ImageError::Io { what: "flush", source });
        }
        if upto >= mine {
            return Ok(());
        }
        let covers = self.asked.load(Ordering::Acquire);
        let result = flush();
        *done = if result.is_ok() { (covers, false) } else { (upto, true) };
        result
    }
}

impl Table {
    /// One flush at a time.
    pub(super) fn flush(&self, storage: &dyn Storage, leases: &Leases) -> Result<(), ImageError> {
        let sync = || storage.sync().map_err(ImageError::io("flush the file"));
        let (changes, count) = self.dirty.take();
        let bitmaps = self.stored_bitmaps(&changes);
        // Data, new blocks' bitmaps and the footer.
        sync()?;
        if changes.table.is_empty() && bitmaps.is_empty() {
            self.dirty.flushed.store(count, Ordering::Release);
            return Ok(());
        }
        for (at, bytes) in &bitmaps {
            storage.write_at(*at, bytes).map_err(ImageError::io("write a block's bitmap"))?;
        }
        self.write_entries(&changes.table, storage)?;
        self.clear_batmap(&changes.table, storage)?;
        sync()?;
        self.dirty.flushed.store(count, Ordering::Release);
        for block in changes.bitmaps {
            if self.word(block) & FULL != 0 {
                self.bitmaps.drop_idle(block, |b| !self.dirty.has_bitmap(b));
            }
        }
        let mut space = self.space.lock();
        space.add_freed(changes.freed);
        space.give_back(storage, leases, self.block_bytes());
        Ok(())
    }

    /// The dirty bitmaps with their places, as they are now: what they say is written already.
    fn stored_bitmaps(&self, changes: &Changes) -> Vec<(u64, Vec<u8>)> {
        let mut stored = Vec::with_capacity(changes.bitmaps.len());
        for block in &changes.bitmaps {
            let sector = sector_of(self.word(*block));
            // A block that was freed meanwhile needs none.
            if let (Some(bitmap), true) = (self.bitmaps.get(*block), sector != UNUSED) {
                let mut bytes = vec![0; self.bitmap_bytes as usize];
                bitmap.store(&mut bytes);
                stored.push((u64::from(sector) * 512, bytes));
            }
        }
        stored
    }

    /// Writes entries of the block table, neighbours together.
    fn write_entries(
        &self,
        entries: &BTreeMap<u32, u32>,
        storage: &dyn Storage,
    ) -> Result<(), ImageError> {
        let mut entries = entries.iter().peekable();
        while let Some((first, sector)) = entries.next() {
            let mut bytes = sector.to_be_bytes().to_vec();
            let mut next = first + 1;
            while let Some((_, sector)) = entries.next_if(|(block, _)| **block == next) {
                bytes.extend(sector.to_be_bytes());
                next += 1;
            }
            let at = self.header.table_offset.get() + u64::from(*first) * 4;
            storage.write_at(at, &bytes).map_err(ImageError::io("write the block table"))?;
        }
        Ok(())
    }

    /// Blocks whose place changed are no longer in the batmap.
    fn clear_batmap(
        &self,
        entries: &BTreeMap<u32, u32>,
        storage: &dyn Storage,
    ) -> Result<(), ImageError> {
        let mut batmap = self.batmap.lock();
        let Some(batmap) = batmap.as_mut() else { return Ok(()) };
        let mut bits = entries.keys().map(|b| (*b, false)).peekable();
        if bits.peek().is_some() && batmap.update(bits) {
            batmap.write(storage)?;
        }
        Ok(())
    }

    /// Tells the batmap which blocks are full. After a flush, with nothing in flight.
    pub(super) fn write_batmap(&self, storage: &dyn Storage) -> Result<(), ImageError> {
        let mut batmap = self.batmap.lock();
        let Some(batmap) = batmap.as_mut() else { return Ok(()) };
        let full = |block: u32| (block, self.word(block) & FULL != 0);
        if batmap.update((0..self.blocks.len() as u32).map(full)) {
            batmap.write(storage)?;
            storage.sync().map_err(ImageError::io("flush the file"))?;
        }
        Ok(())
    }
}
