//! What a block device counts beside its rings. The first six keep the names they have in
//! xen-blkback's sysfs statistics.

perf::counters! {
    /// One queue of a block backend.
    pub struct QueueCounters {
        /// Requests that could not be started at once for want of memory.
        oo_req: Counter [requests],
        /// Reads.
        rd_req: Counter [requests],
        /// Writes, barriers included.
        wr_req: Counter [requests],
        /// Flushes.
        f_req: Counter [requests],
        /// Discards.
        ds_req: Counter [requests],
        /// Sectors read.
        rd_sect: Counter [sectors],
        /// Sectors written.
        wr_sect: Counter [sectors],
        /// Write barriers.
        barriers: Counter [requests],
        /// Requests with an indirect segment table.
        indirect: Counter [requests],
        /// Largest request so far.
        largest: Gauge [bytes],
        /// Requests answered with an error.
        errors: Counter [requests],
        /// Requests that a killed predecessor had taken and not answered, served again.
        replayed: Counter [requests],
        /// Requests done once more with copied data, since the kernel refused the guest's pages.
        bounced: Counter [requests],
        /// Requests that have failed and wait until the disk is resumed.
        stalled: Gauge [requests],
        /// Granted pages mapped.
        grants_mapped: Counter [pages],
        /// Granted pages copied by the hypervisor.
        grants_copied: Counter [pages],
        /// Time from taking a read off the ring to its answer.
        latency_read: Histogram [ns],
        /// Time from taking a write off the ring to its answer.
        latency_write: Histogram [ns],
        /// Time from taking a flush off the ring to its answer.
        latency_flush: Histogram [ns],
        /// Time from taking a discard off the ring to its answer.
        latency_discard: Histogram [ns],
        /// Times the queue's thread went to sleep.
        sleeps: Counter [sleeps],
        /// Polls that found work before the thread would have slept.
        polls_paid: Counter [polls],
        /// Processor time of the queue's thread.
        cpu_ns: Gauge [ns],
    }
}
