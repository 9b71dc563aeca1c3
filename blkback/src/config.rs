//! The knobs of a block backend: one table, from which parsing, `--help` and docs/tuning.md come.

mod knobs;

use std::path::{Path, PathBuf};
use std::time::Duration;

use blktap::filters::changed::LogOptions;
use blktap::filters::delay::Delay;
use blktap::filters::fault::Faults;
use blktap::filters::priority::Priority;
use blktap::filters::stall::Policies;
use blktap::filters::throttle::Limits;
use blktap::formats::qcow2::L2Cache;
use blktap::image::Commits;
use blktap::storage::Cache;
use hypervisor::xenbus::knobs::{Knob, Knobs};
use hypervisor::xenbus::placement::Placement;

/// How a payload gets between the guest's pages and the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantMode {
    /// Pages stay mapped where the frontend offers that, else copy.
    Persistent,
    /// Each payload is copied by the hypervisor.
    Copy,
    /// Pages are mapped for one request and unmapped before its answer. Never with O_DIRECT:
    /// such a request completes before the kernel lets go of its pages, and gntdev's unmapping
    /// waits for that in the background, so the answer could come first.
    Map,
}

/// How a frontend may order its writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ordering {
    /// `feature-flush-cache`, the usual way.
    Flush,
    /// `feature-barrier` alone, for frontends that know nothing else. Never with indirect
    /// descriptors: Linux's blkfront BUGs on a barrier of more than 11 segments.
    Barrier,
    /// Both, as Linux's blkback; a frontend that knows flush uses that.
    Both,
}

/// How a block backend serves its devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Page cache use.
    pub cache: Cache,
    /// Memory for the L2 tables of each QCOW2 image of a chain.
    pub l2_cache_size: L2Cache,
    /// When the metadata of images is written.
    pub commits: Commits,
    /// Payload transport.
    pub grants: GrantMode,
    /// Pages that a queue keeps mapped.
    pub max_persistent_grants: u32,
    /// Seconds after which an unused persistent grant is unmapped.
    pub persistent_idle_s: u32,
    /// Largest ring offered, as an order of pages.
    pub max_ring_page_order: u32,
    /// Most queues offered.
    pub max_queues: u32,
    /// Most segments of an indirect request; 0 offers none.
    pub max_indirect_segments: u32,
    /// How long a queue polls before it sleeps, in microseconds, at most.
    pub poll_us: u32,
    /// Ordering primitives offered.
    pub ordering: Ordering,
    /// Where the queues' threads run.
    pub placement: Placement,
    /// Limits of requests and bytes a second.
    pub limits: Limits,
    /// How urgent the disk's reads and writes are to the kernel.
    pub io_priority: Priority,
    /// Disks of the process that name the same group share its limits.
    pub throttle_group: Option<String>,
    /// What becomes of a request that fails.
    pub policies: Policies,
    /// Requests that fail on purpose.
    pub faults: Faults,
    /// How long requests wait on purpose.
    pub delay: Delay,
    /// Which blocks change, for backups.
    pub changed: ChangedLog,
    /// Bytes that a bit of that log stands for, as text.
    pub changed_granularity: String,
}

/// Whether changed blocks are logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangedLog {
    /// Never.
    None,
    /// As soon as a control command starts a log.
    Ready,
    /// From the beginning, in this file.
    In(PathBuf),
}

impl Default for Config {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        Config {
            cache: Cache::None,
            l2_cache_size: L2Cache::default(),
            commits: Commits::BeforeAnswer,
            grants: GrantMode::Persistent,
            max_persistent_grants: 1056,
            persistent_idle_s: 60,
            max_ring_page_order: 4,
            max_queues: cpus.min(MAX_QUEUES),
            max_indirect_segments: 256,
            poll_us: 100,
            ordering: Ordering::Both,
            placement: Placement::default(),
            limits: Limits::default(),
            io_priority: Priority::None,
            throttle_group: None,
            policies: Policies::default(),
            faults: Faults::default(),
            delay: Delay::default(),
            changed: ChangedLog::None,
            changed_granularity: "64K".to_owned(),
        }
    }
}

/// Most queues of one device.
pub const MAX_QUEUES: u32 = 64;

impl Knobs for Config {
    const KNOBS: &'static [Knob<Config>] = knobs::KNOBS;
}

impl Config {
    /// Whether the knobs agree with each other: what is wrong, and what to do.
    pub fn agrees(&self) -> Result<(), String> {
        self.limits.agree()?;
        self.io_priority.is_allowed()?;
        match (self.grants, self.cache) {
            (GrantMode::Map, Cache::None) => Err("grants=map: not with cache=none (O_DIRECT); \
                 set cache=writeback, or grants=persistent or copy"
                .to_owned()),
            _ => Ok(()),
        }
    }

    /// How a log of changed blocks is made in `path`.
    pub fn log_options(&self, path: &Path) -> LogOptions {
        let options = LogOptions::of(path);
        options.clone().granularity(&self.changed_granularity).unwrap_or(options)
    }

    /// How long a persistent grant may be unused.
    pub fn persistent_idle(&self) -> Duration {
        Duration::from_secs(self.persistent_idle_s.into())
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
