//! What the queues of a live disk share, and how they are told what is wanted.
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::queue::SegQueue;
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};

use super::second::Second;
use super::{Current, LiveError};
use crate::disk::{Disk, Geometry};

/// How the queues are to work.
#[derive(Clone)]
pub(super) enum Wanted {
    Pass,
    Paused,
    Tracked(Tracking),
}

/// What a job wants of the queues.
#[derive(Clone)]
pub(super) struct Tracking {
    /// Changes here wait; what lies below was copied.
    pub(super) window: Range<u64>,
    /// Where changes below go as well.
    pub(super) second: Option<Arc<Second>>,
}

/// A way of working.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Pass,
    Paused,
    Tracked,
}

impl Wanted {
    pub(super) fn mode(&self) -> Mode {
        match self {
            Wanted::Pass => Mode::Pass,
            Wanted::Paused => Mode::Paused,
            Wanted::Tracked(_) => Mode::Tracked,
        }
    }
}

/// Where a queue is reached.
pub(super) struct Station {
    wake: OwnedFd,
    /// The generation that the queue has carried out.
    settled: AtomicU64,
    /// Requests' parts that the second disk has done, by their numbers in the queue.
    pub(super) answers: SegQueue<u32>,
}

impl Station {
    pub(super) fn wake(&self) {
        // It can only fail when its count is full, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
    /// Readable when there is something to look at.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
    /// Call it before looking.
    pub(super) fn calm(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }
}

struct Control {
    wanted: Wanted,
    stations: Vec<Arc<Station>>,
    owner: Owner,
}

/// Who decides what is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Nobody,
    /// A pause or a job.
    Somebody,
    /// A job that has given the disk to a pause.
    Successor,
}

/// See the module.
pub(super) struct Shared {
    generation: AtomicU64,
    control: Mutex<Control>,
    changed: Condvar,
    pub(super) current: Current,
    /// Of the present disk, or of the last one.
    pub(super) geometry: Mutex<Geometry>,
}

impl Shared {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Shared {
        let control = Control { wanted: Wanted::Pass, stations: Vec::new(), owner: Owner::Nobody };
        Shared {
            generation: AtomicU64::new(1),
            control: Mutex::new(control),
            changed: Condvar::new(),
            geometry: Mutex::new(disk.geometry()),
            current: Current::new(Some(disk)),
        }
    }

    /// Changes with each change of what is wanted.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// A new queue's station, with what is wanted now.
    pub(super) fn enter(&self) -> io::Result<(Arc<Station>, u64, Wanted)> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut control = self.control.lock();
        // It has nothing in flight.
        let generation = self.generation();
        let (settled, answers) = (AtomicU64::new(generation), SegQueue::new());
        let station = Arc::new(Station { wake, settled, answers });
        control.stations.push(Arc::clone(&station));
        Ok((station, generation, control.wanted.clone()))
    }

    /// A queue has ended.
    pub(super) fn leave(&self, station: &Arc<Station>) {
        self.control.lock().stations.retain(|s| !Arc::ptr_eq(s, station));
        self.changed.notify_all();
    }

    /// What is wanted, with its number.
    pub(super) fn look(&self) -> (u64, Wanted) {
        let control = self.control.lock();
        (self.generation(), control.wanted.clone())
    }

    /// A queue has carried out what was wanted.
    pub(super) fn report(&self, station: &Station, generation: u64) {
        let _control = self.control.lock();
        station.settled.store(generation, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Tells all queues; what was wanted before.
    pub(super) fn want(&self, wanted: Wanted) -> Wanted {
        let mut control = self.control.lock();
        let before = std::mem::replace(&mut control.wanted, wanted);
        self.generation.fetch_add(1, Ordering::Relaxed);
        control.stations.iter().for_each(|station| station.wake());
        before
    }

    /// Tells all queues and waits until all have carried it out; after `limit` what was wanted
    /// before is wanted again.
    pub(super) fn reach(&self, wanted: Wanted, limit: Duration) -> Result<(), LiveError> {
        let before = self.want(wanted);
        let end = Instant::now() + limit;
        let mut control = self.control.lock();
        let generation = self.generation();
        let behind = |s: &Arc<Station>| s.settled.load(Ordering::Relaxed) < generation;
        while control.stations.iter().any(behind) {
            if self.changed.wait_until(&mut control, end).timed_out() {
                drop(control);
                self.want(before);
                return Err(LiveError::Busy(limit));
            }
        }
        Ok(())
    }

    /// Makes the caller the one who decides what is wanted.
    pub(super) fn take(&self) -> Result<(), LiveError> {
        let mut control = self.control.lock();
        if control.owner != Owner::Nobody {
            return Err(LiveError::Taken);
        }
        control.owner = Owner::Somebody;
        Ok(())
    }

    pub(super) fn is_taken(&self) -> bool {
        self.control.lock().owner != Owner::Nobody
    }

    /// The next to give back does not decide any more.
    pub(super) fn hand_on(&self) {
        self.control.lock().owner = Owner::Successor;
    }

    /// The end of deciding; whether nobody decides now.
    pub(super) fn give_back(&self) -> bool {
        let mut control = self.control.lock();
        let handed_on = control.owner == Owner::Successor;
        control.owner = if handed_on { Owner::Somebody } else { Owner::Nobody };
        !handed_on
    }
}
