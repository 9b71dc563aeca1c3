//! How a filter wakes its queues, whose threads sleep in a `wait` of their own.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

/// A queue as the others see it.
pub(super) struct Flag {
    /// Something of it is in flight below, or is about to be.
    pub(super) busy: AtomicBool,
    pub(super) bell: Arc<OwnedFd>,
}

/// The queues' bells.
#[derive(Default)]
pub(super) struct Bells(Mutex<Vec<Weak<Flag>>>);

impl Flag {
    /// Takes a ring, so that the next sleep lasts.
    pub(super) fn calm(&self) {
        if let Err(e) = rustix::io::read(&self.bell, &mut [0; 8]) {
            tracing::debug!("a queue's bell: {e}");
        }
    }
}

impl Bells {
    /// Wakes the queues that hold something back.
    pub(super) fn ring(&self) {
        for flag in self.0.lock().iter().filter_map(Weak::upgrade) {
            // It fails where the count is full, and then the queue wakes anyway.
            if let Err(e) = rustix::io::write(&flag.bell, &1u64.to_ne_bytes()) {
                tracing::debug!("waking a queue: {e}");
            }
        }
    }

    pub(super) fn join(&self) -> io::Result<Arc<Flag>> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let flag = Arc::new(Flag { busy: AtomicBool::new(false), bell: Arc::new(bell) });
        let mut flags = self.0.lock();
        flags.retain(|flag| flag.strong_count() > 0);
        flags.push(Arc::downgrade(&flag));
        Ok(flag)
    }

    pub(super) fn are_busy(&self) -> bool {
        let busy = |flag: Arc<Flag>| flag.busy.load(Ordering::SeqCst);
        self.0.lock().iter().filter_map(Weak::upgrade).any(busy)
    }
}
