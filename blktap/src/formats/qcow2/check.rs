//! Checking a QCOW2 image as `qemu-img check` does, and repairing it.
//!
//! A check reads the image alone and holds nothing of it open. References are counted in a
//! bounded number of bytes; a large image is gone through in several passes.
mod bitmaps;
mod compare;
mod copied;
mod counts;
mod entries;
mod image;
mod rebuild;
pub(super) mod references;
mod repair;
mod report;
mod snapshots;
mod tables;
mod walk;

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::formats::ImageError;
use crate::storage::Storage;

use super::header::Header;
use super::metadata::MetadataMap;
use copied::Mend;
use image::Image;
pub use image::{OnProgress, Progress};
pub use repair::{Repair, repair};
pub use report::{CheckReport, Fault, Finding};
use walk::{Follow, Sight, Walk};

/// Bytes that counting may take unless told otherwise.
pub const CHECK_MEMORY: usize = 32 << 20;

/// Checks the image in `storage`, which nobody else changes meanwhile.
///
/// The external data file, if there is one, is not looked at. An error says that the image could
/// not be examined at all.
pub fn check(
    storage: &dyn Storage,
    memory: usize,
    progress: OnProgress<'_>,
) -> Result<CheckReport, ImageError> {
    let header = Header::read(storage)?;
    header.check_tables()?;
    let image = Image::new(storage, &header, memory, progress)?;
    let mut report = examine(&image)?.report;
    if let Some(text) = overlap(&image, &report)? {
        report.corruption(1, || text);
    }
    Ok(report)
}

/// Tables that share a cluster, in an image whose counts are right: it is never written. (As to
/// `qemu-img check` a cluster with two users and a count of 2 is sound, whoever they are.)
fn overlap(image: &Image<'_>, report: &CheckReport) -> Result<Option<String>, ImageError> {
    if report.corruptions > 0 || report.check_errors > 0 {
        return Ok(None);
    }
    let l1 = super::read_l1(image.header, image.storage)?;
    match MetadataMap::of(image.storage, image.header, &l1, &image.refcount_table) {
        Ok(_) => Ok(None),
        Err(ImageError::Corrupt(text)) => Ok(Some(text)),
        Err(e) => Err(e),
    }
}

/// For [`check`]: no progress is wanted.
pub fn unwatched(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// All that can be said of an image without changing it.
fn examine(image: &Image<'_>) -> Result<Sight, ImageError> {
    let mut first: Option<Sight> = None;
    let mut start = 0;
    while start < u64::MAX {
        image.next_pass();
        let mut walk = Walk::new(image, start, Follow::All);
        walk.run()?;
        let Walk { counts, sight, .. } = walk;
        // What later passes find in the tables is what the first one found.
        let sight = first.get_or_insert(sight);
        compare::compare(image, &counts, sight)?;
        start = counts.window().end;
    }
    let mut sight = first.unwrap_or_default();
    copied::flags(image, Mend::Nothing, &mut sight)?;
    sight.report.total_clusters = image.header.disk_size().div_ceil(image.cluster());
    Ok(sight)
}

/// Makes the refcounts of an image right that was not closed, as opening it for writing needs.
pub fn repair_dirty(storage: &Arc<dyn Storage>) -> Result<(), ImageError> {
    let report = repair(&**storage, Repair::All, CHECK_MEMORY, &unwatched)?;
    match report.corruptions + report.check_errors {
        0 => Ok(()),
        n => Err(ImageError::Corrupt(format!(
            "it was not closed properly, and {n} faults cannot be repaired"
        ))),
    }
}
