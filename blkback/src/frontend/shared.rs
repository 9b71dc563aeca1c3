//! What a device, its queues and its watcher share.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use super::handshake::{DiskInfo, News};
use super::pages::Region;
use crate::proto::SECTOR;

/// How far a connected device has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It works.
    Connected,
    /// The backend wants to close: what is in flight is answered, nothing new is taken.
    Closing,
    /// Nothing will be answered.
    Broken,
}

/// See the module.
pub(super) struct Shared {
    pub info: DiskInfo,
    pub regions: Regions,
    sectors: AtomicU64,
    stage: AtomicU8,
    reason: Mutex<Option<String>>,
    wake: OwnedFd,
}

impl Shared {
    pub(super) fn new(info: DiskInfo) -> std::io::Result<Shared> {
        Ok(Shared {
            sectors: AtomicU64::new(info.disk.size / SECTOR),
            info,
            regions: Regions::default(),
            stage: AtomicU8::new(0),
            reason: Mutex::new(None),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }
    pub(super) fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Connected,
            1 => Stage::Closing,
            _ => Stage::Broken,
        }
    }
    /// Readable for good once the stage has changed.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
    /// Why the device is disabled.
    pub(super) fn reason(&self) -> Option<String> {
        self.reason.lock().clone()
    }
    /// Disables the device; the first reason stays.
    pub(super) fn fail(&self, reason: String) {
        let mut first = self.reason.lock();
        if first.is_none() {
            tracing::error!("{reason}; the disk is disabled");
            *first = Some(reason);
        }
        drop(first);
        self.raise(2);
    }
    fn raise(&self, stage: u8) {
        if self.stage.fetch_max(stage, Ordering::AcqRel) < stage
            && stage == 2
            && let Err(e) = rustix::io::write(&self.wake, &1u64.to_ne_bytes())
        {
            tracing::debug!("waking the queues: {e}");
        }
    }
    /// What the watcher has seen.
    pub(super) fn told(&self, news: News) {
        match news {
            News::Sectors(sectors) if sectors <= u64::MAX / 512 => {
                self.sectors.store(sectors, Ordering::Relaxed);
            }
            News::Sectors(_) => {}
            News::Closing => self.raise(1),
            News::Closed => self.fail("the backend has closed the device".into()),
            News::NoStore => self.fail("xenstored is gone".into()),
        }
    }
}

/// Memory that callers were given, granted for as long as the device lives.
#[derive(Default)]
pub(super) struct Regions {
    all: Mutex<Vec<Region>>,
    generation: AtomicU64,
}

impl Regions {
    pub(super) fn add(&self, region: Region) {
        let mut all = self.all.lock();
        all.push(region);
        self.generation.store(all.len() as u64, Ordering::Release);
    }
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
    pub(super) fn all(&self) -> (Vec<Region>, u64) {
        let all = self.all.lock();
        (all.clone(), all.len() as u64)
    }
}
