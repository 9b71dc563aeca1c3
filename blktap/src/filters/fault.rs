//! Faults on purpose, to test guests and programs with: requests that fail by operation, place,
//! number or chance.
//!
//! A fault is written `OP:ERROR[:CONDITION]...`, several are joined by `+`:
//! `read:EIO:p=0.01:seed=7+flush:ENOSPC:nth=3+write:EIO:at=1M-2M`. A request that fails does not
//! reach the disk. ([`crate::faults`] has disks that lie, for tests of verifiers.)

use std::fmt;
use std::io;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::around::{Around, Wrapped};
use super::{amount, forward_to_below};
use crate::disk::{Disk, DiskQueue, Done, Full, Op, Request};

/// Which requests a fault concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All.
    Any,
    /// Reads.
    Read,
    /// Writes and zeroing.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
}

impl Kind {
    fn has(self, op: Op) -> bool {
        match self {
            Kind::Any => true,
            Kind::Read => op == Op::Read,
            Kind::Write => matches!(op, Op::Write | Op::WriteFua | Op::WriteZeroes),
            Kind::Flush => op == Op::Flush,
            Kind::Discard => matches!(op, Op::Discard | Op::SecureDiscard),
        }
    }
}

/// One fault. All its conditions must be met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which requests.
    pub kind: Kind,
    /// What they are answered with, a positive errno.
    pub errno: i32,
    /// Only those that touch these bytes.
    pub at: Option<Range<u64>>,
    /// Only the nth of those, from 1.
    pub nth: Option<u64>,
    /// Only each nth of those.
    pub every: Option<u64>,
    /// Only with this probability, of a million.
    pub chance: Option<u32>,
    /// Where the chance begins: the same seed and requests have the same faults.
    pub seed: u64,
}

/// What is wrong with a fault's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotAFault(String);

impl fmt::Display for NotAFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = "OP:ERROR[:nth=N][:every=N][:p=0..1][:seed=N][:at=FIRST-END], OP of any, read, \
                    write, flush, discard";
        write!(f, "{}: a fault is {form}", self.0)
    }
}

impl std::error::Error for NotAFault {}

/// Errors that have names here; others are numbers.
const ERRORS: [(&str, i32); 6] = [
    ("EIO", libc::EIO),
    ("ENOSPC", libc::ENOSPC),
    ("EROFS", libc::EROFS),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
    ("EINVAL", libc::EINVAL),
    ("ETIMEDOUT", libc::ETIMEDOUT),
];

impl Fault {
    fn parse(text: &str) -> Option<Fault> {
        let mut parts = text.split(':');
        let kind = match parts.next()? {
            "any" => Kind::Any,
            "read" => Kind::Read,
            "write" => Kind::Write,
            "flush" => Kind::Flush,
            "discard" => Kind::Discard,
            _ => return None,
        };
        let error = parts.next()?;
        let named = ERRORS.iter().find(|(name, _)| *name == error).map(|(_, errno)| *errno);
        let errno = named.or_else(|| error.parse().ok().filter(|n| (1..=4095).contains(n)))?;
        let mut fault =
            Fault { kind, errno, at: None, nth: None, every: None, chance: None, seed: 1 };
        for part in parts {
            let (name, value) = part.split_once('=')?;
            let count = || value.parse().ok().filter(|n| *n > 0);
            match name {
                "nth" => fault.nth = Some(count()?),
                "every" => fault.every = Some(count()?),
                "seed" => fault.seed = value.parse().ok()?,
                "p" => {
                    let chance: Option<f64> = value.parse().ok();
                    let chance = chance.filter(|p| (0.0..=1.0).contains(p))?;
                    fault.chance = Some((chance * 1e6).round() as u32);
                }
                "at" => {
                    let (first, end) = value.split_once('-')?;
                    fault.at = Some(amount(first)?..amount(end)?);
                }
                _ => return None,
            }
        }
        Some(fault)
    }
}

/// Faults of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl FromStr for Faults {
    type Err = NotAFault;

    fn from_str(text: &str) -> Result<Faults, NotAFault> {
        let parts = text.split('+').filter(|part| !part.is_empty());
        let all = parts.map(|part| Fault::parse(part).ok_or_else(|| NotAFault(part.to_owned())));
        all.collect::<Result<_, _>>().map(Faults)
    }
}

/// A number that is the same for the same seed and count, evenly spread over all of `u64`
/// (splitmix64's mixing).
pub(super) fn scattered(seed: u64, count: u64) -> u64 {
    let mut z = seed.wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Faults with what they have seen.
struct Plan {
    faults: Vec<(Fault, u64)>,
    struck: u64,
}

impl Plan {
    /// Counts a request; what it fails with.
    fn strike(&mut self, r: &Request<'_>) -> Option<i32> {
        let end = r.offset.saturating_add(r.len);
        let mut found = None;
        for (fault, seen) in &mut self.faults {
            let touches = |at: &Range<u64>| r.offset < at.end && at.start < end;
            if !fault.kind.has(r.op) || !fault.at.as_ref().is_none_or(touches) {
                continue;
            }
            *seen += 1;
            let chance = |p: u32| scattered(fault.seed, *seen) % 1_000_000 < u64::from(p);
            let strikes = fault.nth.is_none_or(|n| *seen == n)
                && fault.every.is_none_or(|n| seen.is_multiple_of(n))
                && fault.chance.is_none_or(chance);
            found = found.or(strikes.then_some(fault.errno));
        }
        self.struck += u64::from(found.is_some());
        found
    }
}

/// A disk with faults.
pub struct FaultyDisk {
    below: Arc<dyn Disk>,
    plan: Arc<Mutex<Plan>>,
}

impl FaultyDisk {
    /// `below`, failing as told. Requests are counted over all queues.
    pub fn new(below: Arc<dyn Disk>, faults: Faults) -> Arc<FaultyDisk> {
        let faults = faults.0.into_iter().map(|fault| (fault, 0)).collect();
        Arc::new(FaultyDisk { below, plan: Arc::new(Mutex::new(Plan { faults, struck: 0 })) })
    }

    /// How many requests failed on purpose.
    pub fn struck(&self) -> u64 {
        self.plan.lock().struck
    }
}

impl Disk for FaultyDisk {
    forward_to_below!();

    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let (below, plan) = (self.below.queue(depth)?, Arc::clone(&self.plan));
        Ok(Box::new(Wrapped::new(Faulty { below, plan, ready: Vec::new() }, depth)))
    }
}

struct Faulty {
    below: Box<dyn DiskQueue>,
    plan: Arc<Mutex<Plan>>,
    ready: Vec<Done>,
}

impl Around for Faulty {
    fn below(&self) -> &dyn DiskQueue {
        &*self.below
    }
    fn below_mut(&mut self) -> &mut dyn DiskQueue {
        &mut *self.below
    }
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        match self.plan.lock().strike(r) {
            Some(errno) => self.ready.push(Done { token: r.token, errno }),
            None => return self.below.submit(r),
        }
        Ok(())
    }
    fn held(&self) -> u32 {
        self.ready.len() as u32
    }
    fn completed(&mut self, done: &mut Vec<Done>, _from: usize) {
        done.append(&mut self.ready);
    }
    fn patience(&self) -> Option<Duration> {
        (!self.ready.is_empty()).then_some(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MemDisk, blocking};

    fn disk(text: &str) -> Arc<FaultyDisk> {
        FaultyDisk::new(MemDisk::new(1 << 20), text.parse().expect("faults"))
    }

    /// The errors of `n` reads of 512 bytes, one after the other.
    fn reads(disk: &FaultyDisk, n: u64) -> Vec<i32> {
        let mut queue = disk.queue(1).expect("a queue");
        let mut read = |at| blocking::read_at(&mut *queue, at * 512, &mut [0; 512]);
        let errno = |e: io::Error| e.raw_os_error().expect("an errno");
        (0..n).map(|at| read(at).err().map_or(0, errno)).collect()
    }

    #[test]
    fn faults_strike_where_they_are_told() {
        assert_eq!(reads(&disk("read:EIO:nth=2"), 3), [0, libc::EIO, 0]);
        assert_eq!(reads(&disk("any:28:every=2"), 4), [0, 28, 0, 28]);
        assert_eq!(reads(&disk("read:EIO:at=512-1K"), 3), [0, libc::EIO, 0]);
        assert_eq!(reads(&disk("write:EIO+flush:EIO"), 2), [0, 0]);
        let disk = disk("write:ENOSPC");
        let mut queue = disk.queue(1).expect("a queue");
        let error = blocking::write_at(&mut *queue, 0, &[1; 512]).expect_err("a fault");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        drop(queue);
        assert_eq!((reads(&disk, 1), disk.struck()), (vec![0], 1));
    }

    #[test]
    fn chance_is_repeatable_and_as_told() {
        let count = |text: &str| reads(&disk(text), 2000).iter().filter(|e| **e != 0).count();
        assert_eq!(reads(&disk("any:EIO:p=0.1"), 2000), reads(&disk("any:EIO:p=0.1:seed=1"), 2000));
        assert_ne!(reads(&disk("any:EIO:p=0.1"), 2000), reads(&disk("any:EIO:p=0.1:seed=2"), 2000));
        assert!((150..250).contains(&count("any:EIO:p=0.1")));
        assert_eq!((count("any:EIO:p=0"), count("any:EIO:p=1")), (0, 2000));
    }

    #[test]
    fn what_is_no_fault_is_refused_by_name() {
        for bad in [
            "read",
            "fly:EIO",
            "read:EIEIO",
            "read:0",
            "read:EIO:nth=0",
            "read:EIO:p=2",
            "read:EIO:at=5",
            "read:EIO:when=now",
            "read:EIO:p=NaN",
        ] {
            let refusal = bad.parse::<Faults>().expect_err(bad).to_string();
            assert!(refusal.starts_with(bad), "{refusal}");
        }
        assert_eq!("".parse(), Ok(Faults::default()));
    }
}
