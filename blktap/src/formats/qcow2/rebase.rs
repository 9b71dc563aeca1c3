//! Another backing file in the header of an image that nobody has open.
//!
//! A sector is certain to be written whole. So the fields, the extensions with the backing file's
//! format and, where it fits, the name go into the first one; a longer name is written where
//! nothing is yet, and durable before the first sector names it. The names of feature bits, which
//! are there for error messages alone, give way.
use std::ops::Range;

use super::header::{Header, be32, be64};
use crate::formats::{BackingName, ImageError};
use crate::storage::{Access, Storage};

/// What is written as one.
const SECTOR: usize = 512;
/// Where the name's place and length are.
const NAME: Range<usize> = 8..20;

fn sync(storage: &dyn Storage) -> Result<(), ImageError> {
    storage.sync().map_err(ImageError::io("flush the header"))
}

fn write(storage: &dyn Storage, at: usize, bytes: &[u8]) -> Result<(), ImageError> {
    storage.write_at(at as u64, bytes).map_err(ImageError::io("write the header"))
}

/// Names `backing` in the header, durably; `None`: none. After a crash the header is the old or
/// the new one, as long as its extensions fit the first sector (those that we and QEMU write do,
/// unless an external data file has a very long name) and clusters of less than 4 KiB have room
/// for both names.
pub fn set_backing(storage: &dyn Storage, backing: Option<&BackingName>) -> Result<(), ImageError> {
    if storage.access() == Access::ReadOnly {
        return Err(ImageError::ReadOnly);
    }
    let mut header = Header::read(storage)?;
    header.backing_file = backing.map(|b| b.name.clone());
    header.backing_format = backing.and_then(|b| b.format.clone());
    // Whether it fits at all.
    header.serialise()?;
    let name = header.backing_file.take().unwrap_or_default().into_bytes();
    let mut head = header.without_feature_names();
    let mut cluster = vec![0; 1 << header.cluster_bits];
    storage.read_at(0, &mut cluster).map_err(ImageError::io("read the header"))?;
    let place = match head.len() {
        n if n > SECTOR => None,
        _ if name.is_empty() => Some(0),
        n if n + name.len() <= SECTOR => Some(n),
        _ => free_place(&cluster, name.len()),
    };
    let Some(place) = place else {
        header.backing_file = String::from_utf8(name).ok().filter(|n| !n.is_empty());
        header.write(storage)?;
        return sync(storage);
    };
    let mut range = (place as u64).to_be_bytes().to_vec();
    range.extend_from_slice(&(name.len() as u32).to_be_bytes());
    head[NAME].copy_from_slice(&range);
    if place >= SECTOR {
        write(storage, place, &name)?;
        sync(storage)?;
    } else {
        head.extend_from_slice(&name);
    }
    head.resize(SECTOR, 0);
    write(storage, 0, &head)?;
    sync(storage)
}

/// Where in the header's cluster, behind its first sector, there is nothing now for `len` bytes.
fn free_place(cluster: &[u8], len: usize) -> Option<usize> {
    let (old, old_len) = (be64(cluster, NAME.start) as usize, be32(cluster, 16) as usize);
    let mut end = if be32(cluster, 4) == 2 { 72 } else { be32(cluster, 100) as usize };
    while end + 8 <= cluster.len() && be32(cluster, end) != 0 {
        end = (end + 8 + be32(cluster, end + 4) as usize).next_multiple_of(8);
    }
    let used = (end + 8).max(SECTOR).next_multiple_of(8);
    let last = cluster.len().checked_sub(len)? & !7;
    let is_free = |at: &usize| {
        *at >= used && *at <= last && (old == 0 || *at >= old + old_len || at + len <= old)
    };
    [last, used].into_iter().find(is_free)
}
