//! A reader of QCOW images that shares nothing with the one it judges: slow, without a cache, and
//! byte by byte where that is plainest. Made from block/qcow.c's description in words.
use std::io::Read;

/// What a byte of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Byte {
    Is(u8),
    /// The backing file's.
    Below,
    /// It cannot be read.
    Broken,
}

pub struct Model<'a> {
    file: &'a [u8],
    pub size: u64,
    pub backing: Option<Vec<u8>>,
    cluster: u64,
    entries: u64,
    l1: u64,
}

fn number(file: &[u8], at: u64, len: u64) -> Option<u64> {
    let bytes = file.get(usize::try_from(at).ok()?..usize::try_from(at.checked_add(len)?).ok()?)?;
    Some(bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
}

impl<'a> Model<'a> {
    /// `None`: the image must be refused.
    pub fn open(file: &'a [u8]) -> Option<Self> {
        // What is beyond the end of a file counts as zeroes, and a disk has 512 bytes or more.
        let field = |at, len| number(file, at, len).unwrap_or(0);
        if field(0, 4) != u64::from(u32::from_be_bytes(*b"QFI\xfb")) || field(4, 4) != 1 {
            return None;
        }
        let (size, cluster_bits, l2_bits) = (field(24, 8), field(32, 1), field(33, 1));
        let bits_fit = (9..=16).contains(&cluster_bits) && (6..=13).contains(&l2_bits);
        if !bits_fit || size < 512 || field(36, 4) != 0 {
            return None;
        }
        let (cluster, entries) = (1u64 << cluster_bits, 1u64 << l2_bits);
        let l1 = field(40, 8);
        let tables = size.div_ceil(cluster * entries);
        let end = l1.checked_add(tables * 8)?;
        if tables > (32 << 20) / 8 || l1 < 48 || end > file.len() as u64 {
            return None;
        }
        let (offset, len) = (field(8, 8), field(16, 4));
        let mut backing = None;
        if offset != 0 && len != 0 {
            let end = offset.checked_add(len)?;
            let name = file.get(offset as usize..usize::try_from(end).ok()?)?;
            let name = name.split(|b| *b == 0).next().unwrap_or_default();
            std::str::from_utf8(name).ok().filter(|_| len <= 1023)?;
            backing = (!name.is_empty()).then(|| name.to_vec());
        } else if offset != 0 && offset > file.len() as u64 {
            return None;
        }
        Some(Model { file, size: size / 512 * 512, backing, cluster, entries, l1 })
    }

    pub fn byte(&self, at: u64) -> Byte {
        let unnamed = if self.backing.is_some() { Byte::Below } else { Byte::Is(0) };
        let (cluster, skip) = (at / self.cluster, at % self.cluster);
        let table = number(self.file, self.l1 + cluster / self.entries * 8, 8).unwrap_or(0);
        if table == 0 {
            return unnamed;
        }
        let end = table.checked_add(self.entries * 8);
        if end.is_none_or(|end| end > self.file.len() as u64) {
            return Byte::Broken;
        }
        let entry = number(self.file, table + cluster % self.entries * 8, 8).unwrap_or(0);
        match entry {
            0 => unnamed,
            e if e >> 63 == 1 => self.packed(e, skip),
            e if e >= self.file.len() as u64 || e % 512 != 0 => Byte::Broken,
            e => Byte::Is(self.file.get((e + skip) as usize).copied().unwrap_or(0)),
        }
    }

    /// `entry`: a bit, as many bits as a cluster's size has for the length, the rest the place.
    fn packed(&self, entry: u64, skip: u64) -> Byte {
        let place_bits = 63 - self.cluster.trailing_zeros();
        let len = entry >> place_bits & (self.cluster - 1);
        let at = entry % (1 << place_bits);
        let rounded = (self.file.len() as u64).div_ceil(512) * 512;
        if len == 0 || at + len > rounded {
            return Byte::Broken;
        }
        let there = self.file.get(at as usize..).unwrap_or_default();
        let mut stream = there[..there.len().min(len as usize)].to_vec();
        stream.resize(len as usize, 0);
        let mut unpacked = Vec::new();
        let mut reader = flate2::read::DeflateDecoder::new(&*stream).take(self.cluster + 1);
        let mut byte = [0];
        // A broken stream may still have given a whole cluster.
        while let Ok(1) = reader.read(&mut byte) {
            unpacked.push(byte[0]);
        }
        match unpacked.get(skip as usize) {
            Some(byte) if unpacked.len() as u64 >= self.cluster => Byte::Is(*byte),
            _ => Byte::Broken,
        }
    }
}
