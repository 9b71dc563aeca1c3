//! `ringback disk commit`.

use std::path::Path;
use std::process::ExitCode;

use blktap::copy::{self, CopyOptions, Part, What};
use blktap::image::{BackingPolicy, StatusPlace};
use blktap::storage::{Access, Sharing};
use blktap::{ImageDisk, Kept};
use serde_json::json;

use super::open::Opening;
use super::resize::Wanted;
use super::work::Work;
use super::{Result, about, document, formats};
use crate::cli::disk::{Commit, Preallocation};

/// An image of the chain.
struct Layer {
    file: String,
    format: &'static str,
    size: u64,
}

/// `ringback disk commit`.
pub fn run(options: &Commit) -> Result {
    let opening = Opening::to_write(&options.file, options.format.as_deref(), &options.allow);
    let format = opening.format()?;
    // Held to the end: what somebody wrote after the copy would be lost when the image is
    // emptied. It is read through another descriptor.
    let access = if options.keep { Access::ReadOnly } else { Access::ReadWrite };
    let held = Opening { access, ..opening.clone() }.storage()?;
    let reading = Opening { access: Access::ReadOnly, sharing: Sharing::Shared, ..opening };
    let layers = layers(&reading)?;
    let base = base(&layers, options)?;
    let emptied = !options.keep && base == 1;
    if emptied {
        formats::can_empty(format)?;
    }
    let mut work = Work::new(options.progress.progress)?;
    let written = write_down(&reading, &layers, base, &mut work)?;
    if emptied {
        formats::empty(&*held, format)?;
    }
    drop(held);
    work.end();
    let file = &layers[base].file;
    if options.output.json {
        document(json!({
            "filename": options.file, "base": file, "written": written, "emptied": emptied,
        }));
    } else {
        outln!("{}: {written} bytes of data written to {file}", options.file);
    }
    Ok(ExitCode::SUCCESS)
}

fn layers(opening: &Opening<'_>) -> Result<Vec<Layer>> {
    let (image, _) = opening.image()?;
    let layers = image.layers().map(|layer| Layer {
        file: layer.files().first().map(|f| f.name()).unwrap_or_default(),
        format: layer.name(),
        size: layer.size(),
    });
    Ok(layers.collect())
}

/// Which of the layers is written: the nearest, or the one that is named.
fn base(layers: &[Layer], options: &Commit) -> Result<usize> {
    if layers.len() < 2 {
        let text = format!("{}: it has no backing file to commit to", options.file);
        return Err(text.into());
    }
    let Some(name) = &options.base else { return Ok(1) };
    let real = |file: &str| Path::new(file).canonicalize().ok();
    let wanted = real(name).ok_or_else(|| format!("{name}: there is no such file"))?;
    let found = layers.iter().skip(1).position(|l| real(&l.file).as_ref() == Some(&wanted));
    let found = found.map(|n| n + 1);
    found.ok_or_else(|| format!("{name}: {} does not build on it", options.file).into())
}

/// Writes what the layers above `base` have into it; the bytes that were data.
fn write_down(
    reading: &Opening<'_>,
    layers: &[Layer],
    base: usize,
    work: &mut Work,
) -> Result<u64> {
    let target = &layers[base];
    let opening = Opening {
        file: &target.file,
        format: Some(target.format),
        access: Access::ReadWrite,
        sharing: Sharing::Exclusive,
        ..reading.clone()
    };
    let size = layers[0].size;
    if target.size < size {
        let wanted = Wanted { old: target.size, new: size, preallocation: Preallocation::Off };
        formats::resize(&opening, opening.format()?, &wanted, work)?;
    }
    let above = open_above(reading, base)?;
    let (disk, _) = opening.image()?;
    let mut found = Vec::new();
    let mut plan = |range: std::ops::Range<u64>, out: &mut Vec<Part>| {
        found.clear();
        above.status(range, base, &mut found)?;
        out.extend(found.iter().map(|s| {
            let what = match s.place {
                // Hidden by a layer that is too short, not by what is below all of them.
                StatusPlace::Nowhere if s.layer + 1 < base => What::Zero,
                StatusPlace::Nowhere => What::Skip,
                StatusPlace::Zero => What::Zero,
                StatusPlace::Data { kept, .. } if kept != Kept::Data => What::Zero,
                StatusPlace::Data { .. } | StatusPlace::Compressed => What::Data,
            };
            Part { len: s.len, what }
        }));
        Ok(())
    };
    let options = CopyOptions::new(size);
    let mut tick = |done| work.tick(done, size);
    let copied = copy::copy(&*above, &*disk, &options, &mut plan, None, &mut tick)
        .map_err(|e| format!("{}: {e}; commit again to complete it", target.file))?;
    disk.close().map_err(about(&target.file))?;
    Ok(copied.written)
}

/// The layers above the base. Those from there on are not needed, and would be locked.
fn open_above(reading: &Opening<'_>, base: usize) -> Result<std::sync::Arc<ImageDisk>> {
    let format = reading.format()?;
    if base == 1 {
        let alone = Opening { backing: BackingPolicy::Ignore, ..reading.clone() };
        return Ok(alone.image()?.0);
    }
    let layers = blktap::image::open_layers(&reading.image_options(format))?;
    let above = layers.into_iter().take(base).collect();
    let image = ImageDisk::new(above, 512, blktap::image::Blocking::Threads);
    image.map_err(about(reading.file))
}
