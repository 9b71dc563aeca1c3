//! The pool of persistent grants: mappings that stay from one request to the next.
//!
//! Handles are opaque. The pool never unmaps: whatever falls out of it is given back to the
//! caller. Time is passed in, in any unit that only grows. Each operation takes constant time and
//! none allocates after construction.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use perf::Handle;

use crate::grants::{Access, GrantRef};

perf::counters! {
    /// Counters of one queue's pool of persistent grants.
    pub struct PoolCounters {
        /// Segments whose grant was mapped already.
        hits: Counter [grants],
        /// Segments whose grant was not mapped, or only for reading.
        misses: Counter [grants],
        /// Mappings dropped to make room or because nobody used them for long.
        evictions: Counter [grants],
        /// Mappings that found every entry in use and were not kept.
        refused: Counter [grants],
        /// Mappings kept now.
        kept: Gauge [grants],
    }
}

/// How many mappings a pool keeps, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most mappings (Linux: 1056).
    pub entries: u32,
    /// How long an unused mapping is kept, in the unit of `now`.
    pub idle: u64,
    /// Anything that the guest cannot guess: it decides where references collide.
    pub seed: u64,
}

impl Limits {
    /// Linux's limits, for a `now` in milliseconds: 1056 mappings, 60 s.
    pub fn linux(seed: u64) -> Self {
        Limits { entries: 1056, idle: 60_000, seed }
    }
}

/// Says that the kernel or a copy may be using a mapping. Not released, it stays for ever.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a pin that is not released keeps its mapping for ever"]
pub struct Pin(u32);

/// What became of a new mapping.
#[derive(Debug)]
#[must_use = "a handle that fell out must be unmapped"]
pub enum Inserted<H> {
    /// It is kept, and pinned for the request at hand. `out`, if any, fell out for it: unmap it.
    Kept {
        /// For the request at hand.
        pin: Pin,
        /// What fell out.
        out: Option<H>,
    },
    /// Every entry is in use: the mapping is the caller's, for this request alone.
    Refused(H),
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// Found by its reference.
    Listed,
    /// Replaced while in use; goes with its last pin.
    Replaced,
}

struct Entry<H> {
    gref: GrantRef,
    access: Access,
    state: State,
    pins: u32,
    handle: Option<H>,
    /// Neighbours in the list of unused entries, by age; `next` also links the free ones.
    older: u32,
    next: u32,
    used: u64,
}

/// Mappings by grant reference, the least recently used ones falling out first.
pub struct PersistentPool<H> {
    entries: Box<[Entry<H>]>,
    index: Index,
    free: u32,
    oldest: u32,
    newest: u32,
    kept: u32,
    limit: u32,
    idle: u64,
    counters: Handle<PoolCounters>,
}

impl<H> PersistentPool<H> {
    /// An empty pool.
    pub fn new(limits: Limits, counters: Handle<PoolCounters>) -> Self {
        let count = limits.entries.min(1 << 24);
        let entry = |i: u32| Entry {
            gref: 0,
            access: Access::ReadOnly,
            state: State::Free,
            pins: 0,
            handle: None,
            older: NONE,
            next: if i + 1 < count { i + 1 } else { NONE },
            used: 0,
        };
        PersistentPool {
            entries: (0..count).map(entry).collect::<Vec<_>>().into(),
            index: Index::new(count, limits.seed),
            free: if count > 0 { 0 } else { NONE },
            oldest: NONE,
            newest: NONE,
            kept: 0,
            limit: count,
            idle: limits.idle,
            counters,
        }
    }

    /// Mappings kept, with those in use.
    pub fn len(&self) -> usize {
        self.kept as usize
    }
    /// Whether it keeps none.
    pub fn is_empty(&self) -> bool {
        self.kept == 0
    }
    /// The pool's counters.
    pub fn counters(&self) -> &Handle<PoolCounters> {
        &self.counters
    }

    /// The mapping of `gref`, pinned. `None` is a miss: there is none, or it is read-only and
    /// `access` is not; map it and [`insert`](Self::insert) it.
    #[inline]
    pub fn get(&mut self, gref: GrantRef, access: Access) -> Option<Pin> {
        let found = self.index.find(gref);
        let Some(i) = found.filter(|i| self.at(*i).access >= access) else {
            self.counters.misses.add(1);
            return None;
        };
        self.counters.hits.add(1);
        if self.at(i).pins == 0 {
            self.unlink(i);
        }
        self.at_mut(i).pins += 1;
        Some(Pin(i))
    }

    /// The handle behind a pin.
    #[inline]
    pub fn handle(&self, pin: &Pin) -> Option<&H> {
        self.entries.get(pin.0 as usize)?.handle.as_ref()
    }

    /// Keeps a new mapping of `gref`, pinned. It replaces one of the same reference.
    pub fn insert(&mut self, gref: GrantRef, access: Access, handle: H) -> Inserted<H> {
        let mut out = self.index.find(gref).and_then(|old| self.replace(old));
        if out.is_none() && self.kept >= self.limit {
            let Some(evicted) = self.evict() else {
                self.counters.refused.add(1);
                return Inserted::Refused(handle);
            };
            out = Some(evicted);
        }
        let i = self.free;
        self.free = self.at(i).next;
        *self.at_mut(i) = Entry {
            gref,
            access,
            state: State::Listed,
            pins: 1,
            handle: Some(handle),
            older: NONE,
            next: NONE,
            used: 0,
        };
        self.index.insert(gref, i);
        self.kept += 1;
        self.counters.kept.set(u64::from(self.kept));
        Inserted::Kept { pin: Pin(i), out }
    }

    /// Ends a use. A handle comes back if it was replaced meanwhile and this was its last use:
    /// unmap it.
    #[inline]
    pub fn unpin(&mut self, pin: Pin, now: u64) -> Option<H> {
        let entry = self.at_mut(pin.0);
        entry.pins -= 1;
        if entry.pins > 0 {
            return None;
        }
        match entry.state {
            State::Replaced => self.release(pin.0),
            _ => {
                entry.used = now;
                self.link(pin.0);
                None
            }
        }
    }

    /// Drops what nobody used for the idle time, and gives each handle to `unmap`.
    pub fn expire(&mut self, now: u64, mut unmap: impl FnMut(H)) {
        while self.oldest != NONE && now.saturating_sub(self.at(self.oldest).used) >= self.idle {
            self.evict().into_iter().for_each(&mut unmap);
        }
    }

    /// Changes how many mappings are kept (at most as many as at first) and how long; gives each
    /// handle that falls out to `unmap`. Entries in use stay until they are unpinned and evicted.
    pub fn set_limits(&mut self, entries: u32, idle: u64, mut unmap: impl FnMut(H)) {
        self.limit = entries.min(self.entries.len() as u32);
        self.idle = idle;
        while self.kept > self.limit {
            match self.evict() {
                Some(handle) => unmap(handle),
                None => break,
            }
        }
    }

    /// Ends the pool and gives every handle to `unmap`, in use or not: the caller knows that
    /// nothing uses them any more.
    pub fn close(self, unmap: impl FnMut(H)) {
        self.counters.kept.set(0);
        self.entries.into_iter().filter_map(|e| e.handle).for_each(unmap);
    }

    #[inline]
    fn at(&self, i: u32) -> &Entry<H> {
        &self.entries[i as usize]
    }
    #[inline]
    fn at_mut(&mut self, i: u32) -> &mut Entry<H> {
        &mut self.entries[i as usize]
    }

    /// Takes an entry off its reference; gives its handle if nobody uses it.
    fn replace(&mut self, i: u32) -> Option<H> {
        self.index.remove(self.at(i).gref);
        if self.at(i).pins == 0 {
            self.unlink(i);
            return self.release(i);
        }
        self.at_mut(i).state = State::Replaced;
        None
    }

    /// Drops the entry that was unused for longest.
    fn evict(&mut self) -> Option<H> {
        let i = Some(self.oldest).filter(|i| *i != NONE)?;
        self.counters.evictions.add(1);
        self.replace(i)
    }

    fn release(&mut self, i: u32) -> Option<H> {
        let free = core::mem::replace(&mut self.free, i);
        let entry = self.at_mut(i);
        entry.state = State::Free;
        entry.next = free;
        let handle = entry.handle.take();
        self.kept -= 1;
        self.counters.kept.set(u64::from(self.kept));
        handle
    }

    #[inline]
    fn link(&mut self, i: u32) {
        let newest = core::mem::replace(&mut self.newest, i);
        let entry = self.at_mut(i);
        entry.older = newest;
        entry.next = NONE;
        match newest {
            NONE => self.oldest = i,
            _ => self.at_mut(newest).next = i,
        }
    }

    #[inline]
    fn unlink(&mut self, i: u32) {
        let (older, newer) = (self.at(i).older, self.at(i).next);
        match older {
            NONE => self.oldest = newer,
            _ => self.at_mut(older).next = newer,
        }
        match newer {
            NONE => self.newest = older,
            _ => self.at_mut(newer).older = older,
        }
    }
}

impl<H> core::fmt::Debug for PersistentPool<H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PersistentPool")
            .field("kept", &self.kept)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// From reference to entry: open addressing, at most half full, multiplicative hashing by a
/// secret odd factor, deletion by shifting back.
struct Index {
    cells: Box<[(GrantRef, u32)]>,
    factor: u64,
    shift: u32,
}

impl Index {
    fn new(entries: u32, seed: u64) -> Self {
        let cells = (entries as usize * 2).next_power_of_two().max(2);
        Index {
            cells: vec![(0, NONE); cells].into(),
            // Odd whatever the seed, and well mixed for seeds such as 0, 1, 2.
            factor: seed.wrapping_mul(2).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            shift: 64 - cells.ilog2(),
        }
    }
    #[inline]
    fn home(&self, gref: GrantRef) -> usize {
        (u64::from(gref).wrapping_mul(self.factor) >> self.shift) as usize
    }
    #[inline]
    fn after(&self, cell: usize) -> usize {
        (cell + 1) & (self.cells.len() - 1)
    }
    /// The cell that holds `gref`, or the empty one where it would go.
    #[inline]
    fn cell(&self, gref: GrantRef) -> usize {
        let mut cell = self.home(gref);
        while self.cells[cell].1 != NONE && self.cells[cell].0 != gref {
            cell = self.after(cell);
        }
        cell
    }
    #[inline]
    fn find(&self, gref: GrantRef) -> Option<u32> {
        Some(self.cells[self.cell(gref)].1).filter(|i| *i != NONE)
    }
    fn insert(&mut self, gref: GrantRef, i: u32) {
        self.cells[self.cell(gref)] = (gref, i);
    }
    fn remove(&mut self, gref: GrantRef) {
        let mut hole = self.cell(gref);
        let mut next = self.after(hole);
        while self.cells[next].1 != NONE {
            let wrap = self.cells.len() - 1;
            let displaced = next.wrapping_sub(self.home(self.cells[next].0)) & wrap;
            // The hole lies on the way from its home to where it is.
            if displaced >= next.wrapping_sub(hole) & wrap {
                self.cells[hole] = self.cells[next];
                hole = next;
            }
            next = self.after(next);
        }
        self.cells[hole].1 = NONE;
    }
}

#[cfg(test)]
#[path = "persistent_tests.rs"]
mod tests;
