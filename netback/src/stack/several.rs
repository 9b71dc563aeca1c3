//! Several queues of one device as one.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll;

use super::flow;
use crate::endpoint::{EndpointQueue, Waits};
use crate::frame::{Frame, Pool};

/// See the module. A packet's addresses and ports choose its queue, so that no flow overtakes
/// itself.
pub struct Several<Q> {
    queues: Vec<Q>,
    /// Frames that their queue has not taken.
    waiting: Vec<VecDeque<Frame>>,
    /// Readable when one of them is.
    any: OwnedFd,
    /// The queue that is asked first.
    first: usize,
}

impl<Q: EndpointQueue> Several<Q> {
    /// Of queues whose descriptors stay the same, and are never waited for to be writable.
    pub fn new(queues: Vec<Q>) -> io::Result<Self> {
        let any = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in queues.iter().filter_map(|queue| queue.waits().readable) {
            epoll::add(&any, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        let waiting = queues.iter().map(|_| VecDeque::new()).collect();
        Ok(Several { queues, waiting, any, first: 0 })
    }

    /// The queues.
    pub fn queues(&mut self) -> &mut [Q] {
        &mut self.queues
    }
}

impl<Q: EndpointQueue> EndpointQueue for Several<Q> {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        let count = self.queues.len();
        // While one takes nothing, nothing more is taken: what waits is as much as one call brings.
        if self.waiting.iter().all(VecDeque::is_empty) {
            for frame in frames.drain(..) {
                let number = flow(&frame) as usize % count.max(1);
                if let Some(waiting) = self.waiting.get_mut(number) {
                    waiting.push_back(frame);
                }
            }
        }
        for (queue, waiting) in self.queues.iter_mut().zip(&mut self.waiting) {
            queue.send(waiting, pool)?;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        let (before, count) = (frames.len(), self.queues.len());
        for number in self.first..self.first + count {
            let left = room.saturating_sub(frames.len() - before);
            self.queues[number % count].receive(frames, left, pool)?;
        }
        self.first = (self.first + 1) % count.max(1);
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        let deadline = self.queues.iter().filter_map(|queue| queue.waits().deadline).min();
        Waits { readable: Some(self.any.as_fd()), deadline, ..Waits::default() }
    }

    fn take_dropped(&mut self) -> u64 {
        self.queues.iter_mut().map(EndpointQueue::take_dropped).sum()
    }
}
