//! The cache of L2 tables, by slices: sets of a few, each under a lock of its own.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use parking_lot::{Mutex, MutexGuard, RwLock};

/// Largest slice in bytes.
pub(super) const SLICE_BYTES: u64 = 4096;
/// Slices of a set.
const WAYS: usize = 8;
/// So many locks keep loads of one slice apart.
const LOADERS: usize = 64;

/// A part of an L2 table.
#[derive(Debug)]
pub(super) struct Slice {
    /// Which: slices are numbered through all tables, by guest offset.
    pub number: u32,
    words: Box<[AtomicU64]>,
    /// Words of an entry.
    width: usize,
    /// Odd while an entry of two words is changed.
    sequence: AtomicU32,
    dirty: AtomicBool,
    /// Held while entries change or are copied.
    change: Mutex<()>,
    /// Entries name what guests must not write: judge each.
    pub suspicious: bool,
    used: AtomicBool,
}

impl Slice {
    /// From the table's bytes, with `width` words an entry.
    pub(super) fn new(number: u32, bytes: &[u8], width: usize, suspicious: bool) -> Self {
        let word = |b: &[u8]| {
            let mut n = [0; 8];
            n.copy_from_slice(b);
            AtomicU64::new(u64::from_be_bytes(n))
        };
        Slice {
            number,
            words: bytes.chunks_exact(8).map(word).collect(),
            width,
            sequence: AtomicU32::new(0),
            dirty: AtomicBool::new(false),
            change: Mutex::new(()),
            suspicious,
            used: AtomicBool::new(true),
        }
    }

    /// Both words of entry `index`, as they were at one time.
    pub(super) fn entry(&self, index: usize) -> (u64, u64) {
        if self.width == 1 {
            return (self.words[index].load(Ordering::Acquire), 0);
        }
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let both = [0, 1].map(|i| self.words[2 * index + i].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            if before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before {
                return (both[0], both[1]);
            }
            std::hint::spin_loop();
        }
    }

    /// Starts changing entries. Others see each entry whole.
    pub(super) fn change(&self) -> Changing<'_> {
        Changing { slice: self, _held: self.change.lock() }
    }

    /// The bytes that are to be written; it counts as clean from then on.
    pub(super) fn clean_copy(&self) -> Vec<u8> {
        let _held = self.change.lock();
        self.dirty.store(false, Ordering::Relaxed);
        self.words.iter().flat_map(|w| w.load(Ordering::Relaxed).to_be_bytes()).collect()
    }

    /// Marks it dirty. Whether it was not before.
    pub(super) fn soil(&self) -> bool {
        !self.dirty.swap(true, Ordering::Relaxed)
    }
}

/// The right to change entries of a slice.
pub(super) struct Changing<'a> {
    slice: &'a Slice,
    _held: MutexGuard<'a, ()>,
}

impl Changing<'_> {
    /// Sets an entry's words.
    pub(super) fn set(&self, index: usize, (word, bitmap): (u64, u64)) {
        let s = self.slice;
        if s.width == 1 {
            return s.words[index].store(word, Ordering::Release);
        }
        let before = s.sequence.load(Ordering::Relaxed);
        s.sequence.store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        s.words[2 * index].store(word, Ordering::Relaxed);
        s.words[2 * index + 1].store(bitmap, Ordering::Relaxed);
        s.sequence.store(before.wrapping_add(2), Ordering::Release);
    }
}

/// Slices with their numbers, so that looking for one touches no other.
type Set = Vec<(u32, Arc<Slice>)>;

/// Slices by number. A slice that somebody else holds (a guard, the list of dirty ones) is not
/// dropped; beyond its limit the cache has at most what requests in flight hold.
#[derive(Debug)]
pub(super) struct SliceCache {
    sets: Box<[RwLock<Set>]>,
    loaders: Box<[Mutex<()>]>,
    ways: usize,
}

/// No slice can be dropped: all are dirty or held.
pub(super) struct AllDirty;

impl SliceCache {
    /// Of at most `slices` slices, at least one.
    pub(super) fn new(slices: u64) -> Self {
        let slices = usize::try_from(slices).unwrap_or(usize::MAX).clamp(1, u32::MAX as usize);
        let ways = WAYS.min(slices);
        let sets = slices / ways;
        SliceCache {
            sets: (0..sets).map(|_| RwLock::default()).collect(),
            loaders: (0..LOADERS.min(sets)).map(|_| Mutex::default()).collect(),
            ways,
        }
    }

    fn set(&self, number: u32) -> usize {
        (number % self.sets.len() as u32) as usize
    }

    /// Calls `f` with the slice, if it is here. No lock may be taken in it.
    pub(super) fn with<T>(&self, number: u32, f: impl FnOnce(&Arc<Slice>) -> T) -> Option<T> {
        let set = self.sets[self.set(number)].read();
        let (_, slice) = set.iter().find(|(n, _)| *n == number)?;
        if !slice.used.load(Ordering::Relaxed) {
            slice.used.store(true, Ordering::Relaxed);
        }
        Some(f(slice))
    }

    /// The slice, if it is here.
    pub(super) fn get(&self, number: u32) -> Option<Arc<Slice>> {
        self.with(number, Arc::clone)
    }

    /// Keeps others from loading or dropping slices of this one's set.
    pub(super) fn loader(&self, number: u32) -> MutexGuard<'_, ()> {
        self.loaders[self.set(number) % self.loaders.len()].lock()
    }

    /// Makes room in the slice's set; the caller has its [`loader`](Self::loader).
    pub(super) fn make_room(&self, number: u32) -> Result<(), AllDirty> {
        let mut set = self.sets[self.set(number)].write();
        for _ in 0..2 {
            while set.len() >= self.ways {
                // Nobody takes a new hold of it: that needs the set's lock.
                let free = |(_, s): &(u32, Arc<Slice>)| {
                    Arc::strong_count(s) == 1
                        && !s.dirty.load(Ordering::Relaxed)
                        && !s.used.load(Ordering::Relaxed)
                };
                match set.iter().position(free) {
                    Some(i) => drop(set.remove(i)),
                    None => break,
                }
            }
            if set.len() < self.ways {
                return Ok(());
            }
            set.iter().for_each(|(_, s)| s.used.store(false, Ordering::Relaxed));
        }
        Err(AllDirty)
    }

    /// Puts a loaded slice in; the caller has its [`loader`](Self::loader).
    pub(super) fn insert(&self, slice: Slice) {
        let mut set = self.sets[self.set(slice.number)].write();
        set.push((slice.number, Arc::new(slice)));
    }

    /// Slices that are here.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.sets.iter().map(|s| s.read().len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(number: u32) -> Slice {
        Slice::new(number, &[0; 64], 1, false)
    }

    #[test]
    fn the_limit_is_kept_and_dirty_ones_stay() {
        let cache = SliceCache::new(32);
        let load = |n: u32| {
            let _one = cache.loader(n);
            let room = cache.make_room(n).is_ok();
            if room {
                cache.insert(slice(n));
            }
            room
        };
        assert!((0..1000).all(load));
        assert!(cache.len() <= 32);
        let held: Vec<_> = (0..1000).filter_map(|n| cache.get(n)).collect();
        assert_eq!(held.len(), 32);
        assert!(!load(5000));
        drop(held);
        assert!(load(5000));
    }

    #[test]
    fn wide_entries_are_seen_whole() {
        let slice = Arc::new(Slice::new(0, &[0; 64], 2, false));
        let writer = Arc::clone(&slice);
        let thread = std::thread::spawn(move || {
            for n in 0..50_000 {
                writer.change().set(1, (n, n));
            }
        });
        for _ in 0..50_000 {
            let (a, b) = slice.entry(1);
            assert_eq!(a, b);
        }
        thread.join().expect("the writer");
        assert_eq!(slice.entry(1).0, 49_999);
        assert_eq!(slice.entry(0), (0, 0));
    }
}
