//! Looking again for a moment before sleeping: with one request at a time, going to sleep and
//! waking cost more than the request.

use std::time::{Duration, Instant};

/// How long at most.
const MOST: Duration = Duration::from_micros(50);
/// Looks between two readings of the clock.
const LOOKS: u32 = 4;
/// So many polls in a row that found nothing end polling for a while.
const VAIN: u32 = 4;
/// For so many sleeps at first; twice as many each time, up to the last. A client that needs the
/// very processor that polls, or that comes seldom, costs next to nothing.
const PAUSES: (u32, u32) = (64, 4096);

/// See the module.
#[derive(Debug)]
pub struct Poller {
    vain: u32,
    pause: u32,
    next_pause: u32,
}

impl Poller {
    pub fn new() -> Poller {
        Poller { vain: 0, pause: 0, next_pause: PAUSES.0 }
    }

    /// Looks until there is something, it is time to sleep, or looking fails.
    pub fn poll<E>(&mut self, mut look: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if self.pause > 0 {
            self.pause -= 1;
            return Ok(false);
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if look()? {
                    (self.vain, self.next_pause) = (0, PAUSES.0);
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= MOST {
                break;
            }
        }
        self.vain += 1;
        if self.vain >= VAIN {
            (self.vain, self.pause) = (0, self.next_pause);
            self.next_pause = (self.next_pause * 2).min(PAUSES.1);
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_pays_is_left_and_tried_again() {
        let mut poller = Poller::new();
        let mut polls = Vec::new();
        for sleep in 0..500 {
            let mut looked = false;
            let found: Result<bool, ()> = poller.poll(|| {
                looked = true;
                Ok(false)
            });
            assert_eq!(found, Ok(false));
            if looked {
                polls.push(sleep);
            }
        }
        assert_eq!(polls[..5], [0, 1, 2, 3, 68]);
        assert!(polls.len() < 20, "{polls:?}");
        while !poller.poll(|| Ok::<_, ()>(true)).unwrap() {}
        assert_eq!(poller.poll(|| Ok::<_, ()>(true)), Ok(true));
    }
}
