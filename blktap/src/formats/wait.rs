//! How a queue hears of what it waits for: a mailbox that others put keys into.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::queue::SegQueue;
use rustix::event::{EventfdFlags, eventfd};

/// Messages to one queue, of any thread, with a descriptor that is readable while there are any.
#[derive(Debug)]
pub struct Mailbox<T> {
    messages: SegQueue<T>,
    event: OwnedFd,
    /// The event was written and not yet read.
    rung: AtomicBool,
}

impl<T> Mailbox<T> {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox { messages: SegQueue::new(), event, rung: AtomicBool::new(false) })
    }

    /// Leaves a message.
    pub fn post(&self, message: T) {
        self.messages.push(message);
        if !self.rung.swap(true, Ordering::AcqRel) {
            // Cannot fail: the counter is at most 1.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Takes the oldest message. Its owner calls until there is none.
    pub fn take(&self) -> Option<T> {
        if let Some(message) = self.messages.pop() {
            return Some(message);
        }
        if !self.rung.load(Ordering::Acquire) {
            return None;
        }
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.event, &mut count);
        self.rung.store(false, Ordering::Release);
        std::sync::atomic::fence(Ordering::SeqCst);
        // Whoever posted before the flag went down did not ring.
        self.messages.pop()
    }

    /// Whether a message may be there.
    pub fn is_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Somebody who waits for clusters to be given back.
#[derive(Clone, Debug)]
pub struct Waiter {
    mailbox: Arc<Mailbox<u32>>,
    key: u32,
}

impl Waiter {
    /// `key` will be posted to `mailbox`.
    pub fn new(mailbox: Arc<Mailbox<u32>>, key: u32) -> Self {
        Waiter { mailbox, key }
    }
    /// The same mailbox, another key.
    pub fn set_key(&mut self, key: u32) {
        self.key = key;
    }
    /// Tells it to try again.
    pub fn wake(&self) {
        self.mailbox.post(self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_between_threads() {
        let mailbox = Arc::new(Mailbox::new().expect("eventfd"));
        let posts = 20_000;
        let senders: Vec<_> = (0..2)
            .map(|_| {
                let mailbox = Arc::clone(&mailbox);
                std::thread::spawn(move || (0..posts).for_each(|i| mailbox.post(i)))
            })
            .collect();
        let mut got = 0;
        while got < 2 * posts {
            match mailbox.take() {
                Some(_) => got += 1,
                None => {
                    let mut fds =
                        [rustix::event::PollFd::new(&*mailbox, rustix::event::PollFlags::IN)];
                    let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
                    let ready = rustix::event::poll(&mut fds, Some(&limit)).expect("poll");
                    assert!(ready == 1, "a message without a ring");
                }
            }
        }
        senders.into_iter().for_each(|s| s.join().expect("a sender"));
        assert!(mailbox.take().is_none());
    }
}
