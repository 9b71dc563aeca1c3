//! Raw bytes as a format: what a chain ends with, and how a storage that is no file is a disk.
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    Change, Extent, Format, Guard, ImageError, Leases, Miss, Outcome, Piece, Place, Target, Waiter,
};
use crate::disk::Region;
use crate::storage::{Access, Storage};

/// A storage whose bytes are the disk's. A tail of less than 512 bytes reads as if it were filled
/// up with zeroes (as QEMU has it) where the storage is read-only, and is not part of the disk
/// otherwise.
pub struct RawFormat {
    files: [Arc<dyn Storage>; 1],
    size: AtomicU64,
    leases: Arc<Leases>,
}

impl RawFormat {
    /// The bytes of `storage`.
    pub fn new(storage: Arc<dyn Storage>) -> io::Result<Self> {
        let size = AtomicU64::new(whole_sectors(&*storage)?);
        Ok(RawFormat { files: [storage], size, leases: Arc::default() })
    }
}

fn whole_sectors(storage: &dyn Storage) -> io::Result<u64> {
    let size = storage.size()?;
    Ok(match storage.access() {
        Access::ReadOnly => size.checked_next_multiple_of(512).unwrap_or(size - size % 512),
        Access::ReadWrite => size - size % 512,
    })
}

impl Format for RawFormat {
    fn name(&self) -> &'static str {
        "raw"
    }
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }
    fn cluster(&self) -> u64 {
        512
    }
    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }
    fn leases(&self) -> &Arc<Leases> {
        &self.leases
    }
    fn resolve_read(
        &self,
        range: Range<u64>,
        out: &mut Vec<Extent>,
    ) -> Result<Outcome<()>, ImageError> {
        let len = range.end - range.start;
        out.push(Extent { len, place: Place::Data { file: 0, offset: range.start } });
        Ok(Outcome::Ready(()))
    }
    fn resolve_write(
        &self,
        range: Range<u64>,
        _change: Change,
        _waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Outcome<Option<Guard>>, ImageError> {
        let len = range.end - range.start;
        out.push(Piece { len, target: Target::InPlace { file: 0, offset: range.start } });
        Ok(Outcome::Ready(None))
    }
    fn commit(&self, _guard: Guard) {}
    fn abort(&self, _guard: Guard) {}
    fn load(&self, _miss: Miss) -> Result<(), ImageError> {
        Ok(())
    }
    fn decompress(&self, _cluster: u64, _out: &mut Vec<u8>) -> Result<(), ImageError> {
        Err(ImageError::Corrupt("a raw image has no compressed clusters".into()))
    }
    fn has_unflushed(&self) -> bool {
        false
    }
    fn flush(&self) -> Result<(), ImageError> {
        self.files[0].sync().map_err(ImageError::io("flush the file"))
    }
    fn close(&self) -> Result<(), ImageError> {
        self.flush()
    }
    fn refresh(&self) -> io::Result<()> {
        self.size.store(whole_sectors(&*self.files[0])?, Ordering::Relaxed);
        Ok(())
    }
    fn map_data(&self, _file: u16, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        self.files[0].map(range, out)
    }
}
