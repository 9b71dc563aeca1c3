//! Bitmaps as a check sees them.
use super::entries;
use super::walk::Walk;
use crate::formats::ImageError;
use crate::formats::qcow2::bitmaps::directory::{self, Bits, Entry, MAX_BITMAPS, MAX_DIRECTORY};
use crate::formats::qcow2::header::AUTOCLEAR_BITMAPS;

/// Bytes of a table that are read at once.
const STRIDE: u64 = 1 << 20;

/// Counts directory, tables and bits. Without the autoclear bit there are no bitmaps.
pub(super) fn follow(walk: &mut Walk<'_>) -> Result<(), ImageError> {
    let (image, header) = (walk.image, walk.image.header);
    let Some(named) = header.bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0) else {
        return Ok(());
    };
    let size = named.directory_size;
    let there = size <= MAX_DIRECTORY
        && named.count <= MAX_BITMAPS
        && image.is_aligned(named.directory_offset)
        && walk.refer(named.directory_offset, size, 1, || "the bitmap directory".to_owned());
    if !there {
        broken(walk, || "the header names no usable bitmap directory".to_owned());
        return Ok(());
    }
    let bytes = image.read(named.directory_offset, size as usize, "read the bitmap directory")?;
    match directory::parse(&bytes, named.count, image.cluster(), header.disk_size()) {
        Ok(list) => list.iter().try_for_each(|bitmap| follow_one(walk, bitmap)),
        Err(e) => {
            broken(walk, || e.to_string());
            Ok(())
        }
    }
}

fn broken(walk: &mut Walk<'_>, text: impl FnOnce() -> String) {
    walk.sight.bitmaps_broken = true;
    walk.sight.report.corruption(1, text);
}

fn follow_one(walk: &mut Walk<'_>, bitmap: &Entry) -> Result<(), ImageError> {
    let image = walk.image;
    let len = u64::from(bitmap.table_size) * 8;
    let what = || format!("the table of bitmap {:?}", bitmap.name);
    walk.sight.bitmaps_broken |= !walk.refer(bitmap.table_offset, len, 1, what);
    let end = (bitmap.table_offset + len).min(image.file);
    let mut at = bitmap.table_offset;
    while at < end {
        let len = STRIDE.min(end - at);
        if !image.is_hole(at..at + len)? {
            walk.budget.spend(len)?;
            let bytes = image.read(at, len as usize, "read a bitmap table")?;
            bytes.chunks_exact(8).for_each(|raw| bits(walk, bitmap, entries::word(raw)));
        }
        at += len;
    }
    Ok(())
}

fn bits(walk: &mut Walk<'_>, bitmap: &Entry, raw: u64) {
    let cluster = walk.image.cluster();
    let what = || format!("bitmap {:?}", bitmap.name);
    match Bits::decode(raw, cluster) {
        Some(Bits::Zeroes | Bits::Ones) => {}
        Some(Bits::At(offset)) => {
            walk.sight.bitmaps_broken |= !walk.refer(offset, cluster, 1, what);
        }
        None => broken(walk, || format!("{} has the table entry {raw:#x}", what())),
    }
}
