//! Disks that change under a running guest: paused, swapped for another, copied while they are
//! written.
//!
//! A [`LiveDisk`] stands before a present [`Disk`]; its queues stand before queues of it. While
//! nothing is going on a request passes straight through: one comparison of a shared number.
//! When the number changes, each queue looks at what is wanted, finishes what it has in flight
//! if that needs another way of working, and reports.
//!
//! * **Paused**: requests are refused ([`Full`](crate::Full)) and the queues hold nothing of the
//!   disk, which may be closed, changed and opened again, or be replaced by another.
//! * **Tracked**: the disk is copied in one pass by a [window](Tracked::advance). What lies below
//!   it was copied: a change there goes to the copy as well, and is answered when both have it.
//!   A change inside it waits until it has moved on. What lies above is still to come.
//!
//! **Why a job ends.** The window passes over each byte of the disk once, whatever the guest
//! writes: a job reads and writes at most the disk's size, and a change waits for at most the
//! copying of the windows that it overlaps (4 MiB each).
mod control;
mod fan;
pub mod jobs;
mod name;
mod pass;
mod queue;
mod second;
mod tracked;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::RwLock;

pub use name::{BadName, Name};
pub use pass::{Pass, PassError, WINDOW};

use crate::blocking;
use crate::disk::{Discarded, Disk, DiskQueue, Geometry, Region};
use control::{Shared, Tracking, Wanted};
pub use second::Discards;
use second::Second;

/// How long the queues may take to finish what they have in flight, unless the caller says.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Why a disk could not be brought into another state. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// Requests in flight did not end in time.
    #[error("requests are in flight that do not end (waited {} s)", .0.as_secs())]
    Busy(Duration),
    /// Something else is going on.
    #[error("the disk is paused, or a job runs on it")]
    Taken,
    /// The disk could not be flushed: nobody knows what of it is durable.
    #[error("cannot flush the disk: {0}")]
    Flush(io::Error),
    /// The other disk is not as this one.
    #[error("{0}")]
    Unfit(String),
    /// Anything else.
    #[error("cannot {what}: {source}")]
    Other {
        /// What was tried.
        what: &'static str,
        /// The answer.
        source: io::Error,
    },
}

/// A disk that can be paused, swapped and copied while queues use it.
pub struct LiveDisk {
    shared: Arc<Shared>,
}

impl LiveDisk {
    /// Before `disk`, which nobody else keeps.
    pub fn new(disk: Arc<dyn Disk>) -> Arc<LiveDisk> {
        Arc::new(LiveDisk { shared: Arc::new(Shared::new(disk)) })
    }

    /// Looks at the present disk; `None` while there is none. It is not to be kept.
    pub fn with<R>(&self, look: impl FnOnce(&dyn Disk) -> R) -> Option<R> {
        // Recursive: a look may open a queue of the disk by another look.
        self.shared.current.read_recursive().as_deref().map(look)
    }

    /// Holds all requests back, and waits until those in flight are done and no queue has
    /// anything of the disk: at most `limit`, after which all goes on as before.
    pub fn pause(self: &Arc<Self>, limit: Duration) -> Result<Paused, LiveError> {
        self.shared.take()?;
        let paused = Paused { live: Arc::clone(self), since: Instant::now() };
        self.shared.reach(Wanted::Paused, limit)?;
        Ok(paused)
    }

    /// Begins to keep track of requests, for a job. Changes below the window go to `second` too,
    /// where there is one.
    pub fn track(
        self: &Arc<Self>,
        second: Option<(Arc<dyn Disk>, Discards)>,
    ) -> Result<Tracked, LiveError> {
        self.shared.take()?;
        let mut tracked = Tracked { live: Arc::clone(self), second: None, at: 0 };
        if let Some((disk, discards)) = second {
            let what = "start a thread for the copy";
            let second = Second::start(&*disk, discards);
            tracked.second = Some(second.map_err(|source| LiveError::Other { what, source })?);
        }
        tracked.go(0..0)?;
        Ok(tracked)
    }
}

impl Disk for LiveDisk {
    fn geometry(&self) -> Geometry {
        *self.shared.geometry.lock()
    }
    /// While a job runs or the disk is paused its size stays.
    fn refresh(&self) -> io::Result<Geometry> {
        if self.shared.is_taken() {
            return Ok(self.geometry());
        }
        if let Some(geometry) = self.with(|disk| disk.refresh()) {
            *self.shared.geometry.lock() = geometry?;
        }
        Ok(self.geometry())
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        Ok(Box::new(queue::LiveQueue::new(Arc::clone(&self.shared), depth)?))
    }
    fn discarded(&self) -> Discarded {
        // Who asks will rely on it, and the next disk may do less.
        Discarded::Unspecified
    }
    fn map(&self, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        self.with(|disk| disk.map(range, out)).unwrap_or_else(|| Err(no_disk()))
    }
    fn bitmaps(&self) -> Vec<String> {
        self.with(|disk| disk.bitmaps()).unwrap_or_default()
    }
    fn bitmap(&self, name: &str, range: Range<u64>, out: &mut Vec<(u64, bool)>) -> io::Result<()> {
        self.with(|disk| disk.bitmap(name, range, out)).unwrap_or_else(|| Err(no_disk()))
    }
}

fn no_disk() -> io::Error {
    io::Error::other("the disk is paused")
}

/// A disk whose requests are held back. They go on when this is dropped, if there is a disk then.
pub struct Paused {
    live: Arc<LiveDisk>,
    since: Instant,
}

impl Paused {
    /// How long it has been paused.
    pub fn lasted(&self) -> Duration {
        self.since.elapsed()
    }

    /// Flushes and closes the disk; its files are let go. After an error it is still there.
    pub fn close(&self) -> Result<(), LiveError> {
        let mut current = self.live.shared.current.write();
        let Some(disk) = &*current else { return Ok(()) };
        if !disk.geometry().read_only {
            let mut queue = disk.queue(1).map_err(LiveError::Flush)?;
            blocking::flush(&mut *queue).map_err(LiveError::Flush)?;
            drop(queue);
            disk.close().map_err(LiveError::Flush)?;
        }
        *current = None;
        Ok(())
    }

    /// Puts `disk` there, which has the size and the blocks of the one before, or is larger.
    pub fn install(&self, disk: Arc<dyn Disk>) -> Result<(), LiveError> {
        let (old, new) = (self.live.geometry(), disk.geometry());
        if new.size < old.size {
            let (old, new) = (old.size, new.size);
            return Err(LiveError::Unfit(format!("its disk has {new} bytes, the guest's {old}")));
        }
        if new.logical_block > old.logical_block {
            let (old, new) = (old.logical_block, new.logical_block);
            return Err(LiveError::Unfit(format!(
                "its blocks have {new} bytes, the guest's {old}"
            )));
        }
        if new.read_only != old.read_only {
            return Err(LiveError::Unfit("one of both is read-only".into()));
        }
        // What the guest was told of stays.
        *self.live.shared.geometry.lock() = Geometry { logical_block: old.logical_block, ..new };
        *self.live.shared.current.write() = Some(disk);
        Ok(())
    }

    /// Lets requests go on.
    pub fn resume(self) {
        drop(self);
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if self.live.shared.current.read().is_some() {
            self.live.shared.want(Wanted::Pass);
        } else {
            tracing::error!("a paused disk has nothing to go on with: its requests wait");
        }
        self.live.shared.give_back();
    }
}

/// A disk that is copied; requests pass as before once this is dropped.
pub struct Tracked {
    live: Arc<LiveDisk>,
    second: Option<(Arc<Second>, JoinHandle<()>)>,
    at: u64,
}

impl Tracked {
    fn go(&mut self, window: Range<u64>) -> Result<(), LiveError> {
        let (at, second) = (window.end, self.second.as_ref().map(|(s, _)| Arc::clone(s)));
        self.live.shared.reach(Wanted::Tracked(Tracking { window, second }), PATIENCE)?;
        self.at = at;
        Ok(())
    }

    /// Moves the window on by `len` bytes: what lies before is copied. When this returns, no
    /// change inside the window is in flight, and none begins until it moves on.
    pub fn advance(&mut self, len: u64) -> Result<Range<u64>, LiveError> {
        let size = self.live.geometry().size;
        let window = self.at..self.at.saturating_add(len).min(size);
        self.go(window.clone())?;
        Ok(window)
    }

    /// The first error of the second disk.
    pub fn failure(&self) -> Option<String> {
        self.second.as_ref().and_then(|(second, _)| second.failure())
    }

    /// The disk that is tracked.
    pub fn live(&self) -> &Arc<LiveDisk> {
        &self.live
    }

    /// After the whole disk was passed: goes over to a pause without letting a request pass between: when this returns, the second
    /// disk has all that the guest was told is written. Back to passing on an error.
    pub fn pause(mut self, limit: Duration) -> Result<Paused, LiveError> {
        let live = Arc::clone(&self.live);
        let since = Instant::now();
        if let Some(why) = self.failure() {
            return Err(LiveError::Unfit(why));
        }
        if self.at < live.geometry().size {
            // What the window holds would not end.
            return Err(LiveError::Unfit("the copy is not complete".into()));
        }
        live.shared.reach(Wanted::Paused, limit)?;
        // No queue has it any more, so its thread ends and lets the disk go.
        let failure = self.failure();
        if let Some((second, thread)) = self.second.take() {
            second.end();
            drop(second);
            if thread.join().is_err() {
                return Err(LiveError::Unfit("the thread of the other disk panicked".into()));
            }
        }
        if let Some(why) = failure {
            return Err(LiveError::Unfit(why));
        }
        // Its end would let requests pass.
        live.shared.hand_on();
        drop(self);
        Ok(Paused { live, since })
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if self.live.shared.give_back() {
            self.live.shared.want(Wanted::Pass);
        }
        if let Some((second, _)) = &self.second {
            second.end();
        }
    }
}

/// The present disk of a [`LiveDisk`].
type Current = RwLock<Option<Arc<dyn Disk>>>;
