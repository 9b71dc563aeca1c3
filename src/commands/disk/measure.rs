//! `ringback disk measure`.

use std::process::ExitCode;

use serde_json::json;

use super::open::{Opened, Opening, parse_format};
use super::options::Options;
use super::{Result, Usage, document, formats, sizes};
use crate::cli::disk::Measure;

/// How large an image would be.
pub struct Measured {
    /// Bytes of the file after a copy.
    pub required: u64,
    /// Bytes of the file when all of the disk is written.
    pub fully_allocated: u64,
    /// Bytes of what the bitmaps of the source take, where they can be copied.
    pub bitmaps: Option<u64>,
}

/// `ringback disk measure`.
pub fn run(options: &Measure) -> Result {
    let format = parse_format(&options.output_format)?;
    let mut given = Options::parse(&options.options)?;
    if given.asks_for_help() {
        out!("{}", formats::help(format));
        return Ok(ExitCode::SUCCESS);
    }
    let source = options.file.as_deref().map(|file| source(options, file)).transpose()?;
    let asked = options.size.as_deref().map(sizes::parse).transpose()?;
    let size = match (&source, given.size("size")?, asked) {
        (Some(source), ..) => source.disk.geometry().size,
        (None, _, Some(size)) | (None, Some(size), None) => size,
        (None, None, None) => return Err(Usage("name an image, or a --size".into()).into()),
    };
    let measured = formats::measure(format, size, &mut given, source.as_ref())?;
    given.finish(format.name())?;
    if options.output.json {
        let mut value = json!({
            "required": measured.required, "fully-allocated": measured.fully_allocated,
        });
        if let Some(bitmaps) = measured.bitmaps {
            value["bitmaps"] = bitmaps.into();
        }
        document(value);
    } else {
        outln!("required size: {}", measured.required);
        outln!("fully allocated size: {}", measured.fully_allocated);
        if let Some(bitmaps) = measured.bitmaps {
            outln!("bitmaps size: {bitmaps}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn source(options: &Measure, file: &str) -> Result<Opened> {
    let opening = Opening::to_read(file, options.format.as_deref(), &options.allow);
    let opening = opening.force_share(options.force_share);
    match &options.snapshot {
        Some(name) => formats::snapshot_disk(&opening, name),
        None => opening.open(),
    }
}
