//! The way through L1 tables to L2 tables: each L2 table once, however many entries name it, in
//! the order of the file. So hostile tables that share their parts cost no more than honest ones.
use std::cell::Cell;
use std::collections::BTreeMap;

use super::counts::Counts;
use super::entries;
use super::image::Image;
use crate::formats::ImageError;

/// Bytes of an L1 table that are read at once.
const STRIDE: u64 = 1 << 20;

/// An L1 table in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct L1 {
    pub(super) offset: u64,
    pub(super) entries: u64,
}

/// How often a table is named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    /// By the disk as it is.
    pub(super) active: u32,
    /// By the disk and its snapshots.
    pub(super) all: u32,
}

/// L1 tables, each once.
pub(super) type L1Tables = BTreeMap<L1, Uses>;

/// Who goes through the tables.
pub(super) trait Visitor {
    /// An entry of an L1 table that is not 0.
    fn l1_entry(&mut self, index: u64, raw: u64, uses: Uses) {
        let _ = (index, raw, uses);
    }
    /// The L2 table in the cluster at `offset`.
    fn l2_table(&mut self, offset: u64, table: &[u8], uses: Uses) -> Result<(), ImageError>;
}

/// Bytes of tables that may still be read. More than the file has means that they overlap.
#[derive(Debug)]
pub(super) struct Budget(Cell<u64>);

impl Budget {
    pub(super) fn of(image: &Image<'_>) -> Self {
        Budget(Cell::new(image.file.saturating_add(STRIDE)))
    }

    pub(super) fn spend(&self, bytes: u64) -> Result<(), ImageError> {
        let left = self.0.get().checked_sub(bytes);
        let overlap = || ImageError::Corrupt("its tables overlap each other".to_owned());
        self.0.set(left.ok_or_else(overlap)?);
        Ok(())
    }
}

/// Goes through all of `tables`.
pub(super) fn visit(
    image: &Image<'_>,
    tables: &L1Tables,
    visitor: &mut dyn Visitor,
) -> Result<(), ImageError> {
    let mut start = 0;
    while start < u64::MAX {
        let mut round = Round::new(image, start);
        let budget = Budget::of(image);
        for (l1, uses) in tables {
            each_entry(image, *l1, &budget, |index, raw| {
                if start == 0 {
                    visitor.l1_entry(index, raw, *uses);
                }
                round.add(image, entries::l2_offset(raw), *uses);
            })?;
        }
        start = round.visit(image, visitor)?;
    }
    Ok(())
}

/// Calls `each` with an L1 table's entries that are not 0.
fn each_entry(
    image: &Image<'_>,
    l1: L1,
    budget: &Budget,
    mut each: impl FnMut(u64, u64),
) -> Result<(), ImageError> {
    let end = l1.entries.saturating_mul(8).saturating_add(l1.offset).min(image.file);
    let mut at = l1.offset;
    while at < end {
        let len = STRIDE.min(end - at);
        if !image.is_hole(at..at + len)? {
            budget.spend(len)?;
            let bytes = image.read(at, len as usize, "read an L1 table")?;
            let words = bytes.chunks_exact(8).map(entries::word).enumerate();
            let base = (at - l1.offset) / 8;
            words.filter(|(_, raw)| *raw != 0).for_each(|(i, raw)| each(base + i as u64, raw));
        }
        at += len;
    }
    Ok(())
}

/// As many L2 tables as their counts fit into memory.
struct Round {
    active: Counts,
    all: Counts,
}

impl Round {
    fn new(image: &Image<'_>, start: u64) -> Self {
        let counts = || Counts::new(start, image.memory / 8);
        Round { active: counts(), all: counts() }
    }

    fn add(&mut self, image: &Image<'_>, offset: u64, uses: Uses) {
        if offset != 0 && image.is_aligned(offset) && offset < image.file {
            self.active.add(offset >> image.bits(), uses.active);
            self.all.add(offset >> image.bits(), uses.all);
        }
    }

    /// Gives where the next round begins.
    fn visit(&self, image: &Image<'_>, visitor: &mut dyn Visitor) -> Result<u64, ImageError> {
        let end = self.all.window().end.min(self.active.window().end);
        for (cluster, all) in self.all.iter().take_while(|(cluster, _)| *cluster < end) {
            image.tick()?;
            let offset = cluster << image.bits();
            if !image.is_hole(offset..offset + image.cluster())? {
                let table = image.read(offset, image.cluster() as usize, "read an L2 table")?;
                let uses = Uses { active: self.active.get(cluster), all };
                visitor.l2_table(offset, &table, uses)?;
            }
        }
        Ok(end)
    }
}
