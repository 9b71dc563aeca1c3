//! Other sizes for the disk of an image that nobody has open.
//!
//! The header switches to the new size, and to a longer L1 table, in one write. Before it nothing
//! of the old disk is touched; a shrunk disk loses what lies behind its end after it.
mod grow;
mod mappings;

use crate::formats::ImageError;
use crate::storage::Storage;

use super::bitmaps;
use super::header::{Header, MAX_L1_BYTES, Version};
use super::offline::Offline;

/// Whether a disk may become smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrink {
    /// No: what lies behind the new end would be lost.
    Refuse,
    /// Yes.
    Allow,
}

/// The disk below an image: its backing file.
pub trait Below {
    /// Its bytes.
    fn size(&self) -> u64;
    /// Fills `into` from `offset` on; bytes beyond the end are zeroes.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError>;
}

/// The files around the one that is resized.
#[derive(Clone, Copy, Default)]
pub struct Around<'a> {
    /// The external data file, which an image that has one needs.
    pub data_file: Option<&'a dyn Storage>,
    /// What the image builds on, which an image with a backing file needs to grow.
    pub below: Option<&'a dyn Below>,
}

/// Gives the disk `size` bytes, a multiple of 512. What is added reads as zeroes, however large
/// the backing file is; bitmaps are fitted. An interrupted change leaves one of both sizes.
pub fn resize(
    storage: &dyn Storage,
    around: Around<'_>,
    size: u64,
    shrink: Shrink,
) -> Result<(), ImageError> {
    let mut offline = Offline::open(storage)?;
    let old = offline.header().disk_size();
    check(offline.header(), around, size, shrink)?;
    if size == old {
        return Ok(());
    }
    let suspended = bitmaps::suspend(&mut offline)?;
    // Of a shrinking that was interrupted.
    mappings::drop_behind(&mut offline, old)?;
    if size > old {
        grow::grow(&mut offline, around, size)?;
    } else {
        offline.switch(SIZE, &size.to_be_bytes())?;
        mappings::drop_behind(&mut offline, size)?;
        mappings::cut(&mut offline)?;
    }
    if let (true, Some(data)) = (offline.header().has_raw_data(), around.data_file) {
        data.set_size(size).map_err(ImageError::io("resize the data file"))?;
        data.sync().map_err(ImageError::io("flush the data file"))?;
    }
    bitmaps::resize(&mut offline, suspended)
}

/// Drops all that the image has of its own, so that it reads as its backing file, or as zeroes.
/// Snapshots and bitmaps stay. An interruption leaves a part of it dropped: what it had was
/// written into the backing file before.
pub fn empty(storage: &dyn Storage) -> Result<(), ImageError> {
    let mut offline = Offline::open(storage)?;
    if offline.header().has_raw_data() {
        let text = "a raw data file holds the disk itself: it cannot be emptied";
        return Err(ImageError::Invalid(text.to_owned()));
    }
    mappings::drop_behind(&mut offline, 0)?;
    mappings::cut(&mut offline)
}

/// Where the size is in the header; the size of the L1 table and its place follow.
const SIZE: u64 = 24;

fn check(header: &Header, around: Around<'_>, size: u64, shrink: Shrink) -> Result<(), ImageError> {
    let invalid = |text: &str| Err(ImageError::Invalid(text.to_owned()));
    if !size.is_multiple_of(512) {
        return invalid("the new size is no multiple of 512");
    }
    if header.snapshot_count > 0 && header.version == Version::V2 {
        return invalid("an image of compat=0.10 with snapshots cannot be resized");
    }
    if size < header.disk_size() && shrink == Shrink::Refuse {
        return invalid("shrinking loses the data behind the new end: ask for it explicitly");
    }
    if header.has_data_file() != around.data_file.is_some() {
        return invalid("the image's external data file is needed");
    }
    if header.backing_file.is_some() && around.below.is_none() && size > header.disk_size() {
        return invalid("the image's backing file is needed");
    }
    if size > i64::MAX as u64 || header.layout().l1_entries(size) > MAX_L1_BYTES / 8 {
        return invalid("so large a disk needs too large an L1 table: use larger clusters");
    }
    Ok(())
}
