//! A histogram of powers of two with one writer.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Number of buckets: bucket 0 holds the values 0 and 1, bucket k the values 2^k to 2^(k+1)-1.
pub const BUCKETS: usize = 64;

/// The bucket that holds `v`.
#[inline]
pub const fn bucket_of(v: u64) -> usize {
    63 - (v | 1).leading_zeros() as usize
}

/// The largest value of bucket `k`.
pub const fn bucket_top(k: usize) -> u64 {
    if k >= BUCKETS - 1 { u64::MAX } else { (2u64 << k) - 1 }
}

/// A log2 histogram. One thread writes it, any number read it.
#[derive(Debug)]
#[repr(C)]
pub struct Histogram {
    count: AtomicU64,
    sum: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            count: AtomicU64::new(0),
            sum: AtomicU64::new(0),
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
        }
    }
}

#[inline]
fn bump(word: &AtomicU64, n: u64) {
    word.store(word.load(Relaxed).wrapping_add(n), Relaxed);
}

impl Histogram {
    /// Records one value.
    #[inline]
    pub fn record(&self, v: u64) {
        self.record_n(v, 1);
    }
    /// Records the same value `n` times (a batch that one clock reading stands for).
    #[inline]
    pub fn record_n(&self, v: u64, n: u64) {
        bump(&self.count, n);
        bump(&self.sum, v.wrapping_mul(n));
        bump(&self.buckets[bucket_of(v)], n);
    }
    /// A copy to compute with. Not atomic as a whole: a writer may be between two words.
    pub fn snapshot(&self) -> HistogramSnapshot {
        let mut buckets = [0; BUCKETS];
        for (to, from) in buckets.iter_mut().zip(&self.buckets) {
            *to = from.load(Relaxed);
        }
        HistogramSnapshot { count: self.count.load(Relaxed), sum: self.sum.load(Relaxed), buckets }
    }
}

/// A histogram's values at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSnapshot {
    /// Values recorded.
    pub count: u64,
    /// Their sum, wrapping.
    pub sum: u64,
    /// Values by power of two; see [`BUCKETS`].
    pub buckets: [u64; BUCKETS],
}

impl HistogramSnapshot {
    /// The value below or at which the fraction `q` (0 to 1) of the recorded values lies,
    /// interpolated within its bucket; 0 where nothing was recorded. Computed from the buckets
    /// alone, so a count that runs ahead of them does no harm.
    pub fn quantile(&self, q: f64) -> u64 {
        let total = self.buckets.iter().fold(0u64, |a, b| a.saturating_add(*b));
        if total == 0 {
            return 0;
        }
        let wanted = q.clamp(0.0, 1.0) * total as f64;
        let mut below = 0.0;
        let mut last = 0;
        for (k, n) in self.buckets.iter().enumerate().filter(|(_, n)| **n > 0) {
            if below + *n as f64 >= wanted {
                return within_bucket(k, ((wanted - below) / *n as f64).clamp(0.0, 1.0));
            }
            below += *n as f64;
            last = k;
        }
        bucket_top(last)
    }
    /// Arithmetic mean; 0 where nothing was recorded.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum as f64 / self.count as f64 }
    }
    /// What was recorded since `old`. A writer that started anew gives its present values.
    pub fn since(&self, old: &HistogramSnapshot) -> HistogramSnapshot {
        if self.count < old.count || self.buckets.iter().zip(&old.buckets).any(|(n, o)| n < o) {
            return self.clone();
        }
        let mut buckets = self.buckets;
        for (n, o) in buckets.iter_mut().zip(&old.buckets) {
            *n -= o;
        }
        HistogramSnapshot {
            count: self.count - old.count,
            sum: self.sum.wrapping_sub(old.sum),
            buckets,
        }
    }
}

fn within_bucket(k: usize, fraction: f64) -> u64 {
    let low = if k == 0 { 0 } else { 1u64 << k };
    let width = bucket_top(k) - low;
    low.saturating_add((width as f64 * fraction) as u64)
}

#[cfg(test)]
#[path = "histogram_tests.rs"]
mod tests;
