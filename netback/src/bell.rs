//! How a vif's threads are woken and asked to end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, Timespec, eventfd, poll};
use rustix::io::Errno;

/// One thread's.
pub(crate) struct Bell {
    stop: AtomicBool,
    wake: OwnedFd,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Bell { stop: AtomicBool::new(false), wake })
    }
    /// Wakes the thread.
    pub(crate) fn ring(&self) {
        // It fails where the count is full, and then the thread wakes anyway.
        if let Err(e) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            tracing::debug!("waking a thread: {e}");
        }
    }
    /// Asks the thread to end.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring();
    }
    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
    /// Takes the wake-up, so that the next sleep lasts.
    pub(crate) fn woken(&self) {
        if let Err(e) = rustix::io::read(&self.wake, &mut [0; 8]) {
            tracing::debug!("a thread's wake-up: {e}");
        }
    }
    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Waits for one of the descriptors or the end of the time.
pub(crate) fn wait(fds: &mut [PollFd<'_>], timeout: Option<std::time::Duration>) -> io::Result<()> {
    let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
