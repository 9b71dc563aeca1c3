//! The dynamic disk header: 1024 bytes that say where the block table is and what the parent is.
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::footer::{FOOTER, NOWHERE, checksum};
use super::locator::Locator;
use crate::formats::ImageError;
use crate::storage::Storage;

/// Bytes of a header.
pub(super) const HEADER: u64 = 1024;
/// Entries of the largest block table that is read: 2040 GiB in blocks of 512 KiB.
pub(super) const LARGEST_TABLE: u32 = 4 << 20;
const LARGEST_BLOCK: u32 = 256 << 20;
const COOKIE: [u8; 8] = *b"cxsparse";

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub(super) struct Header {
    cookie: [u8; 8],
    data_offset: U64,
    /// Where the block table is.
    pub table_offset: U64,
    version: U32,
    /// Entries that the block table has room for.
    pub entries: U32,
    /// Bytes of a block without its bitmap.
    pub block_size: U32,
    checksum: U32,
    pub parent_id: [u8; 16],
    /// When the parent was last modified, as this image has it.
    pub parent_time: U32,
    reserved: U32,
    /// The parent's name in big-endian UTF-16.
    pub parent_name: [u8; 512],
    pub locators: [Locator; 8],
    reserved2: [u8; 256],
}

impl Header {
    /// A new image's, without a parent and without its checksum.
    pub fn new(table_offset: u64, entries: u32, block_size: u32) -> Header {
        let mut header = Header::new_zeroed();
        header.cookie = COOKIE;
        header.data_offset = U64::new(NOWHERE);
        header.table_offset = U64::new(table_offset);
        header.version = U32::new(0x0001_0000);
        header.entries = U32::new(entries);
        header.block_size = U32::new(block_size);
        header
    }

    /// Computes the checksum.
    pub fn seal(&mut self) {
        self.checksum = checksum(self.as_bytes(), self.checksum);
    }

    pub fn read(storage: &dyn Storage, at: u64, file_size: u64) -> Result<Header, ImageError> {
        let fits =
            at >= FOOTER && at.is_multiple_of(512) && file_size.checked_sub(HEADER) >= Some(at);
        if !fits {
            let what = format!("the dynamic header cannot be at byte {at}");
            return Err(ImageError::Corrupt(what));
        }
        let mut header = Header::new_zeroed();
        storage
            .read_at(at, header.as_mut_bytes())
            .map_err(ImageError::io("read the dynamic header"))?;
        header.check(at, file_size)?;
        Ok(header)
    }

    fn check(&self, at: u64, file_size: u64) -> Result<(), ImageError> {
        let corrupt = |what: String| Err(ImageError::Corrupt(what));
        if self.cookie != COOKIE {
            return corrupt(format!("no dynamic header at byte {at}"));
        }
        if self.checksum != checksum(self.as_bytes(), self.checksum) {
            return corrupt("the dynamic header's checksum is wrong".into());
        }
        if self.version.get() >> 16 != 1 {
            let what = format!("dynamic header version {:#x}", self.version);
            return Err(ImageError::Unsupported(what));
        }
        let block = self.block_size.get();
        if !block.is_power_of_two() || !(512..=LARGEST_BLOCK).contains(&block) {
            return Err(ImageError::Unsupported(format!("a block size of {block} bytes")));
        }
        if self.entries.get() > LARGEST_TABLE {
            let what = format!("a block table of {} entries", self.entries);
            return Err(ImageError::Unsupported(what));
        }
        let table = self.table_offset.get();
        let end = table.checked_add(self.table_bytes());
        if table < FOOTER || !table.is_multiple_of(512) || end.is_none_or(|end| end > file_size) {
            return corrupt(format!("the block table cannot be at byte {table}"));
        }
        Ok(())
    }

    /// Bytes of the block table, in whole sectors.
    pub fn table_bytes(&self) -> u64 {
        (u64::from(self.entries.get()) * 4).next_multiple_of(512)
    }

    /// Behind the block table: where tapdisk's batmap begins.
    pub fn table_end(&self) -> u64 {
        self.table_offset.get() + self.table_bytes()
    }

    /// Bytes of a block's bitmap, in whole sectors.
    pub fn bitmap_bytes(&self) -> u64 {
        (u64::from(self.block_size.get()) / 512).div_ceil(8).next_multiple_of(512)
    }
}
