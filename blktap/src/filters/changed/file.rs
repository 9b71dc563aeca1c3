//! The file of a changed-block log.
//!
//! | bytes | what (little-endian) |
//! |---|---|
//! | 0 to 7 | `RBCHANGE` |
//! | 8 to 11 | version, 1 |
//! | 12 to 15 | 0: closed, the bits are exact; 1: in use, or its user crashed: the bits claim too much |
//! | 16 to 19 | granularity: a bit stands for 2 to the power of this many bytes, 9 to 31 |
//! | 20 to 23 | length of the name |
//! | 24 to 31 | size of the disk in bytes |
//! | 32 to 287 | the name, UTF-8, filled up with zeroes |
//! | 508 to 511 | CRC-32 (zlib's) of bytes 0 to 507 |
//! | 4096 on | the bits: block n is bit n modulo 8 of byte n / 8 |
//!
//! The first 512 bytes are written as one: a power cut leaves the old or the new ones. A bit is
//! durable before what it stands for is written to the disk.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::formats::qcow2::bitmaps::bits::DirtyBits;
use crate::storage::{self, Access, Cache, OpenOptions, Storage};

const MAGIC: [u8; 8] = *b"RBCHANGE";
const VERSION: u32 = 1;
/// Where the bits begin.
const BITS: u64 = 4096;
/// The bits are read and written in pieces of so many bytes.
pub(super) const PAGE: u64 = 4096;
/// Longest name, in bytes.
const MAX_NAME: usize = 255;
/// Most bytes of bits: 2 PiB of disk in blocks of 64 KiB.
const MAX_BITS: u64 = 4 << 30;

/// What is wrong with a log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It cannot be read or written.
    #[error("{name}: cannot {what}: {source}")]
    Io {
        /// The file.
        name: String,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// It is no log, or damaged.
    #[error("{name}: {why}")]
    Invalid {
        /// The file.
        name: String,
        /// Why.
        why: String,
    },
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] storage::OpenError),
}

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U32,
    state: U32,
    granularity_bits: U32,
    name_len: U32,
    disk_size: U64,
    name: [u8; 256],
    zero: [u8; 220],
    crc: U32,
}

/// How the last user left a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Closed: exactly the blocks that were changed.
    Exact,
    /// Not closed: all blocks that were changed, and some that were not.
    Claims,
}

/// What a log says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// As what it is shown.
    pub name: String,
    /// A bit stands for 2 to the power of this many bytes.
    pub granularity_bits: u8,
    /// Bytes of the disk.
    pub disk_size: u64,
    /// How it was left.
    pub left: Left,
}

impl Header {
    fn decode(bytes: &[u8; 512]) -> Result<Header, String> {
        let raw = Raw::read_from_bytes(bytes).map_err(|e| e.to_string())?;
        if raw.magic != MAGIC {
            return Err("no changed-block log".into());
        }
        if raw.crc.get() != crc(&bytes[..508]) {
            return Err("the header's checksum is wrong".into());
        }
        if raw.version.get() != VERSION {
            return Err(format!("version {} is not known", raw.version));
        }
        let left = match raw.state.get() {
            0 => Left::Exact,
            1 => Left::Claims,
            other => return Err(format!("a state of {other}")),
        };
        let name = raw.name.get(..raw.name_len.get() as usize).filter(|n| n.len() <= MAX_NAME);
        let name = name.and_then(|name| std::str::from_utf8(name).ok()).ok_or("its name")?;
        let granularity_bits = raw.granularity_bits.get() as u8;
        if !(9..=31).contains(&raw.granularity_bits.get()) {
            return Err(format!("a granularity of 2^{}", raw.granularity_bits));
        }
        let header =
            Header { name: name.into(), granularity_bits, disk_size: raw.disk_size.get(), left };
        header.check()?;
        Ok(header)
    }

    /// Whether its bits fit memory.
    fn check(&self) -> Result<(), String> {
        if self.name.is_empty() || self.name.len() > MAX_NAME {
            return Err(format!("a name has 1 to {MAX_NAME} bytes"));
        }
        if i64::try_from(self.disk_size).is_err() {
            return Err(format!("a disk of {} bytes", self.disk_size));
        }
        if self.bytes_of_bits() > MAX_BITS {
            return Err("its bits need too much memory; take a larger granularity".into());
        }
        Ok(())
    }

    fn encode(&self) -> [u8; 512] {
        let mut raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            state: u32::from(self.left == Left::Claims).into(),
            granularity_bits: u32::from(self.granularity_bits).into(),
            name_len: (self.name.len() as u32).into(),
            disk_size: self.disk_size.into(),
            name: [0; 256],
            zero: [0; 220],
            crc: 0.into(),
        };
        raw.name[..self.name.len()].copy_from_slice(self.name.as_bytes());
        raw.crc = crc(&raw.as_bytes()[..508]).into();
        let mut bytes = [0; 512];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Bytes that the bits take.
    pub(super) fn bytes_of_bits(&self) -> u64 {
        self.disk_size.div_ceil(1 << self.granularity_bits).div_ceil(8)
    }

    /// Bytes of the whole file.
    fn file_size(&self) -> u64 {
        BITS + self.bytes_of_bits().next_multiple_of(PAGE)
    }
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// A log's file, opened.
pub(super) struct LogFile {
    pub storage: Arc<dyn Storage>,
}

impl LogFile {
    fn io(&self, what: &'static str) -> impl FnOnce(io::Error) -> LogError + use<> {
        let name = self.storage.name();
        move |source| LogError::Io { name, what, source }
    }

    fn invalid(&self, why: impl Into<String>) -> LogError {
        LogError::Invalid { name: self.storage.name(), why: why.into() }
    }

    /// Makes an empty log, durably, of a storage without content.
    pub fn format(&self, header: &Header) -> Result<(), LogError> {
        header.check().map_err(|why| self.invalid(why))?;
        self.storage.set_size(0).map_err(self.io("empty"))?;
        self.storage.allocate(0..header.file_size()).map_err(self.io("allocate"))?;
        self.put(header)
    }

    /// Writes the header, durably.
    pub fn put(&self, header: &Header) -> Result<(), LogError> {
        self.storage.write_at(0, &header.encode()).map_err(self.io("write the header of"))?;
        self.sync()
    }

    /// Makes room for a disk that has grown. The header says so afterwards.
    pub fn grow(&self, header: &Header) -> Result<(), LogError> {
        header.check().map_err(|why| self.invalid(why))?;
        self.storage.allocate(0..header.file_size()).map_err(self.io("allocate"))
    }

    pub fn sync(&self) -> Result<(), LogError> {
        self.storage.sync().map_err(self.io("sync"))
    }

    /// The header and the bits.
    pub fn read(&self) -> Result<(Header, DirtyBits), LogError> {
        let mut bytes = [0; 512];
        self.storage.read_at(0, &mut bytes).map_err(self.io("read the header of"))?;
        let header = Header::decode(&bytes).map_err(|why| self.invalid(why))?;
        if self.storage.size().map_err(self.io("find the size of"))? < header.file_size() {
            return Err(self.invalid("shorter than its bits"));
        }
        let bits = DirtyBits::new(header.disk_size, header.granularity_bits);
        let mut page = vec![0; PAGE as usize];
        for at in (0..header.bytes_of_bits()).step_by(PAGE as usize) {
            self.storage.read_at(BITS + at, &mut page).map_err(self.io("read"))?;
            bits.put_bytes(at, &page);
        }
        Ok((header, bits))
    }

    /// Writes one page of the bits: that which holds byte `page * PAGE` of them.
    pub fn write_page(&self, page: u64, bits: &DirtyBits) -> Result<(), LogError> {
        let mut bytes = vec![0; PAGE as usize];
        bits.bytes(page * PAGE, &mut bytes);
        self.write_bytes(page, &bytes)
    }

    /// Writes one page of the bits.
    pub fn write_bytes(&self, page: u64, bytes: &[u8]) -> Result<(), LogError> {
        self.storage.write_at(BITS + page * PAGE, bytes).map_err(self.io("write"))
    }
}

/// What a log holds that nobody writes.
pub struct Frozen {
    /// What it says of itself.
    pub header: Header,
    bits: DirtyBits,
}

impl Frozen {
    pub(super) fn new(header: Header, bits: DirtyBits) -> Frozen {
        Frozen { header, bits }
    }

    /// Reads the log in `path`, which nobody has in use.
    pub fn read(path: &Path) -> Result<Frozen, LogError> {
        let options = OpenOptions::new(path).access(Access::ReadOnly).cache(Cache::Writeback);
        Self::load(Arc::new(storage::open(&options)?))
    }

    /// Reads the log in a storage.
    pub fn load(storage: Arc<dyn Storage>) -> Result<Frozen, LogError> {
        let (header, bits) = LogFile { storage }.read()?;
        Ok(Frozen { header, bits })
    }

    /// Appends `range` (bytes) in stretches of (bytes, whether changed).
    pub fn stretches(&self, range: std::ops::Range<u64>, out: &mut Vec<(u64, bool)>) {
        self.bits.stretches(range, out);
    }
}

/// Creates a file durably, the folder's entry too: a log that a crash makes vanish would be taken
/// for one that has just begun.
pub(super) fn create(path: &Path) -> Result<(), LogError> {
    let made = File::options().write(true).create_new(true).open(path).and_then(|file| {
        file.sync_all()?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    });
    made.map_err(|source| LogError::Io { name: path.display().to_string(), what: "create", source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemStorage;

    fn header() -> Header {
        let name = "backup".to_owned();
        Header { name, granularity_bits: 16, disk_size: 10 << 20, left: Left::Claims }
    }

    #[test]
    fn what_is_written_is_read() {
        let file = LogFile { storage: Arc::new(MemStorage::default()) };
        file.format(&header()).expect("made");
        let bits = DirtyBits::new(10 << 20, 16);
        bits.mark(3 << 16..(4 << 16) + 1);
        file.write_page(0, &bits).expect("written");
        let frozen = Frozen::load(file.storage).expect("a log");
        assert_eq!(frozen.header, header());
        let mut out = Vec::new();
        frozen.stretches(0..10 << 20, &mut out);
        assert_eq!(out, [(3 << 16, false), (2 << 16, true), ((10 << 20) - (5 << 16), false)]);
    }

    #[test]
    fn damaged_headers_are_refused_by_name() {
        let good = header().encode();
        assert_eq!(Header::decode(&good), Ok(header()));
        let resealed = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            let crc = crc(&bytes[..508]);
            bytes[508..].copy_from_slice(&crc.to_le_bytes());
            Header::decode(&bytes).expect_err("damaged")
        };
        assert_eq!(resealed(0, 0), "no changed-block log");
        assert_eq!(resealed(8, 2), "version 2 is not known");
        assert_eq!(resealed(12, 7), "a state of 7");
        assert_eq!(resealed(16, 40), "a granularity of 2^40");
        assert_eq!(resealed(23, 255), "its name");
        assert_eq!(resealed(20, 0), "a name has 1 to 255 bytes");
        assert!(resealed(30, 255).contains("too much memory"));
        assert!(resealed(31, 255).starts_with("a disk of"));
        let mut flipped = good;
        flipped[25] ^= 1;
        assert_eq!(Header::decode(&flipped), Err("the header's checksum is wrong".into()));
        let short = LogFile { storage: Arc::new(MemStorage::new(good.to_vec())) };
        let why = short.read().map(|_| ()).expect_err("short").to_string();
        assert!(why.contains("shorter than its bits"), "{why}");
    }
}
