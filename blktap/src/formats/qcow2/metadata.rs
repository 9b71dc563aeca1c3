//! Which clusters of the file hold metadata: nothing else may be written over them.
use std::collections::BTreeMap;
use std::ops::Range;

use crate::formats::ImageError;

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
