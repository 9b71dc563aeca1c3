//! Clusters that are reserved ahead, so that a write finds some without waiting.
use std::collections::VecDeque;
use std::ops::Range;

use parking_lot::Mutex;

use crate::formats::{Fresh, ImageError};

use super::Qcow2;
use super::space::{Run, Want};

/// What the first reservation takes, in bytes.
const FIRST: u64 = 2 << 20;
/// What one takes at most: each is twice the one before.
const MOST: u64 = 32 << 20;
/// Clusters of one reservation, whatever their size.
const CLUSTERS: std::ops::RangeInclusive<u64> = 4..=1024;

/// Separate stretches of one reservation.
const RUNS: usize = 64;

/// Reserved clusters.
#[derive(Debug, Default)]
pub(super) struct Pool {
    inner: Mutex<Inner>,
    /// One fills it at a time.
    filling: Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    runs: VecDeque<Run>,
    /// Bytes that the next reservation takes.
    ahead: u64,
}

impl Pool {
    /// Takes up to `most` clusters that follow each other.
    pub(super) fn take(&self, most: u64) -> Option<Run> {
        let mut inner = self.inner.lock();
        let run = inner.runs.front_mut()?;
        let end = run.clusters.end.min(run.clusters.start + most);
        let clusters = run.clusters.start..end;
        run.clusters.start = end;
        let fresh = run.fresh;
        if run.clusters.is_empty() {
            inner.runs.pop_front();
        }
        Some(Run { clusters, fresh })
    }

    /// Gives clusters back that were not used; their bytes may have been written.
    pub(super) fn put_back(&self, clusters: Range<u64>) {
        self.inner.lock().runs.push_back(Run { clusters, fresh: Fresh::Unknown });
    }

    /// Empties it.
    pub(super) fn drain(&self) -> Vec<Range<u64>> {
        let mut inner = self.inner.lock();
        inner.ahead = 0;
        inner.runs.drain(..).map(|r| r.clusters).collect()
    }
}

impl Qcow2 {
    /// Reserves clusters for a write that needs `count`, and ahead.
    pub(super) fn fill_pool(&self, count: u64) -> Result<(), ImageError> {
        let _one = self.pool.filling.lock();
        let ahead = {
            let mut inner = self.pool.inner.lock();
            // Somebody else filled it meanwhile.
            if !inner.runs.is_empty() {
                return Ok(());
            }
            inner.ahead = (inner.ahead * 2).clamp(FIRST, MOST);
            inner.ahead
        };
        let clusters =
            (ahead >> self.layout.cluster_bits).clamp(*CLUSTERS.start(), *CLUSTERS.end());
        let clusters = clusters.max(count);
        let mut space = self.space.lock();
        space.recycle(&self.leases)?;
        let (mut runs, mut found) = (Vec::new(), 0);
        while found < clusters && runs.len() < RUNS {
            match space.reserve(Want::UpTo(clusters - found)) {
                Ok(run) => {
                    found += run.clusters.end - run.clusters.start;
                    runs.push(run);
                }
                // A file system that is nearly full may have room for less.
                Err(ImageError::Io { .. }) if runs.is_empty() && clusters > 1 => {
                    runs.push(space.reserve(Want::UpTo(1))?);
                    break;
                }
                Err(e) if runs.is_empty() => return Err(e),
                Err(_) => break,
            }
        }
        self.pool.inner.lock().runs.extend(runs);
        Ok(())
    }
}
