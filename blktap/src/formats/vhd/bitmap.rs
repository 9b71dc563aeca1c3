//! The sector bitmaps of blocks that are not full, as far as they are in memory.
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard, RwLock};

use crate::formats::Waiter;

const SHARDS: usize = 64;
/// Bytes of bitmaps that are kept in memory, beside those in use.
const KEPT: usize = 32 << 20;

/// A change of sectors that is not published yet.
#[derive(Debug)]
struct Pending {
    id: u32,
    sectors: Range<u32>,
    waiters: Vec<Waiter>,
}

/// Who is changing what of a block.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// The bitmap is no longer the block's: look it up again.
    pub gone: bool,
    next: u32,
    pending: Vec<Pending>,
}

impl Changes {
    /// How far from `sectors.start` on nobody changes anything; `None`, and the waiter is woken,
    /// if somebody changes the very first.
    pub fn free(&mut self, sectors: Range<u32>, waiter: &Waiter) -> Option<u32> {
        let here = |p: &&mut Pending| p.sectors.contains(&sectors.start);
        if let Some(owner) = self.pending.iter_mut().find(here) {
            owner.waiters.push(waiter.clone());
            return None;
        }
        let later = self.pending.iter().map(|p| p.sectors.start).filter(|s| *s > sectors.start);
        Some(later.min().unwrap_or(sectors.end).min(sectors.end))
    }

    /// Takes sectors that are free: the change's number.
    pub fn take(&mut self, sectors: Range<u32>) -> u32 {
        self.next = self.next.wrapping_add(1);
        self.pending.push(Pending { id: self.next, sectors, waiters: Vec::new() });
        self.next
    }

    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// Ends a change: its sectors, and who waits for them.
    pub fn end(&mut self, id: u32) -> Option<(Range<u32>, Vec<Waiter>)> {
        let at = self.pending.iter().position(|p| p.id == id)?;
        let ended = self.pending.swap_remove(at);
        Some((ended.sectors, ended.waiters))
    }
}

/// A block's bitmap. The first sector is the highest bit of the first word.
#[derive(Debug)]
pub(super) struct Bitmap {
    words: Box<[AtomicU64]>,
    sectors: u32,
    /// What is not set has never been written: it is zeroes in the file.
    virgin: AtomicBool,
    changes: Mutex<Changes>,
}

impl Bitmap {
    /// As read from the file.
    pub fn parse(bytes: &[u8], sectors: u32) -> Bitmap {
        let word = |i: u32| {
            let at = i as usize * 8;
            let mut word = [0; 8];
            // Bitmaps are padded to 512 bytes: there are always eight.
            word.copy_from_slice(&bytes[at..at + 8]);
            AtomicU64::new(u64::from_be_bytes(word))
        };
        let words = (0..sectors.div_ceil(64)).map(word).collect();
        let virgin = AtomicBool::new(false);
        Bitmap { words, sectors, virgin, changes: Mutex::default() }
    }

    /// A new block's.
    pub fn empty(sectors: u32) -> Bitmap {
        let words = (0..sectors.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let virgin = AtomicBool::new(true);
        Bitmap { words, sectors, virgin, changes: Mutex::default() }
    }

    /// Writes it to where the file has it.
    pub fn store(&self, into: &mut [u8]) {
        for (word, bytes) in self.words.iter().zip(into.as_chunks_mut().0) {
            *bytes = word.load(Ordering::Acquire).to_be_bytes();
        }
    }

    pub fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock()
    }

    pub fn is_virgin(&self) -> bool {
        self.virgin.load(Ordering::Relaxed)
    }

    /// Sectors that are not set may have been written.
    pub fn spoil(&self) {
        self.virgin.store(false, Ordering::Relaxed);
    }

    /// Whether a sector is set.
    pub fn is_set(&self, sector: u32) -> bool {
        let word = self.words[sector as usize / 64].load(Ordering::Acquire);
        word << (sector % 64) >> 63 == 1
    }

    /// Whether the first of `sectors` is set, and where that ends.
    pub fn run(&self, sectors: Range<u32>) -> (bool, u32) {
        let set = self.is_set(sectors.start);
        let mut at = sectors.start;
        while at < sectors.end {
            let word = self.words[at as usize / 64].load(Ordering::Acquire) << (at % 64);
            let same = if set { word.leading_ones() } else { word.leading_zeros() };
            let left = 64 - at % 64;
            at += same.min(left);
            if same < left {
                break;
            }
        }
        (set, at.min(sectors.end))
    }

    /// Whether all of `sectors` are set.
    pub fn all_set(&self, sectors: Range<u32>) -> bool {
        let end = sectors.end;
        self.run(sectors) == (true, end)
    }

    /// Whether all sectors are set.
    pub fn is_full(&self) -> bool {
        self.all_set(0..self.sectors)
    }

    /// Sets sectors.
    pub fn set(&self, sectors: Range<u32>) {
        let mut at = sectors.start;
        while at < sectors.end {
            let end = sectors.end.min((at / 64 + 1) * 64);
            let mask = u64::MAX >> (at % 64) & (u64::MAX << (63 - (end - 1) % 64));
            self.words[at as usize / 64].fetch_or(mask, Ordering::Release);
            at = end;
        }
    }
}

/// Block numbers are hashed well enough by a multiplication.
#[derive(Default)]
struct ByNumber(u64);

impl Hasher for ByNumber {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u32(u32::from(*b)));
    }
    fn write_u32(&mut self, n: u32) {
        self.0 = (self.0 ^ u64::from(n)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type Shard = RwLock<HashMap<u32, Arc<Bitmap>, BuildHasherDefault<ByNumber>>>;

/// The bitmaps in memory, by block.
pub(super) struct Bitmaps {
    shards: Box<[Shard]>,
    /// Held while one of a shard is read.
    loading: Box<[Mutex<()>]>,
    /// Bitmaps of a shard above which idle ones are let go.
    kept: usize,
}

impl Bitmaps {
    pub fn new(bitmap_bytes: u64) -> Bitmaps {
        let kept = KEPT / SHARDS / (bitmap_bytes as usize).max(512);
        Bitmaps {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            loading: (0..SHARDS).map(|_| Mutex::default()).collect(),
            kept: kept.max(4),
        }
    }

    /// Held while a block's bitmap is read: otherwise one that was read before others loaded,
    /// changed and let it go could come after them.
    pub fn loading(&self, block: u32) -> MutexGuard<'_, ()> {
        self.loading[block as usize % SHARDS].lock()
    }

    fn shard(&self, block: u32) -> &Shard {
        &self.shards[block as usize % SHARDS]
    }

    pub fn get(&self, block: u32) -> Option<Arc<Bitmap>> {
        self.shard(block).read().get(&block).cloned()
    }

    /// Uses a bitmap without counting its users.
    pub fn with<T>(&self, block: u32, f: impl FnOnce(&Bitmap) -> T) -> Option<T> {
        self.shard(block).read().get(&block).map(|b| f(b))
    }

    /// Keeps a bitmap, unless there is one. Lets idle ones go if there are many; `is_clean` says
    /// whether the file has what a bitmap says.
    pub fn insert(&self, block: u32, bitmap: Bitmap, is_clean: impl Fn(u32) -> bool) {
        let mut shard = self.shard(block).write();
        if shard.len() >= self.kept {
            shard.retain(|block, bitmap| {
                let mut changes = bitmap.changes();
                changes.gone = changes.is_idle() && is_clean(*block);
                !changes.gone
            });
        }
        if let Entry::Vacant(entry) = shard.entry(block) {
            entry.insert(Arc::new(bitmap));
        }
    }

    /// Lets the bitmap of a full block go, if nobody is changing anything.
    pub fn drop_idle(&self, block: u32, is_clean: impl Fn(u32) -> bool) {
        let mut shard = self.shard(block).write();
        let Some(bitmap) = shard.get(&block).cloned() else { return };
        let mut changes = bitmap.changes();
        if changes.is_idle() && is_clean(block) {
            changes.gone = true;
            shard.remove(&block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_sets_agree_with_single_bits() {
        let bitmap = Bitmap::empty(4096);
        let mut model = vec![false; 4096];
        let mut x = 1u32;
        let mut next = |n: u32| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) % n
        };
        for _ in 0..60 {
            let start = next(4096);
            let end = (start + 1 + next(150)).min(4096);
            bitmap.set(start..end);
            model[start as usize..end as usize].fill(true);
            let mut at = 0;
            while at < 4096 {
                let (set, end) = bitmap.run(at..4096);
                assert!(model[at as usize..end as usize].iter().all(|m| *m == set));
                assert!(end == 4096 || model[end as usize] != set);
                at = end;
            }
        }
        let mut bytes = [0; 512];
        bitmap.store(&mut bytes);
        let again = Bitmap::parse(&bytes, 4096);
        assert!((0..4096).all(|i| again.is_set(i) == model[i as usize]));
        assert!(!bitmap.is_full());
        bitmap.set(0..4096);
        assert!(bitmap.is_full());
    }

    #[test]
    fn a_bitmap_smaller_than_a_word() {
        let bitmap = Bitmap::parse(&[0x80; 512], 2);
        assert_eq!(bitmap.run(0..2), (true, 1));
        bitmap.set(1..2);
        assert!(bitmap.is_full());
    }
}
