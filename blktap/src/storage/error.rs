//! Why an image could not be opened, with the remedy.
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why an image could not be opened. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No such path.
    #[error("{}: no such file or device", .0.display())]
    NotFound(PathBuf),
    /// The path's permissions do not allow it.
    #[error(
        "{}: permission denied: give this process's user {} access to the file, and search \
         access to each folder above it",
        path.display(), if *.writing { "read and write" } else { "read" }
    )]
    Permission {
        /// The path.
        path: PathBuf,
        /// Whether it was opened for writing.
        writing: bool,
    },
    /// A directory.
    #[error("{}: is a directory, not an image or a block device", .0.display())]
    Directory(PathBuf),
    /// A FIFO, a socket, a character device.
    #[error("{}: neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// The device, the medium or the file system is read-only.
    #[error("{}: is read-only: open it read-only (access=ro)", .0.display())]
    ReadOnly(PathBuf),
    /// A device without a medium.
    #[error("{}: there is no medium in the device", .0.display())]
    NoMedium(PathBuf),
    /// Someone else holds the image.
    #[error(
        "{}: in use by another process, which {} (waited {:.1} s; Failed to get \"{permission}\" \
         lock): stop the other user, or, if both keep order among themselves, open it shared",
        path.display(), conflict, waited.as_secs_f64()
    )]
    Locked {
        /// The path.
        path: PathBuf,
        /// QEMU's name of the permission that was refused.
        permission: &'static str,
        /// What the other one does.
        conflict: &'static str,
        /// How long this open waited for it.
        waited: Duration,
    },
    /// The file system has no locks.
    #[error("{}: cannot lock: {source}: if nobody else can use the image, open it with lock=off", path.display())]
    NoLocks {
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A logical block size that the disk cannot have.
    #[error("{}: logical block size {asked} is not possible: {why}", path.display())]
    LogicalBlock {
        /// The path.
        path: PathBuf,
        /// What was asked for, in bytes.
        asked: u32,
        /// Why not.
        why: &'static str,
    },
    /// Anything else.
    #[error("{}: cannot {what}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl OpenError {
    pub(super) fn of_open(path: PathBuf, writing: bool, e: io::Error) -> Self {
        match e.raw_os_error() {
            Some(libc::ENOENT) => OpenError::NotFound(path),
            Some(libc::EISDIR) => OpenError::Directory(path),
            Some(libc::EROFS) => OpenError::ReadOnly(path),
            Some(libc::ENOMEDIUM) => OpenError::NoMedium(path),
            Some(libc::EACCES | libc::EPERM) => OpenError::Permission { path, writing },
            Some(libc::ENXIO) => OpenError::Kind(path),
            _ => OpenError::Io { path, what: "open", source: e },
        }
    }
}

impl From<OpenError> for io::Error {
    fn from(e: OpenError) -> Self {
        let kind = match &e {
            OpenError::NotFound(_) => io::ErrorKind::NotFound,
            OpenError::Permission { .. } => io::ErrorKind::PermissionDenied,
            OpenError::Locked { .. } => io::ErrorKind::ResourceBusy,
            OpenError::ReadOnly(_) => io::ErrorKind::ReadOnlyFilesystem,
            OpenError::Io { source, .. } | OpenError::NoLocks { source, .. } => source.kind(),
            _ => io::ErrorKind::InvalidInput,
        };
        io::Error::new(kind, e)
    }
}
