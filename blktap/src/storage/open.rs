//! Opening a file or device for the engine.
use std::fs::{File, Metadata, OpenOptions as FileOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicI32;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::lock;
use super::probe::{self, Probe, probe};
use super::{Lock, OpenError, Sharing};
use crate::engine::FileKind;

/// How long an open waits for a lock if nothing else is said: a killed predecessor's requests
/// end within a second or two.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only reads.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// How the host's page cache is used; named as xl and QEMU name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Past the page cache (O_DIRECT). Where that is not possible: `Writeback`.
    None,
    /// Through the page cache; a flush writes it out.
    Writeback,
    /// As `Writeback`, and flushes do nothing: a host crash loses data.
    Unsafe,
}

/// The logical block size that a disk shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockSize {
    /// A device's own; 512 for a file.
    Native,
    /// So many bytes: a power of two from 512 to 4096, at least the device's own.
    Bytes(u32),
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// What for.
    pub access: Access,
    /// Through which cache.
    pub cache: Cache,
    /// Locked how.
    pub lock: Lock,
    /// Smallest unit of a request.
    pub logical_block: BlockSize,
}

impl OpenOptions {
    /// `path` for reading and writing, past the page cache, locked exclusively with a wait of
    /// 5 s, with its native block size.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        OpenOptions {
            path: path.into(),
            access: Access::ReadWrite,
            cache: Cache::None,
            lock: Lock::Held { sharing: Sharing::Exclusive, wait: LOCK_WAIT },
            logical_block: BlockSize::Native,
        }
    }
    /// With another access.
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }
    /// With another caching mode.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }
    /// With another lock.
    pub fn lock(mut self, lock: Lock) -> Self {
        self.lock = lock;
        self
    }
    /// With another logical block size.
    pub fn logical_block(mut self, size: BlockSize) -> Self {
        self.logical_block = size;
        self
    }
}

/// An opened and locked file or device.
#[derive(Clone, Debug)]
pub struct FileStorage {
    /// The open file; its locks live as long as it or a request on it.
    pub file: Arc<File>,
    /// The path it was opened by.
    pub path: PathBuf,
    /// What it needs and can do; `logical` is what was asked for.
    pub probe: Probe,
    /// The caching mode that is in force.
    pub cache: Cache,
    /// What it was opened for.
    pub access: Access,
    /// The errno of the first sync that failed, 0 before; shared by all who have it open.
    pub(crate) sync_failed: Arc<AtomicI32>,
    /// Held by metadata writes that read, change and write back a unit that they do not fill.
    pub(super) unaligned: Arc<Mutex<()>>,
}

impl FileStorage {
    /// Size now, rounded down to whole logical blocks.
    pub fn whole_blocks(&self) -> io::Result<u64> {
        let bytes = probe::size(&self.file, self.probe.kind)?;
        Ok(bytes - bytes % u64::from(self.probe.logical))
    }

    /// Says in a log line that a tail which is no whole logical block is not part of a raw disk.
    pub(crate) fn warn_of_tail(&self) -> io::Result<()> {
        let tail = probe::size(&self.file, self.probe.kind)? % u64::from(self.probe.logical);
        if tail != 0 {
            tracing::warn!(
                "{}: the last {tail} bytes are not a whole block of {} and are not part of the disk",
                self.path.display(),
                self.probe.logical
            );
        }
        Ok(())
    }
}

/// Opens, probes and locks `options.path`. Where direct I/O is not possible (the file system
/// has none, or needs units larger than the logical block), one log line says so and the cache
/// is `Writeback`. The image's content is not touched before the lock is held.
pub fn open(options: &OpenOptions) -> Result<FileStorage, OpenError> {
    let path = &options.path;
    let asked = match options.logical_block {
        BlockSize::Native => None,
        BlockSize::Bytes(n) => Some(check_block(path, n)?),
    };
    // Opening a FIFO would block and a tape would wind: look before.
    kind_of(std::fs::metadata(path), options)?;
    let (file, mut probe, cache) = match options.cache {
        Cache::None => match open_direct(options, asked)? {
            Ok((file, probe)) => (file, probe, Cache::None),
            Err(why) => {
                tracing::warn!("{}: no cache=none, using writeback: {why}", path.display());
                let (file, probe) = open_locked(options, probe::Path::Buffered)?;
                (file, probe, Cache::Writeback)
            }
        },
        cache => {
            let (file, probe) = open_locked(options, probe::Path::Buffered)?;
            (file, probe, cache)
        }
    };
    if let Some(asked) = asked {
        if asked < probe.logical {
            let why = "the device's own is larger";
            return Err(OpenError::LogicalBlock { path: path.clone(), asked, why });
        }
        probe.logical = asked;
        probe.physical = probe.physical.max(asked);
        probe.discard = probe.discard.map(|d| d.max(asked));
    }
    let storage = FileStorage {
        file: Arc::new(file),
        path: path.clone(),
        probe,
        cache,
        access: options.access,
        sync_failed: Arc::default(),
        unaligned: Arc::default(),
    };
    Ok(storage)
}

fn examine(options: &OpenOptions, source: io::Error) -> OpenError {
    OpenError::Io { path: options.path.clone(), what: "examine", source }
}

/// Opened past the page cache, or the reason why that is not possible.
fn open_direct(
    options: &OpenOptions,
    asked: Option<u32>,
) -> Result<Result<(File, Probe), &'static str>, OpenError> {
    match open_locked(options, probe::Path::Direct) {
        Ok((file, p)) if p.length_align <= asked.unwrap_or(p.logical) => Ok(Ok((file, p))),
        Ok(_) => Ok(Err("it needs larger blocks (a logical block size of 4096 has them)")),
        Err(OpenError::Io { source, .. })
            if source.raw_os_error() == Some(libc::EINVAL)
                || source.kind() == io::ErrorKind::Unsupported =>
        {
            Ok(Err("the file system has no O_DIRECT for it"))
        }
        Err(e) => Err(e),
    }
}

fn open_locked(options: &OpenOptions, path: probe::Path) -> Result<(File, Probe), OpenError> {
    let file = open_file(options, path)?;
    let kind = kind_of(file.metadata(), options)?;
    if kind == FileKind::Block
        && options.access == Access::ReadWrite
        && probe::device_is_read_only(&file).map_err(|e| examine(options, e))?
    {
        return Err(OpenError::ReadOnly(options.path.clone()));
    }
    lock::take(&file, &options.path, options.access, options.lock)?;
    let found = probe(&file, kind, path, options.access).map_err(|e| examine(options, e))?;
    Ok((file, found))
}

fn open_file(options: &OpenOptions, path: probe::Path) -> Result<File, OpenError> {
    let direct = if path == probe::Path::Direct { libc::O_DIRECT } else { 0 };
    let writing = options.access == Access::ReadWrite;
    let file = FileOptions::new()
        .read(true)
        .write(writing)
        .custom_flags(direct)
        .open(&options.path)
        .map_err(|e| OpenError::of_open(options.path.clone(), writing, e))?;
    leave_its_times(&file);
    Ok(file)
}

/// When an image was last read is nobody's to know, and to look whether it is due costs each
/// read of the page cache some 4 %. Only the file's owner (and CAP_FOWNER) may leave it out.
fn leave_its_times(file: &File) {
    if let Ok(flags) = fcntl_getfl(file) {
        let _ = fcntl_setfl(file, flags | OFlags::NOATIME);
    }
}

fn kind_of(found: io::Result<Metadata>, options: &OpenOptions) -> Result<FileKind, OpenError> {
    let path = options.path.clone();
    let writing = options.access == Access::ReadWrite;
    let kind = match found {
        Ok(meta) => meta.file_type(),
        Err(e) => return Err(OpenError::of_open(path, writing, e)),
    };
    if kind.is_file() {
        Ok(FileKind::Regular)
    } else if kind.is_block_device() {
        Ok(FileKind::Block)
    } else if kind.is_dir() {
        Err(OpenError::Directory(path))
    } else {
        Err(OpenError::Kind(path))
    }
}

fn check_block(path: &Path, asked: u32) -> Result<u32, OpenError> {
    if asked.is_power_of_two() && (512..=4096).contains(&asked) {
        return Ok(asked);
    }
    let why = "it must be 512, 1024, 2048 or 4096";
    Err(OpenError::LogicalBlock { path: path.into(), asked, why })
}
