//! What a device, its queues and its watcher share.

use std::sync::atomic::{AtomicU64, Ordering};

use hypervisor::store::Client;
use hypervisor::xenbus::State;
use hypervisor::xenbus::front::{Health, Node};
use parking_lot::Mutex;

use super::handshake::{self, DiskInfo};
use super::pages::Region;
use crate::proto::SECTOR;

/// See the module.
pub(super) struct Shared {
    pub info: DiskInfo,
    pub regions: Regions,
    pub health: Health,
    sectors: AtomicU64,
}

impl Shared {
    pub(super) fn new(info: DiskInfo) -> std::io::Result<Shared> {
        Ok(Shared {
            sectors: AtomicU64::new(info.disk.size / SECTOR),
            info,
            regions: Regions::default(),
            health: Health::new()?,
        })
    }
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }
    /// What the watcher has seen.
    pub(super) fn told(&self, store: &Client, node: &Node, state: Option<State>) {
        if state == Some(State::Connected)
            && let Ok(disk) = handshake::disk(store, node)
            && disk.size / SECTOR <= u64::MAX / 512
        {
            self.sectors.store(disk.size / SECTOR, Ordering::Relaxed);
        }
        self.health.told(state);
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
