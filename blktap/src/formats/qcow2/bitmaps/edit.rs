//! Bitmaps of an image that nobody has open: made, removed, cleared, switched on and off, merged,
//! and fitted to a disk of another size.
//!
//! The directory is written anew elsewhere and switched to, so that each crash leaves the old or
//! the new one. What a crash leaves of a bitmap whose bits were being written is marked
//! [`IN_USE`].
use crate::formats::ImageError;
use crate::formats::qcow2::extension::BitmapsExtension;
use crate::formats::qcow2::offline::Offline;

use super::bits::DirtyBits;
use super::directory::{
    self, AUTO, Entry, GRANULARITY_BITS, IN_USE, MAX_BITMAPS, MAX_DATA, MAX_NAME,
};
use super::{find, list, table};

/// Whether writes are recorded in a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recording {
    /// They are.
    On,
    /// They are not.
    Off,
}

fn invalid<T>(text: String) -> Result<T, ImageError> {
    Err(ImageError::Invalid(text))
}

fn entries(offline: &Offline<'_>) -> Result<Vec<Entry>, ImageError> {
    list(offline.storage(), offline.header())
}

fn find_mut<'a>(entries: &'a mut [Entry], name: &str) -> Result<&'a mut Entry, ImageError> {
    let none = || ImageError::Invalid(format!("no bitmap {name:?}"));
    entries.iter_mut().find(|e| e.name == name).ok_or_else(none)
}

/// Writes the directory elsewhere and switches to it, durably.
fn write_directory(offline: &mut Offline<'_>, entries: &[Entry]) -> Result<(), ImageError> {
    let old = offline.header().bitmaps;
    let new = match directory::serialise(entries) {
        none if none.is_empty() => None,
        bytes => {
            let directory_size = bytes.len() as u64;
            let directory_offset = offline.allocate(directory_size)?;
            offline.write(directory_offset, &bytes, "write the bitmap directory")?;
            let count = entries.len() as u32;
            Some(BitmapsExtension { count, directory_size, directory_offset })
        }
    };
    let valid = offline.header().autoclear & super::AUTOCLEAR_BITMAPS != 0;
    offline.set_bitmaps_extension(new)?;
    if let Some(old) = old.filter(|_| valid) {
        offline.free(old.directory_offset, old.directory_size)?;
    }
    offline.free_deferred()
}

/// Makes a bitmap, all clear. `granularity` is the bytes that a bit stands for: a power of two
/// from 512 to 2 GiB; QEMU's default is 64 KiB.
pub fn create(
    offline: &mut Offline<'_>,
    name: &str,
    granularity: u64,
    recording: Recording,
) -> Result<(), ImageError> {
    let mut all = entries(offline)?;
    let bits = granularity.trailing_zeros() as u8;
    let (size, cluster) = (offline.header().disk_size(), offline.layout().cluster_size());
    if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&bits) {
        return invalid(format!("granularity {granularity}: not a power of 2 from 512 to 2 GiB"));
    }
    if name.is_empty() || name.len() > MAX_NAME {
        return invalid(format!("a bitmap's name has 1 to {MAX_NAME} bytes"));
    }
    if all.iter().any(|e| e.name == name) {
        return invalid(format!("bitmap {name:?} is there already"));
    }
    let table_size = Entry::clusters_for(size, bits, cluster);
    if table_size == 0 || table_size * cluster > MAX_DATA || all.len() >= MAX_BITMAPS as usize {
        return invalid("a bitmap of this granularity is too large, or has nothing".to_owned());
    }
    let table_offset = offline.allocate(table_size * 8)?;
    let none = vec![0; table_size as usize];
    offline.write_table(table_offset, &none, "write a bitmap table")?;
    let flags = if recording == Recording::On { AUTO } else { 0 };
    let (table_size, name) = (table_size as u32, name.to_owned());
    all.push(Entry { table_offset, table_size, flags, granularity_bits: bits, name });
    write_directory(offline, &all)?;
    offline.sync()
}

/// Removes a bitmap. One whose table is broken leaves its clusters to a repair.
pub fn remove(offline: &mut Offline<'_>, name: &str) -> Result<(), ImageError> {
    let mut all = entries(offline)?;
    let gone = find(&all, name)?.clone();
    let cluster = offline.layout().cluster_size();
    if let Ok(clusters) = table::clusters(offline.storage(), cluster, &gone) {
        offline.defer_free(clusters);
    }
    all.retain(|e| e.name != name);
    write_directory(offline, &all)?;
    offline.sync()
}

/// Switches recording on or off.
pub fn set_recording(
    offline: &mut Offline<'_>,
    name: &str,
    recording: Recording,
) -> Result<(), ImageError> {
    let mut all = entries(offline)?;
    let entry = find_mut(&mut all, name)?;
    trusted(entry)?;
    let flags = match recording {
        Recording::On => entry.flags | AUTO,
        Recording::Off => entry.flags & !AUTO,
    };
    entry.flags = flags;
    write_flags(offline, &all)
}

/// Clears a bitmap; one that nobody trusts any more, too, as nothing of it is kept.
pub fn clear(offline: &mut Offline<'_>, name: &str) -> Result<(), ImageError> {
    change_bits(offline, name, |_, disk, entry| Ok(DirtyBits::new(disk, entry.granularity_bits)))
}

/// Sets in bitmap `into` what is set in bitmap `from` of the same image.
pub fn merge(offline: &mut Offline<'_>, into: &str, from: &str) -> Result<(), ImageError> {
    let header = offline.header().clone();
    let other = super::read(offline.storage(), &header, from)?;
    change_bits(offline, into, |offline, disk, entry| {
        trusted(entry)?;
        let cluster = offline.layout().cluster_size();
        let bits = table::load(offline.storage(), cluster, disk, entry)?;
        bits.merge(&other);
        Ok(bits)
    })
}

fn trusted(entry: &Entry) -> Result<(), ImageError> {
    if entry.flags & IN_USE != 0 {
        let name = &entry.name;
        return invalid(format!(
            "bitmap {name:?} was not stored when the image was last used: remove or clear it"
        ));
    }
    Ok(())
}

/// Replaces the bits of a bitmap, which is marked in use meanwhile.
fn change_bits(
    offline: &mut Offline<'_>,
    name: &str,
    bits: impl FnOnce(&Offline<'_>, u64, &Entry) -> Result<DirtyBits, ImageError>,
) -> Result<(), ImageError> {
    let mut all = entries(offline)?;
    let disk = offline.header().disk_size();
    let bits = bits(offline, disk, find(&all, name)?)?;
    find_mut(&mut all, name)?.flags |= IN_USE;
    write_flags(offline, &all)?;
    store_all(offline, &[(name.to_owned(), &bits)])
}

/// Writes the flags where they are: each lies in one sector.
pub(super) fn write_flags(offline: &mut Offline<'_>, entries: &[Entry]) -> Result<(), ImageError> {
    let Some(named) = offline.header().bitmaps else { return Ok(()) };
    offline.sync()?;
    for (at, entry) in directory::flag_offsets(entries).zip(entries) {
        let bytes = entry.flags.to_be_bytes();
        offline.write(named.directory_offset + at, &bytes, "write the bitmap directory")?;
    }
    offline.sync()
}

/// Bitmaps out of use while the disk's size changes.
pub(in crate::formats::qcow2) struct Suspended(Vec<(Entry, DirtyBits)>);

/// Marks all bitmaps in use, durably, and keeps their bits.
pub(in crate::formats::qcow2) fn suspend(
    offline: &mut Offline<'_>,
) -> Result<Suspended, ImageError> {
    let mut all = entries(offline)?;
    let (disk, cluster) = (offline.header().disk_size(), offline.layout().cluster_size());
    let mut kept = Vec::new();
    for entry in all.iter_mut().filter(|e| e.flags & IN_USE == 0) {
        let bits = table::load(offline.storage(), cluster, disk, entry)?;
        kept.push((entry.clone(), bits));
        entry.flags |= IN_USE;
    }
    write_flags(offline, &all)?;
    Ok(Suspended(kept))
}

/// Stores the bits for the disk's new size, and marks the bitmaps as stored.
pub(in crate::formats::qcow2) fn resize(
    offline: &mut Offline<'_>,
    suspended: Suspended,
) -> Result<(), ImageError> {
    if suspended.0.is_empty() {
        return Ok(());
    }
    let mut all = entries(offline)?;
    let disk = offline.header().disk_size();
    for (mut entry, old) in suspended.0 {
        let bits = DirtyBits::new(disk, entry.granularity_bits);
        bits.merge(&old);
        table::store(offline, &mut entry, &bits)?;
        let name = entry.name.clone();
        *find_mut(&mut all, &name)? = entry;
    }
    write_directory(offline, &all)?;
    offline.sync()
}

/// Stores bits of bitmaps that are marked in use, and marks them as stored.
pub(super) fn store_all(
    offline: &mut Offline<'_>,
    bits: &[(String, &DirtyBits)],
) -> Result<(), ImageError> {
    let mut all = entries(offline)?;
    let mut moved = false;
    for (name, bits) in bits {
        let entry = find_mut(&mut all, name)?;
        let before = entry.table_offset;
        table::store(offline, entry, bits)?;
        moved |= entry.table_offset != before;
        entry.flags &= !IN_USE;
    }
    if moved {
        write_directory(offline, &all)?;
    } else {
        write_flags(offline, &all)?;
        offline.free_deferred()?;
    }
    offline.sync()
}
