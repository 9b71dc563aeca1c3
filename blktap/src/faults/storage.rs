//! Storages that fail, drop syncs or reorder writes.
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::storage::{Access, Storage};

/// What a call of a storage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `read_at`.
    Read,
    /// `write_at`, `punch`, `set_size`, `allocate`.
    Write,
    /// `sync`.
    Sync,
}

/// How often a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strikes {
    /// The nth call only.
    Once,
    /// The nth call and all later ones.
    FromThenOn,
}

/// What of a write that fails is carried out nevertheless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// Nothing.
    Nothing,
    /// The first half of its sectors.
    Half,
    /// All of it.
    All,
}

/// What goes wrong. Calls of a kind are counted from 0 over all storages, from when the fault
/// was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageFault {
    /// A call fails. All syncs after one that failed do as well.
    Fail {
        /// What kind of call.
        call: Call,
        /// Which one of them.
        nth: u64,
        /// A positive errno.
        errno: i32,
        /// How often.
        strikes: Strikes,
        /// What a write does nevertheless.
        carried: Carried,
    },
    /// A sync, or all from it on, say `Ok` and do nothing.
    DropSync {
        /// Which one.
        nth: u64,
        /// How often.
        strikes: Strikes,
    },
    /// A write is carried out only after the next one elsewhere, however many syncs lie between
    /// them. Where the nth is no `write_at`, nothing happens.
    HoldWrite {
        /// Which one.
        nth: u64,
    },
}

/// A write that was answered and is yet to be carried out.
struct Held {
    file: usize,
    offset: u64,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Plan {
    fault: Option<StorageFault>,
    reads: u64,
    writes: u64,
    syncs: u64,
    struck: u64,
    sync_failed: Option<i32>,
    held: Option<Held>,
}

/// One fault of some storages.
#[derive(Default)]
pub struct StorageFaults {
    plan: Mutex<Plan>,
    files: Vec<Arc<dyn Storage>>,
}

impl StorageFaults {
    /// Over the files of an image.
    pub fn new(files: Vec<Arc<dyn Storage>>) -> Arc<Self> {
        Arc::new(StorageFaults { plan: Mutex::default(), files })
    }
    /// The files, going wrong as told.
    pub fn storages(self: &Arc<Self>) -> Vec<Arc<dyn Storage>> {
        let storage = |file| -> Arc<dyn Storage> {
            Arc::new(FaultStorage { faults: Arc::clone(self), file })
        };
        (0..self.files.len()).map(storage).collect()
    }
    /// Sets the fault; counts anew.
    pub fn set(&self, fault: Option<StorageFault>) {
        let mut plan = self.plan.lock();
        let (struck, held) = (plan.struck, plan.held.take());
        *plan = Plan { fault, struck, held, ..Plan::default() };
    }
    /// Calls since the fault was set.
    pub fn calls(&self, call: Call) -> u64 {
        let plan = self.plan.lock();
        match call {
            Call::Read => plan.reads,
            Call::Write => plan.writes,
            Call::Sync => plan.syncs,
        }
    }
    /// How often a fault struck: one that never did has shown nothing.
    pub fn struck(&self) -> u64 {
        self.plan.lock().struck
    }
    /// Carries out what is held.
    pub fn release(&self) -> io::Result<()> {
        let held = self.plan.lock().held.take();
        held.map_or(Ok(()), |h| self.files[h.file].write_at(h.offset, &h.bytes))
    }
}

fn strikes(nth: u64, strikes: Strikes, seen: u64) -> bool {
    match strikes {
        Strikes::Once => seen == nth,
        Strikes::FromThenOn => seen >= nth,
    }
}

/// What is to become of a call.
enum Fate {
    Done,
    Fails { errno: i32, carried: Carried },
    Dropped,
    Held,
}

impl Plan {
    fn count(&mut self, call: Call) -> u64 {
        let counter = match call {
            Call::Read => &mut self.reads,
            Call::Write => &mut self.writes,
            Call::Sync => &mut self.syncs,
        };
        *counter += 1;
        *counter - 1
    }

    /// Whether any of these bytes are held.
    fn holds(&self, file: usize, offset: u64, len: u64) -> bool {
        let here = |h: &&Held| h.file == file && h.offset < offset + len;
        let held = self.held.as_ref().filter(here);
        held.is_some_and(|h| offset < h.offset + h.bytes.len() as u64)
    }

    fn fate(&mut self, call: Call) -> Fate {
        let seen = self.count(call);
        let fate = match self.fault {
            Some(StorageFault::Fail { call: mine, nth, errno, strikes: often, carried })
                if mine == call && strikes(nth, often, seen) =>
            {
                Fate::Fails { errno, carried }
            }
            Some(StorageFault::DropSync { nth, strikes: often })
                if call == Call::Sync && strikes(nth, often, seen) =>
            {
                Fate::Dropped
            }
            Some(StorageFault::HoldWrite { nth }) if call == Call::Write && nth == seen => {
                Fate::Held
            }
            _ => Fate::Done,
        };
        self.struck += u64::from(matches!(fate, Fate::Fails { .. } | Fate::Dropped));
        fate
    }
}

struct FaultStorage {
    faults: Arc<StorageFaults>,
    file: usize,
}

impl FaultStorage {
    fn inner(&self) -> &dyn Storage {
        &*self.faults.files[self.file]
    }
    fn change(&self, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let fate = self.faults.plan.lock().fate(Call::Write);
        match fate {
            Fate::Fails { errno, carried } => {
                if carried == Carried::All {
                    change()?;
                }
                Err(io::Error::from_raw_os_error(errno))
            }
            // It may be about the same bytes: in order.
            _ => self.faults.release().and_then(|()| change()),
        }
    }
}

impl Storage for FaultStorage {
    fn size(&self) -> io::Result<u64> {
        let size = self.inner().size()?;
        let plan = self.faults.plan.lock();
        let held = plan.held.as_ref().filter(|h| h.file == self.file);
        Ok(held.map_or(size, |h| size.max(h.offset + h.bytes.len() as u64)))
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let fate = self.faults.plan.lock().fate(Call::Read);
        if let Fate::Fails { errno, .. } = fate {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.inner().read_at(offset, into)?;
        let plan = self.faults.plan.lock();
        let Some(held) = plan.held.as_ref().filter(|h| h.file == self.file) else { return Ok(()) };
        let start = offset.max(held.offset);
        let end = (offset + into.len() as u64).min(held.offset + held.bytes.len() as u64);
        if start < end {
            let from = &held.bytes[(start - held.offset) as usize..(end - held.offset) as usize];
            into[(start - offset) as usize..(end - offset) as usize].copy_from_slice(from);
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let fate = self.faults.plan.lock().fate(Call::Write);
        match fate {
            Fate::Done | Fate::Dropped => {
                if self.faults.plan.lock().holds(self.file, offset, from.len() as u64) {
                    self.faults.release()?;
                }
                self.inner().write_at(offset, from)?;
                self.faults.release()
            }
            Fate::Held => {
                let held = Held { file: self.file, offset, bytes: from.to_vec() };
                let mut plan = self.faults.plan.lock();
                plan.held = Some(held);
                plan.struck += 1;
                Ok(())
            }
            Fate::Fails { errno, carried } => {
                let len = match carried {
                    Carried::Nothing => 0,
                    Carried::Half => from.len() / 1024 * 512,
                    Carried::All => from.len(),
                };
                self.inner().write_at(offset, &from[..len])?;
                Err(io::Error::from_raw_os_error(errno))
            }
        }
    }
    fn sync(&self) -> io::Result<()> {
        let mut plan = self.faults.plan.lock();
        if let Some(errno) = plan.sync_failed {
            return Err(io::Error::from_raw_os_error(errno));
        }
        match plan.fate(Call::Sync) {
            Fate::Dropped => Ok(()),
            Fate::Fails { errno, .. } => {
                plan.sync_failed = Some(errno);
                Err(io::Error::from_raw_os_error(errno))
            }
            Fate::Done | Fate::Held => {
                drop(plan);
                self.inner().sync()
            }
        }
    }
    fn set_size(&self, size: u64) -> io::Result<()> {
        self.change(|| self.inner().set_size(size))
    }
    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.change(|| self.inner().punch(range))
    }
    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.change(|| self.inner().allocate(range))
    }
    fn access(&self) -> Access {
        self.inner().access()
    }
    fn is_memory(&self) -> bool {
        self.inner().is_memory()
    }
    fn name(&self) -> String {
        self.inner().name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::record::{Action, Journal, SparseBytes};

    fn rig() -> (Arc<Journal>, Arc<StorageFaults>, Arc<dyn Storage>) {
        let journal = Journal::new(vec![SparseBytes::default()]);
        let faults = StorageFaults::new(journal.storages());
        let file = faults.storages().swap_remove(0);
        (journal, faults, file)
    }

    #[test]
    fn the_nth_call_of_its_kind_fails() {
        for (strikes, later) in [(Strikes::Once, true), (Strikes::FromThenOn, false)] {
            let (_, faults, file) = rig();
            let (call, errno, carried) = (Call::Write, libc::ENOSPC, Carried::Half);
            faults.set(Some(StorageFault::Fail { call, nth: 1, errno, strikes, carried }));
            file.write_at(0, &[1; 1024]).expect("the first");
            let error = file.write_at(0, &[2; 1024]).expect_err("the second");
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
            assert_eq!(file.write_at(2048, &[3; 512]).is_ok(), later);
            let mut back = [0; 1024];
            file.read_at(0, &mut back).expect("read");
            assert_eq!((back[511], back[512]), (2, 1), "half of it was carried out");
            assert_eq!(faults.struck(), 1 + u64::from(!later));
        }
    }

    #[test]
    fn a_failed_sync_is_the_last() {
        let (_, faults, file) = rig();
        let (call, errno, strikes) = (Call::Sync, libc::EIO, Strikes::Once);
        let carried = Carried::Nothing;
        faults.set(Some(StorageFault::Fail { call, nth: 0, errno, strikes, carried }));
        assert!(file.sync().is_err() && file.sync().is_err());
        file.write_at(0, &[1; 512]).expect("writes go on");
    }

    #[test]
    fn a_dropped_sync_and_a_held_write_are_not_seen_from_above() {
        let (journal, faults, file) = rig();
        faults.set(Some(StorageFault::DropSync { nth: 0, strikes: Strikes::Once }));
        file.sync().expect("dropped");
        assert!(journal.is_empty());
        faults.set(Some(StorageFault::HoldWrite { nth: 0 }));
        file.write_at(0, &[1; 512]).expect("held");
        file.sync().expect("sync");
        let mut back = [0; 1024];
        file.read_at(0, &mut back).expect("read");
        assert_eq!((back[511], back[512], file.size().expect("size")), (1, 0, 512));
        file.write_at(512, &[2; 512]).expect("the next");
        let actions = journal.recording().entries;
        let at = |n: usize| match &actions[n].action {
            Action::Write { offset, .. } => Some(*offset),
            _ => None,
        };
        assert_eq!([at(0), at(1), at(2)], [None, Some(512), Some(0)]);
        assert_eq!(faults.struck(), 2);
    }
}
