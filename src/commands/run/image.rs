//! The images that are worked on, and what must be in them afterwards.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use super::super::Result;
use super::plan::{CELL, DiskPlan, DiskReport, Task};
use super::report::Checked;
use super::settings::DiskSettings;
use super::stamp;
use crate::cli::Run;

/// Bytes that are copied and compared in one go.
const PIECE: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// Made for this run.
    Made,
    /// A copy of the user's.
    Copy,
    /// The user's, only read.
    Read,
    /// The user's, written.
    Overwritten,
}

/// An image.
pub struct Image {
    path: PathBuf,
    /// The user's own, of a copy.
    origin: Option<PathBuf>,
    size: u64,
    used: Use,
}

impl Image {
    /// Makes or finds the image of a disk.
    pub fn make(disk: &DiskSettings, options: &Run, folder: &Path) -> Result<Image> {
        let own = folder.join(format!("{}.img", disk.vdev));
        let Some(target) = &disk.target else {
            let size = disk.size_mib << 20;
            File::create_new(&own)?.set_len(size)?;
            return Ok(Image { path: own, origin: None, size, used: Use::Made });
        };
        let named = named(target)?;
        let told = |e: io::Error| format!("{}: {e}", named.display());
        let source = File::open(&named).map_err(told)?;
        let size = size_of(&source).map_err(told)?;
        if size < CELL as u64 {
            return Err(format!("{}: smaller than 4096 bytes", named.display()).into());
        }
        let used = match (options.read_only, options.overwrite) {
            (true, _) => Use::Read,
            (false, true) => Use::Overwritten,
            (false, false) => Use::Copy,
        };
        if used != Use::Copy {
            return Ok(Image { path: named, origin: None, size, used });
        }
        copy(&source, &own, size).map_err(|e| {
            let remedy = "point TMPDIR at more room, or read it in place with --read-only";
            format!("{}: cannot copy to {}: {e}: {remedy}", named.display(), own.display())
        })?;
        Ok(Image { path: own, origin: Some(named), size, used })
    }

    pub fn path(&self) -> &Path {
        &self.path
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
        let file = File::open(&self.path)?;
        let mut piece = vec![0; PIECE];
        let mut scratch = Box::new([0; CELL]);
        let mut at = 0;
        while at < plan.span {
            let len = (plan.span - at).min(PIECE as u64) as usize;
            file.read_exact_at(&mut piece[..len], at)?;
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
            self.compare_rest(&file, &File::open(origin)?, plan.span, &mut checked)?;
        }
        Ok(checked)
    }

    /// What the guest was not to touch.
    fn compare_rest(
        &self,
        file: &File,
        origin: &File,
        from: u64,
        checked: &mut Checked,
    ) -> io::Result<()> {
        let (mut here, mut there) = (vec![0; PIECE], vec![0; PIECE]);
        let mut at = from;
        while at < self.size {
            let len = (self.size - at).min(PIECE as u64) as usize;
            file.read_exact_at(&mut here[..len], at)?;
            origin.read_exact_at(&mut there[..len], at)?;
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

fn named(target: &str) -> Result<PathBuf> {
    let path = match target.split_once(':') {
        Some((format, path)) if !format.contains('/') => match format {
            "raw" => path,
            other => {
                return Err(format!("{target}: format {other} is not supported; use raw").into());
            }
        },
        _ => target,
    };
    std::path::absolute(path).map_err(|e| format!("{target}: {e}").into())
}

fn size_of(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("neither a regular file nor a block device"));
    }
    (&*file).seek(SeekFrom::End(0))
}

/// By reflink where the file system can, else all that is not zeroes.
fn copy(source: &File, path: &Path, size: u64) -> io::Result<()> {
    let target = File::create_new(path)?;
    if rustix::fs::ioctl_ficlone(&target, source).is_ok() {
        return Ok(());
    }
    target.set_len(size)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        let len = (size - at).min(PIECE as u64) as usize;
        source.read_exact_at(&mut piece[..len], at)?;
        if piece[..len].iter().any(|b| *b != 0) {
            target.write_all_at(&piece[..len], at)?;
        }
        at += len as u64;
    }
    Ok(())
}
