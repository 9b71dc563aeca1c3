//! Raw images: the file is the disk.

use std::sync::Arc;

use blktap::storage::{FileStorage, Storage};

use super::super::create::NewImage;
use super::super::measure::Measured;
use super::super::options::Options;
use super::super::resize::Wanted;
use super::super::work::Work;
use super::super::{Result, Usage, about};
use crate::cli::disk::Preallocation;

pub const HELP: &str = "\
size=SIZE             bytes of the disk
preallocation=HOW     off, falloc, full
";

/// Bytes that are set aside or written between two looks whether to go on.
const STEP: u64 = 64 << 20;
/// Bytes that are written at once.
const PIECE: usize = 1 << 20;

pub struct Plan {
    size: u64,
    preallocation: Preallocation,
}

/// The ways that a format has to allocate ahead.
pub const WAYS: [(&str, Preallocation); 4] = [
    ("off", Preallocation::Off),
    ("metadata", Preallocation::Metadata),
    ("falloc", Preallocation::Falloc),
    ("full", Preallocation::Full),
];

pub fn plan(new: &mut NewImage<'_>) -> Result<Plan> {
    let preallocation = new.options.choice("preallocation", &WAYS)?.unwrap_or(Preallocation::Off);
    if preallocation == Preallocation::Metadata {
        return Err(no_metadata());
    }
    let size = new.size.checked_next_multiple_of(512).filter(|s| i64::try_from(*s).is_ok());
    let size = size.ok_or_else(|| Usage(format!("{} bytes: too large for a file", new.size)))?;
    Ok(Plan { size, preallocation })
}

pub fn no_metadata() -> Box<dyn std::error::Error> {
    Usage("preallocation=metadata: raw has no metadata; it has off, falloc and full".into()).into()
}

pub fn create(plan: &Plan, storage: &Arc<FileStorage>, work: &mut Work) -> Result<()> {
    let name = storage.name();
    storage.set_size(0).map_err(about(&name))?;
    storage.set_size(plan.size).map_err(about(&format!("{name}: {} bytes", plan.size)))?;
    allocate(storage, 0..plan.size, plan.preallocation, work)?;
    storage.sync().map_err(about(&name))
}

/// Sets `range` of the file aside.
pub fn allocate(
    storage: &FileStorage,
    range: std::ops::Range<u64>,
    how: Preallocation,
    work: &mut Work,
) -> Result<()> {
    let name = storage.name();
    if matches!(how, Preallocation::Off | Preallocation::Metadata) {
        return Ok(());
    }
    let zeroes = vec![0; PIECE];
    let step = if how == Preallocation::Full { PIECE as u64 } else { STEP };
    let (mut at, mut synced) = (range.start, range.start);
    while at < range.end {
        let len = step.min(range.end - at);
        let done = match how {
            Preallocation::Full => storage.write_at(at, &zeroes[..len as usize]),
            _ => storage.allocate(at..at + len),
        };
        done.map_err(about(&name))?;
        at += len;
        // In parts, so that the last one is not long.
        if how == Preallocation::Full && at - synced >= STEP {
            storage.sync().map_err(about(&name))?;
            synced = at;
        }
        work.go_on(at - range.start, range.end - range.start)?;
    }
    Ok(())
}

pub fn resize(storage: &Arc<FileStorage>, wanted: &Wanted, work: &mut Work) -> Result<()> {
    let name = storage.name();
    if wanted.preallocation == Preallocation::Metadata {
        return Err(no_metadata());
    }
    storage.set_size(wanted.new).map_err(about(&name))?;
    if wanted.new > wanted.old
        && let Err(e) = allocate(storage, wanted.old..wanted.new, wanted.preallocation, work)
    {
        // As it was.
        storage.set_size(wanted.old).map_err(about(&name))?;
        return Err(format!("{e}; its size is {} bytes as before", wanted.old).into());
    }
    storage.sync().map_err(about(&name))
}

/// What is not written takes room in the file's size as well.
pub fn measure(size: u64, options: &mut Options) -> Result<Measured> {
    options.choice("preallocation", &WAYS)?;
    let size = size.checked_next_multiple_of(512).ok_or_else(|| Usage("too large".into()))?;
    Ok(Measured { required: size, fully_allocated: size, bitmaps: None })
}
