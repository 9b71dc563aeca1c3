//! How long a queue polls before it sleeps.

use std::time::Instant;

use crate::counters::QueueCounters;

/// Iterations between two readings of the clock.
const SPINS: u32 = 32;
/// Where growing starts, in ns.
const FIRST: u64 = 2_000;

/// Decides between polling and sleeping, as KVM's halt polling does: sleeps that would have been
/// short make the next poll longer, long ones make it shorter, down to none for an idle device.
pub(crate) struct Poller {
    max: u64,
    budget: u64,
    spins: u32,
    since: Option<Instant>,
}

impl Poller {
    /// Polls for up to `max_us` microseconds.
    pub(crate) fn new(max_us: u32) -> Poller {
        let max = u64::from(max_us) * 1000;
        Poller { max, budget: max, spins: 0, since: None }
    }

    /// Polls for up to `max_us` microseconds from now on.
    pub(crate) fn set_max(&mut self, max_us: u32) {
        self.max = u64::from(max_us) * 1000;
        self.budget = self.max;
    }

    /// There was work.
    #[inline]
    pub(crate) fn worked(&mut self, counters: &QueueCounters) {
        if self.spins > 0 {
            counters.polls_paid.add(1);
            (self.spins, self.since) = (0, None);
        }
    }

    /// There was none: whether to look again at once.
    pub(crate) fn spin(&mut self, _counters: &QueueCounters) -> bool {
        if self.budget == 0 {
            return false;
        }
        std::hint::spin_loop();
        self.spins += 1;
        if !self.spins.is_multiple_of(SPINS) {
            return true;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if (since.elapsed().as_nanos() as u64) < self.budget {
            return true;
        }
        (self.spins, self.since) = (0, None);
        false
    }

    /// The queue has slept for so many ns.
    pub(crate) fn slept(&mut self, ns: u64) {
        (self.spins, self.since) = (0, None);
        self.budget = if ns <= self.max {
            (self.budget * 2).max(FIRST).min(self.max)
        } else {
            let half = self.budget / 2;
            if half < FIRST { 0 } else { half }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_queue_ends_up_sleeping_at_once_and_a_busy_one_polls_again() {
        let counters = QueueCounters::default();
        let mut poller = Poller::new(50);
        for _ in 0..10 {
            poller.slept(1_000_000_000);
        }
        assert!(!poller.spin(&counters));
        for _ in 0..10 {
            poller.slept(5_000);
        }
        assert!(poller.spin(&counters));
        poller.worked(&counters);
        assert_eq!(counters.polls_paid.get(), 1);
    }

    #[test]
    fn polling_ends() {
        let counters = QueueCounters::default();
        let mut poller = Poller::new(20);
        let start = Instant::now();
        while poller.spin(&counters) {}
        assert!(start.elapsed().as_micros() >= 20);
        assert!(!Poller::new(0).spin(&counters));
    }
}
