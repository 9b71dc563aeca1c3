//! Which image of a chain has a stretch of the disk, and where: for maps and commands.
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::{ImageDisk, io_error};
use crate::disk::{Kept, Region};
use crate::formats::{Extent, Format, Outcome, Place};

/// Where a stretch of a disk is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusPlace {
    /// In a file of the layer.
    Data {
        /// Which of [`Format::files`].
        file: u16,
        /// First byte in it.
        offset: u64,
        /// How the file keeps it.
        kept: Kept,
    },
    /// The layer says that it reads as zeroes.
    Zero,
    /// In compressed clusters of the layer.
    Compressed,
    /// In none of the layers that were looked at.
    Nowhere,
}

/// A stretch of a disk. Stretches follow each other without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Bytes, at least 1.
    pub len: u64,
    /// Which layer has it, 0 the written one; of [`StatusPlace::Nowhere`] the last that was asked.
    pub layer: usize,
    /// Where it is.
    pub place: StatusPlace,
}

impl Status {
    /// Whether `next` goes on where this ends, in the same place.
    fn goes_on_with(&self, next: &Status) -> bool {
        let same_place = match (self.place, next.place) {
            (
                StatusPlace::Data { file, offset, kept },
                StatusPlace::Data { file: f, offset: o, kept: k },
            ) => file == f && kept == k && offset.checked_add(self.len) == Some(o),
            (a, b) => a == b,
        };
        self.layer == next.layer && same_place
    }
}

impl ImageDisk {
    /// Appends where the bytes of `range` (inside the disk, not empty) are found in the first
    /// `layers` layers, neighbours joined; covers the whole range. May block.
    pub fn status(
        &self,
        range: Range<u64>,
        layers: usize,
        out: &mut Vec<Status>,
    ) -> io::Result<()> {
        let formats: Vec<&Arc<dyn Format>> = self.layers().take(layers.max(1)).collect();
        look(&formats, 0, range, out)
    }
}

fn add(out: &mut Vec<Status>, status: Status) {
    match out.last_mut() {
        Some(last) if last.goes_on_with(&status) => last.len += status.len,
        _ => out.push(status),
    }
}

fn look(
    layers: &[&Arc<dyn Format>],
    layer: usize,
    range: Range<u64>,
    out: &mut Vec<Status>,
) -> io::Result<()> {
    let nowhere = |len| Status { len, layer: layer - 1, place: StatusPlace::Nowhere };
    let Some(format) = layers.get(layer) else {
        add(out, nowhere(range.end - range.start));
        return Ok(());
    };
    let (mut at, end) = (range.start, range.end.min(format.size()));
    let mut extents = Vec::new();
    while at < end {
        resolve(&***format, at..end, &mut extents)?;
        for extent in &extents {
            let len = extent.len;
            let place = match extent.place {
                Place::Absent => {
                    look(layers, layer + 1, at..at + len, out)?;
                    at += len;
                    continue;
                }
                Place::Zero => StatusPlace::Zero,
                Place::Compressed { .. } => StatusPlace::Compressed,
                Place::Data { file, offset } => {
                    data(&***format, layer, file, offset..offset + len, out)?;
                    at += len;
                    continue;
                }
            };
            add(out, Status { len, layer, place });
            at += len;
        }
    }
    // An overlay may be larger than what it lies over.
    if at < range.end {
        let above = layer.saturating_sub(1);
        let len = range.end - at;
        add(out, Status { len, layer: above, place: StatusPlace::Nowhere });
    }
    Ok(())
}

/// As [`Format::resolve_read`], with what it needs loaded.
fn resolve(format: &dyn Format, range: Range<u64>, out: &mut Vec<Extent>) -> io::Result<()> {
    loop {
        out.clear();
        match format.resolve_read(range.clone(), out).map_err(|e| io_error(&e))? {
            Outcome::Ready(()) if out.is_empty() => {
                return Err(io::Error::other("a read was resolved to nothing"));
            }
            Outcome::Ready(()) => return Ok(()),
            Outcome::Miss(miss) => format.load(miss).map_err(|e| io_error(&e))?,
            Outcome::Busy => return Err(io::Error::other("a read was told to wait")),
        }
    }
}

fn data(
    format: &dyn Format,
    layer: usize,
    file: u16,
    range: Range<u64>,
    out: &mut Vec<Status>,
) -> io::Result<()> {
    let mut at = range.start;
    let mut regions: Vec<Region> = Vec::new();
    while at < range.end {
        regions.clear();
        format.map_data(file, at..range.end, &mut regions)?;
        if regions.iter().all(|r| r.len == 0) {
            return Err(io::Error::other("a map that does not go on"));
        }
        for region in &regions {
            let len = region.len.min(range.end - at);
            if len > 0 {
                let place = StatusPlace::Data { file, offset: at, kept: region.kept };
                add(out, Status { len, layer, place });
                at += len;
            }
        }
    }
    Ok(())
}
