//! I/O priority: what the kernel's schedulers (bfq, mq-deadline; none has no priorities) make of
//! requests to files and devices, by io_uring's `ioprio` in each of them.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use super::forward_to_below;
use crate::disk::{Disk, DiskQueue};

/// Capabilities that real-time priority asks for (linux/capability.h).
const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_SYS_NICE: u64 = 1 << 23;

/// A class of ioprio_set(2), with a level from 0 (first) to 7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// What the thread has.
    #[default]
    None,
    /// Before all others.
    RealTime(u8),
    /// Best effort; 4 is what everybody has.
    BestEffort(u8),
    /// When nobody else has anything.
    Idle,
}

impl Priority {
    /// IOPRIO_PRIO_VALUE of linux/ioprio.h.
    pub fn raw(self) -> u16 {
        let (class, level) = match self {
            Priority::None => (0, 0),
            Priority::RealTime(level) => (1, level),
            Priority::BestEffort(level) => (2, level),
            Priority::Idle => (3, 0),
        };
        class << 13 | u16::from(level & 7)
    }

    /// Whether this process may use it; the kernel fails each request (EPERM) otherwise.
    pub fn is_allowed(self) -> Result<(), String> {
        if !matches!(self, Priority::RealTime(_)) {
            return Ok(());
        }
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        match effective(&status) & (CAP_SYS_ADMIN | CAP_SYS_NICE) {
            0 => Err(format!("io_priority={self}: needs CAP_SYS_NICE")),
            _ => Ok(()),
        }
    }
}

/// The capabilities in force, of a /proc/PID/status.
fn effective(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Priority::None => f.write_str("none"),
            Priority::RealTime(level) => write!(f, "rt:{level}"),
            Priority::BestEffort(level) => write!(f, "be:{level}"),
            Priority::Idle => f.write_str("idle"),
        }
    }
}

/// Not a priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a priority is none, idle, rt:LEVEL or be:LEVEL, the level from 0 (first) to 7")]
pub struct NotAPriority;

impl FromStr for Priority {
    type Err = NotAPriority;

    fn from_str(text: &str) -> Result<Priority, NotAPriority> {
        let (class, level) = text.split_once(':').map_or((text, None), |(c, l)| (c, Some(l)));
        let level = level.map(|l| l.parse().ok().filter(|l| *l < 8).ok_or(NotAPriority));
        match (class, level.transpose()?) {
            ("none", None) => Ok(Priority::None),
            ("idle", None) => Ok(Priority::Idle),
            ("rt", level) => Ok(Priority::RealTime(level.unwrap_or(4))),
            ("be", level) => Ok(Priority::BestEffort(level.unwrap_or(4))),
            _ => Err(NotAPriority),
        }
    }
}

/// A disk whose requests have a priority.
pub struct PriorityDisk {
    below: Arc<dyn Disk>,
    priority: Priority,
}

impl PriorityDisk {
    /// `below`, with a priority for all its queues.
    pub fn new(below: Arc<dyn Disk>, priority: Priority) -> Arc<PriorityDisk> {
        Arc::new(PriorityDisk { below, priority })
    }
}

impl Disk for PriorityDisk {
    forward_to_below!();

    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let mut queue = self.below.queue(depth)?;
        queue.prioritize(self.priority);
        Ok(queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_numbers() {
        for (text, raw) in
            [("none", 0), ("idle", 0x6000), ("rt:0", 0x2000), ("be:7", 0x4007), ("be:4", 0x4004)]
        {
            let priority: Priority = text.parse().expect("a priority");
            assert_eq!((priority.raw(), priority.to_string()), (raw, text.to_owned()));
        }
        assert_eq!("rt".parse(), Ok(Priority::RealTime(4)));
        for bad in ["", "rt:8", "be:-1", "idle:1", "none:0", "high"] {
            assert_eq!(bad.parse::<Priority>(), Err(NotAPriority), "{bad}");
        }
        assert_eq!(effective("Name:\tx\nCapEff:\t0000000000800000\n"), CAP_SYS_NICE);
        assert_eq!(effective(""), 0);
        assert_eq!(Priority::Idle.is_allowed(), Ok(()));
    }

    #[test]
    fn the_kernel_gets_it() {
        use crate::storage::OpenOptions;
        use crate::{RawDisk, blocking};
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        std::fs::write(&path, [7; 8192]).expect("a file");
        let raw = RawDisk::open(&OpenOptions::new(&path)).expect("open");
        let disk = PriorityDisk::new(raw, Priority::Idle);
        let mut queue = disk.queue(1).expect("a queue");
        let mut bytes = [0; 512];
        blocking::read_at(&mut *queue, 0, &mut bytes).expect("read");
        blocking::write_at(&mut *queue, 0, &[8; 512]).expect("write");
        assert_eq!(bytes, [7; 512]);
    }
}
