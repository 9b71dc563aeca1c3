//! L1 and L2 tables of an image that nobody has open.
use crate::formats::ImageError;
use crate::formats::qcow2::entry::{COPIED, L2Entry, OFFSET};
use crate::formats::qcow2::offline::Offline;

/// Clusters that wait to be freed at most.
const BATCH: usize = 1 << 16;

/// The words of an L2 table.
pub(super) fn read_l2(offline: &Offline<'_>, offset: u64) -> Result<Vec<u64>, ImageError> {
    let words = offline.layout().cluster_size() / 8;
    offline.read_table(offset, words as usize, "read an L2 table")
}

fn l2_offset(offline: &Offline<'_>, entry: u64) -> Result<Option<u64>, ImageError> {
    match entry & OFFSET {
        0 => Ok(None),
        offset if offset.is_multiple_of(offline.layout().cluster_size()) => Ok(Some(offset)),
        offset => Err(ImageError::Corrupt(format!("L2 table at {offset:#x}"))),
    }
}

/// An L2 table that may be changed, and its words: that of the L1 entry if it is not shared, else
/// a copy, which nothing names yet. The shared one has a user less once that changed.
pub(super) fn own_l2(offline: &mut Offline<'_>, entry: u64) -> Result<(u64, Vec<u64>), ImageError> {
    let cluster = offline.layout().cluster_size();
    let words = match l2_offset(offline, entry)? {
        None => vec![0; cluster as usize / 8],
        Some(offset) => {
            let words = read_l2(offline, offset)?;
            if offline.refcount(offset / cluster)? == 1 {
                return Ok((offset, words));
            }
            offline.defer_free([(offset, cluster)]);
            words
        }
    };
    let offset = offline.allocate(cluster)?;
    offline.write_table(offset, &words, "write an L2 table")?;
    Ok((offset, words))
}

/// What an L2 entry occupies in the image: offset and length.
pub(super) fn occupied(offline: &Offline<'_>, word: u64, bitmap: u64) -> Option<(u64, u64)> {
    let layout = offline.layout();
    match layout.l2(word, bitmap) {
        L2Entry::Compressed { descriptor } => {
            let bytes = layout.compressed(descriptor);
            Some((bytes.start, bytes.end - bytes.start))
        }
        _ if layout.data_file => None,
        L2Entry::Data { host, .. }
        | L2Entry::Zero { host: Some(host), .. }
        | L2Entry::Subclusters { host: Some(host), .. } => Some((host, layout.cluster_size())),
        L2Entry::Unallocated
        | L2Entry::Zero { host: None, .. }
        | L2Entry::Subclusters { host: None, .. } => None,
    }
}

/// Takes away what maps clusters that lie wholly behind a disk of `size` bytes, and frees them.
pub(super) fn drop_behind(offline: &mut Offline<'_>, size: u64) -> Result<(), ImageError> {
    let layout = *offline.layout();
    let (at, entries) = (offline.header().l1_offset, offline.header().l1_size as usize);
    let l1 = offline.read_table(at, entries, "read the L1 table")?;
    let first = size.div_ceil(layout.cluster_size());
    let mut waiting = 0;
    for (index, entry) in l1.iter().enumerate().skip((first >> layout.l2_bits()) as usize) {
        let Some(offset) = l2_offset(offline, *entry)? else { continue };
        let keep = first.saturating_sub((index as u64) << layout.l2_bits());
        waiting += drop_entries(offline, index as u64, (*entry, offset), keep as usize)?;
        if waiting > BATCH {
            offline.sync()?;
            offline.free_deferred()?;
            waiting = 0;
        }
    }
    offline.sync()?;
    offline.free_deferred()?;
    offline.sync()
}

/// Drops the entries of one L2 table from `keep` on; the table too, if none stays. Gives how many
/// clusters wait to be freed.
fn drop_entries(
    offline: &mut Offline<'_>,
    index: u64,
    (entry, offset): (u64, u64),
    keep: usize,
) -> Result<usize, ImageError> {
    let layout = *offline.layout();
    let step = layout.entry_words();
    let kept = keep * step;
    let old = read_l2(offline, offset)?;
    if keep > 0 && old[kept..].iter().all(|word| *word == 0) {
        return Ok(0);
    }
    let freed: Vec<_> = old[kept..]
        .chunks_exact(step)
        .filter_map(|words| occupied(offline, words[0], words.get(1).copied().unwrap_or(0)))
        .collect();
    let l1_entry = offline.header().l1_offset + index * 8;
    let n = freed.len() + 1;
    if keep == 0 {
        offline.defer_free([(offset, layout.cluster_size())]);
        offline.write(l1_entry, &[0; 8], "write the L1 table")?;
    } else {
        let (own, mut words) = own_l2(offline, entry)?;
        words[kept..].fill(0);
        offline.write_table(own, &words, "write an L2 table")?;
        if own != offset {
            offline.sync()?;
            let entry = own | COPIED;
            offline.write(l1_entry, &entry.to_be_bytes(), "write the L1 table")?;
        }
    }
    offline.defer_free(freed);
    Ok(n)
}

/// Cuts off what is free at the end of the file.
pub(super) fn cut(offline: &mut Offline<'_>) -> Result<(), ImageError> {
    let storage = offline.storage();
    let size = storage.size().map_err(ImageError::io("find the size of the file"))?;
    let cluster = offline.layout().cluster_size();
    let mut end = size.div_ceil(cluster);
    while end > 1 && offline.refcount(end - 1)? == 0 {
        end -= 1;
    }
    if end * cluster < size {
        storage.set_size(end * cluster).map_err(ImageError::io("shrink the file"))?;
    }
    Ok(())
}
