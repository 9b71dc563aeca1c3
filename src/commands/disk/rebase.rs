//! `ringback disk rebase`.

use std::process::ExitCode;
use std::sync::Arc;

use blktap::copy::{self, CopyOptions, Part, What};
use blktap::image::StatusPlace;
use blktap::{Disk, DiskQueue, ImageDisk, Kept, Region, blocking};
use serde_json::json;

use super::create::NewBacking;
use super::open::{Opening, beside, parse_format};
use super::work::Work;
use super::{Result, Usage, about, document, formats};
use crate::cli::disk::Rebase;

/// Unit in which old and new are compared.
const UNIT: usize = 4096;

/// `ringback disk rebase`.
pub fn run(options: &Rebase) -> Result {
    let opening = Opening::to_write(&options.file, options.format.as_deref(), &options.allow);
    let format = opening.format()?;
    let backing = match (options.backing.as_str(), &options.backing_format) {
        ("", _) => None,
        (name, Some(format)) => {
            Some(NewBacking { name: name.to_owned(), format: parse_format(format)? })
        }
        (name, None) => {
            return Err(Usage(format!("{name}: name the new backing file's format with -F")).into());
        }
    };
    formats::can_build_on(format)?;
    let mut work = Work::new(options.progress.progress)?;
    let mut written = 0;
    if !options.unsafely {
        let new = backing.as_ref().map(|b| open_new(&opening, b)).transpose()?;
        written = settle(&opening, new.as_deref(), &mut work)?;
    }
    formats::set_backing(&opening, format, backing.as_ref())?;
    work.end();
    if options.output.json {
        document(json!({
            "filename": options.file, "format": format.name(), "written": written,
            "backing-filename": backing.as_ref().map(|b| b.name.as_str()),
            "backing-filename-format": backing.as_ref().map(|b| b.format.name()),
        }));
    }
    Ok(ExitCode::SUCCESS)
}

/// The new backing image: the caller has named it, so it may be anywhere.
fn open_new(opening: &Opening<'_>, backing: &NewBacking) -> Result<Arc<ImageDisk>> {
    let found = beside(opening.path(), &backing.name);
    let file = found.to_string_lossy();
    let opening = Opening {
        backing: opening.backing.clone(),
        ..Opening::to_read(&file, Some(backing.format.name()), &Default::default())
    };
    Ok(opening.image().map_err(about("the new backing file"))?.0)
}

/// Writes into the image what it has from its backing file and would not have from the new one.
fn settle(opening: &Opening<'_>, new: Option<&ImageDisk>, work: &mut Work) -> Result<u64> {
    let (image, _) = opening.image()?;
    let size = image.geometry().size;
    let mut options = CopyOptions::new(size);
    options.sparse = Some(UNIT);
    let mut plan = |range, out: &mut Vec<Part>| plan(&image, new, range, out);
    let mut other = New { queue: new.map(|n| n.queue(1)).transpose()?, bytes: Vec::new(), new };
    let mut look = |at, bytes: &[u8], out: &mut Vec<Part>| other.look(at, bytes, out);
    let mut tick = |done| work.tick(done, size);
    // The image is read and written at once, but never in the same place: what it reads as does
    // not change.
    let copied = copy::copy(&*image, &*image, &options, &mut plan, Some(&mut look), &mut tick)
        .map_err(|e| format!("{}: {e}; it still builds on what it did", opening.file))?;
    image.close().map_err(about(opening.file))?;
    Ok(copied.written)
}

/// What of the image comes from below it, and is not a hole both there and in the new one.
fn plan(
    image: &ImageDisk,
    new: Option<&ImageDisk>,
    range: std::ops::Range<u64>,
    out: &mut Vec<Part>,
) -> std::io::Result<()> {
    let mut found = Vec::new();
    image.status(range.clone(), 1, &mut found)?;
    let mut at = range.start;
    for status in found {
        let end = at + status.len;
        if status.place != StatusPlace::Nowhere {
            out.push(Part { len: status.len, what: What::Skip });
            at = end;
        }
        while at < end {
            let old = first(image, at..end)?;
            let other = below(new, at..end)?;
            let len = old.len.min(other.len);
            let same = old.kept != Kept::Data && other.kept != Kept::Data;
            out.push(Part { len, what: if same { What::Skip } else { What::Data } });
            at += len;
        }
    }
    Ok(())
}

fn first(disk: &dyn Disk, range: std::ops::Range<u64>) -> std::io::Result<Region> {
    let mut regions = Vec::new();
    disk.map(range, &mut regions)?;
    let first = regions.into_iter().find(|r| r.len > 0);
    first.ok_or_else(|| std::io::Error::other("a map that does not go on"))
}

/// As `first`, of an image that may be shorter, or none.
fn below(disk: Option<&ImageDisk>, range: std::ops::Range<u64>) -> std::io::Result<Region> {
    let size = disk.map_or(0, |d| d.geometry().size);
    match disk {
        Some(disk) if range.start < size => first(disk, range.start..range.end.min(size)),
        _ => Ok(Region { len: range.end - range.start, kept: Kept::Hole }),
    }
}

/// The new backing image, which is read where the old one has data.
struct New<'a> {
    queue: Option<Box<dyn DiskQueue>>,
    bytes: Vec<u8>,
    new: Option<&'a ImageDisk>,
}

impl New<'_> {
    /// Which of the bytes the new one has not.
    fn look(&mut self, at: u64, bytes: &[u8], out: &mut Vec<Part>) -> std::io::Result<()> {
        self.bytes.clear();
        self.bytes.resize(bytes.len(), 0);
        let size = self.new.map_or(0, |n| n.geometry().size);
        let there = size.saturating_sub(at).min(bytes.len() as u64) as usize;
        if let (Some(queue), true) = (&mut self.queue, there > 0) {
            blocking::read_at(&mut **queue, at, &mut self.bytes[..there])?;
        }
        for (old, new) in bytes.chunks(UNIT).zip(self.bytes.chunks(UNIT)) {
            let what = match old {
                old if old == new => What::Skip,
                old if old.iter().all(|b| *b == 0) => What::Zero,
                _ => What::Data,
            };
            out.push(Part { len: old.len() as u64, what });
        }
        Ok(())
    }
}
