//! Bytes in memory, for tests and for images that nobody keeps.
use std::io;
use std::ops::Range;

use parking_lot::Mutex;

use super::{Access, Storage};

/// A [`Storage`] in memory. It holds all its bytes: keep it small.
#[derive(Debug, Default)]
pub struct MemStorage {
    bytes: Mutex<Vec<u8>>,
}

impl MemStorage {
    /// With these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        MemStorage { bytes: Mutex::new(bytes) }
    }
    /// A copy of its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().clone()
    }
}

/// `offset..offset + len` as memory has it.
fn span(offset: u64, len: usize) -> io::Result<Range<usize>> {
    let start = usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let end = start.checked_add(len).ok_or(io::ErrorKind::FileTooLarge)?;
    Ok(start..end)
}

impl Storage for MemStorage {
    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().len() as u64)
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let there = &bytes[start..];
        let n = there.len().min(into.len());
        into[..n].copy_from_slice(&there[..n]);
        into[n..].fill(0);
        Ok(())
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let range = span(offset, from.len())?;
        let mut bytes = self.bytes.lock();
        if bytes.len() < range.end {
            bytes.resize(range.end, 0);
        }
        bytes[range].copy_from_slice(from);
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_size(&self, size: u64) -> io::Result<()> {
        self.bytes.lock().resize(span(size, 0)?.start, 0);
        Ok(())
    }
    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let mut bytes = self.bytes.lock();
        let len = bytes.len() as u64;
        bytes[range.start.min(len) as usize..range.end.min(len) as usize].fill(0);
        Ok(())
    }
    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        let end = span(range.end, 0)?.start;
        let mut bytes = self.bytes.lock();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(())
    }
    fn access(&self) -> Access {
        Access::ReadWrite
    }
    fn is_memory(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        "memory".to_owned()
    }
}
