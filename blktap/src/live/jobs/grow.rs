//! A larger disk under the guest.
use std::sync::Arc;

use parking_lot::Mutex;

use super::chain::{self, Layer};
use super::{Change, JobError, Opening, Scene, about};
use crate::blocking;
use crate::disk::{Disk, DiskQueue};
use crate::formats::ImageError;
use crate::formats::qcow2::header::Header;
use crate::formats::qcow2::resize::{self, Around, Below, Shrink};
use crate::formats::vhd::Vhd;
use crate::image::ImageFormat;
use crate::live::Name;
use crate::storage::Storage;

/// Gives the guest's disk `size` bytes, of which the new ones read as zeroes.
pub fn grow(scene: &Scene<'_>, size: u64) -> Result<(), JobError> {
    let old = scene.live.geometry().size;
    let Name::File { path, format } = scene.name else {
        return Err(JobError::Other("a server's export is resized by its server".into()));
    };
    if size < old || !size.is_multiple_of(512) {
        let text = format!(
            "a disk of {old} bytes cannot become one of {size} under a guest: it can only grow, by whole sectors"
        );
        return Err(JobError::Other(text));
    }
    if !std::fs::metadata(path).is_ok_and(|m| m.is_file()) {
        let text = format!("{}: resize the device itself, then `ringback resize`", path.display());
        return Err(JobError::Other(text));
    }
    let own = Layer { path: path.clone(), format: *format, size: old, id: None };
    let below = match chain::layers(scene)?.get(1) {
        Some(below) => Some(BelowDisk::new(scene.host.open(&below.name(), Opening::Read)?)?),
        None => None,
    };
    let mut change = Grow { own, below, size };
    scene.is_cancelled()?;
    let paused = scene.live.pause(scene.patience)?;
    scene.swap(&paused, scene.name, &mut change)?;
    tracing::info!("{}: {size} bytes; paused for {} ms", scene.name, paused.lasted().as_millis());
    Ok(())
}

/// What the image builds on.
struct BelowDisk {
    queue: Mutex<Box<dyn DiskQueue>>,
    size: u64,
    /// Last, so that it is there as long as the queue.
    _disk: Arc<dyn Disk>,
}

impl BelowDisk {
    fn new(disk: Arc<dyn Disk>) -> Result<BelowDisk, JobError> {
        let queue = disk.queue(1).map_err(about("the backing file"))?;
        Ok(BelowDisk { queue: Mutex::new(queue), size: disk.geometry().size, _disk: disk })
    }
}

impl Below for BelowDisk {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let there = self.size.saturating_sub(offset).min(into.len() as u64) as usize;
        let (bytes, beyond) = into.split_at_mut(there);
        beyond.fill(0);
        if bytes.is_empty() {
            return Ok(());
        }
        // Whole sectors.
        let start = offset - offset % 512;
        let end = (offset + there as u64).next_multiple_of(512);
        let mut whole = vec![0; (end - start) as usize];
        let read = blocking::read_at(&mut **self.queue.lock(), start, &mut whole);
        read.map_err(ImageError::io("read the backing file"))?;
        bytes.copy_from_slice(&whole[(offset - start) as usize..][..there]);
        Ok(())
    }
}

struct Grow {
    own: Layer,
    below: Option<BelowDisk>,
    size: u64,
}

impl Change for Grow {
    fn make(&mut self) -> Result<(), JobError> {
        let storage = chain::file(&self.own.path)?;
        let parent = self.below.as_ref().map(Below::size);
        let grown = match self.own.format {
            ImageFormat::Raw => storage
                .set_size(self.size)
                .and_then(|()| storage.sync())
                .map_err(ImageError::io("make the file larger")),
            ImageFormat::Vhd => Vhd::grow(&storage, parent, self.size),
            ImageFormat::Qcow2 => self.grow_qcow2(&storage),
            ImageFormat::Qcow => Err(ImageError::Unsupported("qcow has no resizing".into())),
        };
        grown.map_err(about(self.own.path.display()))
    }

    /// A larger one serves as well.
    fn undo(&mut self) -> Result<(), JobError> {
        Ok(())
    }
}

impl Grow {
    fn grow_qcow2(&self, storage: &dyn Storage) -> Result<(), ImageError> {
        if Header::read(storage)?.has_data_file() {
            let text = "an image with an external data file is not resized under a guest";
            return Err(ImageError::Unsupported(text.into()));
        }
        let below = self.below.as_ref().map(|below| below as &dyn Below);
        resize::resize(storage, Around { data_file: None, below }, self.size, Shrink::Refuse)
    }
}
