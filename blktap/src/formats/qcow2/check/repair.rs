//! Repairing an image, in an order in which each crash leaves what can be repaired again, and
//! without ever freeing what something refers to.
use super::compare::{self, Settle};
use super::copied::{self, Mend};
use super::image::{Image, OnProgress};
use super::report::CheckReport;
use super::walk::Sight;
use super::{examine, overlap, rebuild};
use crate::formats::ImageError;
use crate::formats::qcow2::header::{AUTOCLEAR_BITMAPS, Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use crate::storage::{Access, Storage};

/// Where the feature bits are in the header, which fit one sector.
const INCOMPATIBLE: u64 = 72;
const AUTOCLEAR: u64 = 88;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Leaked clusters are freed.
    Leaks,
    /// Whatever can be without losing data.
    All,
}

/// Checks and repairs the image in `storage`, which nobody else uses meanwhile.
///
/// The report says what is left; `leaks_fixed` and `corruptions_fixed` say how much is gone, and
/// `findings` what was there. If no corruption is left, the image is marked clean.
///
/// What cannot be repaired without losing data stays: tables that are named where none can be,
/// data beyond the end of the file. While such a table hides what it refers to, no leak is freed.
pub fn repair(
    storage: &dyn Storage,
    what: Repair,
    memory: usize,
    progress: OnProgress<'_>,
) -> Result<CheckReport, ImageError> {
    if storage.access() == Access::ReadOnly {
        return Err(ImageError::ReadOnly);
    }
    let job = Job { storage, memory, progress };
    let first = job.with_image(examine)?;
    if what == Repair::All {
        job.repair_references(&first)?;
    }
    let second = if what == Repair::All { job.with_image(examine)? } else { Sight::default() };
    let sight = if what == Repair::All { &second } else { &first };
    job.repair_leaks(sight)?;
    if what == Repair::All || (first.report.corruptions == first.copied && !first.blind) {
        job.with_image(|image| {
            copied::flags(image, Mend::Copied, &mut Sight::default())?;
            image.sync()
        })?;
    }
    let (mut last, overlap) = job.with_image(|image| {
        let last = examine(image)?.report;
        let overlap = overlap(image, &last)?;
        Ok((last, overlap))
    })?;
    let first = first.report;
    last.leaks_fixed = first.leaks.saturating_sub(last.leaks);
    last.corruptions_fixed = first.corruptions.saturating_sub(last.corruptions);
    (last.findings, last.unlisted) = (first.findings, first.unlisted);
    if let Some(text) = overlap {
        last.corruption(1, || text);
    }
    if last.corruptions == 0 && last.check_errors == 0 {
        job.mark_clean()?;
    }
    Ok(last)
}

struct Job<'a> {
    storage: &'a dyn Storage,
    memory: usize,
    progress: OnProgress<'a>,
}

impl Job<'_> {
    /// With the image as it is now.
    fn with_image<T>(
        &self,
        f: impl FnOnce(&Image<'_>) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let header = Header::read(self.storage)?;
        header.check_tables()?;
        f(&Image::new(self.storage, &header, self.memory, self.progress)?)
    }

    /// Repairs refcounts that are too low, then entries that can be said in a sound way.
    fn repair_references(&self, first: &Sight) -> Result<(), ImageError> {
        if first.bitmaps_broken {
            // Without the bit there are no bitmaps, and what they had is a leak.
            self.clear_bits(AUTOCLEAR, AUTOCLEAR_BITMAPS, |header| header.autoclear)?;
        }
        self.with_image(|image| {
            let now = if first.bitmaps_broken { Some(examine(image)?) } else { None };
            let sight = now.as_ref().unwrap_or(first);
            match sight.rebuild {
                true => rebuild::rebuild(image, sight),
                false => compare::settle_all(image, Settle::Raise),
            }
        })?;
        if !first.mendable {
            return Ok(());
        }
        // What the entries let go of is a leak afterwards.
        self.with_image(|image| {
            copied::flags(image, Mend::Entries, &mut Sight::default())?;
            image.sync()
        })
    }

    /// Frees what nothing refers to, where that is certain.
    fn repair_leaks(&self, sight: &Sight) -> Result<(), ImageError> {
        let certain = !sight.blind && !sight.rebuild && sight.report.check_errors == 0;
        match certain && sight.report.leaks > 0 {
            true => self.with_image(|image| compare::settle_all(image, Settle::Lower)),
            false => Ok(()),
        }
    }

    /// Clears bits of a field of the header, if any is set.
    fn clear_bits(
        &self,
        at: u64,
        bits: u64,
        field: impl Fn(&Header) -> u64,
    ) -> Result<(), ImageError> {
        self.with_image(|image| {
            let value = field(image.header);
            if value & bits != 0 {
                image.write(at, &(value & !bits).to_be_bytes(), "write the header")?;
                image.sync()?;
            }
            Ok(())
        })
    }

    fn mark_clean(&self) -> Result<(), ImageError> {
        let bits = INCOMPAT_DIRTY | INCOMPAT_CORRUPT;
        self.clear_bits(INCOMPATIBLE, bits, |header| header.incompatible)
    }
}
