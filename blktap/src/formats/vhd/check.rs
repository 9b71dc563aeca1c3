//! Checking an image that nobody uses, and repairing what can be repaired without loss.
use std::ops::Range;

use zerocopy::IntoBytes;

use super::bitmap::Bitmap;
use super::footer::{FOOTER, Footers, Found, Kind};
use super::growth::{self, Search, before_zeroes};
use super::layout::Survey;
use super::open::{Sparse, check_fixed, growth};
use super::space::{Growth, write_footer};
use super::{UNUSED, Vhd};
use crate::disk::Kept;
use crate::formats::ImageError;
use crate::storage::Storage;

/// Bytes that are compared with zeroes at once.
const PIECE: u64 = 1 << 20;

/// What a check may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    Nothing,
    /// Space that nobody uses is given back.
    Leaks,
    /// That, and what contradicts itself is put right where that loses nothing.
    All,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What is wrong with the image, before any repair.
    pub corruptions: u64,
    /// Of these, what was put right.
    pub corruptions_fixed: u64,
    /// Places for a block that nobody uses and that still hold data.
    pub leaks: u64,
    /// Of these, given back.
    pub leaks_fixed: u64,
    /// Blocks of the disk.
    pub total_blocks: u64,
    /// Of these, allocated.
    pub allocated_blocks: u64,
    /// Where the last part of the image ends.
    pub image_end: u64,
    /// What was found, a line each.
    pub findings: Vec<String>,
}

impl CheckReport {
    fn corrupt(&mut self, what: String) {
        self.corruptions += 1;
        self.findings.push(what);
    }
}

struct Checker<'a> {
    storage: &'a dyn Storage,
    repair: Repair,
    report: CheckReport,
}

impl Vhd {
    /// Checks an image, and repairs it as far as `repair` says. Fails where the image cannot be
    /// read at all.
    pub fn check(storage: &dyn Storage, repair: Repair) -> Result<CheckReport, ImageError> {
        let mut checker = Checker { storage, repair, report: CheckReport::default() };
        checker.run()?;
        let mut report = checker.report;
        if report.corruptions_fixed > 0 {
            // With the footer in its place there may be more space that nobody uses.
            let mut again = Checker { storage, repair, report: CheckReport::default() };
            again.run()?;
            report.leaks += again.report.leaks;
            report.leaks_fixed += again.report.leaks_fixed;
        }
        Ok(report)
    }
}

impl Checker<'_> {
    fn run(&mut self) -> Result<(), ImageError> {
        let footers = self.check_growth(Footers::search(self.storage, Search::Whole)?)?;
        let footer = footers.choose()?;
        let size = footer.disk_size()?;
        if footer.kind()? == Kind::Fixed {
            self.report.image_end = size;
            return check_fixed(&footers, size);
        }
        let sparse = Sparse::read(self.storage, footers, footer)?;
        self.report.total_blocks = sparse.blocks(size)? as u64;
        let survey = sparse.survey();
        self.report.image_end = survey.end;
        self.check_entries(&sparse, size)?;
        self.check_overlaps(&survey);
        self.check_footers(&sparse, &survey)?;
        self.check_batmap(&sparse)?;
        self.check_gaps(&sparse, &survey)?;
        self.storage.sync().map_err(ImageError::io("flush the file"))
    }

    /// Whether what was just found is to be put right; counts it as if it were.
    fn fixes(&mut self) -> bool {
        let fixes = self.repair == Repair::All;
        self.report.corruptions_fixed += u64::from(fixes);
        fixes
    }

    /// A fixed image that was growing: what is left of that is put right. Gives its footers then.
    fn check_growth(&mut self, mut footers: Footers) -> Result<Footers, ImageError> {
        if footers.tail == Found::Nothing && !footers.has_copy()? {
            let found = before_zeroes(self.storage, footers.file_size, Search::Whole)?;
            let Some((at, mut footer)) = found.filter(|(at, f)| f.current_size.get() == *at) else {
                return Ok(footers);
            };
            self.report.corrupt("behind its footer the file goes on with zeroes".into());
            if self.fixes() {
                footers.found(at, footer);
                growth::undo(self.storage, &footers, &mut footer)?;
            }
            return Footers::read(self.storage);
        }
        let Found::Footer(mut footer) = footers.tail else { return Ok(footers) };
        let Some(growing) = footer.growing() else { return Ok(footers) };
        if footer.kind()? != Kind::Fixed {
            return Ok(footers);
        }
        self.report.corrupt(format!(
            "moving the footer from byte {} to {} was cut off",
            growing.start, growing.end
        ));
        if !self.fixes() {
            return Ok(footers);
        }
        growth::settle(self.storage, &footers, &mut footer)?;
        Footers::read(self.storage)
    }

    /// Entries that name nothing of the file, and those of blocks that the disk does not have.
    fn check_entries(&mut self, sparse: &Sparse, size: u64) -> Result<(), ImageError> {
        let blocks = sparse.blocks(size)?;
        let file_size = sparse.footers.file_size;
        let (mut beyond, mut end) = (Vec::new(), 0);
        for (block, at) in sparse.entries.iter().enumerate().filter(|(_, at)| **at != UNUSED) {
            let start = u64::from(*at) * 512;
            self.report.allocated_blocks += u64::from(block < blocks);
            if start >= file_size {
                beyond.push(block);
            } else if start + sparse.block_bytes() > file_size {
                end = end.max(start + sparse.block_bytes());
            }
        }
        if end > 0 {
            self.report.corrupt(format!("the file is cut off: blocks go on to byte {end}"));
            if growth(self.storage) == Growth::File && self.fixes() {
                self.storage.set_size(end).map_err(ImageError::io("extend the file"))?;
            }
        }
        for block in beyond {
            self.report.corrupt(format!("block {block} lies behind the end of the file"));
            if self.fixes() {
                let at = sparse.header.table_offset.get() + block as u64 * 4;
                let what = "write the block table";
                self.storage.write_at(at, UNUSED.as_bytes()).map_err(ImageError::io(what))?;
            }
        }
        Ok(())
    }

    /// Parts of the file that are used twice: which of them is right is not known here.
    fn check_overlaps(&mut self, survey: &Survey) {
        let overlaps = survey.overlaps;
        self.report.corruptions += overlaps;
        let told = survey.faults.iter().filter(|f| f.contains("overlaps"));
        self.report.findings.extend(told.cloned());
    }

    fn check_footers(&mut self, sparse: &Sparse, survey: &Survey) -> Result<(), ImageError> {
        let (footers, footer) = (&sparse.footers, &sparse.footer);
        if footers.head != Found::Footer(*footer) {
            self.report.corrupt("the footer's copy at the start is damaged".into());
            if self.fixes() {
                let what = "write the footer's copy";
                self.storage.write_at(0, footer.as_bytes()).map_err(ImageError::io(what))?;
            }
        }
        let now = self.storage.size().map_err(ImageError::io("read the size"))?;
        let is_last = footers.tail == Found::Footer(*footer) && now == footers.file_size;
        if is_last && footers.tail_at() >= survey.end.min(now) {
            return Ok(());
        }
        self.report.corrupt("the footer at the end is missing or not its copy's".into());
        if !self.fixes() {
            return Ok(());
        }
        let over = footers.tail != Found::Nothing && now == footers.file_size;
        let at = match (over && footers.tail_at() >= survey.end, growth(self.storage)) {
            (true, _) | (_, Growth::Device) => footers.tail_at(),
            (false, Growth::File) => now.next_multiple_of(FOOTER),
        };
        write_footer(self.storage, footer, at)
    }

    /// Bits of the batmap that say more than the bitmaps do, and its checksum.
    fn check_batmap(&mut self, sparse: &Sparse) -> Result<(), ImageError> {
        let Some(mut batmap) = sparse.batmap.clone() else { return Ok(()) };
        let was_damaged = batmap.damaged;
        if was_damaged {
            self.report.corrupt("the batmap's checksum is wrong".into());
            self.fixes();
        }
        let mut wrong = Vec::new();
        for (block, at) in sparse.entries.iter().enumerate() {
            let block = block as u32;
            if *at != UNUSED && batmap.is_full(block) && !self.is_full(sparse, *at)? {
                self.report.corrupt(format!("the batmap says that block {block} is full"));
                self.fixes();
                wrong.push((block, false));
            }
        }
        let changed = batmap.update(wrong.into_iter());
        if changed && self.repair == Repair::All {
            batmap.write(self.storage)?;
        }
        Ok(())
    }

    fn is_full(&self, sparse: &Sparse, at: u32) -> Result<bool, ImageError> {
        let start = u64::from(at) * 512;
        if start >= sparse.footers.file_size {
            return Ok(false);
        }
        let mut bytes = vec![0; sparse.header.bitmap_bytes() as usize];
        let what = "read a block's bitmap";
        self.storage.read_at(start, &mut bytes).map_err(ImageError::io(what))?;
        Ok(Bitmap::parse(&bytes, sparse.header.block_size.get() / 512).is_full())
    }

    /// Space that nobody uses: only what holds data costs anything.
    fn check_gaps(&mut self, sparse: &Sparse, survey: &Survey) -> Result<(), ImageError> {
        let mut gaps = survey.gaps.clone();
        let footer_at = sparse.footers.tail_at();
        if growth(self.storage) == Growth::File && footer_at > survey.end {
            gaps.push(survey.end..footer_at);
        }
        for gap in gaps {
            let blocks = (gap.end - gap.start) / sparse.block_bytes();
            if blocks == 0 || !self.holds_data(gap.clone())? {
                continue;
            }
            self.report.leaks += blocks;
            self.report.findings.push(format!("nobody uses bytes {} to {}", gap.start, gap.end));
            if self.repair != Repair::Nothing {
                self.storage.punch(gap).map_err(ImageError::io("give space back"))?;
                self.report.leaks_fixed += blocks;
            }
        }
        Ok(())
    }

    fn holds_data(&self, range: Range<u64>) -> Result<bool, ImageError> {
        let mut holds = false;
        for_data(self.storage, range, &mut |_, bytes| holds |= bytes.iter().any(|b| *b != 0))?;
        Ok(holds)
    }
}

/// Shows the bytes of a range that are no hole, with their places.
fn for_data(
    storage: &dyn Storage,
    range: Range<u64>,
    show: &mut dyn FnMut(u64, &[u8]),
) -> Result<(), ImageError> {
    let mut regions = Vec::new();
    let mut bytes = Vec::new();
    let mut at = range.start;
    if at < range.end {
        storage.map(range, &mut regions).map_err(ImageError::io("map the file"))?;
    }
    for region in regions {
        let end = at + region.len;
        while at < end && region.kept == Kept::Data {
            bytes.resize((end - at).min(PIECE) as usize, 0);
            storage.read_at(at, &mut bytes).map_err(ImageError::io("read the file"))?;
            show(at, &bytes);
            at += bytes.len() as u64;
        }
        at = end;
    }
    Ok(())
}
