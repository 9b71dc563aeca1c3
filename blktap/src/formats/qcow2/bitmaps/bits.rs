//! The bits of one bitmap, in memory: set by many threads without a lock, and as long as they are
//! clear without memory either.
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words of a chunk, which is allocated with its first bit.
const CHUNK: usize = 512;
/// Bits of a chunk.
const CHUNK_BITS: u64 = CHUNK as u64 * 64;

type Chunk = Box<[AtomicU64]>;

/// Dirty bits of a disk.
#[derive(Debug)]
pub struct DirtyBits {
    size: u64,
    granularity_bits: u8,
    chunks: Box<[OnceLock<Chunk>]>,
}

impl DirtyBits {
    /// Of a disk of `size` bytes, all clear.
    pub fn new(size: u64, granularity_bits: u8) -> Self {
        let bits = size.div_ceil(1 << granularity_bits);
        let chunks = (0..bits.div_ceil(CHUNK_BITS)).map(|_| OnceLock::new()).collect();
        DirtyBits { size, granularity_bits, chunks }
    }

    /// Bits.
    pub fn len(&self) -> u64 {
        self.size.div_ceil(1 << self.granularity_bits)
    }
    /// Bytes of the disk.
    pub fn disk_size(&self) -> u64 {
        self.size
    }
    /// Whether the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }
    /// Bytes that a bit stands for, as bits.
    pub fn granularity_bits(&self) -> u8 {
        self.granularity_bits
    }

    /// Marks bytes of the disk. Cheap where they are marked already.
    pub fn mark(&self, bytes: Range<u64>) {
        let end = bytes.end.min(self.size);
        if bytes.start < end {
            let last = (end - 1) >> self.granularity_bits;
            self.set(bytes.start >> self.granularity_bits..last + 1);
        }
    }

    /// Sets bits.
    pub fn set(&self, bits: Range<u64>) {
        let mut at = bits.start;
        while at < bits.end {
            let first = at % 64;
            let n = (64 - first).min(bits.end - at);
            let mask = (u64::MAX >> (64 - n)) << first;
            let word = self.word(at);
            // Most writes go where others went; a load does not take the line from them.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
            at += n;
        }
    }

    fn word(&self, bit: u64) -> &AtomicU64 {
        let chunk = self.chunks[(bit / CHUNK_BITS) as usize]
            .get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        &chunk[(bit % CHUNK_BITS / 64) as usize]
    }

    fn load(&self, bit: u64) -> u64 {
        let chunk = self.chunks.get((bit / CHUNK_BITS) as usize).and_then(OnceLock::get);
        chunk.map_or(0, |c| c[(bit % CHUNK_BITS / 64) as usize].load(Ordering::Relaxed))
    }

    /// Whether a bit is set.
    pub fn get(&self, bit: u64) -> bool {
        self.load(bit) >> (bit % 64) & 1 != 0
    }

    /// Whether all bits of a range are set.
    pub fn all_set(&self, bits: Range<u64>) -> bool {
        let mut at = bits.start;
        while at < bits.end {
            if !self.get(at) {
                return false;
            }
            let skip = at.is_multiple_of(64) && self.load(at) == u64::MAX;
            at += if skip { 64 } else { 1 };
        }
        true
    }

    /// Sets what is set in `other`, of the same disk.
    pub fn merge(&self, other: &DirtyBits) {
        let mut at = 0;
        while at < other.len() {
            let word = other.load(at);
            for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                let start = (at + bit) << other.granularity_bits;
                self.mark(start..start.saturating_add(1 << other.granularity_bits));
            }
            at += 64;
        }
    }

    /// Sets bits from the file's bytes, from byte `at` (a multiple of 8) on.
    pub fn put_bytes(&self, at: u64, bytes: &[u8]) {
        for (i, part) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            let first = (at + i as u64 * 8) * 8;
            let mut word = u64::from_le_bytes(word);
            // Bits beyond the end mean nothing.
            match self.len().saturating_sub(first) {
                0 => word = 0,
                n if n < 64 => word &= (1 << n) - 1,
                _ => {}
            }
            if word != 0 {
                self.word(first).fetch_or(word, Ordering::Relaxed);
            }
        }
    }

    /// The file's bytes from byte `at` (a multiple of 8) on.
    pub fn bytes(&self, at: u64, into: &mut [u8]) {
        for (i, part) in into.chunks_mut(8).enumerate() {
            let word = self.load((at + i as u64 * 8) * 8).to_le_bytes();
            part.copy_from_slice(&word[..part.len()]);
        }
    }

    /// Appends `range` (bytes of the disk) in stretches of (bytes, whether dirty).
    pub fn stretches(&self, range: Range<u64>, out: &mut Vec<(u64, bool)>) {
        let end = range.end.min(self.size);
        let mut at = range.start;
        while at < end {
            let bit = at >> self.granularity_bits;
            let dirty = self.get(bit);
            // A word that is all alike is passed in one step.
            let (word, alike) = (self.load(bit), if dirty { u64::MAX } else { 0 });
            let next = if word == alike { (bit / 64 + 1) * 64 } else { bit + 1 };
            let next = (next << self.granularity_bits).min(end);
            push(out, next - at, dirty);
            at = next;
        }
    }
}

/// Appends a stretch, joined with the one before if that is alike.
pub(super) fn push(out: &mut Vec<(u64, bool)>, len: u64, dirty: bool) {
    match out.last_mut() {
        Some((before, kind)) if *kind == dirty => *before += len,
        _ => out.push((len, dirty)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_what_a_plain_list_of_bits_says() {
        let size = 5 << 20;
        let bits = DirtyBits::new(size, 9);
        let mut model = vec![false; size as usize >> 9];
        let mut state = 7u64;
        for _ in 0..200 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let start = (state >> 20) % size;
            let end = (start + 1 + (state >> 50)).min(size);
            bits.mark(start..end);
            model[(start >> 9) as usize..=((end - 1) >> 9) as usize].fill(true);
        }
        assert!((0..bits.len()).all(|i| bits.get(i) == model[i as usize]));
        let mut out = Vec::new();
        bits.stretches(700..size, &mut out);
        assert_eq!(out.iter().map(|(len, _)| len).sum::<u64>(), size - 700);
        let mut at = 700;
        for (len, dirty) in out {
            assert!((at >> 9..(at + len).div_ceil(512)).all(|i| model[i as usize] == dirty));
            at += len;
        }
        let mut bytes = vec![0; 2048];
        bits.bytes(0, &mut bytes);
        let other = DirtyBits::new(size, 9);
        other.put_bytes(0, &bytes);
        assert!((0..2048 * 8).all(|i| other.get(i) == bits.get(i)));
    }

    #[test]
    fn bits_beyond_the_end_are_left_out() {
        let bits = DirtyBits::new(5 << 9, 9);
        bits.put_bytes(0, &[0xff; 16]);
        assert_eq!((bits.get(4), bits.get(5), bits.len()), (true, false, 5));
        bits.mark(0..u64::MAX);
        let mut bytes = [0; 8];
        bits.bytes(0, &mut bytes);
        assert_eq!(bytes[0], 0b1_1111);
    }
}
