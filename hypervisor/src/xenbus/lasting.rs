//! Memory that outlives the process: a file in the run directory, mapped. What a backend must know
//! after it was killed lies in it, and costs no more than private memory.
// Parts of a mapping are named by address.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use rings::PAGE_SIZE;
use rings::mem::SharedMem;
use rustix::fs::OFlags;

const MAGIC: &[u8; 8] = b"RBLASTS\0";
const VERSION: u32 = 1;
/// Bytes before the identity: magic, version, the identity's length.
const HEAD: usize = 16;

/// Why what a predecessor left cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LastingError {
    /// There is nothing.
    #[error("{} is not there", .0.display())]
    Missing(PathBuf),
    /// It belongs to something else, or its size or its owner are wrong.
    #[error("{} {why}", .path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It cannot be opened, read or mapped.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A mapped file that says whose it is, and stays when this is dropped: whoever is done with it
/// [removes](Lasting::remove) it.
pub struct Lasting {
    map: Arc<MmapRaw>,
    /// Bytes before the memory.
    head: usize,
}

/// The file's beginning: the identity and what stands before it, in whole pages.
fn head(identity: &[u8]) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD + identity.len());
    head.extend_from_slice(MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&(identity.len() as u32).to_le_bytes());
    head.extend_from_slice(identity);
    head.resize(head.len().next_multiple_of(PAGE_SIZE), 0);
    head
}

fn map(file: &File) -> io::Result<Arc<MmapRaw>> {
    // Its pages are there already: the first use of each is not to fault.
    Ok(Arc::new(MmapOptions::new().populate().map_raw(file)?))
}

impl Lasting {
    /// Makes the file at `path` with `bytes` zeroed bytes (rounded up to pages) that belong to
    /// `identity`, in place of what is there. Nobody sees it before it is whole.
    pub fn create(path: &Path, identity: &[u8], bytes: usize) -> io::Result<Lasting> {
        if let Some(folder) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let new = path.with_file_name(name);
        Lasting::remove(&new)?;
        let made = Lasting::create_at(&new, identity, bytes).and_then(|lasting| {
            fs::rename(&new, path)?;
            Ok(lasting)
        });
        made.inspect_err(|_| drop(Lasting::remove(&new)))
    }

    fn create_at(path: &Path, identity: &[u8], bytes: usize) -> io::Result<Lasting> {
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(path)?;
        let mut contents = head(identity);
        let head = contents.len();
        contents.resize(head + bytes.next_multiple_of(PAGE_SIZE), 0);
        // Written, not left sparse: a full file system is an error here, not a SIGBUS later.
        file.write_all(&contents)?;
        Ok(Lasting { map: map(&file)?, head })
    }

    /// Maps what a predecessor made with the same identity and size.
    pub fn open(path: &Path, identity: &[u8], bytes: usize) -> Result<Lasting, LastingError> {
        let refused = |why| LastingError::Refused { path: path.into(), why };
        let broken = |source| LastingError::Io { path: path.into(), source };
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mut options = File::options();
        let options = options.read(true).write(true).custom_flags(flags.bits() as i32);
        let file = options.open(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => LastingError::Missing(path.into()),
            _ => broken(e),
        })?;
        let meta = file.metadata().map_err(broken)?;
        let ours = meta.uid() == rustix::process::geteuid().as_raw() && meta.mode() & 0o077 == 0;
        if !meta.is_file() || !ours {
            return Err(refused("is not a file of this user alone"));
        }
        let wanted = head(identity);
        if meta.len() != (wanted.len() + bytes.next_multiple_of(PAGE_SIZE)) as u64 {
            return Err(refused("is of another size"));
        }
        let mut found = vec![0; wanted.len()];
        file.read_exact_at(&mut found, 0).map_err(broken)?;
        if found[..HEAD - 4] != wanted[..HEAD - 4] {
            return Err(refused("is of another version"));
        }
        if found != wanted {
            return Err(refused("is of another connection"));
        }
        Ok(Lasting { map: map(&file).map_err(broken)?, head: wanted.len() })
    }

    /// Removes the file at `path`, if there is one.
    pub fn remove(path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Some of the memory, in whole pages; parts do not overlap.
    ///
    /// # Panics
    /// Where the range is not within the memory or not of whole pages: it is the program's own.
    pub fn part(&self, range: Range<usize>) -> Part {
        assert!(range.start.is_multiple_of(PAGE_SIZE) && range.end.is_multiple_of(PAGE_SIZE));
        assert!(range.start <= range.end && self.head + range.end <= self.map.len());
        let len = range.end - range.start;
        Part { map: Arc::clone(&self.map), at: self.head + range.start, len }
    }
}

/// Pages of a [`Lasting`], which they keep mapped.
pub struct Part {
    map: Arc<MmapRaw>,
    at: usize,
    len: usize,
}

// SAFETY: whole pages within a mapping of a file (`Lasting::part`) that stays in place for as
// long as it is held; they are reached through SharedMem alone. The file keeps its size: only
// this user can open it, and nothing of ours changes it.
unsafe impl SharedMem for Part {
    fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(self.at)
    }
    fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
#[path = "lasting_tests.rs"]
mod tests;
