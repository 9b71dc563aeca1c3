//! What lies under a disk: bytes that are read, written and made durable, and how a regular file
//! or a block device is opened, locked and probed for them.
mod error;
mod file;
mod lock;
mod mem;
mod open;
mod probe;
pub mod record;

use std::io;
use std::ops::Range;

use crate::engine::EngineFile;

pub use error::OpenError;
pub use lock::{Lock, Sharing};
pub use mem::MemStorage;
pub use open::{Access, BlockSize, Cache, FileStorage, OpenOptions, open};
pub use probe::{Medium, Probe};

/// The bytes under an image format: a file, memory, a server's export.
///
/// This is the blocking face, for metadata and commands; it may be used from any thread, and
/// calls that do not overlap do not disturb each other. Payload of a storage that
/// [is a file](Storage::engine_file) goes around it, through the queue's own io_uring.
///
/// **Durability.** What was written is durable after a [`sync`](Storage::sync) that began later
/// and returned `Ok`; before that, any part of it may be lost, in units of 512 bytes and in any
/// order. Once a `sync` has failed, all later ones fail.
pub trait Storage: Send + Sync {
    /// Bytes. Grows with writes beyond the end.
    fn size(&self) -> io::Result<u64>;
    /// Fills `into` from `offset` on; bytes beyond the end are zeroes.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes `from` at `offset`, beyond the end too.
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()>;
    /// Makes durable what was written, by this face or by queues.
    fn sync(&self) -> io::Result<()>;
    /// Cuts or grows to `size` bytes; new bytes are zeroes.
    fn set_size(&self, size: u64) -> io::Result<()>;
    /// The range reads as zeroes afterwards; gives its space back where that is possible.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;
    /// Makes sure that `range` has space, so that writes to it do not fail for want of any.
    /// New bytes are zeroes.
    fn allocate(&self, range: Range<u64>) -> io::Result<()>;
    /// What it was opened for.
    fn access(&self) -> Access;
    /// The file for a queue's engine; `None`: payload goes by this face.
    fn engine_file(&self) -> Option<EngineFile> {
        None
    }
    /// Whether a sync does anything.
    fn needs_sync(&self) -> bool {
        true
    }
    /// Whether calls end without waiting for anybody: they need no thread of their own.
    fn is_memory(&self) -> bool {
        false
    }
    /// What messages call it.
    fn name(&self) -> String;
    /// Appends how `range` is kept, as [`Disk::map`](crate::Disk::map) does.
    fn map(&self, range: Range<u64>, out: &mut Vec<crate::Region>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        out.push(crate::Region { len, kept: crate::Kept::Data });
        Ok(())
    }
}
