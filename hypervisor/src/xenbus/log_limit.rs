//! Log lines that a guest can cause as fast as it writes its keys are held back.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Lines at once before any is held back.
const BURST: u32 = 20;
/// How long it takes until one more is allowed.
const EVERY: Duration = Duration::from_secs(1);

/// A device's allowance of log lines: 20 at once, then one a second.
#[derive(Debug)]
pub struct LogLimit {
    credit: u32,
    /// When the last line of credit was given.
    given: Instant,
    dropped: u64,
}

impl LogLimit {
    /// Full allowance at `now`.
    pub fn new(now: Instant) -> LogLimit {
        LogLimit { credit: BURST, given: now, dropped: 0 }
    }

    /// Whether a line may be logged now; if so, how many were held back before it.
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.given).as_secs() / EVERY.as_secs();
        if earned > 0 {
            self.given = now;
            self.credit = self.credit.saturating_add(earned.min(BURST.into()) as u32).min(BURST);
        }
        if self.credit == 0 {
            self.dropped += 1;
            return None;
        }
        self.credit -= 1;
        Some(std::mem::take(&mut self.dropped))
    }

    /// Whether a line about `device` may be logged now. Says in the log what was held back.
    pub fn permits(&mut self, device: impl Display) -> bool {
        let allowed = self.allow(Instant::now());
        if let Some(dropped @ 1..) = allowed {
            tracing::warn!("{device}: {dropped} log lines held back");
        }
        allowed.is_some()
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        LogLimit::new(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_a_second() {
        let start = Instant::now();
        let mut limit = LogLimit::new(start);
        for _ in 0..BURST {
            assert_eq!(limit.allow(start), Some(0));
        }
        let at = |ms| start + Duration::from_millis(ms);
        for ms in 0..100 {
            assert_eq!(limit.allow(at(ms)), None);
        }
        assert_eq!(limit.allow(at(1000)), Some(100));
        assert_eq!(limit.allow(at(1999)), None);
        assert_eq!(limit.allow(at(2000)), Some(1));
        // Silence is not saved up beyond the burst.
        let late = at(1_000_000);
        assert_eq!((0..100).filter(|_| limit.allow(late).is_some()).count(), BURST as usize);
    }
}
