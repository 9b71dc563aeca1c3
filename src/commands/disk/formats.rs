//! What the commands have to know of each format.

mod qcow;
mod qcow2;
mod raw;
mod vhd;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blktap::copy::{Copied, CopyOptions, Plan as CopyPlan};
use blktap::formats::qcow2::header::Header;
use blktap::formats::{BackingName, BitmapInfo};
use blktap::image::ImageFormat;
use blktap::storage::{self, Cache, FileStorage, Lock, OpenOptions, Sharing, Storage};
use serde_json::Value;

use super::check::Checked;
use super::create::{NewBacking, NewImage};
use super::measure::Measured;
use super::open::{Opened, Opening};
use super::options::Options;
use super::resize::Wanted;
use super::snapshot::SnapshotInfo;
use super::work::Work;
use super::{Result, Usage, about, bitmap, snapshot};
use crate::cli::disk::Repair;

/// How an image is made, with all options understood.
pub enum Plan {
    Raw(raw::Plan),
    Qcow(qcow::Plan),
    Qcow2(Box<qcow2::Plan>),
    Vhd(vhd::Plan),
}

/// What an image says of itself.
#[derive(Default)]
pub struct Details {
    /// Bytes of its disk.
    pub size: u64,
    pub cluster_size: Option<u64>,
    pub dirty: bool,
    pub backing: Option<BackingName>,
    pub snapshots: Vec<SnapshotInfo>,
    /// What only this format has, by qemu-img's names.
    pub specific: Vec<(&'static str, Value)>,
}

/// The format's name in qemu-img's documents.
pub fn qemu_name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Vhd => "vpc",
        other => other.name(),
    }
}

/// For what a format has not, with the formats that have it.
fn lacks<T>(format: ImageFormat, what: &str, has: &str) -> Result<T> {
    Err(Usage(format!("format {format} has no {what}; {has}")).into())
}

/// Understands the options of a new image.
pub fn plan(new: &mut NewImage<'_>) -> Result<Plan> {
    if new.backing.is_some() {
        can_build_on(new.format)?;
    }
    match new.format {
        ImageFormat::Raw => Ok(Plan::Raw(raw::plan(new)?)),
        ImageFormat::Qcow => Ok(Plan::Qcow(qcow::plan(new)?)),
        ImageFormat::Qcow2 => Ok(Plan::Qcow2(Box::new(qcow2::plan(new)?))),
        ImageFormat::Vhd => Ok(Plan::Vhd(vhd::plan(new)?)),
    }
}

impl Plan {
    pub fn carry_out(&self, storage: &Arc<FileStorage>, work: &mut Work) -> Result<()> {
        match self {
            Plan::Raw(plan) => raw::create(plan, storage, work),
            Plan::Qcow(plan) => qcow::create(plan, storage),
            Plan::Qcow2(plan) => qcow2::create(plan, storage),
            Plan::Vhd(plan) => vhd::create(plan, storage, work),
        }
    }
}

/// The options of a format, one a line.
pub fn help(format: ImageFormat) -> String {
    match format {
        ImageFormat::Raw => raw::HELP.into(),
        ImageFormat::Qcow => qcow::HELP.into(),
        ImageFormat::Qcow2 => qcow2::HELP.into(),
        ImageFormat::Vhd => vhd::HELP.into(),
    }
}

/// What the image says of itself.
pub fn details(opening: &Opening<'_>, format: ImageFormat) -> Result<Details> {
    let storage = opening.storage()?;
    match format {
        ImageFormat::Raw => {
            let size = storage.size().map_err(about(opening.file))?.next_multiple_of(512);
            Ok(Details { size, ..Details::default() })
        }
        ImageFormat::Vhd => vhd::details(storage).map_err(about(opening.file)),
        ImageFormat::Qcow2 => qcow2::details(&*storage).map_err(about(opening.file)),
        ImageFormat::Qcow => qcow::details(storage).map_err(about(opening.file)),
    }
}

/// Bytes of the image's disk.
pub fn size(opening: &Opening<'_>, format: ImageFormat) -> Result<u64> {
    Ok(details(&opening.clone().alone(), format)?.size)
}

/// Checks, and repairs; `None` where there is nothing to check.
pub fn check(
    opening: &Opening<'_>,
    format: ImageFormat,
    repair: Option<Repair>,
    work: &mut Work,
) -> Result<Option<Checked>> {
    if matches!(format, ImageFormat::Raw | ImageFormat::Qcow) {
        return Ok(None);
    }
    let storage = opening.storage()?;
    let checked = match format {
        ImageFormat::Vhd => vhd::check(&*storage, repair),
        _ => qcow2::check(&*storage, repair, work),
    };
    checked.map(Some).map_err(about(opening.file))
}

/// Changes the size of the disk.
pub fn resize(
    opening: &Opening<'_>,
    format: ImageFormat,
    wanted: &Wanted,
    work: &mut Work,
) -> Result<()> {
    let alone = opening.clone().alone();
    match format {
        ImageFormat::Raw => raw::resize(&alone.storage()?, wanted, work),
        ImageFormat::Vhd => vhd::resize(opening, wanted).map_err(about(opening.file)),
        ImageFormat::Qcow2 => qcow2::resize(opening, wanted).map_err(about(opening.file)),
        other => lacks(other, "resizing", "convert it to qcow2"),
    }
}

/// How large an image of a format would be.
pub fn measure(
    format: ImageFormat,
    size: u64,
    options: &mut Options,
    source: Option<&Opened>,
) -> Result<Measured> {
    match format {
        ImageFormat::Raw => raw::measure(size, options),
        ImageFormat::Qcow2 => qcow2::measure(size, options, source),
        other => lacks(other, "measure", "raw and qcow2 have"),
    }
}

/// A snapshot inside the image, as a disk.
pub fn snapshot_disk(opening: &Opening<'_>, name: &str) -> Result<Opened> {
    match opening.format()? {
        ImageFormat::Qcow2 => qcow2::snapshot_disk(opening, name).map_err(about(opening.file)),
        other => lacks(other, "snapshots", "qcow2 has"),
    }
}

/// Whether clusters can be compressed, where that is asked for.
pub fn can_compress(format: ImageFormat, asked: bool) -> Result<()> {
    match format {
        _ if !asked => Ok(()),
        ImageFormat::Qcow | ImageFormat::Qcow2 => Ok(()),
        other => lacks(other, "compression", "qcow2 and qcow have"),
    }
}

/// Whether a target of the format that is there can be written.
pub fn can_write(format: ImageFormat) -> Result<()> {
    match format {
        ImageFormat::Qcow => {
            let text = "qcow images are only made whole, not written: leave -n out";
            Err(Usage(text.into()).into())
        }
        _ => Ok(()),
    }
}

/// A target that is written cluster by cluster instead of as a disk.
pub struct Packing<'a> {
    pub path: &'a Path,
    pub format: ImageFormat,
    pub compress: bool,
    pub cache: Cache,
}

impl Packing<'_> {
    /// Copies into the target, which was made and is empty, and makes it durable.
    pub fn carry_out(
        &self,
        source: &Opened,
        how: CopyOptions,
        plan: CopyPlan<'_>,
        work: &mut Work,
    ) -> Result<Copied> {
        match self.format {
            ImageFormat::Qcow => qcow::pack(self, source, how, plan, work),
            ImageFormat::Qcow2 => qcow2::pack(self, source, how, plan, work),
            other => lacks(other, "compression", "qcow2 and qcow have"),
        }
    }

    /// The target's file.
    fn storage(&self) -> Result<Arc<FileStorage>> {
        let lock = Lock::Held { sharing: Sharing::Exclusive, wait: Duration::ZERO };
        Ok(Arc::new(storage::open(&OpenOptions::new(self.path).cache(self.cache).lock(lock))?))
    }
}

/// Whether images of the format build on others.
pub fn can_build_on(format: ImageFormat) -> Result<()> {
    match format {
        ImageFormat::Raw => lacks(format, "backing file", "qcow2 and vhd have"),
        ImageFormat::Qcow => lacks(format, "room for the backing file's format", "qcow2 has"),
        _ => Ok(()),
    }
}

/// Writes another backing file into the header.
pub fn set_backing(
    opening: &Opening<'_>,
    format: ImageFormat,
    backing: Option<&NewBacking>,
) -> Result<()> {
    match format {
        ImageFormat::Qcow2 => {
            let storage = opening.clone().alone().storage()?;
            qcow2::set_backing(&*storage, backing).map_err(about(opening.file))
        }
        other => Err(format!("{}: format {other} cannot be rebased", opening.file).into()),
    }
}

/// Whether the image can be emptied after a commit.
pub fn can_empty(format: ImageFormat) -> Result<()> {
    match format {
        ImageFormat::Qcow2 => Ok(()),
        other => lacks(other, "way to be emptied", "keep the image as it is with -d"),
    }
}

/// Empties the image in `storage`: all of it comes from its backing file afterwards.
pub fn empty(storage: &dyn Storage, format: ImageFormat) -> Result<()> {
    can_empty(format)?;
    let emptied = blktap::formats::qcow2::resize::empty(storage);
    emptied.map_err(about(&storage.name()))
}

/// Snapshots inside the image.
pub fn snapshot(
    opening: &Opening<'_>,
    format: ImageFormat,
    act: snapshot::Act,
    name: &str,
) -> Result<()> {
    if format != ImageFormat::Qcow2 {
        return lacks(format, "snapshots", "qcow2 has");
    }
    let storage = opening.clone().alone().storage()?;
    qcow2::snapshot(&*storage, act, name).map_err(about(opening.file))
}

/// The image's dirty bitmaps.
pub fn bitmaps(opening: &Opening<'_>, format: ImageFormat) -> Result<Vec<BitmapInfo>> {
    if format != ImageFormat::Qcow2 {
        return lacks(format, "bitmaps", "qcow2 has");
    }
    let storage = opening.storage()?;
    let header = Header::read(&*storage).map_err(about(opening.file))?;
    qcow2::bitmaps(&*storage, &header).map_err(about(opening.file))
}

/// Adds, removes, changes a dirty bitmap.
pub fn change_bitmap(
    opening: &Opening<'_>,
    format: ImageFormat,
    act: bitmap::Act,
    name: &str,
) -> Result<()> {
    if format != ImageFormat::Qcow2 {
        return lacks(format, "bitmaps", "qcow2 has");
    }
    let storage = opening.storage()?;
    qcow2::change_bitmap(&*storage, act, name).map_err(about(opening.file))
}
