//! The changed-block log: which blocks of a disk were written since the log began, for backups.
//!
//! A write goes to the disk when the bit of its block is durable in the log's [file](self::file):
//! so after a crash the log claims too much (whole groups of blocks, of which one was about to be
//! written) and never too little. Only the first write to a group waits, and all that wait do so
//! for one sync.
//!
//! The log can be started, replaced and removed while the disk is used: all queues stop passing
//! requests on, and as soon as nothing is in flight below, the logs change places. What was
//! answered before that is in the old log, what comes afterwards in the new one.
//!
//! A log knows what went through this filter. Who writes to the image otherwise, or without the
//! log, begins with a full backup and a new log.

pub mod file;
mod log;
mod queue;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::around::Wrapped;
use super::bells::Bells;
use super::forward_to_below;
use crate::disk::{Disk, DiskQueue, Geometry};
use crate::storage::Storage;
pub use file::{Frozen, Header, Left, LogError};
pub use log::{Log, LogOptions};
use queue::Changed;

/// How long a change of the log waits for what is in flight.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether requests go on between changes of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Flow {
    #[default]
    Goes,
    Paused,
}

#[derive(Default)]
struct Logs {
    now: Option<Arc<Log>>,
    /// Those that were replaced and may still be asked for.
    before: Vec<Frozen>,
}

/// What the disk and its queues share.
#[derive(Default)]
struct Shared {
    /// Changes with the log; odd while it is being changed, and then nothing is passed on.
    epoch: AtomicU64,
    logs: Mutex<Logs>,
    bells: Arc<Bells>,
    /// Held by whoever changes the log, or this.
    flow: Mutex<Flow>,
}

impl Shared {
    /// Has all queues hold everything back; nothing is in flight below afterwards.
    fn stop(&self) -> Result<(), LogError> {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let end = Instant::now() + PATIENCE;
        while self.bells.are_busy() {
            if Instant::now() >= end {
                self.go();
                let source = io::ErrorKind::TimedOut.into();
                return Err(LogError::Io { name: "the disk".into(), what: "stop", source });
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// After `stop`.
    fn go(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        self.bells.ring();
    }

    /// Lets `make` give the disk another log, while nothing is in flight.
    fn change<T>(
        &self,
        make: impl FnOnce(Option<Arc<Log>>) -> Result<(Option<Arc<Log>>, T), LogError>,
    ) -> Result<T, LogError> {
        let flow = self.flow.lock();
        if *flow == Flow::Goes {
            self.stop()?;
        }
        let now = self.logs.lock().now.clone();
        let made = make(now).map(|(log, told)| {
            self.logs.lock().now = log;
            told
        });
        if *flow == Flow::Goes {
            self.go();
        }
        made
    }
}

/// A disk that logs which of its blocks change.
pub struct ChangedDisk {
    below: Arc<dyn Disk>,
    shared: Arc<Shared>,
}

impl ChangedDisk {
    /// `below`, without a log so far.
    pub fn new(below: Arc<dyn Disk>) -> Arc<ChangedDisk> {
        Arc::new(ChangedDisk { below, shared: Arc::default() })
    }

    /// Holds all requests back, once those in flight are done, until [`resume`](Self::resume).
    pub fn pause(&self) -> Result<(), LogError> {
        let mut flow = self.shared.flow.lock();
        if *flow == Flow::Goes {
            self.shared.stop()?;
            *flow = Flow::Paused;
        }
        Ok(())
    }

    /// Lets requests go on.
    pub fn resume(&self) {
        let mut flow = self.shared.flow.lock();
        if *flow == Flow::Paused {
            self.shared.go();
            *flow = Flow::Goes;
        }
    }

    /// Goes on with the log in `path`, or begins one there if there is no such file.
    pub fn log_to(&self, path: &Path, options: &LogOptions) -> Result<(), LogError> {
        let there = path.try_exists().map_err(|source| LogError::Io {
            name: path.display().to_string(),
            what: "find",
            source,
        })?;
        let size = self.below.geometry().size;
        self.begin(|bells| match there {
            true => Log::open(path, size, bells),
            false => Log::create(path, options, size, bells),
        })
    }

    /// Begins a log in the new file `path`. If there is a log, it is closed at the moment in
    /// which the new one begins, and can be asked for until it is [removed](Self::remove).
    pub fn start(&self, path: &Path, options: &LogOptions) -> Result<(), LogError> {
        self.check_name(&options.name)?;
        let size = self.below.geometry().size;
        self.begin(|bells| Log::create(path, options, size, bells))
    }

    /// As [`start`](Self::start), in an empty storage.
    pub fn start_in(
        &self,
        storage: Arc<dyn Storage>,
        options: &LogOptions,
    ) -> Result<(), LogError> {
        let size = self.below.geometry().size;
        self.begin(|bells| Log::format(storage, options, size, bells))
    }

    fn begin(
        &self,
        open: impl FnOnce(&Arc<Bells>) -> Result<Log, LogError>,
    ) -> Result<(), LogError> {
        // The disk stops for the change alone.
        let log = Arc::new(open(&self.shared.bells)?);
        self.check_name(&log.header().name)?;
        let old = self.shared.change(|old| Ok((Some(log), old)))?;
        self.freeze(old)
    }

    fn check_name(&self, name: &str) -> Result<(), LogError> {
        let is = |other: &String| other == name;
        match self.below.bitmaps().iter().any(is) || self.names().iter().any(is) {
            false => Ok(()),
            true => {
                let (name, why) = (name.to_owned(), "the disk has a bitmap of this name".into());
                Err(LogError::Invalid { name, why })
            }
        }
    }

    fn freeze(&self, old: Option<Arc<Log>>) -> Result<(), LogError> {
        if let Some(old) = old {
            let frozen = old.close()?;
            self.shared.logs.lock().before.push(frozen);
        }
        Ok(())
    }

    /// Ends the log, which can be asked for until it is removed.
    pub fn stop(&self) -> Result<(), LogError> {
        let old = self.shared.change(|old| Ok((None, old)))?;
        self.freeze(old)
    }

    /// Forgets a log that was ended. Its file stays.
    pub fn remove(&self, name: &str) -> Result<(), LogError> {
        let mut logs = self.shared.logs.lock();
        let count = logs.before.len();
        logs.before.retain(|log| log.header.name != name);
        if logs.before.len() < count {
            return Ok(());
        }
        let why = match &logs.now {
            Some(now) if now.header().name == name => "the log is in use: stop it first",
            _ => "there is no such log",
        };
        Err(LogError::Invalid { name: name.to_owned(), why: why.into() })
    }

    /// The logs' names, the one in use first.
    pub fn names(&self) -> Vec<String> {
        let logs = self.shared.logs.lock();
        let now = logs.now.iter().map(|log| log.header().name.clone());
        now.chain(logs.before.iter().map(|log| log.header.name.clone())).collect()
    }
}

impl Disk for ChangedDisk {
    forward_to_below!(but geometry, bitmaps);

    fn geometry(&self) -> Geometry {
        let mut geometry = self.below.geometry();
        if let Some(log) = &self.shared.logs.lock().now {
            // What the log does not know of is not there yet.
            geometry.size = geometry.size.min(log.header().disk_size);
        }
        geometry
    }
    fn refresh(&self) -> io::Result<Geometry> {
        let size = self.below.refresh()?.size;
        let is_short = |log: &Arc<Log>| log.header().disk_size < size;
        if self.shared.logs.lock().now.as_ref().is_some_and(is_short) {
            let bells = &self.shared.bells;
            self.shared.change(|old| {
                let Some(old) = old.clone().filter(is_short) else { return Ok((old, ())) };
                old.close()?;
                Ok((Some(Arc::new(Log::resume(old.storage(), size, bells)?)), ()))
            })?;
        }
        Ok(self.geometry())
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let below = self.below.queue(depth)?;
        let flag = self.shared.bells.join()?;
        let queue = Changed::new(below, Arc::clone(&self.shared), flag);
        Ok(Box::new(Wrapped::new(queue, depth)))
    }
    fn bitmaps(&self) -> Vec<String> {
        let mut all = self.names();
        all.append(&mut self.below.bitmaps());
        all
    }
    fn bitmap(&self, name: &str, range: Range<u64>, out: &mut Vec<(u64, bool)>) -> io::Result<()> {
        let now = {
            let logs = self.shared.logs.lock();
            if let Some(log) = logs.before.iter().find(|log| log.header.name == name) {
                log.stretches(range, out);
                return Ok(());
            }
            logs.now.clone().filter(|log| log.header().name == name)
        };
        match now {
            Some(log) => log.stretches(range, out),
            None => return self.below.bitmap(name, range, out),
        }
        Ok(())
    }
}

/// A log that nobody writes, shown as a bitmap of a disk.
pub struct FrozenDisk {
    below: Arc<dyn Disk>,
    log: Frozen,
}

impl FrozenDisk {
    /// `below`, with the bitmap that `log` is.
    pub fn new(below: Arc<dyn Disk>, log: Frozen) -> Arc<FrozenDisk> {
        Arc::new(FrozenDisk { below, log })
    }
}

impl Disk for FrozenDisk {
    forward_to_below!(but geometry, bitmaps);

    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }
    fn refresh(&self) -> io::Result<Geometry> {
        self.below.refresh()
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        self.below.queue(depth)
    }
    fn bitmaps(&self) -> Vec<String> {
        let mut all = vec![self.log.header.name.clone()];
        all.append(&mut self.below.bitmaps());
        all
    }
    fn bitmap(&self, name: &str, range: Range<u64>, out: &mut Vec<(u64, bool)>) -> io::Result<()> {
        if name == self.log.header.name {
            // Beyond the log, nobody knows: changed.
            let end = self.log.header.disk_size.clamp(range.start, range.end);
            self.log.stretches(range.start..end, out);
            if end < range.end {
                out.push((range.end - end, true));
            }
            return Ok(());
        }
        self.below.bitmap(name, range, out)
    }
}

#[cfg(test)]
mod tests;
