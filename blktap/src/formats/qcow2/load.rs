//! What resolving lacks, brought by threads that may block: slices, tables, clusters.
use std::sync::atomic::{AtomicU64, Ordering};

use crate::formats::{ImageError, Miss};
use crate::storage::Access;

use super::cache::AllDirty;
use super::entry::{COMPRESSED, COPIED, OFFSET};
use super::metadata::Kind;
use super::space::{Bytes, Freed, Want};
use super::{Qcow2, Slice};

/// What is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// A slice of an L2 table.
    Slice(u32),
    /// The L2 table behind an L1 entry, as one that may be written.
    Table(u32),
    /// So many clusters, or some.
    Clusters(u32),
}

impl From<Missing> for Miss {
    fn from(missing: Missing) -> Miss {
        Miss(match missing {
            Missing::Slice(n) => u64::from(n),
            Missing::Table(n) => 1 << 32 | u64::from(n),
            Missing::Clusters(n) => 2 << 32 | u64::from(n),
        })
    }
}

impl Qcow2 {
    pub(super) fn load_missing(&self, Miss(miss): Miss) -> Result<(), ImageError> {
        let n = miss as u32;
        match miss >> 32 {
            0 => self.load_slice(n),
            1 => self.make_table(n),
            _ => self.fill_pool(u64::from(n)),
        }
    }

    /// First byte of a slice in the file, while its L1 entry is `entry`.
    pub(super) fn slice_offset(&self, number: u32, entry: u64) -> u64 {
        let per_table = self.layout.l2_bits() - self.slice_bits();
        let inside = u64::from(number) & ((1 << per_table) - 1);
        (entry & OFFSET) + inside * self.slice_bytes()
    }

    /// The L1 entry of a slice.
    pub(super) fn l1_of_slice(&self, number: u32) -> u64 {
        self.l1_entry(u64::from(number) << self.slice_guest_bits())
    }

    pub(super) fn load_slice(&self, number: u32) -> Result<(), ImageError> {
        let _one = self.cache.loader(number);
        if self.cache.get(number).is_some() {
            return Ok(());
        }
        let mut room = self.cache.make_room(number);
        if let Err(AllDirty) = room {
            self.flush_all()?;
            room = self.cache.make_room(number);
        }
        // What is still held belongs to requests in flight, which must not be waited for.
        let _ = room;
        let entry = self.l1_of_slice(number);
        if entry & OFFSET == 0 {
            return Ok(());
        }
        if entry & OFFSET & (self.layout.cluster_size() - 1) != 0 {
            return Err(ImageError::Corrupt(format!("L2 table at {:#x}", entry & OFFSET)));
        }
        let mut bytes = vec![0; self.slice_bytes() as usize];
        let read = self.file().read_at(self.slice_offset(number, entry), &mut bytes);
        read.map_err(ImageError::io("read an L2 table"))?;
        let suspicious = self.access == Access::ReadWrite && self.names_metadata(&bytes);
        let width = self.layout.entry_words();
        self.cache.insert(Slice::new(number, &bytes, width, suspicious));
        Ok(())
    }

    /// Whether an entry of a slice has the guest write where metadata are.
    fn names_metadata(&self, bytes: &[u8]) -> bool {
        let space = self.space.lock();
        let width = 8 * self.layout.entry_words();
        bytes.chunks_exact(width).any(|e| {
            let word = super::header::be64(e, 0);
            let cluster = (word & OFFSET) >> self.layout.cluster_bits;
            let own = word & COPIED != 0 && word & COMPRESSED == 0 && !self.layout.data_file;
            own && space.map.overlap(cluster..cluster + 1).is_some()
        })
    }

    /// Whether guest data may be written to a cluster. Only asked for suspicious slices.
    pub(super) fn may_write(&self, host: u64) -> Result<(), ImageError> {
        let cluster = host >> self.layout.cluster_bits;
        let checked = self.space.lock().map.check(cluster..cluster + 1, "a data cluster");
        self.judge(checked)
    }

    /// Makes the L2 table behind an L1 entry one that may be written: a new one, or a copy of
    /// one that a snapshot has too.
    fn make_table(&self, index: u32) -> Result<(), ImageError> {
        let _one = self.making_table.lock();
        let Some(place) = self.l1.get(index as usize) else {
            return Err(ImageError::Invalid(format!("L1 entry {index}")));
        };
        let old = place.load(Ordering::Acquire);
        if old & COPIED != 0 && old & OFFSET != 0 {
            return Ok(());
        }
        let mut table = vec![0; self.layout.cluster_size() as usize];
        if old & OFFSET != 0 {
            if old & OFFSET & (self.layout.cluster_size() - 1) != 0 {
                return Err(ImageError::Corrupt(format!("L2 table at {:#x}", old & OFFSET)));
            }
            let read = self.file().read_at(old & OFFSET, &mut table);
            read.map_err(ImageError::io("read an L2 table"))?;
        }
        let cluster = {
            let mut space = self.space.lock();
            space.recycle(&self.leases)?;
            space.reserve(Want::Exactly(1, Kind::L2))?.clusters.start
        };
        let offset = cluster << self.layout.cluster_bits;
        if let Err(e) = self.file().write_at(offset, &table) {
            let mut space = self.space.lock();
            space.map.remove(cluster..cluster + 1);
            space.lower(cluster..cluster + 1)?;
            return Err(ImageError::io("write an L2 table")(e));
        }
        place.store(offset | COPIED, Ordering::Release);
        self.pending.name_table(index);
        if old & OFFSET != 0 {
            let cluster = (old & OFFSET) >> self.layout.cluster_bits;
            let clusters = cluster..cluster + 1;
            let same = |e: &AtomicU64| e.load(Ordering::Acquire) & OFFSET == old & OFFSET;
            if !self.l1.iter().any(same) {
                self.space.lock().map.remove(clusters.clone());
            }
            self.pending.free(Freed { clusters, bytes: Bytes::Stay });
        }
        Ok(())
    }
}
