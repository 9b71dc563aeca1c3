//! The header of version 1: 48 bytes, big-endian.
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::formats::ImageError;
use crate::storage::Storage;

const MAGIC: u32 = 0x5146_49fb;
/// Bytes of the largest L1 table that is read; QEMU has the same limit for QCOW2.
const LARGEST_L1: u64 = 32 << 20;
/// Longest name of a backing file, as in QEMU.
const LONGEST_NAME: u32 = 1023;

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub(super) struct Header {
    magic: U32,
    version: U32,
    pub backing_offset: U64,
    pub backing_len: U32,
    modified: U32,
    pub size: U64,
    pub cluster_bits: u8,
    pub l2_bits: u8,
    padding: U16,
    crypt_method: U32,
    pub l1_offset: U64,
}

/// Bytes of a header.
pub(super) const HEADER: u64 = 48;

impl Header {
    pub fn new(size: u64, cluster_bits: u8, l2_bits: u8, l1_offset: u64) -> Header {
        Header {
            magic: U32::new(MAGIC),
            version: U32::new(1),
            size: U64::new(size),
            cluster_bits,
            l2_bits,
            l1_offset: U64::new(l1_offset),
            ..Header::new_zeroed()
        }
    }

    pub fn read(storage: &dyn Storage) -> Result<Header, ImageError> {
        let mut header = Header::new_zeroed();
        storage.read_at(0, header.as_mut_bytes()).map_err(ImageError::io("read the header"))?;
        let file_size = storage.size().map_err(ImageError::io("read the size"))?;
        header.check(file_size)?;
        Ok(header)
    }

    /// Whether it can be used, with a file of so many bytes.
    pub fn check(&self, file_size: u64) -> Result<(), ImageError> {
        let unsupported = |what: String| Err(ImageError::Unsupported(what));
        if self.magic.get() != MAGIC {
            return Err(ImageError::NotThis("QCOW"));
        }
        match (self.version.get(), self.crypt_method.get()) {
            (1, 0) => {}
            (1, 1) => return unsupported("an image encrypted with AES".into()),
            (1, n) => return unsupported(format!("encryption method {n}")),
            (2 | 3, _) => return Err(ImageError::Invalid("it is QCOW2, not QCOW".into())),
            (n, _) => return unsupported(format!("QCOW version {n}")),
        }
        if !(9..=16).contains(&self.cluster_bits) {
            return unsupported(format!("clusters of 2^{} bytes", self.cluster_bits));
        }
        if !(6..=13).contains(&self.l2_bits) {
            return unsupported(format!("L2 tables of 2^{} entries", self.l2_bits));
        }
        if self.size.get() < 512 {
            return Err(ImageError::Corrupt(format!("a disk of {} bytes", self.size)));
        }
        let bytes = self.l1_entries() * 8;
        if bytes > LARGEST_L1 {
            let what = format!("a disk of {} bytes: its L1 table has {bytes}", self.size);
            return unsupported(what);
        }
        let end = self.l1_offset.get().checked_add(bytes);
        if self.l1_offset.get() < HEADER || end.is_none_or(|end| end > file_size) {
            let what = format!("the L1 table cannot be at byte {}", self.l1_offset);
            return Err(ImageError::Corrupt(what));
        }
        self.check_name(file_size)
    }

    fn check_name(&self, file_size: u64) -> Result<(), ImageError> {
        let (offset, len) = (self.backing_offset.get(), self.backing_len.get());
        let end = offset.checked_add(u64::from(len));
        if offset != 0 && (len > LONGEST_NAME || end.is_none_or(|end| end > file_size)) {
            let what = format!("the backing file's name cannot be {len} bytes at byte {offset}");
            return Err(ImageError::Corrupt(what));
        }
        Ok(())
    }

    /// The backing file's name, if there is one.
    pub fn backing(&self, storage: &dyn Storage) -> Result<Option<String>, ImageError> {
        if self.backing_offset.get() == 0 || self.backing_len.get() == 0 {
            return Ok(None);
        }
        let mut name = vec![0; self.backing_len.get() as usize];
        let what = "read the backing file's name";
        storage.read_at(self.backing_offset.get(), &mut name).map_err(ImageError::io(what))?;
        // QEMU takes it for a string of C.
        name.truncate(name.iter().position(|b| *b == 0).unwrap_or(name.len()));
        match String::from_utf8(name) {
            Ok(name) => Ok((!name.is_empty()).then_some(name)),
            Err(_) => Err(ImageError::Unsupported("a backing file's name not in UTF-8".into())),
        }
    }

    /// Guest bytes that an L1 entry stands for, as a power of two.
    pub fn l1_shift(&self) -> u32 {
        u32::from(self.cluster_bits) + u32::from(self.l2_bits)
    }

    pub fn l1_entries(&self) -> u64 {
        self.size.get().div_ceil(1 << self.l1_shift())
    }

    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }
}
