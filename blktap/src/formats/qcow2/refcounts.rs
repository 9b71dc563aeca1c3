//! Refcounts: the table, and blocks cached by slices under a limit. Used by one thread at a time,
//! never on the way of a request that hits.
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use crate::formats::ImageError;
use crate::storage::Storage;

use super::entry::{self, Layout};
use super::header::MAX_REFTABLE_BYTES;
use super::metadata::{Kind, MetadataMap};

/// Largest slice of a block in bytes.
const SLICE_BYTES: u64 = 4096;
/// Offsets in the refcount table.
pub(super) const TABLE_OFFSET: u64 = !511;
/// First byte that a file cannot have: L2 entries have 56 bits.
pub(super) const FILE_LIMIT: u64 = 1 << 56;

#[derive(Debug)]
struct RefSlice {
    bytes: Vec<u8>,
    dirty: bool,
    used: u64,
}

/// The refcounts of an image's clusters.
///
/// Counts are never lower than what durable metadata needs: they are raised before a cluster is
/// named and lowered after its last name is durably gone. So slices may be written at any time.
pub(super) struct Refcounts {
    storage: Arc<dyn Storage>,
    layout: Layout,
    table: Vec<u64>,
    /// First cluster of the table.
    table_at: u64,
    /// Blocks that the table on disk does not name yet.
    unnamed: BTreeSet<usize>,
    slices: HashMap<u64, RefSlice>,
    limit: usize,
    clock: u64,
}

/// A table that takes the place of another, which was too small.
pub(super) struct NewTable {
    /// Where it is.
    pub offset: u64,
    /// Its clusters.
    pub clusters: u32,
    /// The clusters of the old one: free once the header names the new one.
    pub old: Range<u64>,
}

impl Refcounts {
    /// Reads the table of `entries` entries. At most `limit` bytes of blocks are kept, at least
    /// a few slices.
    pub(super) fn read(
        storage: Arc<dyn Storage>,
        layout: Layout,
        (offset, clusters): (u64, u32),
        limit: u64,
    ) -> Result<Self, ImageError> {
        let bytes = usize::try_from(u64::from(clusters) << layout.cluster_bits);
        let mut table = vec![0; bytes.map_err(|_| ImageError::Corrupt("refcount table".into()))?];
        storage.read_at(offset, &mut table).map_err(ImageError::io("read the refcount table"))?;
        let table = table.chunks_exact(8).map(|b| super::header::be64(b, 0)).collect();
        let slice = SLICE_BYTES.min(layout.cluster_size());
        Ok(Refcounts {
            storage,
            layout,
            table,
            table_at: offset >> layout.cluster_bits,
            unnamed: BTreeSet::new(),
            slices: HashMap::new(),
            limit: usize::try_from(limit / slice).unwrap_or(usize::MAX).max(4),
            clock: 0,
        })
    }

    /// The table's entries.
    pub(super) fn table(&self) -> &[u64] {
        &self.table
    }

    fn whole(&self, offset: u64) -> Result<u64, ImageError> {
        if !offset.is_multiple_of(self.layout.cluster_size()) || offset >= FILE_LIMIT {
            return Err(ImageError::Corrupt(format!("refcount block at {offset:#x}")));
        }
        Ok(offset >> self.layout.cluster_bits)
    }

    fn table_clusters(&self) -> Range<u64> {
        let clusters = (self.table.len() as u64 * 8) >> self.layout.cluster_bits;
        self.table_at..self.table_at + clusters
    }

    fn slice_bytes(&self) -> u64 {
        SLICE_BYTES.min(self.layout.cluster_size())
    }
    /// Counts of a slice, as bits.
    fn slice_bits(&self) -> u32 {
        self.slice_bytes().trailing_zeros() + 3 - self.layout.refcount_order
    }

    /// Where a slice is in the file; `None` where its block is not there.
    fn offset_of(&self, slice: u64) -> Result<Option<u64>, ImageError> {
        let per_block = self.layout.refblock_bits() - self.slice_bits();
        let block = usize::try_from(slice >> per_block).unwrap_or(usize::MAX);
        let offset = self.table.get(block).copied().unwrap_or(0) & TABLE_OFFSET;
        if offset == 0 {
            return Ok(None);
        }
        self.whole(offset)?;
        Ok(Some(offset + (slice & ((1 << per_block) - 1)) * self.slice_bytes()))
    }

    /// The slice, read if it is not here; `None` where its block is not there.
    fn slice(&mut self, number: u64) -> Result<Option<&mut RefSlice>, ImageError> {
        self.clock += 1;
        if !self.slices.contains_key(&number) {
            let Some(offset) = self.offset_of(number)? else { return Ok(None) };
            self.make_room()?;
            let mut bytes = vec![0; self.slice_bytes() as usize];
            let read = self.storage.read_at(offset, &mut bytes);
            read.map_err(ImageError::io("read a refcount block"))?;
            self.slices.insert(number, RefSlice { bytes, dirty: false, used: 0 });
        }
        let clock = self.clock;
        let Some(slice) = self.slices.get_mut(&number) else { return Ok(None) };
        slice.used = clock;
        Ok(Some(slice))
    }

    fn make_room(&mut self) -> Result<(), ImageError> {
        while self.slices.len() >= self.limit {
            let oldest = self.slices.iter().min_by_key(|(_, s)| s.used).map(|(n, _)| *n);
            let Some(number) = oldest else { return Ok(()) };
            self.write_slice(number)?;
            self.slices.remove(&number);
        }
        Ok(())
    }

    fn write_slice(&mut self, number: u64) -> Result<(), ImageError> {
        let offset = self.offset_of(number)?;
        if let Some((slice, offset)) = self.slices.get_mut(&number).zip(offset)
            && slice.dirty
        {
            let written = self.storage.write_at(offset, &slice.bytes);
            written.map_err(ImageError::io("write a refcount block"))?;
            slice.dirty = false;
        }
        Ok(())
    }

    fn place(&self, cluster: u64) -> (u64, usize) {
        let bits = self.slice_bits();
        (cluster >> bits, (cluster & ((1 << bits) - 1)) as usize)
    }

    /// A cluster's refcount.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64, ImageError> {
        let (number, index) = self.place(cluster);
        let order = self.layout.refcount_order;
        let slice = self.slice(number)?;
        Ok(slice.map_or(0, |s| entry::refcount(&s.bytes, order, index)))
    }

    /// Raises or lowers a cluster's refcount and returns the new one. Its block must be there.
    pub(super) fn change(&mut self, cluster: u64, by: i64) -> Result<u64, ImageError> {
        let old = self.get(cluster)?;
        let new = old.checked_add_signed(by).filter(|n| *n <= self.layout.max_refcount());
        let Some(new) = new else {
            let text = format!("refcount {old} of cluster {cluster:#x} cannot change by {by}");
            return Err(match by > 0 {
                true => ImageError::NoSpace(text),
                false => ImageError::Corrupt(text),
            });
        };
        let (number, index) = self.place(cluster);
        let order = self.layout.refcount_order;
        let Some(slice) = self.slice(number)? else {
            return Err(ImageError::Corrupt(format!("no refcount block for cluster {cluster:#x}")));
        };
        entry::set_refcount(&mut slice.bytes, order, index, new);
        slice.dirty = true;
        Ok(new)
    }

    /// Makes sure that the cluster has a block. A new one lies in the first cluster that it
    /// counts. The table must be long enough.
    pub(super) fn ensure_block(
        &mut self,
        cluster: u64,
        map: &mut MetadataMap,
    ) -> Result<(), ImageError> {
        let index = (cluster >> self.layout.refblock_bits()) as usize;
        if self.table.get(index).is_none_or(|e| e & TABLE_OFFSET != 0) {
            return Ok(());
        }
        let first = (index as u64) << self.layout.refblock_bits();
        map.add(first..first + 1, Kind::RefcountBlock)?;
        let offset = first << self.layout.cluster_bits;
        let zeroes = vec![0; self.layout.cluster_size() as usize];
        if let Err(e) = self.storage.write_at(offset, &zeroes) {
            map.remove(first..first + 1);
            return Err(ImageError::io("write a refcount block")(e));
        }
        self.table[index] = offset;
        self.unnamed.insert(index);
        if let Err(e) = self.change(first, 1) {
            // A block that does not count itself must not be used.
            self.table[index] = 0;
            self.unnamed.remove(&index);
            map.remove(first..first + 1);
            return Err(e);
        }
        Ok(())
    }

    /// First cluster behind those that the table can count.
    pub(super) fn end(&self) -> u64 {
        (self.table.len() as u64) << self.layout.refblock_bits()
    }

    /// Whether a cluster has a block.
    pub(super) fn has_block(&self, cluster: u64) -> bool {
        let index = (cluster >> self.layout.refblock_bits()) as usize;
        self.table.get(index).is_some_and(|e| e & TABLE_OFFSET != 0)
    }

    /// First cluster from which on there are no blocks.
    fn tail(&self) -> u64 {
        let blocks = self.table.iter().rposition(|e| e & TABLE_OFFSET != 0).map_or(0, |i| i + 1);
        (blocks as u64) << self.layout.refblock_bits()
    }

    /// Blocks that `count` clusters and these blocks themselves need.
    fn blocks_for(&self, count: u64) -> u64 {
        let bits = self.layout.refblock_bits();
        let mut blocks = 1;
        while blocks << bits < blocks + count {
            blocks = (blocks + count).div_ceil(1 << bits);
        }
        blocks
    }

    /// Whether the table can count `count` clusters more behind all blocks.
    pub(super) fn has_tail(&self, count: u64) -> bool {
        self.tail() + self.blocks_for(count) + count <= self.end()
    }

    /// Takes `count` clusters behind all that have blocks, with new blocks in front of them.
    pub(super) fn take_tail(
        &mut self,
        count: u64,
        kind: Option<Kind>,
        map: &mut MetadataMap,
    ) -> Result<Range<u64>, ImageError> {
        let (start, blocks) = (self.tail(), self.blocks_for(count));
        let run = start + blocks..start + blocks + count;
        map.check(start..run.end, "new clusters")?;
        map.add(start..run.start, Kind::RefcountBlock)?;
        if let Some(kind) = kind {
            map.add(run.clone(), kind)?;
        }
        let taken = self.fill_tail(start, blocks, run.end);
        if taken.is_err() {
            let bits = self.slice_bits();
            self.slices.retain(|number, _| *number < start >> bits);
            self.table[(start >> self.layout.refblock_bits()) as usize..].fill(0);
            let table = &self.table;
            self.unnamed.retain(|i| table[*i] != 0);
            map.remove(start..run.start);
            if kind.is_some() {
                map.remove(run.clone());
            }
        }
        taken.map(|()| run)
    }

    fn fill_tail(&mut self, start: u64, blocks: u64, end: u64) -> Result<(), ImageError> {
        let zeroes = vec![0; self.layout.cluster_size() as usize];
        let first = (start >> self.layout.refblock_bits()) as usize;
        for i in 0..blocks {
            let offset = (start + i) << self.layout.cluster_bits;
            let written = self.storage.write_at(offset, &zeroes);
            written.map_err(ImageError::io("write a refcount block"))?;
            self.table[first + i as usize] = offset;
            self.unnamed.insert(first + i as usize);
        }
        (start..end).try_for_each(|c| self.change(c, 1).map(|_| ()))
    }

    /// Makes a longer table behind all that the present one counts, durable with all blocks.
    /// Nothing names it yet: the caller writes the header and then lowers the old one's counts.
    pub(super) fn grow(&mut self, map: &mut MetadataMap) -> Result<NewTable, ImageError> {
        let bits = self.layout.cluster_bits;
        let old = self.table_clusters();
        let per_cluster = self.layout.cluster_size() / 8;
        let most = (MAX_REFTABLE_BYTES >> bits).max(1);
        let mut clusters = (old.end - old.start).saturating_mul(2).min(most);
        while clusters < most
            && (clusters * per_cluster) << self.layout.refblock_bits()
                <= self.tail() + clusters + self.blocks_for(clusters)
        {
            clusters = (clusters * 2).min(most);
        }
        let full = clusters <= old.end - old.start || self.end() << bits >= FILE_LIMIT;
        if full {
            return Err(ImageError::NoSpace("the refcount table is full".into()));
        }
        let before = self.table.len();
        self.table.resize((clusters * per_cluster) as usize, 0);
        let placed = if self.has_tail(clusters) {
            self.take_tail(clusters, Some(Kind::RefcountTable), map)
        } else {
            Err(ImageError::NoSpace("the refcount table is full".into()))
        };
        match placed.and_then(|at| self.write_table(&at).map(|()| at)) {
            Ok(at) => {
                self.table_at = at.start;
                self.unnamed.clear();
                let clusters = (at.end - at.start) as u32;
                Ok(NewTable { offset: at.start << bits, clusters, old })
            }
            Err(e) => {
                // Blocks behind the old end are leaked at worst.
                self.table.truncate(before);
                self.unnamed.retain(|i| *i < before);
                Err(e)
            }
        }
    }

    fn write_table(&mut self, at: &Range<u64>) -> Result<(), ImageError> {
        self.write_dirty()?;
        let bytes: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
        let offset = at.start << self.layout.cluster_bits;
        let written = self.storage.write_at(offset, &bytes);
        written.map_err(ImageError::io("write the refcount table"))?;
        self.storage.sync().map_err(ImageError::io("flush the refcount table"))
    }

    /// Writes all dirty slices.
    pub(super) fn write_dirty(&mut self) -> Result<(), ImageError> {
        let mut dirty: Vec<u64> =
            self.slices.iter().filter(|(_, s)| s.dirty).map(|(n, _)| *n).collect();
        dirty.sort_unstable();
        dirty.into_iter().try_for_each(|n| self.write_slice(n))
    }

    /// The blocks that the table on disk does not name yet.
    pub(super) fn unnamed_blocks(&self) -> Vec<usize> {
        self.unnamed.iter().copied().collect()
    }

    /// Writes the table's entries of blocks that are durable.
    pub(super) fn name_blocks(&mut self, blocks: &[usize]) -> Result<(), ImageError> {
        for index in blocks {
            let at = (self.table_at << self.layout.cluster_bits) + *index as u64 * 8;
            let written = self.storage.write_at(at, &self.table[*index].to_be_bytes());
            written.map_err(ImageError::io("write the refcount table"))?;
            self.unnamed.remove(index);
        }
        Ok(())
    }

    /// Bytes of slices that are kept.
    #[cfg(test)]
    pub(super) fn cached(&self) -> u64 {
        self.slices.len() as u64 * self.slice_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::qcow2::header::Version;
    use crate::storage::MemStorage;

    /// A file of header, table and one block, which counts these.
    fn three_clusters(refcount_order: u32) -> (Arc<dyn Storage>, Layout) {
        let version = Version::V3;
        let layout =
            Layout { cluster_bits: 9, refcount_order, extended: false, data_file: false, version };
        let mut bytes = vec![0; 3 * 512];
        bytes[512..520].copy_from_slice(&1024u64.to_be_bytes());
        (0..3).for_each(|i| entry::set_refcount(&mut bytes[1024..], refcount_order, i, 1));
        (Arc::new(MemStorage::new(bytes)), layout)
    }

    #[test]
    fn a_table_that_is_full_grows_and_the_limit_of_memory_is_kept() {
        for order in [5, 6] {
            let (storage, layout) = three_clusters(order);
            let mut counts =
                Refcounts::read(Arc::clone(&storage), layout, (512, 1), 0).expect("a table");
            let mut map = MetadataMap::default();
            map.add(1..2, Kind::RefcountTable).expect("free");
            map.add(2..3, Kind::RefcountBlock).expect("free");
            let (mut at, mut tables) = ((512, 1), 0);
            let last = 5 * counts.end();
            for cluster in (3..last).step_by(17) {
                while cluster >= counts.end() {
                    let new = counts.grow(&mut map).expect("room");
                    (at, tables) = ((new.offset, new.clusters), tables + 1);
                    map.remove(new.old.clone());
                    new.old.for_each(|c| assert_eq!(counts.change(c, -1).expect("a count"), 0));
                }
                counts.ensure_block(cluster, &mut map).expect("a block");
                counts.change(cluster, 1).expect("a count");
                assert!(counts.cached() <= 4 * 512);
            }
            assert!(tables >= 2, "{tables}");
            counts.write_dirty().expect("write");
            let blocks = counts.unnamed_blocks();
            counts.name_blocks(&blocks).expect("write");
            let mut again = Refcounts::read(storage, layout, at, 0).expect("a table");
            for cluster in 0..last {
                let count = again.get(cluster).expect("a count");
                assert_eq!(count, counts.get(cluster).expect("a count"), "cluster {cluster}");
                let expected = map.overlap(cluster..cluster + 1).is_some()
                    || (cluster >= 3 && (cluster - 3).is_multiple_of(17));
                assert!(count > 0 || !expected, "cluster {cluster} is not counted");
            }
        }
    }

    #[test]
    fn counts_neither_wrap_nor_exceed_their_width() {
        let (storage, layout) = three_clusters(0);
        let mut counts = Refcounts::read(storage, layout, (512, 1), 0).expect("a table");
        assert!(matches!(counts.change(1, 1), Err(ImageError::NoSpace(_))));
        assert!(matches!(counts.change(5, -1), Err(ImageError::Corrupt(_))));
        assert_eq!(counts.change(1, -1).expect("a count"), 0);
        assert_eq!(counts.get(counts.end() + 9).expect("nothing there"), 0);
    }
}
