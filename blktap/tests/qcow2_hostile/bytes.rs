//! An image in memory that cannot become large.
use std::io;
use std::ops::Range;
use std::sync::Mutex;

use blktap::storage::{Access, MemStorage, Storage};

/// Most bytes of an image, as a file system with a quota has it.
const MOST: u64 = 256 << 20;

pub struct Bytes {
    memory: MemStorage,
    access: Access,
    /// Bytes that were read: a measure of the work.
    read: Mutex<u64>,
}

impl Bytes {
    pub fn new(bytes: &[u8], access: Access) -> Self {
        Bytes { memory: MemStorage::new(bytes.to_vec()), access, read: Mutex::new(0) }
    }
    pub fn bytes(&self) -> Vec<u8> {
        self.memory.bytes()
    }
    /// How much was read.
    pub fn work(&self) -> u64 {
        *self.read.lock().expect("a number")
    }
    fn check(&self, end: u64) -> io::Result<()> {
        match self.access {
            Access::ReadOnly => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Access::ReadWrite if end > MOST => Err(io::ErrorKind::StorageFull.into()),
            Access::ReadWrite => Ok(()),
        }
    }
}

impl Storage for Bytes {
    fn size(&self) -> io::Result<u64> {
        self.memory.size()
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        *self.read.lock().expect("a number") += into.len() as u64;
        self.memory.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check(offset.saturating_add(from.len() as u64))?;
        self.memory.write_at(offset, from)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_size(&self, size: u64) -> io::Result<()> {
        self.check(size)?;
        self.memory.set_size(size)
    }
    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.check(0)?;
        self.memory.punch(range)
    }
    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.check(range.end)?;
        self.memory.allocate(range)
    }
    fn access(&self) -> Access {
        self.access
    }
    fn is_memory(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        "an image in memory".to_owned()
    }
}
