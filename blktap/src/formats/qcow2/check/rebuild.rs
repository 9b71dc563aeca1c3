//! A refcount table made anew, where no other cluster lies, from the references that there are.
//!
//! The old table stays untouched until the header names the new one, which is one write of one
//! sector. Before it nothing refers to the new clusters, after it nothing to the old ones.
use std::collections::BTreeSet;
use std::ops::Range;

use super::compare::each_window;
use super::image::{Image, Refcounts};
use super::walk::{Follow, Sight};
use crate::formats::ImageError;
use crate::formats::qcow2::entry::set_refcount;
use crate::formats::qcow2::header::MAX_REFTABLE_BYTES;

/// Where the table's offset and its clusters are in the header.
const TABLE_IN_HEADER: u64 = 48;

/// Where the new blocks and the table go.
#[derive(Debug)]
struct Plan {
    /// Clusters of the blocks, in the order of `blocks`, then of the table.
    clusters: Range<u64>,
    /// Blocks that are needed, by index.
    blocks: Vec<u64>,
    /// Clusters of the table.
    table: u64,
}

/// Makes all refcounts anew and switches to them.
pub(super) fn rebuild(image: &Image<'_>, sight: &Sight) -> Result<(), ImageError> {
    let plan = plan(image, sight)?;
    blank(image, &plan)?;
    let mut old = Refcounts::new(image);
    each_window(image, Follow::AllButRefcounts, |counts| {
        fill(image, &plan, counts.window(), |cluster| {
            let used = u64::from(counts.get(cluster));
            // What could not be followed may refer to all that has a refcount.
            Ok(if sight.blind { used.max(old.get(cluster)?) } else { used })
        })
    })?;
    let own = plan.clusters.clone();
    fill(image, &plan, own, |_| Ok(1))?;
    write_table(image, &plan)
}

fn plan(image: &Image<'_>, sight: &Sight) -> Result<Plan, ImageError> {
    let per = image.per_block();
    let mut used: BTreeSet<u64> = BTreeSet::new();
    let mut end = old_end(image);
    each_window(image, Follow::AllButRefcounts, |counts| {
        for (cluster, _) in counts.iter() {
            end = end.max(cluster + 1);
            if !used.contains(&(cluster / per)) {
                check_index(cluster / per)?;
                used.insert(cluster / per);
            }
        }
        Ok(())
    })?;
    if sight.blind {
        // What could not be followed may lie anywhere.
        end = end.max(image.clusters());
        used.extend(
            (0..image.refcount_table.len() as u64).filter(|i| image.block_offset(*i).is_some()),
        );
    }
    let mut plan = place(image, &used, end)?;
    // What refers to bytes beyond the end must not come upon ours.
    while let Some(met) = sight.beyond.iter().filter(|c| plan.clusters.contains(c)).max() {
        plan = place(image, &used, met + 1)?;
    }
    Ok(plan)
}

/// The end of the old table and blocks, in clusters: they stay until the switch.
fn old_end(image: &Image<'_>) -> u64 {
    let blocks = image.refcount_table.len() as u64;
    let last = (0..blocks).filter_map(|index| image.block_offset(index)).max().unwrap_or(0);
    let table = image.header.refcount_table_offset >> image.bits();
    (table + u64::from(image.header.refcount_table_clusters)).max((last >> image.bits()) + 1)
}

fn check_index(block: u64) -> Result<(), ImageError> {
    if block >= MAX_REFTABLE_BYTES / 8 {
        let text = "clusters lie too far behind for any refcount table";
        return Err(ImageError::NoSpace(text.to_owned()));
    }
    Ok(())
}

/// The plan with its first cluster at `start`, behind all that is used.
fn place(image: &Image<'_>, used: &BTreeSet<u64>, start: u64) -> Result<Plan, ImageError> {
    let per = image.per_block();
    let (mut last, mut table) = (start / per, 1);
    loop {
        check_index(last)?;
        let mut blocks = used.clone();
        blocks.extend(start / per..=last);
        let end = start + blocks.len() as u64 + table;
        // Blocks may be kept for clusters far behind.
        let top = blocks.last().copied().unwrap_or(0).max((end - 1) / per);
        check_index(top)?;
        let need = ((top + 1) * 8).div_ceil(image.cluster());
        if (end - 1) / per == last && need == table {
            let blocks = blocks.into_iter().collect();
            return Ok(Plan { clusters: start..end, blocks, table });
        }
        (last, table) = ((end - 1) / per, need.max(table));
    }
}

/// Makes the place read as zeroes, whatever was there.
fn blank(image: &Image<'_>, plan: &Plan) -> Result<(), ImageError> {
    let zeroes = vec![0; image.cluster() as usize];
    for cluster in plan.clusters.clone() {
        image.tick()?;
        image.write(cluster << image.bits(), &zeroes, "write a new refcount block")?;
    }
    Ok(())
}

/// Puts the refcounts of `clusters` into their new blocks.
fn fill(
    image: &Image<'_>,
    plan: &Plan,
    clusters: Range<u64>,
    mut count: impl FnMut(u64) -> Result<u64, ImageError>,
) -> Result<(), ImageError> {
    let (per, order) = (image.per_block(), image.layout.refcount_order);
    for (at, index) in plan.blocks.iter().enumerate() {
        let first = index * per;
        let part = first.max(clusters.start)..(first + per).min(clusters.end);
        if part.is_empty() {
            continue;
        }
        image.tick()?;
        let offset = (plan.clusters.start + at as u64) << image.bits();
        // A block may have been begun by the window before.
        let mut block = image.read(offset, image.cluster() as usize, "read a refcount block")?;
        for cluster in part {
            let used = count(cluster)?.min(image.layout.max_refcount());
            if used > 0 {
                set_refcount(&mut block, order, (cluster - first) as usize, used);
            }
        }
        image.write(offset, &block, "write a new refcount block")?;
    }
    Ok(())
}

fn write_table(image: &Image<'_>, plan: &Plan) -> Result<(), ImageError> {
    let mut table = vec![0; (plan.table << image.bits()) as usize];
    for (at, index) in plan.blocks.iter().enumerate() {
        let offset = (plan.clusters.start + at as u64) << image.bits();
        let to = (index * 8) as usize;
        table[to..to + 8].copy_from_slice(&offset.to_be_bytes());
    }
    let offset = (plan.clusters.end - plan.table) << image.bits();
    image.write(offset, &table, "write the new refcount table")?;
    image.sync()?;
    let mut fields = offset.to_be_bytes().to_vec();
    fields.extend_from_slice(&(plan.table as u32).to_be_bytes());
    image.write(TABLE_IN_HEADER, &fields, "write the header")?;
    image.sync()
}
