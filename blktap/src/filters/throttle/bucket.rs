//! One limit as a leaky bucket: what is carried out fills it, time empties it at the limit's
//! rate, and what comes while it is full waits.

use super::limits::Limit;

/// Without a burst, a bucket holds what so much time brings.
const SLACK_S: f64 = 0.1;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bucket {
    limit: Limit,
    /// Units above what the rate has carried away.
    level: f64,
    /// The same for the rate of bursts, where these have one of their own.
    burst: f64,
}

impl Bucket {
    pub(super) fn new(limit: Limit) -> Bucket {
        Bucket { limit, ..Bucket::default() }
    }

    pub(super) fn limits(&self) -> bool {
        self.limit.rate != 0
    }

    fn is_long(&self) -> bool {
        self.limit.burst != 0 && self.limit.burst_s > 1
    }

    /// Time has passed.
    pub(super) fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.limit.rate as f64 * seconds).max(0.0);
        self.burst = (self.burst - self.limit.burst as f64 * seconds).max(0.0);
    }

    /// Seconds until the next request may go; 0: at once.
    pub(super) fn wait(&self) -> f64 {
        if !self.limits() {
            return 0.0;
        }
        let (rate, burst) = (self.limit.rate as f64, self.limit.burst as f64);
        let room = match self.limit.burst {
            0 => rate * SLACK_S,
            _ => burst * f64::from(self.limit.burst_s),
        };
        let wait = ((self.level - room) / rate).max(0.0);
        if !self.is_long() {
            return wait;
        }
        // A long burst has a rate too; a short one may come all at once.
        wait.max((self.burst - burst * SLACK_S) / burst)
    }

    /// A request of so many units goes.
    pub(super) fn fill(&mut self, units: f64) {
        if self.limits() {
            self.level += units;
            self.burst += if self.is_long() { units } else { 0.0 };
        }
    }

    /// Seconds of the whole rate that so many units are.
    pub(super) fn cost(&self, units: f64) -> f64 {
        if self.limits() { units / self.limit.rate as f64 } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of one unit go in `seconds`, tried every millisecond.
    fn carried(bucket: &mut Bucket, seconds: u32) -> u32 {
        let mut count = 0;
        for _ in 0..seconds * 1000 {
            bucket.leak(0.001);
            while bucket.wait() <= 0.0 {
                bucket.fill(1.0);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn rates_and_bursts_are_kept() {
        let mut plain = Bucket::new(Limit::of(1000));
        assert!((1000..=1102).contains(&carried(&mut plain, 1)), "with a tenth of a second");
        assert!((9990..=10010).contains(&carried(&mut plain, 10)));
        let mut short = Bucket::new(Limit { rate: 100, burst: 2000, burst_s: 1 });
        assert!((2090..=2110).contains(&carried(&mut short, 1)), "the burst, at once");
        assert!((990..=1010).contains(&carried(&mut short, 10)), "and then the rate");
        let mut long = Bucket::new(Limit { rate: 100, burst: 1000, burst_s: 3 });
        for second in 0..3 {
            let n = carried(&mut long, 1);
            assert!((995..=1105).contains(&n), "second {second}: {n}");
        }
        carried(&mut long, 1);
        assert!((95..=105).contains(&carried(&mut long, 1)), "the burst is over");
    }

    #[test]
    fn a_request_larger_than_the_bucket_goes_and_is_paid_afterwards() {
        let mut bucket = Bucket::new(Limit::of(100));
        assert_eq!(bucket.wait(), 0.0);
        bucket.fill(1000.0);
        assert!((9.8..10.0).contains(&bucket.wait()), "{}", bucket.wait());
        assert_eq!(Bucket::default().wait(), 0.0);
    }
}
