//! The bitmap directory: one entry for each bitmap, with the place of its table.
use crate::formats::ImageError;
use crate::formats::qcow2::header::{be32, be64};

/// Most bytes of a directory, as QEMU has it.
pub const MAX_DIRECTORY: u64 = 64 << 20;
/// Most bitmaps, as QEMU has it.
pub const MAX_BITMAPS: u32 = 65_535;
/// Longest name in bytes.
pub const MAX_NAME: usize = 1023;
/// Granularities, as bits: 512 bytes to 2 GiB.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Most bytes of bits that one bitmap may take in the file, as QEMU has it.
pub const MAX_DATA: u64 = 512 << 20;

/// Flag: it was not stored when the image was last used; its content is unknown.
pub const IN_USE: u32 = 1;
/// Flag: writes are to be recorded in it.
pub const AUTO: u32 = 2;
/// The one type of bitmaps that is defined.
const DIRTY_TRACKING: u8 = 1;
/// Bytes of an entry before its extra data and name.
const FIXED: usize = 24;

/// A table entry without an offset: all of its bits are set.
pub const ALL_ONES: u64 = 1;
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
const TABLE_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A bitmap as the directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where its table is.
    pub table_offset: u64,
    /// Entries of the table.
    pub table_size: u32,
    /// [`IN_USE`], [`AUTO`].
    pub flags: u32,
    /// Bytes that a bit stands for, as bits.
    pub granularity_bits: u8,
    /// Its name.
    pub name: String,
}

/// What a table entry says about a cluster of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// All clear.
    Zeroes,
    /// All set.
    Ones,
    /// In the cluster at this offset.
    At(u64),
}

impl Bits {
    /// Decodes a table entry; `None` if it makes no sense.
    pub fn decode(raw: u64, cluster: u64) -> Option<Bits> {
        let offset = raw & TABLE_OFFSET;
        match (offset, raw & ALL_ONES) {
            _ if raw & TABLE_RESERVED != 0 => None,
            (0, 0) => Some(Bits::Zeroes),
            (0, _) => Some(Bits::Ones),
            (_, 0) if offset.is_multiple_of(cluster) => Some(Bits::At(offset)),
            _ => None,
        }
    }

    /// The table entry.
    pub fn encode(self) -> u64 {
        match self {
            Bits::Zeroes => 0,
            Bits::Ones => ALL_ONES,
            Bits::At(offset) => offset,
        }
    }
}

impl Entry {
    /// Clusters of bits, which is entries of the table, for a disk of `size` bytes.
    pub fn clusters_for(size: u64, granularity_bits: u8, cluster: u64) -> u64 {
        size.div_ceil(1 << granularity_bits).div_ceil(8).div_ceil(cluster)
    }

    /// Bytes in the directory.
    pub fn bytes(&self) -> usize {
        Self::bytes_with_name(self.name.len())
    }

    /// Bytes in the directory of an entry whose name has `len` bytes.
    pub fn bytes_with_name(len: usize) -> usize {
        (FIXED + len).next_multiple_of(8)
    }

    /// Whether the fields make sense in an image of such clusters with a disk of `size` bytes.
    fn check(&self, cluster: u64, size: u64) -> Result<(), ImageError> {
        let data = u64::from(self.table_size) * cluster;
        let fault = match () {
            () if self.table_size == 0 => "has no table",
            () if self.table_offset == 0 || !self.table_offset.is_multiple_of(cluster) => {
                "has a table that is not aligned"
            }
            () if !GRANULARITY_BITS.contains(&self.granularity_bits) => {
                "has a granularity that is not supported"
            }
            () if self.flags & !(IN_USE | AUTO) != 0 => "has unknown flags",
            () if data > MAX_DATA => "is too large",
            () if self.flags & IN_USE == 0
                && u64::from(self.table_size)
                    < Self::clusters_for(size, self.granularity_bits, cluster) =>
            {
                "is too short for the disk"
            }
            () => return Ok(()),
        };
        Err(ImageError::Corrupt(format!("bitmap {:?} {fault}", self.name)))
    }

    fn put(&self, out: &mut Vec<u8>) {
        let end = out.len() + self.bytes();
        out.extend_from_slice(&self.table_offset.to_be_bytes());
        out.extend_from_slice(&self.table_size.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&[DIRTY_TRACKING, self.granularity_bits]);
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(self.name.as_bytes());
        out.resize(end, 0);
    }
}

/// Parses a directory of `count` entries.
pub fn parse(bytes: &[u8], count: u32, cluster: u64, disk: u64) -> Result<Vec<Entry>, ImageError> {
    let broken = || ImageError::Corrupt("the bitmap directory is broken".to_owned());
    let mut list: Vec<Entry> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let fixed = bytes.get(at..at + FIXED).ok_or_else(broken)?;
        let name = (be32(fixed, 16) & 0xffff) as usize;
        let end = at + FIXED + name;
        if fixed[16] != DIRTY_TRACKING || be32(fixed, 20) != 0 || name > MAX_NAME {
            let text = "a bitmap of an unknown type, or with extra data";
            return Err(ImageError::Unsupported(text.to_owned()));
        }
        let name = bytes.get(at + FIXED..end).ok_or_else(broken)?;
        let entry = Entry {
            table_offset: be64(fixed, 0),
            table_size: be32(fixed, 8),
            flags: be32(fixed, 12),
            granularity_bits: fixed[17],
            name: std::str::from_utf8(name).map_err(|_| broken())?.to_owned(),
        };
        entry.check(cluster, disk)?;
        list.push(entry);
        at = end.next_multiple_of(8);
    }
    let names: std::collections::HashSet<_> = list.iter().map(|e| &e.name).collect();
    if at != bytes.len() || list.len() != count as usize || names.len() != list.len() {
        return Err(broken());
    }
    Ok(list)
}

/// The bytes of a directory.
pub fn serialise(list: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(list.iter().map(Entry::bytes).sum());
    list.iter().for_each(|e| e.put(&mut out));
    out
}

/// Where the flags of each entry are, from the directory's start.
pub fn flag_offsets(list: &[Entry]) -> impl Iterator<Item = u64> {
    list.iter().scan(0, |at, e| {
        let flags = *at + 12;
        *at += e.bytes() as u64;
        Some(flags)
    })
}
