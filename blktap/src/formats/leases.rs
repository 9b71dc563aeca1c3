//! Who may still use what is no longer named: freed clusters wait for the leases of their time.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use parking_lot::Mutex;

/// No lease is held.
const IDLE: u64 = u64::MAX;

/// The leases on an image. Each queue is a [`LeaseHolder`]; whoever frees something takes a
/// [`stamp`](Leases::stamp) after nothing names it any more, and uses it anew once all leases
/// from before the stamp have [ended](Leases::ended).
#[derive(Debug, Default)]
pub struct Leases {
    epoch: AtomicU64,
    /// For each holder the epoch of its oldest lease.
    oldest: Mutex<Vec<Arc<AtomicU64>>>,
}

impl Leases {
    /// The time from which on nobody can come across what was taken out of the metadata before.
    pub fn stamp(&self) -> u64 {
        fence(Ordering::SeqCst);
        self.epoch.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Whether all leases that began before `stamp` have ended.
    pub fn ended(&self, stamp: u64) -> bool {
        fence(Ordering::SeqCst);
        self.oldest.lock().iter().all(|oldest| oldest.load(Ordering::SeqCst) >= stamp)
    }

    /// A new holder.
    pub fn holder(self: &Arc<Self>) -> LeaseHolder {
        let oldest = Arc::new(AtomicU64::new(IDLE));
        self.oldest.lock().push(Arc::clone(&oldest));
        LeaseHolder { leases: Arc::clone(self), oldest, phases: [Phase::default(); 2], now: 0 }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Phase {
    epoch: u64,
    held: u32,
}

/// One thread's leases. They are counted in two phases: a new one begins when the older is
/// empty, so that it empties in turn however many requests overlap.
#[derive(Debug)]
pub struct LeaseHolder {
    leases: Arc<Leases>,
    oldest: Arc<AtomicU64>,
    phases: [Phase; 2],
    now: u8,
}

/// A lease; to be given back to its holder.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease(u8);

impl LeaseHolder {
    /// Takes a lease. Resolve afterwards.
    pub fn take(&mut self) -> Lease {
        let epoch = self.leases.epoch.load(Ordering::Relaxed);
        let (current, other) = (self.now, 1 - self.now);
        let [held, held_before] = [current, other].map(|p| self.phases[usize::from(p)].held);
        if held == 0 {
            self.phases[usize::from(current)] = Phase { epoch, held: 1 };
            if held_before == 0 {
                self.oldest.store(epoch, Ordering::Relaxed);
                // The pair of the fences of `stamp` and `ended`: either they see this lease, or
                // what is resolved from here on is what they left.
                fence(Ordering::SeqCst);
            }
            return Lease(current);
        }
        if held_before == 0 && self.phases[usize::from(current)].epoch != epoch {
            self.phases[usize::from(other)] = Phase { epoch, held: 1 };
            self.now = other;
            return Lease(other);
        }
        self.phases[usize::from(current)].held += 1;
        Lease(current)
    }

    /// Ends a lease.
    pub fn end(&mut self, lease: Lease) {
        let phase = &mut self.phases[usize::from(lease.0)];
        phase.held = phase.held.saturating_sub(1);
        if phase.held > 0 {
            return;
        }
        let oldest = self.phases.iter().filter(|p| p.held > 0).map(|p| p.epoch).min();
        // What was done under the lease comes before.
        self.oldest.store(oldest.unwrap_or(IDLE), Ordering::Release);
    }
}

impl Drop for LeaseHolder {
    fn drop(&mut self) {
        self.leases.oldest.lock().retain(|oldest| !Arc::ptr_eq(oldest, &self.oldest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_freed_waits_for_older_leases_only() {
        let leases = Arc::new(Leases::default());
        let (mut a, mut b) = (leases.holder(), leases.holder());
        let first = a.take();
        let stamp = leases.stamp();
        assert!(!leases.ended(stamp));
        let younger = b.take();
        let second = a.take();
        assert!(!leases.ended(stamp));
        a.end(first);
        assert!(leases.ended(stamp), "the younger ones do not count");
        let later = leases.stamp();
        assert!(!leases.ended(later));
        a.end(second);
        b.end(younger);
        assert!(leases.ended(later));
    }

    #[test]
    fn leases_that_overlap_without_end_do_not_hold_up() {
        let leases = Arc::new(Leases::default());
        let mut a = leases.holder();
        let mut held = std::collections::VecDeque::from([a.take(), a.take()]);
        let mut passed = 0;
        let mut stamp = leases.stamp();
        for _ in 0..100 {
            held.push_back(a.take());
            if let Some(lease) = held.pop_front() {
                a.end(lease);
            }
            if leases.ended(stamp) {
                (passed, stamp) = (passed + 1, leases.stamp());
            }
        }
        assert!(passed > 10, "{passed}");
    }
}
