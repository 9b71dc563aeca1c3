//! Which format is opened by what: the one place that knows them all.

use std::io;
use std::sync::Arc;

use crate::disk::{Disk, RawDisk};
use crate::storage::{Access, Cache, OpenOptions};

/// How a disk is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenAs {
    /// For what.
    pub access: Access,
    /// Through which cache.
    pub cache: Cache,
}

/// A target's format and what it names: `FORMAT:TARGET`; without a format it is raw.
pub fn split_target(text: &str) -> (&str, &str) {
    match text.split_once(':') {
        Some((format, target)) if !format.contains('/') => (format, target),
        _ => ("raw", text),
    }
}

/// Opens `target` as an image of `format`. The error's text says what to do.
pub fn open_disk(format: &str, target: &str, how: OpenAs) -> io::Result<Arc<dyn Disk>> {
    match format {
        "raw" => {
            let options = OpenOptions::new(target).access(how.access).cache(how.cache);
            Ok(RawDisk::open(&options)?)
        }
        _ => {
            let text = format!("{format}:{target}: format {format} is not supported; use raw");
            Err(io::Error::new(io::ErrorKind::Unsupported, text))
        }
    }
}
