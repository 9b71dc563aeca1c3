//! What an engine counts.

perf::counters! {
    /// Counters of one engine; written by its thread, read by anyone.
    pub struct EngineCounters {
        /// Calls of io_uring_enter (and of poll, where the kernel has no timeout in enter).
        enters: Counter [calls],
        /// Calls that were allowed to sleep.
        sleeps: Counter [calls],
        /// Submission entries for reads.
        reads: Counter [entries],
        /// Submission entries for writes.
        writes: Counter [entries],
        /// Small writes into the page cache that the queue's thread made itself (pwritev2).
        inline_writes: Counter [calls],
        /// Submission entries for fsync.
        syncs: Counter [entries],
        /// Submission entries for fallocate.
        fallocates: Counter [entries],
        /// BLKDISCARD and BLKSECDISCARD handed to the helper thread.
        ioctls: Counter [calls],
        /// Submission entries that poll a foreign descriptor.
        polls: Counter [entries],
        /// Requests that moved on after a short read or write.
        resumed: Counter [requests],
        /// Requests sent again after EINTR or EAGAIN.
        retried: Counter [requests],
        /// Pieces that went through a bounce buffer.
        bounced: Counter [pieces],
        /// Segments saved by joining adjacent buffers.
        merged: Counter [segments],
        /// Requests that a throttle before the engine held back.
        throttled: Counter [requests],
    }
}
