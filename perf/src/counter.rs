//! One number with one writer.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A number that only grows, wrapping at 2^64. One thread writes it, any number read it.
///
/// Adding is a relaxed load and a relaxed store, not a locked instruction: two writers would
/// lose counts (and nothing worse).
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }
    /// Sets a total that something else keeps (CPU time of a thread, say).
    #[inline]
    pub fn set(&self, total: u64) {
        self.0.store(total, Relaxed);
    }
    /// The present total.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that goes up and down (a level, a setting). One thread writes it, any number read it.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the level.
    #[inline]
    pub fn set(&self, level: u64) {
        self.0.store(level, Relaxed);
    }
    /// The present level.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_adds_sets_and_wraps() {
        let c = Counter::default();
        c.add(2);
        c.add(3);
        assert_eq!(c.get(), 5);
        c.set(u64::MAX);
        c.add(2);
        assert_eq!(c.get(), 1);
    }

    #[test]
    fn a_gauge_goes_down_too() {
        let g = Gauge::default();
        g.set(9);
        g.set(4);
        assert_eq!(g.get(), 4);
    }
}
