//! What is wrong with an image.
use std::io;

use crate::storage::OpenError;

/// Why an image cannot be used, or an operation on it failed. The texts go behind the image's
/// name and a colon.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file below failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// The file could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is not an image of the format that was asked for.
    #[error("not a {0} image")]
    NotThis(&'static str),
    /// The image contradicts itself or its format.
    #[error("image is corrupt: {0}")]
    Corrupt(String),
    /// A feature that is not supported, named.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// What was asked for makes no sense, or not with this image.
    #[error("{0}")]
    Invalid(String),
    /// No room is left, in the file or in what the format can address.
    #[error("no space left: {0}")]
    NoSpace(String),
    /// The image was opened read-only.
    #[error("opened read-only")]
    ReadOnly,
}

impl ImageError {
    /// For `map_err`: the file below failed at `what` ("read the L2 table").
    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> ImageError {
        move |source| ImageError::Io { what, source }
    }

    /// The errno that a guest's request gets.
    pub fn errno(&self) -> i32 {
        match self {
            ImageError::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull => libc::ENOSPC,
                _ => source.raw_os_error().unwrap_or(libc::EIO),
            },
            ImageError::NoSpace(_) => libc::ENOSPC,
            ImageError::ReadOnly => libc::EROFS,
            ImageError::Unsupported(_) => libc::EOPNOTSUPP,
            ImageError::Invalid(_) => libc::EINVAL,
            ImageError::Open(_) | ImageError::NotThis(_) | ImageError::Corrupt(_) => libc::EIO,
        }
    }
}
