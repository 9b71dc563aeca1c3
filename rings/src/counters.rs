//! What each ring counts.

perf::counters! {
    /// Counters of one end of one ring. Written once a batch, not once a request.
    pub struct RingCounters {
        /// Requests that this end published or found published.
        requests: Counter [requests],
        /// Responses that this end published or found published.
        responses: Counter [responses],
        /// Messages that one look at the ring brought; its count is the number of batches.
        batch: Histogram [messages],
        /// Notifications that this end had to send.
        notifications_sent: Counter [events],
        /// Publications that needed no notification.
        notifications_saved: Counter [events],
        /// Notifications that this end received.
        notifications_received: Counter [events],
        /// Notifications that brought nothing.
        spurious: Counter [events],
        /// Looks at the ring while polling.
        polls: Counter [polls],
        /// Polls that found something.
        polls_paid: Counter [polls],
        /// Requests that found the ring full (frontend).
        ring_full: Counter [requests],
    }
}
