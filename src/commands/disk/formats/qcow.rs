//! QCOW images of version 1: read, and written whole by a conversion.

use std::sync::Arc;

use blktap::copy::{self, Before, Copied, CopyOptions, Plan as CopyPlan};
use blktap::formats::Format;
use blktap::formats::qcow::{CreateOptions, Packing as Kept, Qcow, QcowWriter};
use blktap::storage::{FileStorage, Storage};
use parking_lot::Mutex;

use super::super::create::NewImage;
use super::super::open::Opened;
use super::super::work::Work;
use super::super::{Result, Usage, about};
use super::{Details, Packing};

pub const HELP: &str = "\
size=SIZE             bytes of the disk
";

/// Bytes that are read at once, and packed by one thread: a multiple of both cluster sizes.
const PIECE: usize = 1 << 20;

pub struct Plan {
    options: CreateOptions,
}

pub fn plan(new: &mut NewImage<'_>) -> Result<Plan> {
    let size = new.size.checked_next_multiple_of(512);
    let size = size.ok_or_else(|| Usage(format!("{} bytes: too large", new.size)))?;
    Ok(Plan { options: CreateOptions { size, backing: None } })
}

pub fn create(plan: &Plan, storage: &Arc<FileStorage>) -> Result<()> {
    let name = storage.name();
    let storage = Arc::clone(storage) as Arc<dyn Storage>;
    let writer = QcowWriter::create(storage, &plan.options).map_err(about(&name))?;
    writer.finish().map_err(about(&name))
}

pub fn details(storage: Arc<FileStorage>) -> Result<Details> {
    let image = Qcow::open(storage)?;
    Ok(Details {
        size: image.size(),
        cluster_size: Some(image.cluster()),
        backing: image.backing(),
        ..Details::default()
    })
}

/// Copies into a new image.
pub fn pack(
    packing: &Packing<'_>,
    source: &Opened,
    mut how: CopyOptions,
    plan: CopyPlan<'_>,
    work: &mut Work,
) -> Result<Copied> {
    let name = packing.path.display().to_string();
    let size = how.len;
    let storage = packing.storage()?;
    let writer = QcowWriter::create(storage, &CreateOptions { size, backing: None });
    let writer = writer.map_err(about(&name))?;
    let cluster = writer.cluster();
    let kept = if packing.compress { Kept::Compressed } else { Kept::Plain };
    let leaves_out = how.before == Before::Zeroes;
    let writer = Mutex::new(writer);
    let pack = |at: u64, bytes: &[u8]| {
        for (number, bytes) in (at / cluster..).zip(bytes.chunks(cluster as usize)) {
            if !leaves_out || bytes.iter().any(|b| *b != 0) {
                writer.lock().write(number, bytes, kept)?;
            }
        }
        Ok(())
    };
    how.piece = PIECE;
    let copied =
        copy::copy_packed(&*source.disk, &pack, &how, plan, &mut |done| work.tick(done, size))?;
    writer.into_inner().finish().map_err(about(&name))?;
    Ok(copied)
}
