//! Image locks, byte for byte as QEMU's file driver takes them (block/file-posix.c and
//! include/block/block-common.h), so that QEMU's programs and these disks refuse each other.
//!
//! Each permission that is used holds a shared lock on byte 100 + its bit, each permission that
//! others may not use one on byte 200 + its bit; a conflict is found by asking who holds the
//! opposite byte. They are open-file-description locks, held through the description that I/O
//! uses: after a kill they stay until the last request of the dead process has ended.
// fcntl(2) takes its argument by address.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Access, OpenError};

/// `RAW_LOCK_PERM_BASE`.
const PERM_BASE: i64 = 100;
/// `RAW_LOCK_SHARED_BASE`.
const SHARED_BASE: i64 = 200;
/// `BLK_PERM_CONSISTENT_READ`, the number of its bit.
const CONSISTENT_READ: u8 = 0;
/// `BLK_PERM_WRITE`.
const WRITE: u8 = 1;
/// `BLK_PERM_RESIZE`.
const RESIZE: u8 = 3;
/// Bytes from `PERM_BASE` and `SHARED_BASE` on that stand for a permission.
const PERMISSIONS: i64 = 64;
/// How long to sleep between two looks at somebody else's lock.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Whether others may write what this disk has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Nobody else may write, and nobody may be writing now.
    Exclusive,
    /// Others may write too: they keep order among themselves (a cluster file system).
    Shared,
}

/// Whether and how an image is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Not at all.
    Off,
    /// Locked, waiting up to `wait` for somebody else to let go.
    Held {
        /// What others may do.
        sharing: Sharing,
        /// The limit of waiting; zero to try once.
        wait: Duration,
    },
}

struct Plan {
    used: &'static [u8],
    unshared: &'static [u8],
}

fn plan(access: Access, sharing: Sharing) -> Plan {
    Plan {
        used: match access {
            Access::ReadOnly => &[CONSISTENT_READ],
            Access::ReadWrite => &[CONSISTENT_READ, WRITE, RESIZE],
        },
        unshared: match sharing {
            Sharing::Exclusive => &[WRITE, RESIZE],
            Sharing::Shared => &[],
        },
    }
}

/// Takes the locks of `access` on `file`, waiting as `lock` says. They end with the last
/// descriptor and the last request of this open file.
pub(super) fn take(file: &File, path: &Path, access: Access, lock: Lock) -> Result<(), OpenError> {
    let Lock::Held { sharing, wait } = lock else { return Ok(()) };
    let plan = plan(access, sharing);
    let start = Instant::now();
    let mut told = false;
    loop {
        let conflict = attempt(file, &plan)
            .map_err(|source| OpenError::NoLocks { path: path.into(), source })?;
        let Some((permission, conflict)) = conflict else {
            return Ok(());
        };
        let waited = start.elapsed();
        if waited >= wait {
            return Err(OpenError::Locked { path: path.into(), permission, conflict, waited });
        }
        if !told {
            told = true;
            tracing::info!(
                "{}: in use by another process, which {conflict}; waiting up to {:.1} s",
                path.display(),
                wait.as_secs_f64()
            );
        }
        // Two that give way to each other at once do not stay in step.
        let stagger = Duration::from_millis(u64::from(std::process::id() % 8));
        std::thread::sleep((LOOK_AGAIN + stagger).min(wait - waited));
    }
}

/// Takes all bytes and looks for conflicts; on one, gives all bytes back and says which.
fn attempt(file: &File, plan: &Plan) -> io::Result<Option<(&'static str, &'static str)>> {
    let mut refused = None;
    let ours = plan.used.iter().map(|b| PERM_BASE + i64::from(*b));
    for byte in ours.chain(plan.unshared.iter().map(|b| SHARED_BASE + i64::from(*b))) {
        if !set(file, byte, 1, libc::F_RDLCK)? {
            refused = Some(("write", "holds the whole file locked"));
        }
    }
    for bit in plan.used {
        if refused.is_none() && held(file, SHARED_BASE + i64::from(*bit))? {
            refused = Some((name(*bit), "does not share it"));
        }
    }
    for bit in plan.unshared {
        if refused.is_none() && held(file, PERM_BASE + i64::from(*bit))? {
            refused = Some((unshared_name(*bit), "writes to it"));
        }
    }
    if refused.is_some() {
        set(file, PERM_BASE, PERMISSIONS, libc::F_UNLCK)?;
        set(file, SHARED_BASE, PERMISSIONS, libc::F_UNLCK)?;
    }
    Ok(refused)
}

/// QEMU's words for a permission.
fn name(bit: u8) -> &'static str {
    match bit {
        WRITE => "write",
        RESIZE => "resize",
        _ => "consistent read",
    }
}

fn unshared_name(bit: u8) -> &'static str {
    if bit == WRITE { "shared write" } else { "shared resize" }
}

fn range(start: i64, len: i64, kind: libc::c_int) -> libc::flock {
    // SAFETY: a plain C structure; zero is a value of every field.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = len;
    lock
}

/// Sets or clears a lock; `false` if somebody else's lock is in the way.
fn set(file: &File, start: i64, len: i64, kind: libc::c_int) -> io::Result<bool> {
    let lock = range(start, len, kind);
    // SAFETY: reads a flock from the address.
    let r = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if r == 0 {
        return Ok(true);
    }
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(e),
    }
}

/// Whether another open file holds a lock on the byte.
fn held(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = range(byte, 1, libc::F_WRLCK);
    // SAFETY: reads and writes a flock at the address.
    let r = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if r != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}
