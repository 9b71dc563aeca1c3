//! A queue's thread, and how its device's control reaches it.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::{Fault, Faults};

/// How a thread is woken and asked to end.
pub struct Bell {
    stop: AtomicBool,
    wake: OwnedFd,
}

impl Bell {
    /// Of a thread that is to begin.
    pub fn new() -> io::Result<Bell> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Bell { stop: AtomicBool::new(false), wake })
    }
    /// Wakes the thread.
    pub fn ring(&self) {
        // It fails where the count is full, and then the thread wakes anyway.
        if let Err(e) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            tracing::debug!("waking a queue: {e}");
        }
    }
    /// Asks the thread to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring();
    }
    /// Whether the thread is to end.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
    /// Takes the wake-up, so that the next sleep lasts.
    pub fn woken(&self) {
        if let Err(e) = rustix::io::read(&self.wake, &mut [0; 8]) {
            tracing::debug!("a queue's wake-up: {e}");
        }
    }
    /// Readable once it was rung.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Waits for one of the descriptors or the end of the time.
pub fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// What a queue's thread and the device's control share; `C` are the knobs.
pub struct Shared<C> {
    bell: Bell,
    /// They can change while the queue runs; `changes` counts the changes.
    knobs: Mutex<C>,
    changes: AtomicU64,
}

impl<C: Clone> Shared<C> {
    /// For a thread that begins with these knobs.
    pub fn new(knobs: &C) -> io::Result<Arc<Shared<C>>> {
        let (knobs, changes) = (Mutex::new(knobs.clone()), AtomicU64::new(0));
        Ok(Arc::new(Shared { bell: Bell::new()?, knobs, changes }))
    }
    /// The knobs, if they have changed since change number `known`.
    pub fn changed(&self, known: &mut u64) -> Option<C> {
        let changes = self.changes.load(Ordering::Acquire);
        if changes == *known {
            return None;
        }
        *known = changes;
        Some(self.knobs.lock().clone())
    }
    /// Gives the queue new values of its live knobs.
    pub fn set(&self, knobs: &C) {
        *self.knobs.lock() = knobs.clone();
        self.changes.fetch_add(1, Ordering::Release);
        self.ring();
    }
}

impl<C> Deref for Shared<C> {
    type Target = Bell;
    fn deref(&self) -> &Bell {
        &self.bell
    }
}

/// A running thread; stopped, and waited for, when dropped.
pub struct Thread<C> {
    shared: Arc<Shared<C>>,
    handle: Option<std::thread::JoinHandle<()>>,
    tid: Arc<AtomicU64>,
}

impl<C: Send + 'static> Thread<C> {
    /// Starts it. Why `run` could not go on is reported to `faults`.
    pub fn start(
        name: String,
        shared: Arc<Shared<C>>,
        faults: Faults,
        run: impl FnOnce() -> Result<(), Fault> + Send + 'static,
    ) -> io::Result<Thread<C>> {
        let tid = Arc::new(AtomicU64::new(0));
        let seen = tid.clone();
        let handle = std::thread::Builder::new().name(name).spawn(move || {
            seen.store(rustix::thread::gettid().as_raw_nonzero().get() as u64, Ordering::Relaxed);
            // A panic is a bug of ours; without a report the guest would wait for ever.
            let ended = catch_unwind(AssertUnwindSafe(run));
            let result = ended.unwrap_or_else(|_| Err(Fault("a queue's thread panicked".into())));
            if let Err(fault) = result {
                faults.report(fault);
            }
        })?;
        Ok(Thread { shared, handle: Some(handle), tid })
    }

    /// Nanoseconds of processor time that it has used: what this host spends on the guest.
    pub fn cpu_ns(&self) -> Option<u64> {
        let path = format!("/proc/self/task/{}/schedstat", self.tid.load(Ordering::Relaxed));
        std::fs::read_to_string(path).ok()?.split(' ').next()?.parse().ok()
    }
}

impl<C> Deref for Thread<C> {
    type Target = Shared<C>;
    fn deref(&self) -> &Shared<C> {
        &self.shared
    }
}

impl<C> Drop for Thread<C> {
    fn drop(&mut self) {
        self.stop();
        if let Some(handle) = self.handle.take()
            && handle.join().is_err()
        {
            tracing::error!("a queue's thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    /// Sleeps until it is rung for, each time; ends when it is told to, or for a knob of 9.
    fn serve(shared: &Shared<u32>, seen: &Mutex<Vec<u32>>) -> Result<(), Fault> {
        let mut known = 0;
        while !shared.stopping() {
            poll(&mut [PollFd::from_borrowed_fd(shared.wake(), PollFlags::IN)], None)?;
            shared.woken();
            match shared.changed(&mut known) {
                Some(7) => panic!("on purpose"),
                Some(9) => return Err(Fault("nine".into())),
                Some(knob) => seen.lock().push(knob),
                None => {}
            }
        }
        Ok(())
    }

    fn start() -> (Thread<u32>, Arc<Mutex<Vec<u32>>>, crossbeam::channel::Receiver<Fault>) {
        let (faults, reported) = Faults::channel();
        let (shared, seen) = (Shared::new(&1).unwrap(), Arc::new(Mutex::new(Vec::new())));
        let (mine, list) = (shared.clone(), seen.clone());
        let run = move || serve(&mine, &list);
        (Thread::start("test".into(), shared, faults, run).unwrap(), seen, reported)
    }

    #[test]
    fn a_thread_is_told_of_knobs_and_ends_when_it_is_dropped() {
        let (thread, seen, reported) = start();
        assert!(seen.lock().is_empty(), "those that it began with are no change");
        thread.set(&2);
        while seen.lock().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(thread.cpu_ns().is_some());
        drop(thread);
        assert_eq!(*seen.lock(), [2]);
        assert!(reported.recv().is_err(), "an end that was asked for is no fault");
    }

    #[test]
    fn why_a_thread_ended_is_reported_also_where_it_panicked() {
        for (knob, why) in [(9, "nine"), (7, "a queue's thread panicked")] {
            let (thread, _, reported) = start();
            thread.set(&knob);
            assert_eq!(reported.recv(), Ok(Fault(why.into())));
        }
    }
}
