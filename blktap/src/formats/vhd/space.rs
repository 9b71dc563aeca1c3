//! Where new blocks go. This runs on threads that may block.
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::bitmap::Bitmap;
use super::footer::Footer;
use super::layout::Survey;
use super::{FULL, Kind, Table, UNUSED, sector_of};
use crate::formats::{ImageError, Leases};
use crate::storage::Storage;
use zerocopy::IntoBytes;

/// Blocks' data begin at multiples of this, as direct I/O likes it; tapdisk does so too.
const ALIGNMENT: u64 = 4096;

/// Whether the file ends behind the footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Growth {
    /// A file: the footer moves.
    File,
    /// A device: the footer is at its end for good.
    Device,
}

/// The file's stretches that no block has.
pub(super) struct Space {
    growth: Growth,
    /// Where the footer is.
    footer_at: u64,
    /// Where blocks may go on a device; the footer's place on a file.
    end: u64,
    /// Unused stretches before that, with anything in them.
    gaps: Vec<Range<u64>>,
    /// Blocks that no durable table names: their sectors, and when all leases on them have ended.
    freed: Vec<(u32, u64)>,
}

/// The first place from `at` on for a block whose data are aligned.
fn aligned(at: u64, bitmap_bytes: u64, shift: u32) -> Option<u64> {
    let unit = ALIGNMENT.min(1 << shift);
    let data = at.checked_add(bitmap_bytes)?.checked_next_multiple_of(unit)?;
    Some(data - bitmap_bytes)
}

impl Space {
    pub fn new(growth: Growth, survey: Survey, footer_at: u64, block_bytes: u64) -> Space {
        let mut gaps: Vec<_> = survey.gaps;
        if growth == Growth::File && footer_at > survey.end {
            gaps.push(survey.end..footer_at);
        }
        // Others look for blocks only behind all metadata.
        let behind = |gap: &Range<u64>| gap.start >= survey.metadata_end;
        gaps.retain(|gap| behind(gap) && gap.end - gap.start >= block_bytes);
        let end = match growth {
            Growth::File => footer_at,
            Growth::Device => survey.end,
        };
        Space { growth, footer_at, end, gaps, freed: Vec::new() }
    }

    /// Blocks that were freed, once the table without them is durable.
    pub fn add_freed(&mut self, freed: Vec<(u32, u64)>) {
        self.freed.extend(freed);
    }

    /// Gives blocks that nobody uses any more back to the file system.
    pub fn give_back(&mut self, storage: &dyn Storage, leases: &Leases, block_bytes: u64) {
        let ended = |(_, stamp): &mut (u32, u64)| leases.ended(*stamp);
        for (sector, _) in self.freed.extract_if(.., ended) {
            let start = u64::from(sector) * 512;
            // Used anew it is punched once more, and then it must succeed.
            if let Err(e) = storage.punch(start..start + block_bytes) {
                tracing::debug!("{}: cannot give back a block: {e}", storage.name());
            }
            self.gaps.push(start..start + block_bytes);
        }
    }

    fn take_gap(&mut self, bitmap_bytes: u64, shift: u32) -> Option<u64> {
        let block_bytes = bitmap_bytes + (1 << shift);
        while let Some(gap) = self.gaps.pop() {
            let fits = |start: &u64| start.saturating_add(block_bytes) <= gap.end;
            // A block of somebody who does not align may leave just enough.
            let anywhere = gap.start.next_multiple_of(512);
            let start = aligned(gap.start, bitmap_bytes, shift).filter(fits).unwrap_or(anywhere);
            let end = start + block_bytes;
            if !fits(&start) || start / 512 >= u64::from(UNUSED) {
                continue;
            }
            if gap.end - end >= block_bytes {
                self.gaps.push(end..gap.end);
            }
            return Some(start);
        }
        None
    }

    /// Where the footer is.
    pub fn footer_at(&self) -> u64 {
        self.footer_at
    }

    /// Has blocks go behind `end` only. Gives whether that moves the footer, which is then to be
    /// written.
    pub fn only_behind(&mut self, end: u64) -> Result<bool, ImageError> {
        self.gaps.retain(|gap| gap.start >= end);
        self.end = self.end.max(end);
        if self.footer_at >= end {
            return Ok(false);
        }
        if self.growth == Growth::Device {
            return Err(ImageError::NoSpace("the device is full".into()));
        }
        self.footer_at = end;
        Ok(true)
    }

    /// A place for a block, zeroed up to where the file ended. On a file the footer is behind it
    /// before this returns: whatever a crash leaves, no data of a guest are the file's last.
    pub fn take(
        &mut self,
        storage: &dyn Storage,
        footer: &Footer,
        bitmap_bytes: u64,
        shift: u32,
    ) -> Result<Place, ImageError> {
        let block_bytes = bitmap_bytes + (1 << shift);
        if let Some(start) = self.take_gap(bitmap_bytes, shift) {
            let range = start..start + block_bytes;
            if let Err(e) = storage.punch(range.clone()) {
                self.gaps.push(range);
                return Err(ImageError::io("clear a block")(e));
            }
            return Ok(Place { start, pad: 0 });
        }
        let start = aligned(self.end, bitmap_bytes, shift).unwrap_or(u64::MAX);
        if start / 512 >= u64::from(UNUSED) {
            let what = "the block table cannot name places behind 2 TiB of the file";
            return Err(ImageError::NoSpace(what.into()));
        }
        let end = start + block_bytes;
        match self.growth {
            Growth::Device if end > self.footer_at => {
                return Err(ImageError::NoSpace("the device is full".into()));
            }
            Growth::Device => {
                storage.punch(start..end).map_err(ImageError::io("clear a block"))?;
            }
            Growth::File => {
                write_footer(storage, footer, end)?;
                self.footer_at = end;
            }
        }
        let pad = if self.growth == Growth::File { start - self.end } else { 0 };
        self.end = end;
        Ok(Place { start, pad })
    }
}

/// Where a block goes.
pub(super) struct Place {
    pub start: u64,
    /// Bytes before it that nobody uses, in which the footer was.
    pub pad: u64,
}

/// Writes the footer at the end of the file.
pub(super) fn write_footer(
    storage: &dyn Storage,
    footer: &Footer,
    at: u64,
) -> Result<(), ImageError> {
    storage.write_at(at, footer.as_bytes()).map_err(ImageError::io("write the footer"))
}

impl Table {
    /// Allocates a block, of which nothing changes what the guest reads.
    pub(super) fn allocate(
        &self,
        block: u32,
        storage: &dyn Storage,
        footer: &Footer,
        leases: &Leases,
    ) -> Result<(), ImageError> {
        let mut space = self.space.lock();
        if sector_of(self.word(block)) != UNUSED {
            return Ok(());
        }
        space.give_back(storage, leases, self.block_bytes());
        let Place { start, pad } = space.take(storage, footer, self.bitmap_bytes, self.shift)?;
        // All set: what QEMU makes of it too, and the data are zeroes.
        let fill = if self.kind == Kind::Differencing { 0 } else { 0xff };
        let mut bitmap = vec![0; pad as usize];
        bitmap.resize((pad + self.bitmap_bytes) as usize, fill);
        if let Err(e) = storage.write_at(start - pad, &bitmap) {
            space.gaps.push(start..start + self.block_bytes());
            return Err(ImageError::io("write a block's bitmap")(e));
        }
        let sector = (start / 512) as u32;
        let mut word = u64::from(sector);
        if self.kind == Kind::Differencing {
            let clean = |b| !self.dirty.has_bitmap(b);
            self.bitmaps.insert(block, Bitmap::empty(self.sectors()), clean);
        } else {
            word |= FULL;
        }
        let mut changes = self.dirty.changes();
        self.blocks[block as usize].store(word, Ordering::Release);
        changes.table.insert(block, sector);
        Ok(())
    }

    /// Loads a block's bitmap.
    pub(super) fn load_bitmap(&self, block: u32, storage: &dyn Storage) -> Result<(), ImageError> {
        // Nobody else reads what may be written meanwhile.
        let _one = self.bitmaps.loading(block);
        let word = self.word(block);
        if sector_of(word) == UNUSED || word & FULL != 0 || self.bitmaps.get(block).is_some() {
            return Ok(());
        }
        let mut bytes = vec![0; self.bitmap_bytes as usize];
        let at = u64::from(sector_of(word)) * 512;
        storage.read_at(at, &mut bytes).map_err(ImageError::io("read a block's bitmap"))?;
        let bitmap = Bitmap::parse(&bytes, self.sectors());
        if bitmap.is_full() {
            // Nothing but this word changes: what is full stays so until it is freed.
            let slot = &self.blocks[block as usize];
            let full = word | FULL;
            let _ = slot.compare_exchange(word, full, Ordering::AcqRel, Ordering::Relaxed);
            return Ok(());
        }
        self.bitmaps.insert(block, bitmap, |b| !self.dirty.has_bitmap(b));
        Ok(())
    }
}
