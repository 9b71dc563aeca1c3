//! `ringback disk map`.

use std::process::ExitCode;
use std::sync::Arc;

use blktap::formats::Format;
use blktap::image::{Status, StatusPlace};
use blktap::{Kept, Region};
use serde_json::{Value, json};

use super::open::{Opened, Opening};
use super::{Result, about, document, sizes};
use crate::cli::disk::Map;

/// Bytes that are looked at before what is found is shown.
const STEP: u64 = 1 << 32;

/// A line of the map.
#[derive(Clone, Debug, PartialEq)]
struct Line {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    /// Where, in a file.
    offset: Option<u64>,
    file: Option<String>,
}

impl Line {
    fn of_image(start: u64, status: &Status, layers: &[Arc<dyn Format>]) -> Line {
        let line = Line {
            start,
            length: status.len,
            depth: status.layer,
            present: status.place != StatusPlace::Nowhere,
            zero: true,
            data: false,
            compressed: status.place == StatusPlace::Compressed,
            offset: None,
            file: None,
        };
        match status.place {
            StatusPlace::Data { file, offset, kept } => {
                let file = layers.get(status.layer).and_then(|l| l.files().get(usize::from(file)));
                let data = kept == Kept::Data;
                let file = file.map(|f| f.name());
                Line { zero: !data, data, offset: Some(offset), file, ..line }
            }
            StatusPlace::Compressed => Line { zero: false, data: true, ..line },
            StatusPlace::Zero | StatusPlace::Nowhere => line,
        }
    }

    fn of_disk(start: u64, region: &Region) -> Line {
        let data = region.kept == Kept::Data;
        Line {
            start,
            length: region.len,
            depth: 0,
            present: region.kept != Kept::Hole,
            zero: !data,
            data,
            compressed: false,
            offset: None,
            file: None,
        }
    }

    fn document(&self) -> Value {
        let mut line = json!({
            "start": self.start, "length": self.length, "depth": self.depth,
            "present": self.present, "zero": self.zero, "data": self.data,
            "compressed": self.compressed,
        });
        if let Some(offset) = self.offset {
            line["offset"] = offset.into();
        }
        line
    }
}

/// What is shown of `range`.
fn lines(opened: &Opened, range: std::ops::Range<u64>) -> std::io::Result<Vec<Line>> {
    let mut at = range.start;
    let mut lines = Vec::new();
    let Some(image) = &opened.image else {
        let mut regions = Vec::new();
        opened.disk.map(range, &mut regions)?;
        for region in &regions {
            lines.push(Line::of_disk(at, region));
            at += region.len;
        }
        return Ok(lines);
    };
    let layers: Vec<Arc<dyn Format>> = image.layers().cloned().collect();
    let mut found = Vec::new();
    image.status(range, usize::MAX, &mut found)?;
    for status in &found {
        lines.push(Line::of_image(at, status, &layers));
        at += status.len;
    }
    Ok(lines)
}

/// `ringback disk map`.
pub fn run(options: &Map) -> Result {
    let opening = Opening::to_read(&options.file, options.format.as_deref(), &options.allow);
    let opened = opening.force_share(options.force_share).open()?;
    let size = opened.disk.geometry().size;
    let start = sizes::parse(&options.start_offset)?.min(size);
    let length = options.max_length.as_deref().map_or(Ok(u64::MAX), sizes::parse)?;
    let end = start.saturating_add(length).min(size);
    let mut document_lines = Vec::new();
    if !options.output.json {
        outln!("{:<15} {:<15} {:<15} File", "Offset", "Length", "Mapped to");
    }
    let mut show = |line: &Line| {
        if options.output.json {
            document_lines.push(line.document());
        } else if line.data {
            print(line, &options.file);
        }
    };
    let mut at = start;
    let mut last: Option<Line> = None;
    while at < end {
        let found = lines(&opened, at..end.min(at + STEP)).map_err(about(&options.file))?;
        let Some(covered) = found.last().map(|l| l.start + l.length) else { break };
        at = covered;
        for line in found {
            match &mut last {
                Some(last) if goes_on(last, &line) => last.length += line.length,
                _ => {
                    if let Some(done) = last.replace(line) {
                        show(&done);
                    }
                }
            }
        }
    }
    if let Some(line) = &last {
        show(line);
    }
    if options.output.json {
        document(json!({"map": document_lines}));
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether `b` is only cut off from `a`.
fn goes_on(a: &Line, b: &Line) -> bool {
    let offset = a.offset.map(|o| o + a.length);
    let whole = Line { start: b.start, length: b.length, offset, ..a.clone() };
    whole == *b
}

/// As qemu-img: only what is data.
fn print(line: &Line, file: &str) {
    let hex = |n: u64| format!("{n:#x}").replace("0x0", "0");
    let to = match line.offset {
        Some(offset) => hex(offset),
        None if line.compressed => "compressed".into(),
        None => "?".into(),
    };
    let file = line.file.as_deref().unwrap_or(file);
    outln!("{:<15} {:<15} {to:<15} {file}", hex(line.start), hex(line.length));
}
