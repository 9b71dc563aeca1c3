//! What the guest's disk has from the images it builds on comes into its own image.
use std::path::Path;

use super::chain::{self, Layer, Rebase};
use super::mirror::open_pass;
use super::{JobError, Scene};
use crate::copy::{Before, Part, What};
use crate::disk::Disk;
use crate::image::{Status, StatusPlace};
use crate::live::Pass;

/// Copies into the disk's own image what it has from the images above `base`, which it builds on
/// afterwards; without one from all, and it builds on none.
pub fn stream(scene: &Scene<'_>, base: Option<&Path>) -> Result<(), JobError> {
    let layers = chain::layers(scene)?;
    let at = match base {
        Some(base) => chain::find(&layers, Some(base))?,
        None => layers.len(),
    };
    if at < 2 {
        let text = "there is nothing between the disk's own image and that one";
        return Err(JobError::Other(text.into()));
    }
    let mut change = Rebase::new(&layers[0], layers.get(1), layers.get(at))?;
    let size = scene.live.geometry().size;
    scene.is_cancelled()?;
    let mut tracked = scene.live.track(None)?;
    let mut pass = own_pass(scene)?;
    let mut plan = |range, out: &mut Vec<Part>| {
        chain::status(scene, range, at, out, |status| what_of(status, at, layers.get(at)))
    };
    let mut tick = |done| scene.watch.tick(done, size);
    pass.run(&mut tracked, &mut plan, &mut tick)?;
    drop(pass);
    let paused = tracked.pause(scene.patience)?;
    scene.swap(&paused, scene.name, &mut change)?;
    tracing::info!("{}: streamed; paused for {} ms", scene.name, paused.lasted().as_millis());
    Ok(())
}

fn own_pass(scene: &Scene<'_>) -> Result<Pass, JobError> {
    let pass = scene.live.with(|disk| open_pass(scene, disk, Before::Unknown));
    pass.unwrap_or_else(|| Err(JobError::Other("the disk is paused".into())))
}

/// What the top has itself stays. What reads as zeroes must be written only where something
/// else would be seen afterwards.
fn what_of(status: &Status, at: usize, base: Option<&Layer>) -> What {
    match chain::what_of(status, at) {
        _ if status.layer == 0 && status.place != StatusPlace::Nowhere => What::Skip,
        What::Zero if base.is_none() => What::Skip,
        what => what,
    }
}
