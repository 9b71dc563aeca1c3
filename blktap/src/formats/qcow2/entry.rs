//! Entries of L1 and L2 tables, and the arithmetic of a layout. Pure.
use std::ops::Range;

use super::header::{Header, Version};

/// The entry's cluster has refcount 1: it may be written in place.
pub const COPIED: u64 = 1 << 63;
/// The entry names a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// A standard entry reads as zeroes.
pub const ZERO: u64 = 1;
/// Bits of an offset, in L1 entries and standard L2 entries.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Reserved bits of L1 entries.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of L2 entries that are not compressed.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// Bytes of entries, tables and clusters of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Cluster size in bits.
    pub cluster_bits: u32,
    /// Width of refcounts: 1 << order bits.
    pub refcount_order: u32,
    /// Whether L2 entries have 128 bits and 32 subclusters.
    pub extended: bool,
    /// Whether guest data lie in another file.
    pub data_file: bool,
    /// Which version.
    pub version: Version,
}

impl Layout {
    /// That of a header.
    pub fn new(header: &Header) -> Self {
        Layout {
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            extended: header.extended_l2(),
            data_file: header.has_data_file(),
            version: header.version,
        }
    }
    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// 64-bit words of an L2 entry.
    pub fn entry_words(&self) -> usize {
        if self.extended { 2 } else { 1 }
    }
    /// Bytes of an L2 entry, as bits.
    pub fn entry_bits(&self) -> u32 {
        if self.extended { 4 } else { 3 }
    }
    /// Entries of an L2 table, as bits.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.entry_bits()
    }
    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }
    /// Guest bytes behind one L1 entry, as bits.
    pub fn l1_bits(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }
    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.l1_bits())
    }
    /// Subclusters of a cluster: 32 or 1.
    pub fn subclusters(&self) -> u32 {
        if self.extended { 32 } else { 1 }
    }
    /// Bytes of a subcluster, as bits.
    pub fn subcluster_bits(&self) -> u32 {
        if self.extended { self.cluster_bits - 5 } else { self.cluster_bits }
    }
    /// Bytes of a subcluster.
    pub fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }
    /// Refcounts in one refcount block, as bits.
    pub fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }
    /// Largest refcount.
    pub fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// Decodes an L2 entry: its first word, and the subclusters' of an extended one (0 else).
    pub fn l2(&self, word: u64, bitmap: u64) -> L2Entry {
        if word & COMPRESSED != 0 {
            return L2Entry::Compressed { descriptor: word & !(COPIED | COMPRESSED) };
        }
        let copied = word & COPIED != 0;
        let offset = word & OFFSET;
        // In a data file a cluster may lie at 0; then the flag says that it is there.
        let host = (offset != 0 || (self.data_file && copied)).then_some(offset);
        if self.extended {
            return L2Entry::Subclusters { host, copied, bits: SubBits(bitmap) };
        }
        match (host, word & ZERO != 0) {
            (None, false) => L2Entry::Unallocated,
            (host, true) => L2Entry::Zero { host, copied },
            (Some(host), false) => L2Entry::Data { host, copied },
        }
    }

    /// First byte and bytes of a compressed cluster's data, from its descriptor. The bytes reach
    /// to the end of the last sector: the data may be shorter.
    pub fn compressed(&self, descriptor: u64) -> Range<u64> {
        let shift = 62 - (self.cluster_bits - 8);
        let offset = descriptor & ((1 << shift) - 1);
        let sectors = (descriptor & !(COPIED | COMPRESSED)) >> shift;
        offset..(offset & !511) + (sectors + 1) * 512
    }

    /// The L2 word of compressed data at `range`; `None` if they cannot be named.
    pub fn compressed_word(&self, range: Range<u64>) -> Option<u64> {
        let shift = 62 - (self.cluster_bits - 8);
        let sectors = range.end.checked_sub(1)? / 512 - range.start / 512;
        let fits = range.start < 1 << shift && sectors < 1 << (self.cluster_bits - 8);
        fits.then_some(COMPRESSED | (sectors << shift) | range.start)
    }
}

/// A decoded L2 entry. Offsets are not judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// The backing file has it.
    Unallocated,
    /// Reads as zeroes.
    Zero {
        /// A cluster that is kept for it.
        host: Option<u64>,
        /// Its refcount is 1.
        copied: bool,
    },
    /// Data.
    Data {
        /// Where.
        host: u64,
        /// Its refcount is 1.
        copied: bool,
    },
    /// Compressed data, see [`Layout::compressed`].
    Compressed {
        /// The entry without its flags.
        descriptor: u64,
    },
    /// An extended entry.
    Subclusters {
        /// Where its cluster is, if it has one.
        host: Option<u64>,
        /// Its refcount is 1.
        copied: bool,
        /// What its subclusters are.
        bits: SubBits,
    },
}

/// What one subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// The backing file has it.
    Unallocated,
    /// Reads as zeroes.
    Zero,
    /// Data in the cluster.
    Data,
    /// Both bits are set, or data without a cluster.
    Invalid,
}

/// The second word of an extended L2 entry: the low half says which subclusters are allocated,
/// the high half which read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SubBits(pub u64);

impl SubBits {
    /// A mask of the subclusters `range` (of 0..32).
    pub fn mask(range: Range<u32>) -> u64 {
        ((1u64 << range.end) - 1) & !((1u64 << range.start) - 1)
    }
    /// Subclusters with data.
    pub fn allocated(self) -> u32 {
        self.0 as u32
    }
    /// Subclusters that read as zeroes.
    pub fn zero(self) -> u32 {
        (self.0 >> 32) as u32
    }
    /// What subcluster `index` is, in an entry with or without a cluster.
    pub fn get(self, index: u32, host: Option<u64>) -> Subcluster {
        let (data, zero) = (self.0 >> index & 1 != 0, self.0 >> (index + 32) & 1 != 0);
        match (data, zero) {
            (false, false) => Subcluster::Unallocated,
            (false, true) => Subcluster::Zero,
            (true, false) if host.is_some() => Subcluster::Data,
            _ => Subcluster::Invalid,
        }
    }
    /// With the subclusters `range` as data.
    pub fn with_data(self, range: Range<u32>) -> Self {
        let mask = Self::mask(range);
        SubBits((self.0 | mask) & !(mask << 32))
    }
    /// With the subclusters `range` as zeroes.
    pub fn with_zero(self, range: Range<u32>) -> Self {
        let mask = Self::mask(range);
        SubBits((self.0 & !mask) | (mask << 32))
    }
    /// With the subclusters `range` unallocated.
    pub fn without(self, range: Range<u32>) -> Self {
        let mask = Self::mask(range);
        SubBits(self.0 & !mask & !(mask << 32))
    }
}

/// Refcount `index` of a block, of width `1 << order` bits. Widths below a byte fill bytes from
/// the lowest bit on.
pub fn refcount(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let per_byte = 3 - order;
            let shift = (index & ((1 << per_byte) - 1)) << order;
            u64::from(block[index >> per_byte] >> shift) & ((1 << (1u32 << order)) - 1)
        }
        _ => {
            let width = 1usize << (order - 3);
            let bytes = &block[index * width..][..width];
            bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b))
        }
    }
}

/// Sets refcount `index` of a block; bits that do not fit the width are cut off.
pub fn set_refcount(block: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let per_byte = 3 - order;
            let shift = (index & ((1 << per_byte) - 1)) << order;
            let mask = ((1u16 << (1u32 << order)) - 1) as u8;
            let byte = &mut block[index >> per_byte];
            *byte = *byte & !(mask << shift) | ((value as u8 & mask) << shift);
        }
        _ => {
            let width = 1usize << (order - 3);
            let bytes = value.to_be_bytes();
            block[index * width..][..width].copy_from_slice(&bytes[8 - width..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(cluster_bits: u32) -> Layout {
        let version = Version::V3;
        Layout { cluster_bits, refcount_order: 4, extended: false, data_file: false, version }
    }

    #[test]
    fn refcounts_of_all_widths_do_not_touch_their_neighbours() {
        for order in 0..=6 {
            let max = u64::MAX >> (64 - (1u32 << order));
            let mut block = vec![0; 512];
            let count = (512 * 8) >> order;
            for i in 0..count {
                set_refcount(&mut block, order, i, max);
                assert_eq!(refcount(&block, order, i), max, "order {order}");
                assert!(i + 1 == count || refcount(&block, order, i + 1) == 0, "order {order}");
            }
            assert!(block.iter().all(|b| *b == 0xff));
            set_refcount(&mut block, order, 3, 1);
            assert_eq!([2, 3, 4].map(|i| refcount(&block, order, i)), [max, 1, max]);
        }
        // The places of the specification: 4 bits, low half first; 16 bits, big-endian.
        let mut block = [0; 8];
        set_refcount(&mut block, 2, 1, 5);
        set_refcount(&mut block, 4, 1, 0x102);
        assert_eq!(block[..4], [0x50, 0, 1, 2]);
    }

    #[test]
    fn compressed_words_say_where_and_how_many_sectors() {
        for bits in [9, 12, 16, 21] {
            let layout = layout(bits);
            for range in [0x1_0000..0x1_0001, 0x1_01ff..0x1_0200, 0x2_01ff..0x2_0201] {
                let word = layout.compressed_word(range.clone()).expect("it fits");
                let L2Entry::Compressed { descriptor } = layout.l2(word, 0) else {
                    panic!("{word:#x}")
                };
                let end = range.end.next_multiple_of(512);
                assert_eq!(layout.compressed(descriptor), range.start..end, "bits {bits}");
            }
            assert_eq!(layout.compressed_word(0..1 << 30), None);
        }
    }

    #[test]
    fn entries_are_told_apart() {
        let mut layout = layout(16);
        assert_eq!(layout.l2(0, 0), L2Entry::Unallocated);
        assert_eq!(layout.l2(1, 0), L2Entry::Zero { host: None, copied: false });
        let host = 0x30000;
        let zero = L2Entry::Zero { host: Some(host), copied: true };
        assert_eq!(layout.l2(host | COPIED | ZERO, 0), zero);
        assert_eq!(layout.l2(host, 0), L2Entry::Data { host, copied: false });
        layout.data_file = true;
        assert_eq!(layout.l2(COPIED, 0), L2Entry::Data { host: 0, copied: true });
        layout = Layout { extended: true, ..layout };
        assert!(matches!(layout.l2(0, 1), L2Entry::Subclusters { host: None, .. }));
        let bits = SubBits::default().with_data(0..3).with_zero(2..5);
        assert_eq!((bits.allocated(), bits.zero()), (0b11, 0b11100));
        let kinds = [0, 2, 5].map(|i| bits.get(i, Some(0)));
        assert_eq!(kinds, [Subcluster::Data, Subcluster::Zero, Subcluster::Unallocated]);
        assert_eq!(bits.get(0, None), Subcluster::Invalid);
        assert_eq!(bits.without(0..32), SubBits(0));
        assert_eq!(SubBits::mask(0..32), 0xffff_ffff);
    }
}
