//! Everything that an image's metadata refer to, counted.
use super::counts::Counts;
use super::entries::{self, Entry, Named};
use super::image::Image;
use super::report::CheckReport;
use super::tables::{self, Budget, L1, L1Tables, Uses, Visitor};
use super::{bitmaps, snapshots};
use crate::formats::ImageError;

/// So many references beyond the end are remembered.
const BEYOND: usize = 1 << 16;

/// What a walk found out beside the counts.
#[derive(Debug, Default)]
pub(super) struct Sight {
    pub(super) report: CheckReport,
    /// Tables could not be followed: what looks unused may be what they name.
    pub(super) blind: bool,
    /// There are L2 entries that can be mended without loss.
    pub(super) mendable: bool,
    /// The bitmaps' directory or tables are broken.
    pub(super) bitmaps_broken: bool,
    /// The refcount table must be made anew.
    pub(super) rebuild: bool,
    /// Clusters beyond the file's end that something refers to.
    pub(super) beyond: Vec<u64>,
    /// Of the corruptions, those that are wrong copied flags alone.
    pub(super) copied: u64,
}

/// What to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Follow {
    All,
    AllButRefcounts,
}

/// One pass over all metadata, which counts the clusters from `start` on, as many as fit.
pub(super) struct Walk<'a> {
    pub(super) image: &'a Image<'a>,
    pub(super) counts: Counts,
    pub(super) sight: Sight,
    pub(super) budget: Budget,
    follow: Follow,
}

impl<'a> Walk<'a> {
    pub(super) fn new(image: &'a Image<'a>, start: u64, follow: Follow) -> Self {
        let counts = Counts::new(start, image.memory / 2);
        Walk { image, counts, sight: Sight::default(), budget: Budget::of(image), follow }
    }

    /// Follows everything.
    pub(super) fn run(&mut self) -> Result<(), ImageError> {
        let header = self.image.header;
        self.refer(0, self.image.cluster(), 1, || "the header".to_owned());
        let l1_tables = self.l1_tables()?;
        tables::visit(self.image, &l1_tables, self)?;
        bitmaps::follow(self)?;
        if self.follow == Follow::All {
            let table = u64::from(header.refcount_table_clusters) << self.image.bits();
            self.refer(header.refcount_table_offset, table, 1, || "the refcount table".to_owned());
            self.refcount_blocks();
        }
        Ok(())
    }

    /// Counts a reference, `times` over, to `len` bytes from `offset` on. They may end in a
    /// cluster that the file has only a part of. Says whether they lie in the file.
    pub(super) fn refer(
        &mut self,
        offset: u64,
        len: u64,
        times: u32,
        what: impl FnOnce() -> String,
    ) -> bool {
        if len == 0 {
            return true;
        }
        let image = self.image;
        let inside = |end: &u64| end.saturating_sub(image.file) < image.cluster();
        let Some(end) = offset.checked_add(len).filter(inside) else {
            let sight = &mut self.sight;
            sight.report.corruption(u64::from(times), || {
                format!("{} at {offset:#x} lies beyond the end of the file", what())
            });
            if sight.beyond.len() < BEYOND {
                sight.beyond.push(offset >> image.bits());
            }
            return false;
        };
        for cluster in offset >> image.bits()..=(end - 1) >> image.bits() {
            self.counts.add(cluster, times);
        }
        true
    }

    /// The L1 tables of disk and snapshots.
    pub(super) fn l1_tables(&mut self) -> Result<L1Tables, ImageError> {
        let header = self.image.header;
        let mut tables = L1Tables::new();
        let active = L1 { offset: header.l1_offset, entries: u64::from(header.l1_size) };
        tables.insert(active, Uses { active: 1, all: 1 });
        self.refer(active.offset, active.entries * 8, 1, || "the L1 table".to_owned());
        for snapshot in snapshots::follow(self)? {
            let l1 = snapshot.l1;
            if l1.entries > 0 {
                let what = || format!("the L1 table of snapshot {:?}", snapshot.name);
                self.sight.blind |= !self.refer(l1.offset, l1.entries * 8, 1, what);
                tables.entry(l1).or_default().all += 1;
            }
        }
        Ok(tables)
    }

    /// Counts the refcount blocks. Where one is not sound, all are made anew.
    fn refcount_blocks(&mut self) {
        let image = self.image;
        for (index, raw) in image.refcount_table.iter().enumerate().filter(|(_, raw)| **raw != 0) {
            match image.block_fault(*raw) {
                None => {
                    self.refer(*raw, image.cluster(), 1, || format!("refcount block {index}"));
                }
                Some(fault) => {
                    self.sight.rebuild = true;
                    self.sight
                        .report
                        .corruption(1, || format!("refcount block {index} ({raw:#x}) {fault}"));
                }
            }
        }
    }

    fn l2_entry(&mut self, table: u64, entry: Entry, uses: Uses, follows: &mut Option<u64>) {
        let (image, n) = (self.image, u64::from(uses.all));
        for fault in entry.faults(&image.layout) {
            self.sight.mendable |= fault.mended.is_some();
            self.sight.report.corruption(n, || {
                format!("the L2 table at {table:#x}: entry {:#x} {}", entry.raw, fault.text)
            });
        }
        match entry.named(&image.layout) {
            Named::Compressed { offset, len } => {
                if !image.layout.data_file && entry.bitmap == 0 {
                    self.refer(offset, len, uses.all, || "a compressed cluster".to_owned());
                    self.allocated(uses, true, true);
                }
            }
            Named::Cluster { offset } => {
                let apart = follows.is_some_and(|f| f != offset);
                *follows = Some(offset.saturating_add(image.cluster()));
                self.allocated(uses, apart, false);
                if !image.layout.data_file {
                    self.refer(offset, image.cluster(), uses.all, || "a data cluster".to_owned());
                }
            }
            Named::Nothing => {}
        }
    }

    fn allocated(&mut self, uses: Uses, fragment: bool, compressed: bool) {
        let (report, n) = (&mut self.sight.report, u64::from(uses.active));
        report.allocated_clusters += n;
        report.fragmented_clusters += if fragment { n } else { 0 };
        report.compressed_clusters += if compressed { n } else { 0 };
    }
}

impl Visitor for Walk<'_> {
    fn l1_entry(&mut self, index: u64, raw: u64, uses: Uses) {
        let (image, n) = (self.image, u64::from(uses.all));
        let offset = entries::l2_offset(raw);
        let sound = offset != 0 && image.is_aligned(offset);
        let report = &mut self.sight.report;
        report.corruption(if entries::l1_reserved(raw) { n } else { 0 }, || {
            format!("L1 entry {index} ({raw:#x}) has reserved bits set")
        });
        report.corruption(if sound { 0 } else { n }, || {
            format!("L1 entry {index} ({raw:#x}) names no aligned L2 table")
        });
        let there = offset == 0
            || self.refer(offset, image.cluster(), uses.all, || format!("L2 table {index}"));
        self.sight.blind |= !sound || !there;
    }

    fn l2_table(&mut self, offset: u64, table: &[u8], uses: Uses) -> Result<(), ImageError> {
        let mut follows = None;
        for entry in entries::entries(table, &self.image.layout).filter(|e| !e.is_empty()) {
            self.l2_entry(offset, entry, uses, &mut follows);
        }
        Ok(())
    }
}
