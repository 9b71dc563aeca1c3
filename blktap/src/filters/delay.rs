//! Delay on purpose, to test guests and programs with: each request waits before it goes to the
//! disk, for a fixed time or one that a seed draws.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::around::{Around, Wrapped};
use super::fault::scattered;
use super::forward_to_below;
use super::held::Held;
use crate::disk::{Disk, DiskQueue, Full, Request};

/// Longest delay, in microseconds.
const LONGEST_US: u64 = 600_000_000;

/// How long requests wait: evenly spread between two times, `US` or `US-US` or `US-US:seed=N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delay {
    /// At least, in microseconds.
    pub least_us: u64,
    /// At most.
    pub most_us: u64,
    /// What draws.
    pub seed: u64,
}

/// Not a delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a delay is US or LEAST-MOST[:seed=N], in microseconds, at most ten minutes")]
pub struct NotADelay;

impl Default for Delay {
    fn default() -> Delay {
        Delay { least_us: 0, most_us: 0, seed: 1 }
    }
}

impl FromStr for Delay {
    type Err = NotADelay;

    fn from_str(text: &str) -> Result<Delay, NotADelay> {
        let (times, seed) = text.split_once(":seed=").unwrap_or((text, "1"));
        let (least, most) = times.split_once('-').unwrap_or((times, times));
        let number = |text: &str| text.parse::<u64>().map_err(|_| NotADelay);
        let delay = Delay { least_us: number(least)?, most_us: number(most)?, seed: number(seed)? };
        match delay.least_us <= delay.most_us && delay.most_us <= LONGEST_US {
            true => Ok(delay),
            false => Err(NotADelay),
        }
    }
}

impl Delay {
    fn draw(&self, count: u64) -> Duration {
        let span = self.most_us - self.least_us + 1;
        Duration::from_micros(self.least_us + scattered(self.seed, count) % span)
    }
}

/// A disk that takes its time.
pub struct DelayDisk {
    below: Arc<dyn Disk>,
    delay: Delay,
    count: Arc<AtomicU64>,
}

impl DelayDisk {
    /// `below`, whose requests wait.
    pub fn new(below: Arc<dyn Disk>, delay: Delay) -> Arc<DelayDisk> {
        Arc::new(DelayDisk { below, delay, count: Arc::default() })
    }
}

impl Disk for DelayDisk {
    forward_to_below!();

    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let queue = Delayed {
            below: self.below.queue(depth)?,
            delay: self.delay,
            count: Arc::clone(&self.count),
            waiting: BinaryHeap::new(),
            stuck: false,
            hurries: false,
        };
        Ok(Box::new(Wrapped::new(queue, depth)))
    }
}

/// A request and when it goes. Of two at the same time the first goes first.
struct Due {
    at: Instant,
    number: u64,
    held: Held,
}

impl Due {
    fn key(&self) -> Reverse<(Instant, u64)> {
        Reverse((self.at, self.number))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        self.key() == other.key()
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

struct Delayed {
    below: Box<dyn DiskQueue>,
    delay: Delay,
    count: Arc<AtomicU64>,
    /// The next one on top.
    waiting: BinaryHeap<Due>,
    stuck: bool,
    hurries: bool,
}

impl Around for Delayed {
    fn below(&self) -> &dyn DiskQueue {
        &*self.below
    }
    fn below_mut(&mut self) -> &mut dyn DiskQueue {
        &mut *self.below
    }
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let at = Instant::now() + self.delay.draw(number);
        self.waiting.push(Due { at, number, held: Held::of(r) });
        Ok(())
    }
    fn held(&self) -> u32 {
        self.waiting.len() as u32
    }
    fn flow(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        while let Some(next) = self.waiting.peek() {
            if next.at > now && !self.hurries {
                break;
            }
            // A disk that is paused has no room until it goes on.
            self.stuck = self.below.submit(&next.held.request()).is_err();
            if self.stuck {
                break;
            }
            self.waiting.pop();
        }
        Ok(())
    }
    fn patience(&self) -> Option<Duration> {
        // Who has no room below is woken from there.
        if self.stuck {
            return None;
        }
        Some(self.waiting.peek()?.at.saturating_duration_since(Instant::now()))
    }
    fn hurry(&mut self) {
        self.hurries = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MemDisk, blocking};

    #[test]
    fn requests_wait_as_long_as_told() {
        let disk = DelayDisk::new(MemDisk::new(4096), "20000".parse().expect("a delay"));
        let mut queue = disk.queue(4).expect("a queue");
        let begin = Instant::now();
        blocking::write_at(&mut *queue, 0, &[1; 512]).expect("write");
        blocking::flush(&mut *queue).expect("flush");
        let took = begin.elapsed();
        assert!((40..200).contains(&took.as_millis()), "{took:?}");
        // Whoever leaves does not wait.
        let flush = Request { op: crate::Op::Flush, offset: 0, len: 0, bufs: &[], token: 0 };
        let disk = DelayDisk::new(MemDisk::new(4096), "60000000".parse().expect("a delay"));
        let mut queue = disk.queue(4).expect("a queue");
        queue.submit(&flush).expect("room");
        let begin = Instant::now();
        drop(queue);
        assert!(begin.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_seed_draws_evenly() {
        let delay: Delay = "100-300:seed=5".parse().expect("a delay");
        let all: Vec<u128> = (0..1000).map(|n| delay.draw(n).as_micros()).collect();
        assert!(all.iter().all(|us| (100..=300).contains(us)));
        assert!((190..210).contains(&(all.iter().sum::<u128>() / 1000)));
        assert_eq!(all, (0..1000).map(|n| delay.draw(n).as_micros()).collect::<Vec<_>>());
        for bad in ["", "5-", "9-5", "-1", "1:seed=x", "600000001"] {
            assert_eq!(bad.parse::<Delay>(), Err(NotADelay), "{bad}");
        }
    }
}
