//! What an engine counts.
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the engine's own thread does.
    pub(super) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
    /// The present value, from any thread.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of one engine; written by its thread, read by anyone.
        #[derive(Debug, Default)]
        pub struct EngineCounters {
            $($(#[$doc])* pub $name: Counter,)*
        }
    };
}

counters! {
    /// Calls of io_uring_enter (and of ppoll, where the kernel lacks timeouts in enter).
    enters,
    /// Calls that were allowed to sleep.
    sleeps,
    /// Submission entries for reads.
    reads,
    /// Submission entries for writes.
    writes,
    /// Submission entries for fsync.
    syncs,
    /// Submission entries for fallocate.
    fallocates,
    /// BLKDISCARD and BLKSECDISCARD handed to the helper thread.
    ioctls,
    /// Submission entries that poll a foreign descriptor.
    polls,
    /// Requests that moved on after a short read or write.
    resumed,
    /// Requests sent again after EINTR or EAGAIN.
    retried,
    /// Pieces that went through a bounce buffer.
    bounced,
    /// Segments saved by joining adjacent buffers.
    merged,
}
