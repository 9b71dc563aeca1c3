//! How much a vif may move: bytes and packets a second, shared by its queues. Time is passed in.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// So much may come at once after a pause, as time at the full rate. A batch of a busy queue has
/// room in it; a longer one shows in what iperf3 measures in a second.
const BURST: Duration = Duration::from_millis(20);

/// A limit; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Bytes a second.
    pub bytes: u64,
    /// Packets a second.
    pub packets: u64,
}

/// One direction's limit. What was moved is paid for by time: the next packet may go once that is
/// paid but for the burst (the generic cell rate algorithm of ITU-T I.371).
#[derive(Debug)]
pub struct Limiter {
    limited: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rate: Rate,
    /// Until when what was moved is paid for, in bytes and in packets.
    bytes: Instant,
    packets: Instant,
}

/// The time that `amount` takes at `rate` a second.
fn cost(amount: u64, rate: u64) -> Duration {
    match rate {
        0 => Duration::ZERO,
        _ => {
            let ns = u128::from(amount) * 1_000_000_000 / u128::from(rate);
            Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
        }
    }
}

impl Limiter {
    /// A limiter at the time `now`.
    pub fn new(rate: Rate, now: Instant) -> Limiter {
        Limiter {
            limited: AtomicBool::new(rate != Rate::default()),
            state: Mutex::new(State { rate, bytes: now, packets: now }),
        }
    }

    /// Another rate from `now` on. What was moved before is forgotten.
    pub fn set(&self, rate: Rate, now: Instant) {
        let mut state = self.state.lock();
        if state.rate != rate {
            *state = State { rate, bytes: now, packets: now };
            self.limited.store(rate != Rate::default(), Ordering::Relaxed);
        }
    }

    /// Whether there is a limit.
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// The time, where there is a limit; under Xen a reading of the clock may be a call of the system.
    pub fn now(&self) -> Option<Instant> {
        self.is_limited().then(Instant::now)
    }

    /// How long to wait before another packet; none: it may go.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        let state = self.state.lock();
        let paid = state.bytes.max(state.packets);
        let early = paid.checked_duration_since(now)?.checked_sub(BURST)?;
        (!early.is_zero()).then_some(early)
    }

    /// A packet of so many bytes has gone.
    pub fn charge(&self, bytes: usize, now: Instant) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let rate = state.rate;
        for (paid, cost) in [
            (&mut state.bytes, cost(bytes as u64, rate.bytes)),
            (&mut state.packets, cost(1, rate.packets)),
        ] {
            *paid = (*paid).max(now).checked_add(cost).unwrap_or(*paid);
        }
    }
}

/// Both directions of a vif.
#[derive(Debug)]
pub struct Limits {
    /// From the guest.
    pub tx: Limiter,
    /// To the guest.
    pub rx: Limiter,
}

impl Limits {
    /// The same rate each way.
    pub fn new(rate: Rate, now: Instant) -> Limits {
        Limits { tx: Limiter::new(rate, now), rx: Limiter::new(rate, now) }
    }
    /// Another rate from `now` on.
    pub fn set(&self, rate: Rate, now: Instant) {
        self.tx.set(rate, now);
        self.rx.set(rate, now);
    }
}

/// The value of a vif's `rate` key, as xl writes it: `BYTES,MICROSECONDS`.
pub fn parse(text: &str) -> Option<u64> {
    let (bytes, interval) = text.split_once(',')?;
    let (bytes, interval): (u64, u64) = (bytes.trim().parse().ok()?, interval.trim().parse().ok()?);
    let rate = u128::from(bytes) * 1_000_000 / u128::from(interval.max(1));
    // xl writes the largest number for no limit.
    (bytes != u64::MAX && bytes != u64::from(u32::MAX))
        .then(|| u64::try_from(rate).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What passes in ten seconds where `queues` always have packets of `len` bytes.
    fn passed(limiter: &Limiter, start: Instant, queues: usize, len: usize) -> (u64, u64) {
        let (mut bytes, mut packets) = (0, 0);
        let mut now = start;
        while now < start + Duration::from_secs(10) {
            for _ in 0..queues {
                while limiter.wait(now).is_none() {
                    limiter.charge(len, now);
                    (bytes, packets) = (bytes + len as u64, packets + 1);
                }
            }
            now += limiter.wait(now).unwrap_or(Duration::from_micros(50));
        }
        (bytes, packets)
    }

    fn near(wanted: u64, got: u64) {
        assert!(got.abs_diff(wanted) * 20 <= wanted, "wanted {wanted}, got {got}");
    }

    #[test]
    fn bytes_and_packets_are_within_5_percent_for_any_number_of_queues() {
        let start = Instant::now();
        for queues in [1, 4] {
            for len in [60, 1514, 65535] {
                let limiter = Limiter::new(Rate { bytes: 2_500_000, packets: 0 }, start);
                near(25_000_000, passed(&limiter, start, queues, len).0);
            }
            let limiter = Limiter::new(Rate { bytes: 0, packets: 1000 }, start);
            near(10_000, passed(&limiter, start, queues, 60).1);
            // The tighter of both counts.
            let both = Limiter::new(Rate { bytes: 1_000_000, packets: 1000 }, start);
            near(10_000_000, passed(&both, start, queues, 1514).0);
        }
    }

    #[test]
    fn a_rate_is_changed_live_and_taken_away() {
        let start = Instant::now();
        let limiter = Limiter::new(Rate { bytes: 1000, packets: 0 }, start);
        limiter.charge(60_000, start);
        assert!(limiter.wait(start).is_some_and(|wait| wait > Duration::from_secs(59)));
        limiter.set(Rate { bytes: 5_000_000, packets: 0 }, start);
        near(50_000_000, passed(&limiter, start, 2, 1514).0);
        limiter.set(Rate::default(), start);
        assert_eq!(limiter.wait(start), None);
        assert!(!limiter.is_limited());
    }

    #[test]
    fn a_pause_saves_no_more_than_the_burst() {
        let start = Instant::now();
        let limiter = Limiter::new(Rate { bytes: 1_000_000, packets: 0 }, start);
        let later = start + Duration::from_secs(100);
        let mut bytes = 0;
        while limiter.wait(later).is_none() {
            limiter.charge(1000, later);
            bytes += 1000;
        }
        assert_eq!(bytes, 21_000);
    }

    #[test]
    fn xls_form() {
        assert_eq!(parse("125000,50000"), Some(2_500_000));
        assert_eq!(parse("1000,0"), Some(1_000_000_000));
        assert_eq!(parse("18446744073709551615,0"), None);
        for bad in ["", "1", "a,b", "-1,5"] {
            assert_eq!(parse(bad), None);
        }
    }
}
