//! Persistent dirty bitmaps: which parts of a disk were written since the bitmap was made or
//! cleared, as backup programs read it (`qemu-img bitmap`, NBD's `qemu:dirty-bitmap` context).
//!
//! A bitmap that records ([`directory::AUTO`]) is marked [`directory::IN_USE`] durably before the
//! first write and stored when the image is closed; after a crash the mark is still there, so
//! nobody trusts it. The other ones stay in the file, untouched and trusted.
pub mod bits;
pub mod directory;
mod edit;
mod recorder;
mod table;

use crate::formats::{BitmapInfo, ImageError};
use crate::storage::Storage;

use super::header::{AUTOCLEAR_BITMAPS, Header};
use directory::{AUTO, Entry, IN_USE, MAX_BITMAPS, MAX_DIRECTORY};
pub use edit::{Recording, clear, create, merge, remove, set_recording};
pub(super) use edit::{resize, suspend};
pub use recorder::Recorder;

/// The bitmaps of an image, as its directory has them. Without the autoclear bit there are none.
pub fn list(storage: &dyn Storage, header: &Header) -> Result<Vec<Entry>, ImageError> {
    let valid = header.autoclear & AUTOCLEAR_BITMAPS != 0;
    let Some(named) = header.bitmaps.filter(|_| valid) else { return Ok(Vec::new()) };
    if named.directory_size > MAX_DIRECTORY || named.count > MAX_BITMAPS {
        return Err(ImageError::Corrupt("the bitmap directory is too large".to_owned()));
    }
    let mut bytes = vec![0; named.directory_size as usize];
    storage
        .read_at(named.directory_offset, &mut bytes)
        .map_err(ImageError::io("read the bitmap directory"))?;
    let cluster = 1 << header.cluster_bits;
    directory::parse(&bytes, named.count, cluster, header.disk_size())
}

/// What users are told about a bitmap.
pub fn info(entry: &Entry) -> BitmapInfo {
    BitmapInfo {
        name: entry.name.clone(),
        granularity: 1 << entry.granularity_bits,
        recording: entry.flags & AUTO != 0,
        in_use: entry.flags & IN_USE != 0,
    }
}

/// Reads a bitmap that can be trusted.
pub fn read(
    storage: &dyn Storage,
    header: &Header,
    name: &str,
) -> Result<bits::DirtyBits, ImageError> {
    let list = list(storage, header)?;
    let entry = find(&list, name)?;
    if entry.flags & IN_USE != 0 {
        let text = format!("bitmap {name:?} was not stored when the image was last used");
        return Err(ImageError::Invalid(text));
    }
    table::load(storage, 1 << header.cluster_bits, header.disk_size(), entry)
}

fn find<'a>(list: &'a [Entry], name: &str) -> Result<&'a Entry, ImageError> {
    let none = || ImageError::Invalid(format!("no bitmap {name:?}"));
    list.iter().find(|e| e.name == name).ok_or_else(none)
}
