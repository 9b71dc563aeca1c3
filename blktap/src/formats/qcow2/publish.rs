//! What a guard stands for, and how its change gets into the entries.
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::formats::{Guard, GuardedRange};

use super::entry::{COPIED, L2Entry, SubBits, ZERO};
use super::space::{Bytes, Freed};
use super::{Qcow2, Slice, Version};

/// So many locks share all guards.
const SHARDS: u64 = 16;

/// What a guard does in the end. Ranges are guest bytes.
#[derive(Clone, Debug)]
pub(super) enum Action {
    /// The range has data now, in clusters from `host` (that of its start) on.
    Data {
        /// Whole (sub)clusters.
        filled: Range<u64>,
        /// Bytes in the file.
        host: u64,
        /// Clusters of the file that are new.
        taken: Option<Range<u64>>,
    },
    /// The range, whole (sub)clusters, reads as zeroes.
    Zero {
        /// Which.
        range: Range<u64>,
    },
    /// The range, whole clusters, is no longer needed.
    Discard {
        /// Which.
        range: Range<u64>,
    },
}

impl Action {
    /// The same for a range that ends earlier.
    pub(super) fn up_to(self, end: u64) -> Self {
        match self {
            Action::Zero { range } => Action::Zero { range: range.start..end },
            Action::Discard { range } => Action::Discard { range: range.start..end },
            other => other,
        }
    }

    fn range(&self) -> Range<u64> {
        match self {
            Action::Data { filled: range, .. }
            | Action::Zero { range }
            | Action::Discard { range } => range.clone(),
        }
    }
}

/// A change under way.
#[derive(Debug)]
pub(super) struct State {
    pub owned: GuardedRange,
    /// Holds the slice in memory, so that publishing finds it.
    pub slice: Arc<Slice>,
    pub action: Action,
}

#[derive(Debug, Default)]
struct Slab {
    items: Vec<Option<State>>,
    free: Vec<u32>,
}

/// The changes under way, by guard.
#[derive(Debug)]
pub(super) struct Changes {
    shards: Box<[Mutex<Slab>]>,
}

impl Default for Changes {
    fn default() -> Self {
        Changes { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }
}

impl Changes {
    pub(super) fn insert(&self, state: State) -> Guard {
        let shard = state.owned.clusters().start % SHARDS;
        let mut slab = self.shards[shard as usize].lock();
        let index = match slab.free.pop() {
            Some(index) => {
                slab.items[index as usize] = Some(state);
                u64::from(index)
            }
            None => {
                slab.items.push(Some(state));
                slab.items.len() as u64 - 1
            }
        };
        Guard(index * SHARDS + shard)
    }

    fn remove(&self, Guard(number): Guard) -> Option<State> {
        let mut slab = self.shards[(number % SHARDS) as usize].lock();
        let index = number / SHARDS;
        let state = slab.items.get_mut(index as usize)?.take()?;
        slab.free.push(index as u32);
        Some(state)
    }
}

impl Qcow2 {
    /// Carries a guard's change out in memory.
    pub(super) fn publish(&self, guard: Guard) {
        let Some(State { owned, slice, action }) = self.changes.remove(guard) else { return };
        let mut freed = Vec::new();
        let bits = self.layout.cluster_bits;
        let range = action.range();
        {
            let changing = slice.change();
            for cluster in range.start >> bits..range.end.div_ceil(1 << bits) {
                let index = self.index_of(cluster << bits);
                let old = slice.entry(index);
                let new = self.changed(old, &action, cluster << bits);
                changing.set(index, new);
                freed.extend(self.dropped(old, new, &action));
            }
            if slice.soil() {
                self.pending.slice(&slice);
            }
        }
        // After the slice is listed: who takes these takes the slice too.
        for f in freed {
            self.pending.free(f);
        }
        self.pending.note();
        drop(slice);
        self.guards.release(owned);
    }

    /// Gives a guard's clusters back.
    pub(super) fn give_up(&self, guard: Guard) {
        let Some(State { owned, slice, action }) = self.changes.remove(guard) else { return };
        if let Action::Data { taken: Some(clusters), .. } = action {
            self.pool.put_back(clusters);
        }
        drop(slice);
        self.guards.release(owned);
    }

    /// The part of a range in the cluster at `at`, as subclusters.
    fn part(&self, range: &Range<u64>, at: u64) -> Range<u32> {
        let bits = self.layout.subcluster_bits();
        let from = range.start.max(at) - at;
        let to = range.end.min(at + self.layout.cluster_size()) - at;
        (from >> bits) as u32..(to >> bits) as u32
    }

    /// The entry of the cluster at guest byte `at` after a change.
    fn changed(&self, old: (u64, u64), action: &Action, at: u64) -> (u64, u64) {
        let entry = self.layout.l2(old.0, old.1);
        let bits = match entry {
            L2Entry::Subclusters { bits, .. } => bits,
            _ => SubBits::default(),
        };
        match action {
            Action::Data { filled, host, .. } => {
                let start = filled.start & !(self.layout.cluster_size() - 1);
                let word = (host + (at - start)) | COPIED;
                let bits = bits.with_data(self.part(filled, at));
                (word, if self.layout.extended { bits.0 } else { 0 })
            }
            Action::Zero { range } => self.zeroed(old, entry, self.part(range, at)),
            Action::Discard { .. } => {
                let all = SubBits::default().with_zero(0..32).0;
                match (self.layout.extended, self.layout.version) {
                    (true, _) => (0, all),
                    (false, Version::V3) => (ZERO, 0),
                    (false, Version::V2) => (0, 0),
                }
            }
        }
    }

    /// An entry with subclusters that are zero now. What is ours alone is kept for later.
    fn zeroed(&self, old: (u64, u64), entry: L2Entry, part: Range<u32>) -> (u64, u64) {
        match entry {
            L2Entry::Subclusters { host, copied, bits } => {
                let bits = bits.with_zero(part);
                let keep = host.is_some() && (copied || bits.allocated() != 0);
                (if keep { old.0 } else { 0 }, bits.0)
            }
            _ if self.layout.extended => (0, SubBits::default().with_zero(0..32).0),
            _ if self.layout.version == Version::V2 => (0, 0),
            L2Entry::Data { copied: true, .. } | L2Entry::Zero { copied: true, .. } => {
                (old.0 | ZERO, 0)
            }
            _ => (ZERO, 0),
        }
    }

    /// What an entry named that its successor does not.
    pub(super) fn dropped(
        &self,
        old: (u64, u64),
        new: (u64, u64),
        action: &Action,
    ) -> Option<Freed> {
        let bits = self.layout.cluster_bits;
        let bytes = match action {
            Action::Discard { .. } => Bytes::Punch,
            _ => Bytes::Stay,
        };
        let host = match self.layout.l2(old.0, old.1) {
            L2Entry::Compressed { descriptor } => {
                let range = self.layout.compressed(descriptor);
                let clusters = range.start >> bits..range.end.div_ceil(1 << bits);
                return Some(Freed { clusters, bytes });
            }
            L2Entry::Data { host, .. } => host,
            L2Entry::Zero { host, .. } | L2Entry::Subclusters { host, .. } => host?,
            L2Entry::Unallocated => return None,
        };
        let kept = match self.layout.l2(new.0, new.1) {
            L2Entry::Data { host, .. } => Some(host),
            L2Entry::Zero { host, .. } | L2Entry::Subclusters { host, .. } => host,
            _ => None,
        };
        let cluster = host >> bits;
        let gone = kept != Some(host) && !self.layout.data_file;
        gone.then_some(Freed { clusters: cluster..cluster + 1, bytes })
    }
}
