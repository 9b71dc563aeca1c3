//! A new overlay over the guest's disk.
use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::paths::{name_from, real_path, same_file, sync_folder};
use super::{Change, JobError, Nothing, Opening, Scene, Stage, about};
use crate::disk::Disk;
use crate::formats::BackingName;
use crate::formats::qcow2::create as qcow2;
use crate::formats::vhd::{self, NewParent, Vhd};
use crate::image::{ImageFormat, StatusPlace};
use crate::live::Name;
use crate::storage::{self, Cache, FileStorage, OpenOptions};

/// What becomes of the present file's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Old {
    /// It keeps it, and the overlay has its own.
    Keeps,
    /// It is called this from now on, in its folder, and the overlay takes over its name: what
    /// names the guest's disk elsewhere finds the newest data.
    Moves(PathBuf),
}

/// Makes `overlay` on top of the disk as it is at one moment, and lets the guest go on in it;
/// the disk's new name. The stages [`Paused`](Stage::Paused) and [`Swapped`](Stage::Swapped) are
/// there so that several disks of a guest can be taken at one moment.
pub fn snapshot(scene: &Scene<'_>, overlay: &Name, old: &Old) -> Result<Name, JobError> {
    let (Name::File { path: base, format: base_format }, Name::File { path, format }) =
        (scene.name, overlay)
    else {
        return Err(JobError::Other("a server's export has no overlays, and is none".into()));
    };
    if same_file(base, path) {
        let text = format!("{}: that is the guest's disk already", path.display());
        return Err(JobError::Other(text));
    }
    let (mut named, mut below) = (overlay.clone(), base.clone());
    let mut change: Box<dyn Change> = Box::new(Nothing);
    if let Old::Moves(to) = old {
        let moves = Moves::new(base, to, path)?;
        if format != base_format {
            // A reader of the old name would take one for the other.
            let text =
                format!("an overlay of format {base_format} can take over the name, not {format}");
            return Err(JobError::Other(text));
        }
        (named, below) = (scene.name.clone(), moves.to.clone());
        change = Box::new(moves);
    }
    let new = NewOverlay { path, format: *format, base, below: &below, below_format: *base_format };
    new.make(scene)?;
    let result = take(scene, &named, &mut *change);
    if result.is_err() && path.exists() {
        // Nothing names it.
        std::fs::remove_file(path).map_err(about(path.display()))?;
    }
    result.map(|()| named)
}

fn take(scene: &Scene<'_>, named: &Name, change: &mut dyn Change) -> Result<(), JobError> {
    scene.is_cancelled()?;
    let paused = scene.live.pause(scene.patience)?;
    if scene.watch.decide(Stage::Paused, &|| None).is_break() {
        return Err(JobError::Cancelled);
    }
    scene.swap(&paused, named, change)?;
    if scene.watch.decide(Stage::Swapped, &|| None) == ControlFlow::Break(()) {
        scene.back(&paused, change)?;
        return Err(JobError::Cancelled);
    }
    tracing::info!("{named}: a new overlay; paused for {} ms", paused.lasted().as_millis());
    Ok(())
}

/// What an overlay is called until it is whole. A file of that name is nobody's.
fn draft_of(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".ringback-new");
    path.with_file_name(name)
}

struct NewOverlay<'a> {
    path: &'a Path,
    format: ImageFormat,
    /// The file that it builds on, by its present name.
    base: &'a Path,
    /// By the name that it will have.
    below: &'a Path,
    below_format: ImageFormat,
}

impl NewOverlay<'_> {
    /// Makes it, durable with its name.
    fn make(&self, scene: &Scene<'_>) -> Result<(), JobError> {
        let path = self.path;
        let name = name_from(path, self.below)?;
        // What an interrupted snapshot has left, whole.
        if path.exists() {
            if !self.is_left_over(scene, &name) {
                let text = format!("{}: there is a file of that name", path.display());
                return Err(JobError::Other(text));
            }
            std::fs::remove_file(path).map_err(about(path.display()))?;
        }
        // It has its name when it is whole.
        let draft = draft_of(path);
        let made = self.write_draft(scene, &draft, name);
        let made = made.and_then(|()| {
            std::fs::hard_link(&draft, path).map_err(about(path.display()))?;
            sync_folder(path)
        });
        let removed = std::fs::remove_file(&draft).map_err(about(draft.display()));
        made.and(removed)
    }

    fn write_draft(&self, scene: &Scene<'_>, draft: &Path, name: String) -> Result<(), JobError> {
        let file = File::options().create(true).truncate(true).write(true).open(draft);
        drop(file.map_err(about(draft.display()))?);
        let options = OpenOptions::new(draft).cache(Cache::Writeback);
        let storage = storage::open(&options).map_err(about(draft.display()))?;
        self.write(scene, &storage, name)
    }

    fn write(&self, scene: &Scene<'_>, to: &FileStorage, name: String) -> Result<(), JobError> {
        let size = scene.live.geometry().size;
        let made = match self.format {
            ImageFormat::Qcow2 => {
                let mut options = qcow2::CreateOptions::new(size);
                let format = match self.below_format {
                    ImageFormat::Vhd => "vpc",
                    other => other.name(),
                };
                options.backing = Some(BackingName { name, format: Some(format.to_owned()) });
                qcow2::create(to, None, &options)
            }
            ImageFormat::Vhd => {
                let id = |disk: &dyn Disk| disk.image().and_then(|i| i.format().unique_id());
                let modified = std::fs::metadata(self.base).and_then(|m| m.modified());
                let parent = NewParent {
                    id: scene.live.with(id).flatten(),
                    modified: modified.unwrap_or(SystemTime::UNIX_EPOCH),
                    relative: name,
                    absolute: real_path(self.below)?.to_string_lossy().into_owned(),
                };
                vhd::CreateOptions::new(size, vhd::Shape::Differencing(parent))
                    .and_then(|options| Vhd::create(to, &options))
            }
            other => {
                let text = format!("format {other} has no overlays: qcow2 and vhd have");
                return Err(JobError::Other(text));
            }
        };
        made.map_err(about(self.path.display()))
    }

    /// Whether what is there is an overlay of this disk that has nothing of its own.
    fn is_left_over(&self, scene: &Scene<'_>, name: &str) -> bool {
        let there = Name::File { format: self.format, path: self.path.to_owned() };
        let Ok(disk) = scene.host.open(&there, Opening::Alone) else { return false };
        let Some(image) = disk.image() else { return false };
        let mut found = Vec::new();
        let all = image.status(0..image.geometry().size.max(1), 1, &mut found).is_ok();
        let empty = all && found.iter().all(|s| s.place == StatusPlace::Nowhere);
        let backing = image.format().backing();
        let names = image.format().other_backing_names();
        empty && backing.is_some_and(|b| b.name == name || names.iter().any(|n| n == name))
    }
}

/// The disk's file gets another name, and the overlay its name. At each moment there is a whole
/// disk by that name.
struct Moves {
    from: PathBuf,
    to: PathBuf,
    overlay: PathBuf,
}

impl Moves {
    fn new(from: &Path, to: &Path, overlay: &Path) -> Result<Moves, JobError> {
        let refuse = |text: String| Err(JobError::Other(text));
        let folder = real_path(from)?;
        let folder = folder.parent().unwrap_or(Path::new("/"));
        let to = folder.join(to);
        if to.parent() != Some(folder) {
            return refuse(format!("{}: the old file stays in its folder", to.display()));
        }
        if real_path(overlay)?.parent() != Some(folder) {
            return refuse(format!("{}: make it beside the disk", overlay.display()));
        }
        if !std::fs::symlink_metadata(from).is_ok_and(|m| m.is_file()) {
            return refuse(format!("{}: no plain file, which could be renamed", from.display()));
        }
        // An interrupted run has made the same link.
        if to.exists() && !same_file(from, &to) {
            return refuse(format!("{}: there is a file of that name", to.display()));
        }
        Ok(Moves { from: from.to_owned(), to, overlay: overlay.to_owned() })
    }
}

impl Change for Moves {
    fn make(&mut self) -> Result<(), JobError> {
        if !same_file(&self.from, &self.to) {
            std::fs::hard_link(&self.from, &self.to).map_err(about(self.to.display()))?;
            sync_folder(&self.to)?;
        }
        std::fs::rename(&self.overlay, &self.from).map_err(about(self.from.display()))?;
        sync_folder(&self.from)
    }

    fn undo(&mut self) -> Result<(), JobError> {
        if !self.to.exists() {
            return Ok(());
        }
        // Over the overlay, of which the guest has seen nothing.
        std::fs::rename(&self.to, &self.from).map_err(about(self.from.display()))?;
        if self.to.exists() {
            // Both were names of one file, of which rename makes nothing else.
            std::fs::remove_file(&self.to).map_err(about(self.to.display()))?;
        }
        sync_folder(&self.from)
    }
}
