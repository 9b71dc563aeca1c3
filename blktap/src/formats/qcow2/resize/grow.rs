//! A larger disk, whose new part reads as zeroes.
use crate::formats::ImageError;
use crate::formats::qcow2::compressed;
use crate::formats::qcow2::entry::{COPIED, L2Entry, OFFSET, SubBits, Subcluster, ZERO};
use crate::formats::qcow2::header::Version;
use crate::formats::qcow2::offline::Offline;

use super::mappings::{occupied, own_l2};
use super::{Around, SIZE};

/// Grows the disk to `size` bytes.
pub(super) fn grow(
    offline: &mut Offline<'_>,
    around: Around<'_>,
    size: u64,
) -> Result<(), ImageError> {
    let (old, layout) = (offline.header().disk_size(), *offline.layout());
    let (at, entries) = (offline.header().l1_offset, offline.header().l1_size as usize);
    let need = layout.l1_entries(size) as usize;
    let mut l1 = offline.read_table(at, entries, "read the L1 table")?;
    l1.resize(entries.max(need), 0);
    zero_tail(offline, around, old, &mut l1)?;
    zero_new(offline, around, old..size, &mut l1)?;
    let mut fields = size.to_be_bytes().to_vec();
    if l1.len() == entries {
        offline.sync()?;
        offline.write_table(at, &l1, "write the L1 table")?;
        offline.switch(SIZE, &fields)?;
    } else {
        let to = offline.allocate(l1.len() as u64 * 8)?;
        offline.write_table(to, &l1, "write the L1 table")?;
        // No encryption; then size and place of the L1 table.
        fields.extend_from_slice(&[0; 4]);
        fields.extend_from_slice(&(l1.len() as u32).to_be_bytes());
        fields.extend_from_slice(&to.to_be_bytes());
        offline.switch(SIZE, &fields)?;
        offline.defer_free([(at, entries as u64 * 8)]);
    }
    offline.free_deferred()?;
    offline.sync()
}

/// Makes the clusters wholly behind the old end read as zeroes as far as the backing file reaches.
fn zero_new(
    offline: &mut Offline<'_>,
    around: Around<'_>,
    new: std::ops::Range<u64>,
    l1: &mut [u64],
) -> Result<(), ImageError> {
    let layout = *offline.layout();
    let below = around.below.map_or(0, super::Below::size);
    let end = new.end.min(below).div_ceil(layout.cluster_size());
    let mut cluster = new.start.div_ceil(layout.cluster_size());
    if cluster < end && offline.header().version == Version::V2 {
        let text = "compat=0.10 cannot hide the part of its backing file behind the disk's end";
        return Err(ImageError::Unsupported(text.to_owned()));
    }
    while cluster < end {
        let index = (cluster >> layout.l2_bits()) as usize;
        let (offset, mut words) = own_l2(offline, l1[index])?;
        let stop = end.min(((index as u64) + 1) << layout.l2_bits());
        let (first, step) = ((index as u64) << layout.l2_bits(), layout.entry_words());
        for one in cluster..stop {
            let at = (one - first) as usize * step;
            match layout.extended {
                true => words[at + 1] = SubBits::default().with_zero(0..32).0,
                false => words[at] = ZERO,
            }
        }
        offline.write_table(offset, &words, "write an L2 table")?;
        l1[index] = offset | COPIED;
        cluster = stop;
    }
    Ok(())
}

/// Makes what the last cluster has behind the old end read as zeroes.
fn zero_tail(
    offline: &mut Offline<'_>,
    around: Around<'_>,
    old: u64,
    l1: &mut [u64],
) -> Result<(), ImageError> {
    let layout = *offline.layout();
    let inside = (old % layout.cluster_size()) as usize;
    if inside == 0 {
        return Ok(());
    }
    let start = old - inside as u64;
    let index = (old >> layout.l1_bits()) as usize;
    let at =
        (old >> layout.cluster_bits) as usize % layout.l2_entries() as usize * layout.entry_words();
    let entry = l1.get(index).copied().unwrap_or(0);
    let below_reaches = around.below.is_some_and(|below| below.size() > old);
    if entry & OFFSET == 0 && !below_reaches {
        return Ok(());
    }
    let (offset, mut words) = own_l2(offline, entry)?;
    let pair = (words[at], if layout.extended { words[at + 1] } else { 0 });
    let mut content = vec![0; layout.cluster_size() as usize];
    read_cluster(offline, around, pair, start, &mut content)?;
    if content[inside..].iter().any(|byte| *byte != 0) {
        content[inside..].fill(0);
        let host = place(offline, around, pair, start)?;
        match around.data_file {
            Some(data) => data.write_at(host, &content).map_err(ImageError::io("write data"))?,
            None => offline.write(host, &content, "write data")?,
        }
        words[at] = host | COPIED;
        if layout.extended {
            words[at + 1] = SubBits::default().with_data(0..32).0;
        }
        if let Some(freed) = occupied(offline, pair.0, pair.1) {
            offline.defer_free([freed]);
        }
        sync_data(around)?;
    }
    // The data are durable before their table names them.
    offline.sync()?;
    offline.write_table(offset, &words, "write an L2 table")?;
    l1[index] = offset | COPIED;
    Ok(())
}

fn sync_data(around: Around<'_>) -> Result<(), ImageError> {
    around.data_file.map_or(Ok(()), |data| data.sync().map_err(ImageError::io("flush the data")))
}

/// Where the last cluster's data go: a new cluster, or its place in the data file.
fn place(
    offline: &mut Offline<'_>,
    around: Around<'_>,
    (word, bitmap): (u64, u64),
    start: u64,
) -> Result<u64, ImageError> {
    let cluster = offline.layout().cluster_size();
    let Some(data) = around.data_file else { return offline.allocate(cluster) };
    match offline.layout().l2(word, bitmap) {
        L2Entry::Data { host, .. }
        | L2Entry::Zero { host: Some(host), .. }
        | L2Entry::Subclusters { host: Some(host), .. } => Ok(host),
        _ if offline.header().has_raw_data() => Ok(start),
        _ => {
            let end = data.size().map_err(ImageError::io("find the size of the data file"))?;
            Ok(end.next_multiple_of(cluster))
        }
    }
}

/// Reads the guest's cluster at `start`.
fn read_cluster(
    offline: &Offline<'_>,
    around: Around<'_>,
    (word, bitmap): (u64, u64),
    start: u64,
    into: &mut [u8],
) -> Result<(), ImageError> {
    let layout = *offline.layout();
    let below = |from: u64, into: &mut [u8]| match around.below {
        Some(below) => below.read_at(from, into),
        None => Ok(()),
    };
    let data = |host: u64, into: &mut [u8]| {
        let file = around.data_file.unwrap_or(offline.storage());
        file.read_at(host, into).map_err(ImageError::io("read data"))
    };
    match layout.l2(word, bitmap) {
        L2Entry::Unallocated => below(start, into),
        L2Entry::Zero { .. } => Ok(()),
        L2Entry::Data { host, .. } => data(host, into),
        L2Entry::Compressed { descriptor } => {
            let range = layout.compressed(descriptor);
            let mut packed = vec![0; (range.end - range.start) as usize];
            let read = offline.storage().read_at(range.start, &mut packed);
            read.map_err(ImageError::io("read a compressed cluster"))?;
            match compressed::unpack(offline.header().compression, &packed, into) {
                true => Ok(()),
                false => Err(ImageError::Corrupt("the last cluster does not unpack".to_owned())),
            }
        }
        L2Entry::Subclusters { host, bits, .. } => {
            let size = layout.subcluster_size();
            for (i, part) in into.chunks_exact_mut(size as usize).enumerate() {
                let at = i as u64 * size;
                match (bits.get(i as u32, host), host) {
                    (Subcluster::Zero, _) => {}
                    (Subcluster::Data, Some(host)) => data(host + at, part)?,
                    (Subcluster::Unallocated, _) => below(start + at, part)?,
                    _ => return Err(ImageError::Corrupt("a subcluster of no kind".to_owned())),
                }
            }
            Ok(())
        }
    }
}
