//! An image in the middle of the chain goes into the one that it builds on.
use std::ops::Range;
use std::path::Path;

use super::chain::{self, Rebase};
use super::{JobError, Opening, Scene, about};
use crate::blocking;
use crate::copy::{CopyError, CopyOptions, Part, copy};
use crate::disk::{Disk, Op};

/// Longest stretch that is zeroed by one request.
const STEP: u64 = 64 << 20;

/// Copies the layer in the file `middle`, which the guest's disk builds on and which nobody
/// writes, into its parent; what was built on it builds on the parent afterwards.
pub fn coalesce(scene: &Scene<'_>, middle: &Path) -> Result<(), JobError> {
    let layers = chain::layers(scene)?;
    let at = chain::find(&layers, Some(middle))?;
    let Some(parent) = layers.get(at + 1) else {
        let text = format!("{}: it builds on no other image", middle.display());
        return Err(JobError::Other(text));
    };
    let (child, layer) = (&layers[at - 1], &layers[at]);
    let mut change = Rebase::new(child, Some(layer), Some(parent))?;
    chain::make_room(parent, layers.get(at + 2), layer.size)?;
    let source = scene.host.open(&layer.name(), Opening::Alone)?;
    // As for a commit: what is written is hidden by the layer that it comes from.
    let target = scene.host.open(&parent.name(), Opening::Below)?;
    let mut leases = target.image().map(|image| image.format().leases().holder());
    let lease = leases.as_mut().map(|holder| holder.take());
    let mut plan = |range: Range<u64>, out: &mut Vec<Part>| {
        let Some(image) = source.image() else {
            return Err(std::io::Error::other("the layer is no image"));
        };
        let mut found = Vec::new();
        image.status(range, 1, &mut found)?;
        out.extend(found.iter().map(|s| Part { len: s.len, what: chain::what_of(s, 1) }));
        Ok(())
    };
    let mut tick = |done| scene.watch.tick(done, layer.size);
    let copied =
        copy(&*source, &*target, &CopyOptions::new(layer.size), &mut plan, None, &mut tick);
    copied.map_err(|e| match e {
        CopyError::Stopped => JobError::Cancelled,
        e => JobError::Other(format!("{}: {e}", parent.path.display())),
    })?;
    // What a layer that is shorter has hidden must not be seen.
    zero_behind(&*target, layer.size, child.size).map_err(about(parent.path.display()))?;
    drop(source);
    if let (Some(holder), Some(lease)) = (&mut leases, lease) {
        holder.end(lease);
    }
    drop(leases);
    target.close().map_err(about(parent.path.display()))?;
    drop(target);
    scene.is_cancelled()?;
    let paused = scene.live.pause(scene.patience)?;
    scene.swap(&paused, scene.name, &mut change)?;
    tracing::info!("{}: coalesced; paused for {} ms", scene.name, paused.lasted().as_millis());
    Ok(())
}

fn zero_behind(disk: &dyn Disk, from: u64, to: u64) -> std::io::Result<()> {
    let (mut at, end) = (from, to.min(disk.geometry().size));
    let mut queue = disk.queue(1)?;
    while at < end {
        let len = (end - at).min(STEP);
        blocking::range(&mut *queue, Op::WriteZeroes, at, len)?;
        at += len;
    }
    blocking::flush(&mut *queue)
}
