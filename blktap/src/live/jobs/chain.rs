//! The images that the guest's disk stands on.
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::paths::{name_from, real_path, same_file};
use super::{Change, JobError, Scene, about};
use crate::copy::{Part, What};
use crate::disk::{Disk, Kept};
use crate::formats::BackingName;
use crate::formats::qcow2::{rebase, resize};
use crate::formats::vhd::{NewParent, Vhd};
use crate::image::{ImageDisk, ImageFormat, Status, StatusPlace};
use crate::live::Name;
use crate::storage::{self, Cache, FileStorage, Lock, OpenOptions, Storage};

/// An image of a chain.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Bytes of its disk.
    pub size: u64,
    /// The unique id by which a VHD's children know it.
    pub id: Option<[u8; 16]>,
}

impl Layer {
    /// As a disk's name.
    pub(super) fn name(&self) -> Name {
        Name::File { format: self.format, path: self.path.clone() }
    }
}

/// The layers of the guest's disk, the written one first. One that is no image has none.
pub(super) fn layers(scene: &Scene<'_>) -> Result<Vec<Layer>, JobError> {
    let look = |disk: &dyn Disk| disk.image().map_or_else(|| Ok(Vec::new()), of_image);
    scene.live.with(look).unwrap_or_else(|| Ok(Vec::new()))
}

fn of_image(image: &ImageDisk) -> Result<Vec<Layer>, JobError> {
    let layer = |format: &std::sync::Arc<dyn crate::formats::Format>| {
        let path: PathBuf = format.files().first().map(|f| f.name()).unwrap_or_default().into();
        let name = format.name().parse::<ImageFormat>().map_err(about(path.display()))?;
        let (size, id) = (format.size(), format.unique_id());
        Ok(Layer { path: real_path(&path)?, format: name, size, id })
    };
    image.layers().map(layer).collect()
}

/// Which of the layers below the first is meant: the one of that file, or, where none is named,
/// the nearest.
pub(super) fn find(layers: &[Layer], name: Option<&Path>) -> Result<usize, JobError> {
    if layers.len() < 2 {
        return Err(JobError::Other("the disk builds on no other image".into()));
    }
    let Some(name) = name else { return Ok(1) };
    let found = layers.iter().skip(1).position(|layer| same_file(&layer.path, name));
    let refuse = || JobError::Other(format!("{}: the disk does not build on it", name.display()));
    found.map(|n| n + 1).ok_or_else(refuse)
}

/// What of a stretch of a chain's upper layers is to be copied to what lies below them.
pub(super) fn what_of(status: &Status, above: usize) -> What {
    match status.place {
        // Hidden by a layer that is too short, not by what is below all of them.
        StatusPlace::Nowhere if status.layer + 1 < above => What::Zero,
        StatusPlace::Nowhere => What::Skip,
        StatusPlace::Zero => What::Zero,
        StatusPlace::Data { kept, .. } if kept != Kept::Data => What::Zero,
        StatusPlace::Data { .. } | StatusPlace::Compressed => What::Data,
    }
}

/// Where the guest's disk has the bytes of a range, in its first `above` layers.
pub(super) fn status(
    scene: &Scene<'_>,
    range: Range<u64>,
    above: usize,
    out: &mut Vec<Part>,
    what: impl Fn(&Status) -> What,
) -> std::io::Result<()> {
    let mut found = Vec::new();
    let looked = scene.live.with(|disk| match disk.image() {
        Some(image) => image.status(range, above, &mut found),
        None => Err(std::io::Error::other("the disk is no image")),
    });
    looked.unwrap_or_else(|| Err(std::io::Error::other("the disk is paused")))?;
    out.extend(found.iter().map(|s| Part { len: s.len, what: what(s) }));
    Ok(())
}

/// A file of a disk that is closed.
pub(super) fn file(path: &Path) -> Result<FileStorage, JobError> {
    let options = OpenOptions::new(path).cache(Cache::Writeback);
    storage::open(&options).map_err(|e| JobError::Other(e.to_string()))
}

/// A file that the chain has open for reading, and whose lock keeps others from writing.
fn file_below(path: &Path) -> Result<FileStorage, JobError> {
    let options = OpenOptions::new(path).cache(Cache::Writeback).lock(Lock::Off);
    storage::open(&options).map_err(|e| JobError::Other(e.to_string()))
}

/// Makes a layer's disk as large as what is written into it. What is added reads as zeroes.
pub(super) fn make_room(layer: &Layer, below: Option<&Layer>, size: u64) -> Result<(), JobError> {
    if layer.size >= size {
        return Ok(());
    }
    let storage = file_below(&layer.path)?;
    match layer.format {
        ImageFormat::Raw => {
            let grown = storage.set_size(size).and_then(|()| storage.sync());
            grown.map_err(about(layer.path.display()))
        }
        ImageFormat::Qcow2 if below.is_none() => {
            let around = resize::Around::default();
            let grown = resize::resize(&storage, around, size, resize::Shrink::Refuse);
            grown.map_err(about(layer.path.display()))
        }
        other => Err(JobError::Other(format!(
            "{}: it has {} bytes, the guest's disk {size}: a {other} image {} cannot grow while \
             it is in use",
            layer.path.display(),
            layer.size,
            if below.is_some() { "that builds on another" } else { "of this kind" },
        ))),
    }
}

/// Another backing file in the header of an image that is not open.
pub(super) struct Rebase {
    child: Layer,
    old: Option<Layer>,
    new: Option<Layer>,
    made: bool,
}

impl Rebase {
    /// `child` builds on `old` and will on `new`.
    pub(super) fn new(
        child: &Layer,
        old: Option<&Layer>,
        new: Option<&Layer>,
    ) -> Result<Rebase, JobError> {
        let refuse = |why: String| {
            let path = child.path.display();
            Err(JobError::Other(format!(
                "{path}: {why}: copy the disk with `ringback disk mirror`"
            )))
        };
        match (child.format, new.map(|layer| layer.format)) {
            (ImageFormat::Qcow2, _) => {}
            (ImageFormat::Vhd, None | Some(ImageFormat::Vhd | ImageFormat::Raw)) => {}
            (ImageFormat::Vhd, Some(other)) => {
                return refuse(format!("a VHD cannot build on an image of format {other}"));
            }
            (format, _) => {
                return refuse(format!(
                    "an image of format {format} cannot be given another backing file"
                ));
            }
        }
        for layer in [old, new].into_iter().flatten() {
            name_from(&child.path, &layer.path)?;
        }
        let (old, new) = (old.cloned(), new.cloned());
        Ok(Rebase { child: child.clone(), old, new, made: false })
    }

    fn write(&self, below: Option<&Layer>) -> Result<(), JobError> {
        let storage = file(&self.child.path)?;
        let written = match self.child.format {
            ImageFormat::Vhd => {
                let parent = below.map(|layer| self.parent(layer)).transpose()?;
                Vhd::set_parent(&storage, parent.as_ref())
            }
            _ => {
                let backing = below.map(|layer| self.backing(layer)).transpose()?;
                rebase::set_backing(&storage, backing.as_ref())
            }
        };
        written.map_err(about(self.child.path.display()))
    }

    fn backing(&self, layer: &Layer) -> Result<BackingName, JobError> {
        let format = match layer.format {
            ImageFormat::Vhd => "vpc",
            other => other.name(),
        };
        let name = name_from(&self.child.path, &layer.path)?;
        Ok(BackingName { name, format: Some(format.to_owned()) })
    }

    fn parent(&self, layer: &Layer) -> Result<NewParent, JobError> {
        let modified = std::fs::metadata(&layer.path).and_then(|m| m.modified());
        Ok(NewParent {
            id: layer.id,
            modified: modified.map_err(about(layer.path.display()))?,
            relative: name_from(&self.child.path, &layer.path)?,
            absolute: real_path(&layer.path)?.to_string_lossy().into_owned(),
        })
    }
}

impl Change for Rebase {
    fn make(&mut self) -> Result<(), JobError> {
        self.made = true;
        self.write(self.new.as_ref())
    }
    fn undo(&mut self) -> Result<(), JobError> {
        if self.made { self.write(self.old.as_ref()) } else { Ok(()) }
    }
}
