//! Opening an image: what is believed of what it says.
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use zerocopy::IntoBytes;

use super::batmap::Batmap;
use super::bitmap::Bitmaps;
use super::flush::{Dirty, Flushes};
use super::footer::{FOOTER, Footer, Footers, Found, TAPDISK_OLD};
use super::growth::{settle, stale_footer};
use super::header::Header;
use super::layout::{self, Survey};
use super::locator::Parent;
use super::space::{Growth, Space, write_footer};
use super::{FULL, Kind, Table, UNUSED, Vhd};
use crate::engine::FileKind;
use crate::formats::{ImageError, Leases};
use crate::storage::{Access, Storage};

/// An image with a block table, read and checked as far as each number goes.
pub(super) struct Sparse {
    pub footers: Footers,
    pub footer: Footer,
    pub header: Header,
    /// The block table, with all its entries.
    pub entries: Vec<u32>,
    pub batmap: Option<Batmap>,
}

impl Sparse {
    pub fn read(
        storage: &dyn Storage,
        footers: Footers,
        footer: Footer,
    ) -> Result<Sparse, ImageError> {
        let header = Header::read(storage, footer.data_offset.get(), footers.file_size)?;
        let mut bytes = vec![0; header.entries.get() as usize * 4];
        let table = header.table_offset.get();
        storage.read_at(table, &mut bytes).map_err(ImageError::io("read the block table"))?;
        let entries = bytes.as_chunks().0.iter().map(|b| u32::from_be_bytes(*b)).collect();
        let batmap = Batmap::read(storage, &footer, &header, footers.file_size)?;
        Ok(Sparse { footers, footer, header, entries, batmap })
    }

    /// Bytes of a block with its bitmap.
    pub fn block_bytes(&self) -> u64 {
        self.header.bitmap_bytes() + u64::from(self.header.block_size.get())
    }

    /// The stretches of the file that are no blocks.
    pub fn metadata(&self) -> Vec<(Range<u64>, &'static str)> {
        let batmap = self.batmap.as_ref().map(Batmap::extents);
        let batmap = batmap.as_ref().map_or(&[][..], |b| &b[..]);
        layout::metadata(&self.footer, &self.header, batmap)
    }

    pub fn survey(&self) -> Survey {
        let file_size = self.footers.file_size;
        layout::survey(&self.metadata(), &self.entries, self.block_bytes(), file_size)
    }

    /// Blocks of the disk; the table may have room for more.
    pub fn blocks(&self, disk_size: u64) -> Result<usize, ImageError> {
        let blocks = disk_size.div_ceil(u64::from(self.header.block_size.get()));
        if blocks > self.entries.len() as u64 {
            let have = self.entries.len();
            let what = format!("the block table has {have} entries and the disk {blocks} blocks");
            return Err(ImageError::Corrupt(what));
        }
        Ok(blocks as usize)
    }

    /// What keeps an image from being used at all.
    pub fn check(&self) -> Result<(), ImageError> {
        let block_bytes = self.block_bytes();
        let inside = |at: &u32| {
            *at == UNUSED || u64::from(*at) * 512 + block_bytes <= self.footers.file_size
        };
        match self.entries.iter().position(|at| !inside(at)) {
            None => Ok(()),
            Some(block) => Err(ImageError::Corrupt(format!(
                "block {block} reaches beyond the end of the file, which is cut off"
            ))),
        }
    }
}

/// Files grow, devices do not.
pub(super) fn growth(storage: &dyn Storage) -> Growth {
    match storage.engine_file().map(|f| f.kind) {
        Some(FileKind::Block) => Growth::Device,
        _ => Growth::File,
    }
}

/// An image whose disk is the file without its end.
pub(super) fn check_fixed(footers: &Footers, size: u64) -> Result<(), ImageError> {
    if size > footers.tail_at() {
        let have = footers.tail_at();
        let what = format!("the disk has {size} bytes and the file {have}: it is cut off");
        return Err(ImageError::Corrupt(what));
    }
    Ok(())
}

impl Vhd {
    /// Opens an image. For writing, the footer at its end is put back if it is missing or not
    /// its copy's, and nothing may overlap; for reading, only what is read must be there.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Vhd, ImageError> {
        let footers = Footers::read(&*storage)?;
        let footer = footers.choose()?;
        let (kind, size) = (footer.kind()?, footer.disk_size()?);
        let mut vhd = Vhd {
            files: [storage],
            leases: Arc::new(Leases::default()),
            footer,
            kind,
            size,
            parent: None,
            table: None,
            stale: None,
            flushes: Flushes::default(),
        };
        if kind == Kind::Fixed {
            check_fixed(&footers, size)?;
            match vhd.storage().access() {
                Access::ReadOnly => vhd.stale = stale_footer(vhd.storage(), &footers, &footer)?,
                Access::ReadWrite => settle(&*vhd.files[0], &footers, &mut vhd.footer)?,
            }
            return Ok(vhd);
        }
        let sparse = Sparse::read(vhd.storage(), footers, footer)?;
        if footer.is_tapdisk() && footer.creator_version.get() <= TAPDISK_OLD {
            return Err(ImageError::Unsupported("bitmaps as tapdisk 0.1 wrote them".into()));
        }
        if kind == Kind::Differencing {
            vhd.parent = Some(Parent::read(&sparse.header, vhd.storage())?);
        }
        sparse.check()?;
        vhd.table = Some(Table::new(sparse, vhd.storage(), kind, size)?);
        Ok(vhd)
    }
}

impl Table {
    fn new(
        mut sparse: Sparse,
        storage: &dyn Storage,
        kind: Kind,
        size: u64,
    ) -> Result<Table, ImageError> {
        let blocks = sparse.blocks(size)?;
        let space = match storage.access() {
            Access::ReadOnly => Space::new(Growth::Device, Survey::default(), 0, 0),
            Access::ReadWrite => writable(&mut sparse, storage)?,
        };
        let full = |block: usize| sparse.batmap.as_ref().is_some_and(|b| b.is_full(block as u32));
        let word = |(block, at): (usize, &u32)| {
            let flag = if *at != UNUSED && full(block) { FULL } else { 0 };
            AtomicU64::new(u64::from(*at) | flag)
        };
        let words = sparse.entries[..blocks].iter().enumerate().map(word).collect();
        Ok(Table {
            shift: sparse.header.block_size.get().trailing_zeros(),
            bitmap_bytes: sparse.header.bitmap_bytes(),
            kind,
            blocks: words,
            bitmaps: Bitmaps::new(sparse.header.bitmap_bytes()),
            space: Mutex::new(space),
            dirty: Dirty::default(),
            batmap: Mutex::new(sparse.batmap),
            header: sparse.header,
        })
    }
}

/// Makes sure that an image can be written to: nothing overlaps, and the footer is at its end.
pub(super) fn writable(sparse: &mut Sparse, storage: &dyn Storage) -> Result<Space, ImageError> {
    let survey = sparse.survey();
    if let Some(fault) = survey.faults.first() {
        let more = survey.fault_count - 1;
        let what = format!("{fault} (and {more} more faults); it can only be read");
        return Err(ImageError::Corrupt(what));
    }
    let growth = growth(storage);
    let footers = &sparse.footers;
    let is_good =
        footers.tail == Found::Footer(sparse.footer) && footers.file_size.is_multiple_of(512);
    let mut at = footers.tail_at();
    if !is_good {
        at = place_for_footer(footers, &survey, growth)?;
        tracing::warn!("{}: the footer at the end was not right and is put back", storage.name());
        write_footer(storage, &sparse.footer, at)?;
    }
    if footers.head != Found::Footer(sparse.footer) {
        tracing::warn!("{}: the footer's copy was not right and is put back", storage.name());
        let what = "write the footer's copy";
        storage.write_at(0, sparse.footer.as_bytes()).map_err(ImageError::io(what))?;
    }
    if at < survey.end {
        return Err(ImageError::Corrupt("the footer overlaps what is before it".into()));
    }
    // A block that is allocated later is not full because one was before: the first flush makes
    // this durable before it names any.
    let unused = |(block, at): (usize, &u32)| (*at == UNUSED).then_some((block as u32, false));
    let unused = sparse.entries.iter().enumerate().filter_map(unused);
    if let Some(batmap) = sparse.batmap.as_mut().filter(|b| !b.damaged)
        && batmap.update(unused)
    {
        batmap.write(storage)?;
    }
    Ok(Space::new(growth, survey, at, sparse.block_bytes()))
}

/// Where a missing footer goes: over a damaged one, else behind all that is there.
fn place_for_footer(footers: &Footers, survey: &Survey, growth: Growth) -> Result<u64, ImageError> {
    let tail = footers.tail_at();
    let overwrites = !matches!(footers.tail, Found::Nothing) || growth == Growth::Device;
    match (overwrites && tail >= survey.end, growth) {
        (true, _) => Ok(tail),
        (false, Growth::File) => Ok(footers.file_size.max(survey.end).next_multiple_of(FOOTER)),
        (false, Growth::Device) => {
            Err(ImageError::NoSpace("the device has no room for the footer at its end".into()))
        }
    }
}
