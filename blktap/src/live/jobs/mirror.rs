//! A copy of the guest's disk, which the guest may go over to.
use std::ops::ControlFlow;
use std::sync::Arc;

use super::{JobError, Nothing, Opening, Scene, Stage, about};
use crate::copy::{Before, Part, plan_of};
use crate::disk::{Disk, Geometry};
use crate::live::{Discards, Name, Pass};

/// What becomes of the guest when its disk is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtTheEnd {
    /// It keeps its disk; the copy is that of one moment.
    Stay,
    /// It goes on with the copy.
    Switch,
}

/// Copies the disk to `target`, which is as large and may hold anything, and keeps both equal
/// until the word ([`Stage::Ready`]).
pub fn mirror(scene: &Scene<'_>, target: &Name, end: AtTheEnd) -> Result<(), JobError> {
    if target.path().zip(scene.name.path()).is_some_and(|(a, b)| super::paths::same_file(a, b)) {
        return Err(JobError::Other(format!("{target}: that is the guest's disk already")));
    }
    scene.is_cancelled()?;
    let copy = scene.host.open(target, Opening::Guest)?;
    let size = fits(scene.live.geometry(), copy.geometry(), target)?;
    let mut tracked = scene.live.track(Some((Arc::clone(&copy), Discards::Pass)))?;
    let mut pass = open_pass(scene, &*copy, Before::Unknown)?;
    let mut plan = |range, out: &mut Vec<Part>| {
        let planned = scene.live.with(|disk| plan_of(disk)(range, out));
        planned.unwrap_or_else(|| Err(std::io::Error::other("the disk is paused")))
    };
    let mut tick = |done| scene.watch.tick(done, size);
    pass.run(&mut tracked, &mut plan, &mut tick)?;
    let word = scene.watch.decide(Stage::Ready, &|| tracked.failure());
    if let Some(why) = tracked.failure() {
        return Err(JobError::Other(why));
    }
    if word == ControlFlow::Break(()) {
        return Err(JobError::Cancelled);
    }
    let paused = tracked.pause(scene.patience)?;
    pass.flush()?;
    drop(pass);
    copy.close().map_err(about(target))?;
    drop(copy);
    if end == AtTheEnd::Switch {
        scene.swap(&paused, target, &mut Nothing)?;
        tracing::info!(
            "{target}: the guest goes on here; paused for {} ms",
            paused.lasted().as_millis()
        );
    }
    Ok(())
}

/// The bytes of both.
fn fits(ours: Geometry, copy: Geometry, target: &Name) -> Result<u64, JobError> {
    let refuse = |text: &str| Err(JobError::Other(format!("{target}: {text}")));
    match () {
        () if copy.read_only || ours.read_only => refuse("a disk that is only read has no copies"),
        () if copy.size < ours.size => refuse("it is smaller than the guest's disk"),
        () if copy.logical_block > ours.logical_block => refuse("its blocks are larger"),
        () => Ok(ours.size),
    }
}

/// Queues of the guest's disk and of another.
pub(super) fn open_pass(
    scene: &Scene<'_>,
    target: &dyn Disk,
    before: Before,
) -> Result<Pass, JobError> {
    let pass = scene.live.with(|disk| Pass::new(disk, target, before));
    match pass {
        Some(pass) => Ok(pass?),
        None => Err(JobError::Other("the disk is paused".into())),
    }
}
