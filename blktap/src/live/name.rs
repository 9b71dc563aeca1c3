//! How a disk is named: `FORMAT:PATH` or an NBD server's export.
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::disk::NbdTarget;
use crate::formats::ImageError;
use crate::image::ImageFormat;

/// A disk by its name, as the `params` of a backend's node have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// An image or a device.
    File {
        /// Its format.
        format: ImageFormat,
        /// Where it is.
        path: PathBuf,
    },
    /// A server's export.
    Export(String),
}

/// A text that names no disk.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadName(#[from] ImageError);

impl Name {
    /// The file, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Name::File { path, .. } => Some(path),
            Name::Export(_) => None,
        }
    }
}

impl FromStr for Name {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Name, BadName> {
        if NbdTarget::is_meant(text) {
            return Ok(Name::Export(text.to_owned()));
        }
        let (format, path) = match text.split_once(':') {
            Some((format, path)) if !format.contains('/') => (format.parse()?, path),
            _ => (ImageFormat::Raw, text),
        };
        Ok(Name::File { format, path: path.into() })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::File { format, path } => write!(f, "{format}:{}", path.display()),
            Name::Export(text) => f.write_str(text),
        }
    }
}
