//! tapdisk's batmap: a bit for each block whose sectors are all set. It lies behind the block
//! table and saves readers the bitmaps. It is only ever a hint: a bit that is missing is right.
use std::ops::Range;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::footer::{Footer, TAPDISK_OLD, checksum};
use super::header::Header;
use crate::formats::ImageError;
use crate::storage::Storage;

const COOKIE: [u8; 8] = *b"tdbatmap";
const VERSION_1_1: u32 = 0x0001_0001;
const VERSION_1_2: u32 = 0x0001_0002;
const HEADER: u64 = 512;

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Head {
    cookie: [u8; 8],
    offset: U64,
    sectors: U32,
    version: U32,
    checksum: U32,
    marker: u8,
    key_hash: [u8; 65],
    reserved: [u8; 418],
}

/// A batmap in memory.
#[derive(Clone)]
pub(super) struct Batmap {
    at: u64,
    head: Head,
    map: Vec<u8>,
    /// Bytes that the checksum is about: tapdisk goes by the disk's size.
    summed: usize,
    /// The file's has another checksum than its bits: readers must not believe it.
    pub damaged: bool,
}

/// Bytes of the map of so many blocks.
fn map_bytes(blocks: u64) -> u64 {
    blocks.div_ceil(8).next_multiple_of(512).max(512)
}

/// tapdisk's own arithmetic: whole blocks of 2 MiB, eight a byte, in whole sectors.
fn summed_bytes(disk_size: u64) -> u64 {
    (disk_size >> 24).next_multiple_of(512).max(512)
}

impl Batmap {
    /// Bytes that a batmap for so many blocks takes.
    pub fn room(blocks: u32) -> u64 {
        HEADER + map_bytes(u64::from(blocks))
    }

    /// A new image's, empty, at byte `at`.
    pub fn new(at: u64, blocks: u32, disk_size: u64) -> Batmap {
        let bytes = map_bytes(u64::from(blocks));
        let mut head = Head::new_zeroed();
        head.cookie = COOKIE;
        head.offset = U64::new(at + HEADER);
        head.sectors = U32::new((bytes / 512) as u32);
        head.version = U32::new(VERSION_1_2);
        let summed = summed_bytes(disk_size).min(bytes) as usize;
        let mut batmap = Batmap { at, head, map: vec![0; bytes as usize], summed, damaged: false };
        batmap.seal();
        batmap
    }

    /// The image's, if it has one whose place makes sense. Blocks are those of 2 MiB, as
    /// tapdisk knows no others.
    pub fn read(
        storage: &dyn Storage,
        footer: &Footer,
        header: &Header,
        file_size: u64,
    ) -> Result<Option<Batmap>, ImageError> {
        let version = footer.creator_version.get();
        if !footer.is_tapdisk() || version <= TAPDISK_OLD || header.block_size.get() != 2 << 20 {
            return Ok(None);
        }
        let at = header.table_end();
        let mut head = Head::new_zeroed();
        let what = "read the batmap";
        storage.read_at(at, head.as_mut_bytes()).map_err(ImageError::io(what))?;
        let known = matches!(head.version.get(), VERSION_1_1 | VERSION_1_2);
        let start = head.offset.get();
        let bytes = u64::from(head.sectors.get()) * 512;
        let least = map_bytes(u64::from(header.entries.get()));
        let fits = start.checked_add(bytes).is_some_and(|end| end <= file_size);
        let sane = known && fits && start >= at + HEADER && start % 512 == 0;
        if head.cookie != COOKIE || !sane || bytes < least || bytes > 2 * least {
            return Ok(None);
        }
        let mut map = vec![0; bytes as usize];
        storage.read_at(start, &mut map).map_err(ImageError::io(what))?;
        let summed = summed_bytes(footer.current_size.get()).min(bytes) as usize;
        let mut batmap = Batmap { at, head, map, summed, damaged: false };
        batmap.damaged = batmap.head.checksum != batmap.sum();
        Ok(Some(batmap))
    }

    /// Version 1.1 summed up signed bytes.
    fn sum(&self) -> U32 {
        let map = &self.map[..self.summed];
        match self.head.version.get() {
            VERSION_1_1 => U32::new(
                !map.iter().fold(0u32, |sum, byte| sum.wrapping_add_signed(i32::from(*byte as i8))),
            ),
            _ => checksum(map, U32::new(0)),
        }
    }

    fn seal(&mut self) {
        self.head.checksum = self.sum();
    }

    /// Stretches of the file that it takes.
    pub fn extents(&self) -> [Range<u64>; 2] {
        let start = self.head.offset.get();
        [self.at..self.at + HEADER, start..start + self.map.len() as u64]
    }

    /// Whether all sectors of a block are set.
    pub fn is_full(&self, block: u32) -> bool {
        let byte = self.map.get(block as usize / 8).copied().unwrap_or(0);
        !self.damaged && byte << (block % 8) & 0x80 != 0
    }

    /// Sets or clears bits as `is_full` says; gives whether any changed.
    pub fn update(&mut self, blocks: impl Iterator<Item = (u32, bool)>) -> bool {
        let mut changed = std::mem::take(&mut self.damaged);
        if changed {
            self.map.fill(0);
        }
        for (block, is_full) in blocks {
            let Some(byte) = self.map.get_mut(block as usize / 8) else { continue };
            let mask = 0x80 >> (block % 8);
            let new = if is_full { *byte | mask } else { *byte & !mask };
            changed |= new != std::mem::replace(byte, new);
        }
        changed
    }

    /// Writes it, with its checksum.
    pub fn write(&mut self, storage: &dyn Storage) -> Result<(), ImageError> {
        self.seal();
        let what = "write the batmap";
        storage.write_at(self.head.offset.get(), &self.map).map_err(ImageError::io(what))?;
        storage.write_at(self.at, self.head.as_bytes()).map_err(ImageError::io(what))
    }
}
