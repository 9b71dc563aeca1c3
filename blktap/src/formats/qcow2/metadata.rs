//! Which clusters of the file hold metadata: nothing else may be written over them.
use std::collections::BTreeMap;
use std::ops::Range;

use super::header::Header;
use super::refcounts::{FILE_LIMIT, TABLE_OFFSET};
use super::{entry, header, snapshots};
use crate::formats::ImageError;
use crate::storage::Storage;

/// What a cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The header.
    Header,
    /// The active L1 table.
    L1,
    /// A snapshot's L1 table.
    InactiveL1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    Snapshots,
    /// The directory of bitmaps.
    Bitmaps,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Header => "the header",
            Kind::L1 => "the L1 table",
            Kind::InactiveL1 => "a snapshot's L1 table",
            Kind::L2 => "an L2 table",
            Kind::RefcountTable => "the refcount table",
            Kind::RefcountBlock => "a refcount block",
            Kind::Snapshots => "the snapshot table",
            Kind::Bitmaps => "the bitmap directory",
        }
    }
}

/// Ranges of clusters, by their first; neighbours of one kind are one.
#[derive(Debug, Default)]
pub(super) struct MetadataMap {
    ranges: BTreeMap<u64, (u64, Kind)>,
}

impl MetadataMap {
    /// What an image's tables take, by its L1 table and its refcount table. Fails where two of
    /// them share a cluster.
    pub(super) fn of(
        storage: &dyn Storage,
        header: &Header,
        l1: &[u64],
        refcounts: &[u64],
    ) -> Result<MetadataMap, ImageError> {
        let mut map = MetadataMap::default();
        map_tables(header, l1, &mut map)?;
        map_snapshots(header, storage, &mut map)?;
        map_refcounts(header, refcounts, &mut map)?;
        Ok(map)
    }

    /// What lies in a range of clusters.
    pub(super) fn overlap(&self, clusters: Range<u64>) -> Option<Kind> {
        let (_, (end, kind)) = self.ranges.range(..clusters.end).next_back()?;
        (*end > clusters.start).then_some(*kind)
    }

    /// Fails if a range overlaps metadata; `what` is about to be written there.
    pub(super) fn check(&self, clusters: Range<u64>, what: &str) -> Result<(), ImageError> {
        match self.overlap(clusters.clone()) {
            None => Ok(()),
            Some(kind) => Err(ImageError::Corrupt(format!(
                "{what} at cluster {:#x} overlaps {}",
                clusters.start,
                kind.name()
            ))),
        }
    }

    /// Adds a range, which must be free.
    pub(super) fn add(&mut self, clusters: Range<u64>, kind: Kind) -> Result<(), ImageError> {
        if clusters.is_empty() {
            return Ok(());
        }
        self.check(clusters.clone(), kind.name())?;
        let Range { mut start, mut end } = clusters;
        if let Some((&before, &(to, k))) = self.ranges.range(..start).next_back()
            && to == start
            && k == kind
        {
            self.ranges.remove(&before);
            start = before;
        }
        if let Some(&(to, k)) = self.ranges.get(&end)
            && k == kind
        {
            self.ranges.remove(&end);
            end = to;
        }
        self.ranges.insert(start, (end, kind));
        Ok(())
    }

    /// Takes a range of one kind out.
    pub(super) fn remove(&mut self, clusters: Range<u64>) {
        let Some((&start, &(end, kind))) = self.ranges.range(..=clusters.start).next_back() else {
            return;
        };
        if end < clusters.end || clusters.is_empty() {
            return;
        }
        self.ranges.remove(&start);
        for rest in [start..clusters.start, clusters.end..end] {
            if !rest.is_empty() {
                self.ranges.insert(rest.start, (rest.end, kind));
            }
        }
    }
}

/// Adds what the header and the L1 table name to the map of metadata.
fn map_tables(header: &Header, l1: &[u64], map: &mut MetadataMap) -> Result<(), ImageError> {
    let bits = header.cluster_bits;
    let clusters = |at: u64, bytes: u64| at >> bits..(at + bytes).div_ceil(1 << bits);
    map.add(0..1, Kind::Header)?;
    map.add(clusters(header.l1_offset, l1.len() as u64 * 8), Kind::L1)?;
    let valid = header.autoclear & header::AUTOCLEAR_BITMAPS != 0;
    if let Some(b) = header.bitmaps.filter(|_| valid) {
        let end = b.directory_offset.checked_add(b.directory_size);
        if end.is_none_or(|e| e > i64::MAX as u64) {
            return Err(ImageError::Corrupt("bitmap directory".into()));
        }
        map.add(clusters(b.directory_offset, b.directory_size), Kind::Bitmaps)?;
    }
    let mut tables: Vec<_> = l1.iter().map(|e| (e & entry::OFFSET, e & entry::COPIED)).collect();
    tables.sort_unstable();
    // Entries may share a table that none of them writes in place: each makes a copy first.
    tables.dedup_by(|a, b| a == b && a.1 == 0);
    for (offset, _) in tables.into_iter().filter(|(offset, _)| *offset != 0) {
        if !offset.is_multiple_of(1 << bits) {
            return Err(ImageError::Corrupt(format!("L2 table at {offset:#x}")));
        }
        map.add(clusters(offset, 1 << bits), Kind::L2)?;
    }
    Ok(())
}

/// Adds the snapshot table and the snapshots' L1 tables to the map of metadata.
fn map_snapshots(
    header: &Header,
    storage: &dyn Storage,
    map: &mut MetadataMap,
) -> Result<(), ImageError> {
    let bits = header.cluster_bits;
    let mut add = |what: &str, at: u64, bytes: u64, kind| {
        let end = at.checked_add(bytes).filter(|end| *end < i64::MAX as u64);
        match end {
            Some(end) if at.is_multiple_of(1 << bits) => {
                map.add(at >> bits..end.div_ceil(1 << bits), kind)
            }
            _ => Err(ImageError::Corrupt(format!("{what} at {at:#x}"))),
        }
    };
    if header.snapshot_count > 0 {
        let (bytes, tables) = snapshots::tables(storage, header)?;
        add("the snapshot table", header.snapshots_offset, bytes, Kind::Snapshots)?;
        for (at, bytes) in tables {
            add("a snapshot's L1 table", at, bytes, Kind::InactiveL1)?;
        }
    }
    Ok(())
}

/// Adds the refcount table and the blocks that it names.
fn map_refcounts(header: &Header, table: &[u64], map: &mut MetadataMap) -> Result<(), ImageError> {
    let bits = header.cluster_bits;
    let first = header.refcount_table_offset >> bits;
    map.add(first..first + u64::from(header.refcount_table_clusters), Kind::RefcountTable)?;
    for offset in table.iter().map(|e| e & TABLE_OFFSET).filter(|o| *o != 0) {
        if !offset.is_multiple_of(1 << bits) || offset >= FILE_LIMIT {
            return Err(ImageError::Corrupt(format!("refcount block at {offset:#x}")));
        }
        map.add(offset >> bits..(offset >> bits) + 1, Kind::RefcountBlock)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_split_and_collide() {
        let mut map = MetadataMap::default();
        map.add(0..1, Kind::Header).expect("free");
        map.add(4..6, Kind::L2).expect("free");
        map.add(2..4, Kind::L2).expect("free");
        map.add(6..7, Kind::RefcountBlock).expect("free");
        assert_eq!(map.ranges.len(), 3);
        assert!(map.add(5..9, Kind::L1).is_err());
        assert!(map.check(1..2, "data").is_ok() && map.check(1..3, "data").is_err());
        map.remove(3..5);
        assert_eq!(
            [2, 3, 4, 5, 6].map(|c| map.overlap(c..c + 1).is_some()),
            [true, false, false, true, true]
        );
    }
}
