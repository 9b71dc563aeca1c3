//! From memory to the file, in order. A flush
//!
//! 1. takes what was freed, then copies the dirty slices, then lists the new L2 tables;
//! 2. writes refcount blocks and waits until they and the data are durable; then names new
//!    refcount blocks in their table, durably;
//! 3. writes the slices and the L1 entries of new tables, whose first content is durable by now,
//!    and waits until they are durable;
//! 4. gives back what lost its last name thereby, once no lease can have come across it.
//!
//! So at each point the counts on disk are at least what the tables on disk need.
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::formats::ImageError;
use crate::storage::Access;

use super::bitmaps::Recorder;
use super::header::INCOMPAT_DIRTY;
use super::space::Freed;
use super::{Qcow2, Slice};

/// What changed in memory and not yet in the file.
#[derive(Debug, Default)]
pub(super) struct Pending {
    slices: Mutex<Vec<Arc<Slice>>>,
    /// L1 entries.
    tables: Mutex<BTreeSet<u32>>,
    freed: Mutex<Vec<Freed>>,
    /// Counts changes.
    changed: AtomicU64,
    /// Up to which change all is durable.
    durable: AtomicU64,
    /// Counts flushes that were asked for.
    asked: AtomicU64,
    /// Up to which of them all were served. Held by who flushes.
    served: Mutex<u64>,
}

impl Pending {
    /// A slice became dirty.
    pub(super) fn slice(&self, slice: &Arc<Slice>) {
        self.slices.lock().push(Arc::clone(slice));
    }
    /// An L1 entry names a new table.
    pub(super) fn name_table(&self, index: u32) {
        self.tables.lock().insert(index);
        self.note();
    }
    /// The entry that named these was changed.
    pub(super) fn free(&self, freed: Freed) {
        self.freed.lock().push(freed);
    }
    /// Something changed.
    pub(super) fn note(&self) {
        self.changed.fetch_add(1, Ordering::Release);
    }
    /// Whether something changed that is not durable.
    pub(super) fn any(&self) -> bool {
        self.durable.load(Ordering::Acquire) != self.changed.load(Ordering::Acquire)
    }
}

/// What one flush writes.
struct Batch {
    freed: Vec<Freed>,
    slices: Vec<(Arc<Slice>, Vec<u8>)>,
    tables: BTreeSet<u32>,
}

impl Qcow2 {
    /// Makes everything durable that was done before. Those who come together share one.
    pub(super) fn flush_all(&self) -> Result<(), ImageError> {
        let pending = &self.pending;
        let ticket = pending.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut served = pending.served.lock();
        if *served >= ticket {
            return Ok(());
        }
        let covers = pending.asked.load(Ordering::Acquire);
        self.flush_now()?;
        *served = covers;
        Ok(())
    }

    fn flush_now(&self) -> Result<(), ImageError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        let changed = self.pending.changed.load(Ordering::Acquire);
        let batch = self.take_batch();
        let stamp = self.leases.stamp();
        if let Err(e) = self.judge(self.write_batch(&batch)) {
            self.put_back(batch);
            return Err(e);
        }
        self.pending.durable.store(changed, Ordering::Release);
        let mut space = self.space.lock();
        space.retire(stamp, batch.freed);
        self.judge(space.recycle(&self.leases))?;
        if self.corrupt.load(Ordering::Acquire) {
            space.mark_corrupt()?;
        }
        Ok(())
    }

    /// In this order: what was freed is in a slice that is taken later, and that in a table that
    /// is listed later.
    fn take_batch(&self) -> Batch {
        let freed = std::mem::take(&mut *self.pending.freed.lock());
        let slices = std::mem::take(&mut *self.pending.slices.lock());
        let slices = slices.into_iter().map(|s| {
            let bytes = s.clean_copy();
            (s, bytes)
        });
        let slices = slices.collect();
        let tables = std::mem::take(&mut *self.pending.tables.lock());
        Batch { freed, slices, tables }
    }

    fn put_back(&self, batch: Batch) {
        self.pending.tables.lock().extend(batch.tables);
        for (slice, _) in batch.slices {
            if slice.soil() {
                self.pending.slice(&slice);
            }
        }
        self.pending.freed.lock().extend(batch.freed);
    }

    fn write_batch(&self, batch: &Batch) -> Result<(), ImageError> {
        if self.corrupt.load(Ordering::Acquire) {
            // Data were written; metadata is not touched any more.
            return self.sync_files();
        }
        let blocks = if self.lazy {
            Vec::new()
        } else {
            let mut space = self.space.lock();
            space.refcounts.write_dirty()?;
            space.refcounts.unnamed_blocks()
        };
        self.sync_files()?;
        let named = !blocks.is_empty();
        if named {
            self.space.lock().refcounts.name_blocks(&blocks)?;
        }
        if batch.slices.is_empty() && batch.tables.is_empty() {
            return if named { self.sync_image() } else { Ok(()) };
        }
        if named {
            self.sync_image()?;
        }
        for (slice, bytes) in &batch.slices {
            let offset = self.slice_offset(slice.number, self.l1_of_slice(slice.number));
            let written = self.file().write_at(offset, bytes);
            written.map_err(ImageError::io("write an L2 table"))?;
        }
        self.write_l1(&batch.tables)?;
        self.sync_image()
    }

    fn write_l1(&self, tables: &BTreeSet<u32>) -> Result<(), ImageError> {
        let start = if tables.is_empty() { 0 } else { self.space.lock().header.l1_offset };
        for index in tables {
            let Some(entry) = self.l1.get(*index as usize) else { continue };
            let bytes = entry.load(Ordering::Acquire).to_be_bytes();
            let written = self.file().write_at(start + u64::from(*index) * 8, &bytes);
            written.map_err(ImageError::io("write the L1 table"))?;
        }
        Ok(())
    }

    fn sync_image(&self) -> Result<(), ImageError> {
        self.file().sync().map_err(ImageError::io("flush the image"))
    }

    fn sync_files(&self) -> Result<(), ImageError> {
        self.files.iter().try_for_each(|f| f.sync()).map_err(ImageError::io("flush the image"))
    }

    /// Leaves the image as one that was closed properly. No request is in flight.
    pub(super) fn close_image(&self) -> Result<(), ImageError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        self.flush_all()?;
        if self.corrupt.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut space = self.space.lock();
        space.recycle(&self.leases)?;
        space.cut(self.pool.drain())?;
        space.refcounts.write_dirty()?;
        self.sync_image()?;
        let blocks = space.refcounts.unnamed_blocks();
        if !blocks.is_empty() {
            space.refcounts.name_blocks(&blocks)?;
            self.sync_image()?;
        }
        if space.header.is_dirty() {
            space.header.incompatible &= !INCOMPAT_DIRTY;
            space.write_header()?;
        }
        self.bitmaps.as_ref().map_or(Ok(()), Recorder::close)
    }
}
