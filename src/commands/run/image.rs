//! The images that are worked on, and what must be in them afterwards.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blktap::formats::BackingName;
use blktap::formats::qcow2::create::{self, CreateOptions};
use blktap::image::{self, BackingPolicy, ImageFormat, ImageOptions};
use blktap::storage::{self, Access, Cache, OpenOptions};
use blktap::{Disk, DiskQueue, NbdDisk, NbdOptions, NbdTarget, blocking};

use super::super::Result;
use super::plan::{CELL, DiskPlan, DiskReport, Task};
use super::report::Checked;
use super::settings::DiskSettings;
use super::stamp;
use crate::cli::Run;

/// Bytes that are compared in one go.
const PIECE: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// Made for this run.
    Made,
    /// A throw-away overlay over the user's.
    Over,
    /// The user's, only read.
    Read,
    /// The user's, written.
    Overwritten,
}

/// What holds the bytes.
#[derive(Clone)]
enum Named {
    /// An image file and its format.
    File { path: PathBuf, format: ImageFormat },
    /// A server's export, as it was named.
    Export(String),
}

/// An image.
pub struct Image {
    image: Named,
    /// The user's own, of an overlay.
    origin: Option<Named>,
    size: u64,
    used: Use,
}

impl Image {
    /// Makes or finds the image of a disk.
    pub fn make(disk: &DiskSettings, options: &Run, folder: &Path) -> Result<Image> {
        let Some(target) = &disk.target else {
            let (path, size) = (folder.join(format!("{}.img", disk.vdev)), disk.size_mib << 20);
            File::create_new(&path)?.set_len(size)?;
            let image = Named::File { path, format: ImageFormat::Raw };
            return Ok(Image { image, origin: None, size, used: Use::Made });
        };
        let named = Named::parse(target)?;
        let size = named.open(&[])?.geometry().size;
        if size < CELL as u64 {
            return Err(format!("{target}: smaller than 4096 bytes").into());
        }
        let used = match (options.read_only, options.overwrite) {
            (true, _) => Use::Read,
            (false, true) => Use::Overwritten,
            (false, false) => Use::Over,
        };
        if used != Use::Over {
            return Ok(Image { image: named, origin: None, size, used });
        }
        let Named::File { path: below, format } = &named else {
            let why = "no overlay builds on a server's export: say --overwrite (ITS CONTENT IS \
                       LOST) or --read-only";
            return Err(format!("{target}: {why}").into());
        };
        let path = folder.join(format!("{}.qcow2", disk.vdev));
        overlay(&path, below, *format, size).map_err(|e| format!("{}: {e}", path.display()))?;
        let image = Named::File { path, format: ImageFormat::Qcow2 };
        Ok(Image { image, origin: Some(named), size, used })
    }

    /// As a backend takes it: FORMAT:PATH, or the name of an export.
    pub fn target(&self) -> Result<String> {
        match &self.image {
            Named::Export(name) => Ok(name.clone()),
            Named::File { path, format } => match path.to_str() {
                Some(path) => Ok(format!("{format}:{path}")),
                None => Err(format!("{}: the path is not UTF-8", path.display()).into()),
            },
        }
    }
    /// Where the backend has to look for what the image builds on, beside its own folder.
    pub fn backing_folder(&self) -> Option<PathBuf> {
        self.origin.as_ref().and_then(Named::folder)
    }
    pub fn size(&self) -> u64 {
        self.size
    }
    pub fn is_read_only(&self) -> bool {
        self.used == Use::Read
    }

    /// Reads the image again and compares each byte with what the guest says that it has written
    /// or read, and the rest with what was there before.
    pub fn compare(&self, plan: &DiskPlan, report: &DiskReport) -> io::Result<Checked> {
        let mut checked = Checked::of(&plan.vdev);
        let count = plan.span / CELL as u64;
        let told = if plan.task == Task::Read { report.sums.len() } else { report.cells.len() };
        if told as u64 != count {
            checked.wrong(|| format!("the guest tells of {told} blocks instead of {count}"));
            return Ok(checked);
        }
        let folders: Vec<PathBuf> = self.backing_folder().into_iter().collect();
        let mut queue = reader(&self.image, &folders)?;
        let mut piece = vec![0; PIECE];
        let mut scratch = Box::new([0; CELL]);
        let mut at = 0;
        while at < plan.span {
            let len = (plan.span - at).min(PIECE as u64) as usize;
            blocking::read_at(&mut *queue, at, &mut piece[..len])?;
            for (number, cell) in (at / CELL as u64..).zip(piece[..len].chunks(CELL)) {
                checked.bytes += cell.len() as u64;
                match plan.task {
                    Task::Read => compare_sum(&mut checked, report, number, cell),
                    Task::Write => {
                        let generation = report.cells[number as usize];
                        stamp::expected(&mut scratch, plan.seed, number, generation);
                        if cell != &scratch[..] {
                            let right = &scratch[..];
                            checked.wrong(|| {
                                stamp::describe(cell, right, plan.seed, number, generation)
                            });
                        }
                    }
                }
            }
            at += len as u64;
        }
        if let Some(origin) = &self.origin {
            let mut origin = reader(origin, &[])?;
            self.compare_rest(&mut *queue, &mut *origin, plan.span, &mut checked)?;
        }
        Ok(checked)
    }

    /// What the guest was not to touch.
    fn compare_rest(
        &self,
        queue: &mut dyn DiskQueue,
        origin: &mut dyn DiskQueue,
        from: u64,
        checked: &mut Checked,
    ) -> io::Result<()> {
        let (mut here, mut there) = (vec![0; PIECE], vec![0; PIECE]);
        let mut at = from;
        while at < self.size {
            let len = (self.size - at).min(PIECE as u64) as usize;
            blocking::read_at(queue, at, &mut here[..len])?;
            blocking::read_at(origin, at, &mut there[..len])?;
            checked.bytes += len as u64;
            if here[..len] != there[..len] {
                checked.wrong(|| format!("the 1 MiB at {at:#x} was changed, and not by the guest"));
            }
            at += len as u64;
        }
        Ok(())
    }
}

fn compare_sum(checked: &mut Checked, report: &DiskReport, number: u64, cell: &[u8]) {
    if report.sums[number as usize] != stamp::sum(cell) {
        checked.wrong(|| {
            format!("block at {:#x}: the guest has read something else", number * CELL as u64)
        });
    }
}

impl Named {
    fn parse(target: &str) -> Result<Named> {
        if NbdTarget::is_meant(target) {
            return Ok(Named::Export(target.to_owned()));
        }
        let (format, path) = match target.split_once(':') {
            Some((format, path)) if !format.contains('/') => (format, path),
            _ => ("raw", target),
        };
        let told = |e: &dyn std::fmt::Display| format!("{target}: {e}");
        let format = format.parse().map_err(|e| told(&e))?;
        let path = std::path::absolute(path).map_err(|e| told(&e))?;
        Ok(Named::File { path, format })
    }

    /// The folder that a file is in, wherever links lead.
    fn folder(&self) -> Option<PathBuf> {
        let Named::File { path, .. } = self else { return None };
        let real = path.canonicalize().unwrap_or_else(|_| path.clone());
        Some(real.parent().unwrap_or(Path::new("/")).to_owned())
    }

    /// To be read.
    fn open(&self, folders: &[PathBuf]) -> Result<Arc<dyn Disk>> {
        let (path, format) = match self {
            Named::File { path, format } => (path, *format),
            Named::Export(name) => {
                let options = NbdOptions::new(NbdTarget::parse(name)?);
                let disk = NbdDisk::open(NbdOptions { access: Access::ReadOnly, ..options });
                return Ok(disk.map_err(|e| format!("{name}: {e}"))?);
            }
        };
        let file = OpenOptions::new(path).access(Access::ReadOnly).cache(Cache::Writeback);
        let backing = BackingPolicy::Allow(folders.to_vec());
        Ok(image::open(&ImageOptions::new(format, file).backing(backing))?)
    }
}

fn reader(image: &Named, folders: &[PathBuf]) -> io::Result<Box<dyn DiskQueue>> {
    let disk = image.open(folders).map_err(|e| io::Error::other(e.to_string()))?;
    disk.queue(1)
}

/// Makes an empty overlay.
fn overlay(path: &Path, below: &Path, format: ImageFormat, size: u64) -> Result<()> {
    let name = below.to_str().ok_or("the path of what it builds on is not UTF-8")?;
    File::create_new(path)?;
    let file = storage::open(&OpenOptions::new(path).cache(Cache::Writeback))?;
    let mut options = CreateOptions::new(size);
    let format = Some(format.name().to_owned());
    options.backing = Some(BackingName { name: name.to_owned(), format });
    Ok(create::create(&file, None, &options)?)
}
