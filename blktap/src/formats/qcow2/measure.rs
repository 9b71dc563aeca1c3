//! How large an image will be, as `qemu-img measure` counts it.
use crate::formats::ImageError;

use super::bitmaps::directory::Entry;
use super::entry::Layout;
use super::header::MAX_L1_BYTES;

/// Whether the clusters of data are there from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocated {
    /// No, or only their tables.
    #[default]
    Nothing,
    /// Yes (`falloc`, `full`).
    Data,
}

/// Sizes of a file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// What the data that are there need.
    pub required: u64,
    /// What the whole disk needs once all of it is written.
    pub fully_allocated: u64,
}

/// The size of a raw image of a disk of `size` bytes.
pub fn measure_raw(size: u64) -> Measure {
    let size = size.div_ceil(512).saturating_mul(512);
    Measure { required: size, fully_allocated: size }
}

/// The size of an image with such a layout for a disk of `size` bytes. `data` says in bytes, in
/// whole clusters, how much of the disk has data.
pub fn measure(
    layout: &Layout,
    size: u64,
    data: u64,
    preallocated: Preallocated,
) -> Result<Measure, ImageError> {
    let cluster = layout.cluster_size();
    if size > i64::MAX as u64 || layout.l1_entries(size) > MAX_L1_BYTES / 8 {
        let text = "the disk is too large: use larger clusters";
        return Err(ImageError::Invalid(text.to_owned()));
    }
    let clusters = size.div_ceil(cluster);
    let l2_tables = clusters.div_ceil(layout.l2_entries());
    let l1_clusters = (l2_tables * 8).div_ceil(cluster);
    let counted = 1 + l1_clusters + l2_tables + clusters;
    let all = (counted + refcount_clusters(layout, counted)) * cluster;
    let (whole, data) = match preallocated {
        Preallocated::Nothing => (clusters * cluster, data.min(clusters * cluster)),
        Preallocated::Data => (0, 0),
    };
    Ok(Measure { required: all - whole + data, fully_allocated: all })
}

/// Clusters of the refcount table and its blocks, which count themselves too.
fn refcount_clusters(layout: &Layout, counted: u64) -> u64 {
    let per_block = 1 << layout.refblock_bits();
    let (mut blocks, mut table) = (0, 0);
    loop {
        let more = (counted + blocks + table).div_ceil(per_block);
        let longer = (more * 8).div_ceil(layout.cluster_size());
        if (more, longer) == (blocks, table) {
            return blocks + table;
        }
        (blocks, table) = (more, longer);
    }
}

/// Bytes that bitmaps need beside, given their names and granularities (as bits).
pub fn measure_bitmaps<'a>(
    layout: &Layout,
    size: u64,
    bitmaps: impl IntoIterator<Item = (&'a str, u8)>,
) -> u64 {
    let cluster = layout.cluster_size();
    let whole = |bytes: u64| bytes.div_ceil(cluster) * cluster;
    let (mut bytes, mut directory) = (0, 0);
    for (name, granularity_bits) in bitmaps {
        let clusters = Entry::clusters_for(size, granularity_bits, cluster);
        bytes += clusters * cluster + whole(clusters * 8);
        directory += Entry::bytes_with_name(name.len()) as u64;
    }
    bytes + whole(directory)
}
