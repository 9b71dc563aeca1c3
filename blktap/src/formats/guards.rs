//! Who owns which clusters while a change of them is under way.
use std::collections::HashMap;
use std::ops::Range;

use parking_lot::Mutex;

use super::Waiter;

/// So many locks share all clusters.
const SHARDS: usize = 64;

/// Clusters that are owned, with who waits for each.
type Owned = HashMap<u64, Vec<Waiter>>;

/// The clusters of a disk that are being changed, by number. At most one change owns a cluster.
#[derive(Debug)]
pub struct ClusterGuards {
    shards: Box<[Mutex<Owned>]>,
}

/// Clusters that were taken; to be given back by [`ClusterGuards::release`].
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardedRange(Range<u64>);

impl GuardedRange {
    /// Names clusters that the caller took before, for those who keep only their numbers.
    pub fn of(clusters: Range<u64>) -> Self {
        GuardedRange(clusters)
    }
    /// The clusters' numbers.
    pub fn clusters(&self) -> Range<u64> {
        self.0.clone()
    }
}

impl Default for ClusterGuards {
    fn default() -> Self {
        ClusterGuards { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }
}

impl ClusterGuards {
    fn shard(&self, cluster: u64) -> &Mutex<Owned> {
        &self.shards[cluster as usize % SHARDS]
    }

    /// Takes clusters from the start of the range on, up to the first that somebody owns; if
    /// that is the very first, `None`, and the waiter is woken when it is free.
    pub fn take(&self, clusters: Range<u64>, waiter: &Waiter) -> Option<GuardedRange> {
        let mut end = clusters.start;
        while end < clusters.end {
            let mut shard = self.shard(end).lock();
            match shard.get_mut(&end) {
                None => {
                    shard.insert(end, Vec::new());
                    end += 1;
                }
                Some(waiters) if end == clusters.start => {
                    waiters.push(waiter.clone());
                    return None;
                }
                Some(_) => break,
            }
        }
        Some(GuardedRange(clusters.start..end))
    }

    /// Whether somebody owns the cluster.
    pub fn owned(&self, cluster: u64) -> bool {
        self.shard(cluster).lock().contains_key(&cluster)
    }

    /// Gives clusters back and wakes who waits for them.
    pub fn release(&self, range: GuardedRange) {
        for cluster in range.0 {
            let waiters = self.shard(cluster).lock().remove(&cluster);
            waiters.into_iter().flatten().for_each(|w| w.wake());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::Mailbox;
    use super::*;

    #[test]
    fn one_owner_at_a_time_and_whoever_waits_is_woken() {
        let guards = ClusterGuards::default();
        let mailbox = Arc::new(Mailbox::new().expect("eventfd"));
        let waiter = |key| Waiter::new(Arc::clone(&mailbox), key);
        let first = guards.take(4..6, &waiter(1)).expect("free");
        let before = guards.take(2..9, &waiter(2)).expect("free up to 4");
        assert_eq!(before.clusters(), 2..4);
        assert!(guards.take(5..7, &waiter(3)).is_none());
        assert_eq!(mailbox.take(), None);
        guards.release(first);
        assert_eq!(mailbox.take(), Some(3));
        let third = guards.take(4..7, &waiter(3)).expect("free again");
        guards.release(third);
        guards.release(before);
        assert!((0..10).all(|c| !guards.owned(c)));
    }
}
