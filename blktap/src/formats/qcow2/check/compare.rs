//! The refcounts that an image has against the references that there are.
use std::ops::Range;

use super::counts::Counts;
use super::image::Image;
use super::report::Fault;
use super::walk::{Follow, Sight, Walk};
use crate::formats::ImageError;
use crate::formats::qcow2::entry::{refcount, set_refcount};

/// Refcounts that are set right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settle {
    /// Those that are too low.
    Raise,
    /// Those that are too high.
    Lower,
}

/// The refcount blocks that a comparison has to look at, in order, each with its clusters: those
/// that exist and those of clusters that are referred to.
fn blocks(image: &Image<'_>, counts: &Counts) -> Vec<(u64, Range<u64>)> {
    // A reference may end in a cluster that the file has nothing of.
    let window = counts.window().start..counts.window().end.min(image.clusters() + 1);
    let per = image.per_block();
    let mut list: Vec<u64> = (0..image.refcount_table.len() as u64)
        .filter(|index| image.block_offset(*index).is_some())
        .collect();
    list.extend(counts.chunks().flat_map(|c| c.start / per..c.end.div_ceil(per)));
    list.sort_unstable();
    list.dedup();
    let part = |index: u64| {
        let start = index.saturating_mul(per);
        start.max(window.start)..start.saturating_add(per).min(window.end)
    };
    list.into_iter().map(|index| (index, part(index))).filter(|(_, p)| !p.is_empty()).collect()
}

/// Counts what differs. Where the whole table must be made anew is said.
pub(super) fn compare(
    image: &Image<'_>,
    counts: &Counts,
    sight: &mut Sight,
) -> Result<(), ImageError> {
    let (order, max) = (image.layout.refcount_order, image.layout.max_refcount());
    for (index, clusters) in blocks(image, counts) {
        image.tick()?;
        let block = image.block(index)?;
        let first = index * image.per_block();
        for cluster in clusters {
            let used = u64::from(counts.get(cluster));
            let at = (cluster - first) as usize;
            let counted = block.as_deref().map_or(0, |b| refcount(b, order, at));
            if used > 0 || counted > 0 {
                let end = (cluster + 1) << image.bits();
                sight.report.image_end_offset = sight.report.image_end_offset.max(end);
            }
            if used != counted {
                sight.rebuild |= block.is_none();
                differs(sight, cluster, counted, used, max);
            }
        }
    }
    own_alone(image, counts, sight);
    Ok(())
}

fn differs(sight: &mut Sight, cluster: u64, counted: u64, used: u64, max: u64) {
    let report = &mut sight.report;
    report.corruption(used.saturating_sub(max), || {
        format!("cluster {cluster} is used {used} times, which its refcount cannot say")
    });
    let text = || format!("cluster {cluster} has refcount {counted} and is used {used} times");
    match used.min(max) {
        used if counted < used => report.corruption(1, text),
        used => report.found(Fault::Leak, u64::from(counted > used), text),
    }
}

/// The refcount table and its blocks must have no other use.
fn own_alone(image: &Image<'_>, counts: &Counts, sight: &mut Sight) {
    for index in 0..image.refcount_table.len() as u64 {
        let uses = image.block_offset(index).map_or(0, |o| counts.get(o >> image.bits()));
        if uses > 1 {
            sight.rebuild = true;
            sight.report.corruption(1, || format!("refcount block {index} is used {uses} times"));
        }
    }
    let table = image.header.refcount_table_offset >> image.bits();
    let table = table..table + u64::from(image.header.refcount_table_clusters);
    sight.rebuild |= table.into_iter().any(|cluster| counts.get(cluster) > 1);
}

/// Counts all references anew, and calls `each` with each window of them.
pub(super) fn each_window(
    image: &Image<'_>,
    follow: Follow,
    mut each: impl FnMut(&Counts) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let mut start = 0;
    while start < u64::MAX {
        image.next_pass();
        let mut walk = Walk::new(image, start, follow);
        walk.run()?;
        each(&walk.counts)?;
        start = walk.counts.window().end;
    }
    Ok(())
}

/// Sets refcounts right in place, durably.
pub(super) fn settle_all(image: &Image<'_>, which: Settle) -> Result<(), ImageError> {
    each_window(image, Follow::All, |counts| settle(image, counts, which))?;
    image.sync()
}

fn settle(image: &Image<'_>, counts: &Counts, which: Settle) -> Result<(), ImageError> {
    let (order, max) = (image.layout.refcount_order, image.layout.max_refcount());
    for (index, clusters) in blocks(image, counts) {
        image.tick()?;
        let (Some(offset), Some(mut block)) = (image.block_offset(index), image.block(index)?)
        else {
            continue;
        };
        let mut changed = false;
        for cluster in clusters {
            let at = (cluster - index * image.per_block()) as usize;
            let (used, counted) =
                (u64::from(counts.get(cluster)).min(max), refcount(&block, order, at));
            let wrong = match which {
                Settle::Raise => counted < used,
                Settle::Lower => counted > used,
            };
            if wrong {
                set_refcount(&mut block, order, at, used);
                changed = true;
            }
        }
        if changed {
            image.write(offset, &block, "write a refcount block")?;
        }
    }
    Ok(())
}
