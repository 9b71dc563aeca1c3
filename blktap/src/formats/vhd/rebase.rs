//! Another parent, or none, for an image that nobody has open.
//!
//! As when an image grows, what is new is written aside, a header with the parent's names this
//! time, and the footer's copy at the start changes from the old header to the new one at once.
use zerocopy::big_endian::U64;
use zerocopy::{FromZeros, IntoBytes};

use super::batmap::Batmap;
use super::bitmap::Bitmap;
use super::footer::{Footers, Kind};
use super::header::{HEADER, Header};
use super::locator::{Locator, NewParent};
use super::open::{Sparse, writable};
use super::space::write_footer;
use super::{UNUSED, Vhd};
use crate::formats::ImageError;
use crate::storage::{Access, Storage};

fn sync(storage: &dyn Storage) -> Result<(), ImageError> {
    storage.sync().map_err(ImageError::io("flush the file"))
}

impl Vhd {
    /// Names `parent` as what the image builds on, durably; `None`: it builds on nothing, and what
    /// it has not reads as zeroes. After a crash it names the old one or the new one.
    pub fn set_parent(storage: &dyn Storage, parent: Option<&NewParent>) -> Result<(), ImageError> {
        if storage.access() == Access::ReadOnly {
            return Err(ImageError::ReadOnly);
        }
        let footers = Footers::read(storage)?;
        let mut footer = footers.choose()?;
        if footer.kind()? == Kind::Fixed {
            return Err(ImageError::Unsupported("a fixed image has no parent".into()));
        }
        let mut sparse = Sparse::read(storage, footers, footer)?;
        sparse.check()?;
        // Also puts the footers right.
        let mut space = writable(&mut sparse, storage)?;
        if parent.is_none() {
            clear_unset(storage, &sparse)?;
        }
        let start = sparse.survey().end.next_multiple_of(512);
        let new = Described::new(&sparse.header, parent, start)?;
        if space.only_behind(new.end)? {
            write_footer(storage, &footer, space.footer_at())?;
        }
        sync(storage)?;
        new.write(storage, start)?;
        sync(storage)?;
        footer.data_offset = U64::new(start);
        footer.set_kind(if parent.is_some() { Kind::Differencing } else { Kind::Dynamic });
        let what = "write the footer's copy";
        storage.write_at(0, footer.as_bytes()).map_err(ImageError::io(what))?;
        sync(storage)?;
        write_footer(storage, &footer, space.footer_at())?;
        sync(storage)?;
        let names = ["the dynamic header", "a parent locator"];
        for (part, _) in sparse.metadata().into_iter().filter(|(_, name)| names.contains(name)) {
            storage.punch(part).map_err(ImageError::io("give space back"))?;
        }
        Ok(())
    }
}

/// Writes zeroes where sectors of blocks are not set, which were the parent's so far: QEMU does
/// not look at the bitmaps of images without one.
fn clear_unset(storage: &dyn Storage, sparse: &Sparse) -> Result<(), ImageError> {
    let (bitmap_bytes, block) = (sparse.header.bitmap_bytes(), sparse.header.block_size.get());
    let sectors = block / 512;
    let full = |n: usize| sparse.batmap.as_ref().is_some_and(|b: &Batmap| b.is_full(n as u32));
    let mut bytes = vec![0; bitmap_bytes as usize];
    let used = sparse.entries.iter().enumerate().filter(|(n, at)| **at != UNUSED && !full(*n));
    for (_, at) in used {
        let at = u64::from(*at) * 512;
        storage.read_at(at, &mut bytes).map_err(ImageError::io("read a block's bitmap"))?;
        let bitmap = Bitmap::parse(&bytes, sectors);
        let (data, mut sector) = (at + bitmap_bytes, 0);
        while sector < sectors {
            let (set, end) = bitmap.run(sector..sectors);
            if !set {
                let unset = data + u64::from(sector) * 512..data + u64::from(end) * 512;
                storage.punch(unset).map_err(ImageError::io("clear a part of a block"))?;
            }
            sector = end;
        }
    }
    Ok(())
}

/// A header with what it says of the parent.
struct Described {
    header: Header,
    names: Vec<(u64, Vec<u8>)>,
    end: u64,
}

impl Described {
    /// At `start`, with the block table of `old`.
    fn new(old: &Header, parent: Option<&NewParent>, start: u64) -> Result<Self, ImageError> {
        let mut header = *old;
        (header.parent_id, header.parent_name) = ([0; 16], [0; 512]);
        header.parent_time = zerocopy::big_endian::U32::new(0);
        header.locators = [Locator::new_zeroed(); 8];
        let (mut end, mut names) = (start + HEADER, Vec::new());
        if let Some(parent) = parent {
            parent.describe(&mut header)?;
            for (locator, (code, mut name)) in header.locators.iter_mut().zip(parent.encoded()) {
                let len = name.len() as u32;
                name.resize(name.len().next_multiple_of(512), 0);
                *locator = Locator::new(code, name.len() as u32, len, end);
                let at = end;
                end += name.len() as u64;
                names.push((at, name));
            }
        }
        header.seal();
        Ok(Described { header, names, end })
    }

    fn write(&self, storage: &dyn Storage, start: u64) -> Result<(), ImageError> {
        let write = |at, bytes: &[u8]| {
            storage.write_at(at, bytes).map_err(ImageError::io("write a new header"))
        };
        write(start, self.header.as_bytes())?;
        self.names.iter().try_for_each(|(at, name)| write(*at, name))
    }
}
