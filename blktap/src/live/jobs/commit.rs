//! What the guest's disk has above one of the images it builds on goes into that one.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{self, Layer, Rebase};
use super::mirror::open_pass;
use super::{Change, JobError, Opening, Scene, about};
use crate::copy::{Before, Part};
use crate::disk::Disk;
use crate::formats::qcow2::resize;
use crate::image::ImageFormat;
use crate::live::Discards;

/// Copies what the disk has above `base` (a file of its chain; without one the nearest) into it,
/// and lets the guest go on there. The image that the guest had is emptied, so that who opens it
/// reads the same; a VHD is renamed, so that nobody takes it for the disk.
pub fn commit(scene: &Scene<'_>, base: Option<&Path>) -> Result<(), JobError> {
    let layers = chain::layers(scene)?;
    let at = chain::find(&layers, base)?;
    let size = scene.live.geometry().size;
    chain::make_room(&layers[at], layers.get(at + 1), size)?;
    let name = layers[at].name();
    // The chain has it open too, for reading: what is written here is hidden there by what lies
    // above, and what is freed here is not used anew as long as this lease is held.
    let below = scene.host.open(&name, Opening::Below)?;
    let mut leases = below.image().map(|image| image.format().leases().holder());
    let lease = leases.as_mut().map(|holder| holder.take());
    let mut tracked = scene.live.track(Some((Arc::clone(&below), Discards::Drop)))?;
    let mut pass = open_pass(scene, &*below, Before::Unknown)?;
    let mut plan = |range, out: &mut Vec<Part>| {
        chain::status(scene, range, at, out, |status| chain::what_of(status, at))
    };
    let mut tick = |done| scene.watch.tick(done, size);
    pass.run(&mut tracked, &mut plan, &mut tick)?;
    let paused = tracked.pause(scene.patience)?;
    pass.flush()?;
    drop(pass);
    if let (Some(holder), Some(lease)) = (&mut leases, lease) {
        holder.end(lease);
    }
    drop(leases);
    below.close().map_err(about(&name))?;
    drop(below);
    let mut change = Retire::new(&layers, at)?;
    scene.swap(&paused, &name, &mut change)?;
    change.put_aside();
    tracing::info!("{name}: the guest goes on here; paused for {} ms", paused.lasted().as_millis());
    Ok(())
}

/// The end of an image whose data are all in what it builds on.
struct Retire {
    top: Layer,
    /// It builds on the one that was written, where that was not the nearest.
    rebase: Option<Rebase>,
}

impl Retire {
    fn new(layers: &[Layer], at: usize) -> Result<Retire, JobError> {
        let top = layers[0].clone();
        let rebase = match top.format == ImageFormat::Qcow2 && at > 1 {
            true => Some(Rebase::new(&top, layers.get(1), layers.get(at))?),
            false => None,
        };
        Ok(Retire { top, rebase })
    }

    /// Renames a VHD. Only when the guest's disk is recorded under its new name, and before the
    /// guest goes on: at any moment the disk must be where the record says.
    fn put_aside(&self) {
        let path = &self.top.path;
        if self.top.format == ImageFormat::Qcow2 {
            return;
        }
        let mut name = path.clone().into_os_string();
        name.push(".committed");
        let renamed = std::fs::rename(path, PathBuf::from(name)).map_err(about(path.display()));
        if let Err(e) = renamed.and_then(|()| super::paths::sync_folder(path)) {
            tracing::warn!("{e}: it is not the disk any more and keeps its name");
        }
    }
}

impl Change for Retire {
    fn make(&mut self) -> Result<(), JobError> {
        let path = &self.top.path;
        if let Some(rebase) = &mut self.rebase {
            // It reads the same with all that it has.
            rebase.make()?;
        }
        if self.top.format == ImageFormat::Qcow2 {
            return resize::empty(&chain::file(path)?).map_err(about(path.display()));
        }
        Ok(())
    }

    /// Emptied, on what was written, it reads the same.
    fn undo(&mut self) -> Result<(), JobError> {
        Ok(())
    }
}
