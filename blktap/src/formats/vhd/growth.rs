//! Growing a fixed image. Its footer is the last sector of the file and nothing else says where
//! the disk ends, so the footers themselves tell how far growing has come.
//!
//! 1. The footer is marked: where it is, and where the new one will be.
//! 2. The new footer, with the same mark, is written there, which makes the file longer.
//! 3. The old footer, now among the disk's sectors, is cleared.
//! 4. The new footer loses its mark.
//!
//! Between them the file is synced. Cut off before the new footer is there, the file may end in
//! zeroes, and the marked footer before them still counts: the disk has its old size. Cut off
//! later, the new footer counts, and what is left of the old one reads as zeroes. Opening for
//! writing undoes the one and goes on with step 3 of the other. Marks are in bytes that the
//! specification reserves, so other readers do not see them.
use std::ops::Range;

use super::footer::{FOOTER, Footer, Footers, Found, Kind};
use super::open::growth;
use super::space::{Growth, write_footer};
use crate::disk::Kept;
use crate::formats::ImageError;
use crate::storage::Storage;

/// Bytes that are compared with zeroes at once.
const PIECE: u64 = 1 << 20;
/// The first stretch, from the end on, that is asked for holes; each next one is twice as long.
const WINDOW: u64 = 16 << 20;

/// How many zeroes are read to find a footer before them. Holes cost nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Search {
    /// So many that nobody waits for it.
    Short,
    /// All there are.
    Whole,
}

impl Search {
    fn most(self) -> u64 {
        match self {
            Search::Short => 64 << 20,
            Search::Whole => u64::MAX,
        }
    }
}

fn sync(storage: &dyn Storage) -> Result<(), ImageError> {
    storage.sync().map_err(ImageError::io("flush the file"))
}

fn footer_at(storage: &dyn Storage, at: u64) -> Result<Found, ImageError> {
    let mut bytes = [0; 512];
    storage.read_at(at, &mut bytes).map_err(ImageError::io("read the footer"))?;
    Ok(Footer::parse(&bytes))
}

/// The last sector that is not zeroes. Fails where the search ends before one is found.
pub(super) fn last_sector(
    storage: &dyn Storage,
    file_size: u64,
    search: Search,
) -> Result<Option<u64>, ImageError> {
    let (mut end, mut window, mut left) = (file_size, WINDOW, search.most());
    while end > 0 {
        let start = end.saturating_sub(window) / 512 * 512;
        let mut regions = Vec::new();
        storage.map(start..end, &mut regions).map_err(ImageError::io("map the file"))?;
        for region in regions.into_iter().rev() {
            let first = end.saturating_sub(region.len).max(start);
            if region.kept == Kept::Data {
                let found = last_of(storage, first..end, &mut left)?;
                if found.is_some() {
                    return Ok(found);
                }
            }
            end = first;
        }
        // Whatever was told of it, this stretch is done.
        end = end.min(start);
        window = window.saturating_mul(2);
    }
    Ok(None)
}

fn last_of(
    storage: &dyn Storage,
    range: Range<u64>,
    left: &mut u64,
) -> Result<Option<u64>, ImageError> {
    let (mut end, mut bytes) = (range.end, Vec::new());
    while end > range.start {
        let at = range.start.max(end.saturating_sub(PIECE) / 512 * 512);
        bytes.resize((end - at) as usize, 0);
        let Some(rest) = left.checked_sub(end - at) else {
            return Err(ImageError::Corrupt(format!(
                "the file ends in zeroes and not in a footer: if growing was cut off, `ringback \
                 disk check -f vhd -r all` looks for it before byte {end}"
            )));
        };
        *left = rest;
        storage.read_at(at, &mut bytes).map_err(ImageError::io("read the file"))?;
        if let Some(last) = bytes.iter().rposition(|b| *b != 0) {
            return Ok(Some((at + last as u64) / 512 * 512));
        }
        end = at;
    }
    Ok(None)
}

/// The footer of a fixed image behind which the file goes on with zeroes, and its place.
pub(super) fn before_zeroes(
    storage: &dyn Storage,
    file_size: u64,
    search: Search,
) -> Result<Option<(u64, Footer)>, ImageError> {
    if growth(storage) == Growth::Device {
        return Ok(None);
    }
    let Some(at) = last_sector(storage, file_size, search)? else { return Ok(None) };
    match footer_at(storage, at)? {
        Found::Footer(footer) if footer.kind()? == Kind::Fixed => Ok(Some((at, footer))),
        _ => Ok(None),
    }
}

/// Where the footer was before the image grew, if it is still there: it reads as zeroes.
pub(super) fn stale_footer(
    storage: &dyn Storage,
    footers: &Footers,
    footer: &Footer,
) -> Result<Option<u64>, ImageError> {
    let Some(growing) = footer.growing().filter(|g| g.end == footers.tail_at()) else {
        return Ok(None);
    };
    let is_old = matches!(footer_at(storage, growing.start)?, Found::Footer(old)
        if old.id == footer.id && old.growing().as_ref() == Some(&growing));
    Ok(is_old.then_some(growing.start))
}

/// Puts right what growing that was cut off has left: goes on with it if it had come so far that
/// the new footer counts, else undoes it.
pub(super) fn settle(
    storage: &dyn Storage,
    footers: &Footers,
    footer: &mut Footer,
) -> Result<(), ImageError> {
    match footer.growing() {
        None => Ok(()),
        // Nothing that grows here.
        Some(_) if !ends_in_sector(footers) => Ok(()),
        Some(growing) if growing.end == footers.tail_at() => finish(storage, footers, footer),
        Some(_) => undo(storage, footers, footer),
    }
}

/// Whether the footer is a sector of the file, perhaps without its last byte as early programs
/// wrote it.
fn ends_in_sector(footers: &Footers) -> bool {
    matches!(footers.file_size % 512, 0 | 511)
}

fn finish(storage: &dyn Storage, footers: &Footers, footer: &mut Footer) -> Result<(), ImageError> {
    // What was left by a process that was killed is perhaps not durable.
    sync(storage)?;
    if let Some(old) = stale_footer(storage, footers, footer)? {
        storage.write_at(old, &[0; 512]).map_err(ImageError::io("clear the old footer"))?;
        sync(storage)?;
    }
    footer.set_growing(None);
    write_footer(storage, footer, footers.tail_at())?;
    sync(storage)
}

/// Undoes what growing began before the new footer was there.
pub(super) fn undo(
    storage: &dyn Storage,
    footers: &Footers,
    footer: &mut Footer,
) -> Result<(), ImageError> {
    let at = footers.tail_at();
    if footers.file_size > at + FOOTER {
        storage.set_size(at + FOOTER).map_err(ImageError::io("cut the file"))?;
        sync(storage)?;
    }
    footer.set_growing(None);
    write_footer(storage, footer, at)?;
    sync(storage)
}

/// Grows an image to a disk of `size` bytes.
pub(super) fn grow(
    storage: &dyn Storage,
    footers: &Footers,
    mut footer: Footer,
    size: u64,
) -> Result<(), ImageError> {
    if !ends_in_sector(footers) {
        let what = "growing an image whose footer is not a sector of the file: convert it";
        return Err(ImageError::Unsupported(what.into()));
    }
    settle(storage, footers, &mut footer)?;
    let old = footers.tail_at();
    if size > old && growth(storage) == Growth::Device {
        return Err(ImageError::NoSpace("the device is too small".into()));
    }
    let at = size.max(old);
    if at > old {
        footer.set_growing(Some(old..at));
        write_footer(storage, &footer, old)?;
        sync(storage)?;
    }
    footer.set_size(size);
    write_footer(storage, &footer, at)?;
    sync(storage)?;
    if at > old {
        storage.write_at(old, &[0; 512]).map_err(ImageError::io("clear the old footer"))?;
        sync(storage)?;
        footer.set_growing(None);
        write_footer(storage, &footer, at)?;
        sync(storage)?;
    }
    Ok(())
}
