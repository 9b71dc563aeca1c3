//! A vif whose packets come back to it.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use super::{Abilities, Accepts, Endpoint, EndpointQueue, Waits};
use crate::frame::{Frame, Pool};

/// Frames that wait in a queue to be taken back; what comes beyond is dropped.
const MOST_WAITING: usize = 256;

/// Each queue's frames come back on the same queue, as they are: what is left to do with them too.
pub struct Loopback {
    mtu: u16,
}

impl Loopback {
    /// With the length of its packets, in bytes without the Ethernet header.
    pub fn new(mtu: u16) -> Loopback {
        Loopback { mtu }
    }
}

impl Endpoint for Loopback {
    fn abilities(&self) -> Abilities {
        Abilities { checksum: true, tso4: true, tso6: true, mtu: self.mtu }
    }
    fn connect(&self, _: usize, _: Accepts) -> io::Result<()> {
        Ok(())
    }
    fn queue(&self, _: usize) -> io::Result<Box<dyn EndpointQueue>> {
        let waiting = VecDeque::with_capacity(MOST_WAITING);
        Ok(Box::new(Back { waiting, last: Instant::now(), dropped: 0 }))
    }
    fn disconnect(&self) {}
}

struct Back {
    waiting: VecDeque<Frame>,
    last: Instant,
    dropped: u64,
}

impl EndpointQueue for Back {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        for frame in frames.drain(..) {
            if self.waiting.len() < MOST_WAITING {
                self.waiting.push_back(frame);
            } else {
                self.dropped += 1;
                pool.give(frame);
            }
        }
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        _: &mut Pool,
    ) -> io::Result<()> {
        let ready = self.waiting.len().min(room);
        frames.extend(self.waiting.drain(..ready));
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        // `last` has passed: there is something to be taken.
        let deadline = (!self.waiting.is_empty()).then_some(self.last);
        Waits { deadline, ..Waits::default() }
    }

    fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Checksum;

    #[test]
    fn frames_come_back_as_they_went_and_no_more_than_there_is_room_for() {
        let (mut pool, mut frames) = (Pool::private(400), VecDeque::new());
        let mut queue = Loopback::new(1500).queue(0).expect("a queue");
        for number in 0..400usize {
            let mut frame = pool.take().expect("a frame");
            frame.set_len(60 + number);
            frame.fill(number as u8);
            frame.offload.checksum = Checksum::Valid;
            frames.push_back(frame);
        }
        queue.send(&mut frames, &mut pool).expect("sent");
        assert_eq!(queue.take_dropped(), 400 - MOST_WAITING as u64);
        assert!(queue.waits().deadline.is_some_and(|at| at <= Instant::now()));
        let mut got = VecDeque::new();
        queue.receive(&mut got, 100, &mut pool).expect("received");
        assert_eq!(got.len(), 100);
        queue.receive(&mut got, 1000, &mut pool).expect("received");
        assert_eq!((got.len(), pool.free()), (MOST_WAITING, 400 - MOST_WAITING));
        assert!(queue.waits().deadline.is_none());
        for (number, frame) in got.iter().enumerate() {
            assert!(frame.len() == 60 + number && frame.iter().all(|b| *b == number as u8));
            assert_eq!(frame.offload.checksum, Checksum::Valid);
        }
    }
}
