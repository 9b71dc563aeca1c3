//! An image that a tapdisk has open and serves.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use blktap::export::nbd::{Export, Limits, Server};
use blktap::filters::changed::LogOptions;
use blktap::filters::counted::Counts;
use blktap::filters::mirror::OnError;
use blktap::filters::{ChangedDisk, CountedDisk, MirrorDisk, StallDisk};
use blktap::image::{self, BackingPolicy, ImageFormat, ImageOptions};
use blktap::live::{LiveDisk, PATIENCE, Paused};
use blktap::storage::{Access, Cache, OpenOptions};
use blktap::{Disk, NbdDisk, NbdOptions, NbdTarget};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::Result;
use super::standby::Standby;

/// State of an image that is served.
const RUNNING: u32 = 0;
/// Quiesced, closed and paused, as blktap's tapdisk has a paused one.
const PAUSED: u32 = 0x2a;

/// What to open.
#[derive(Clone, Deserialize)]
pub(super) struct Wanted {
    pub(super) args: String,
    read_only: bool,
    no_o_direct: bool,
    read_cache: bool,
    log: Option<PathBuf>,
    pub(super) secondary: Option<String>,
    /// The second image is for the time when the first one has no room, and no mirror.
    standby: bool,
    allow_backing: Vec<PathBuf>,
}

/// See the module.
pub(super) struct Opened {
    minor: u32,
    wanted: Wanted,
    live: Arc<LiveDisk>,
    gate: Arc<ChangedDisk>,
    mirror: Option<Arc<MirrorDisk>>,
    mirror_failed: bool,
    standby: Option<Standby>,
    counted: Arc<CountedDisk>,
    paused: Option<Paused>,
    /// The server's thread, and what ends it when it is dropped.
    serving: Option<(OwnedFd, JoinHandle<std::io::Result<()>>)>,
}

impl Opened {
    /// Opens the image and serves it at `socket`.
    pub(super) fn open(wanted: Wanted, minor: u32, socket: &Path) -> Result<Opened> {
        let (disk, mirror) = disks_of(&wanted)?;
        let live = LiveDisk::new(disk);
        let standby = match wanted.standby {
            true => Some(Standby::new(&wanted, &live, minor)?),
            false => None,
        };
        let disk: Arc<dyn Disk> = match &standby {
            Some(standby) => StallDisk::new(live.clone(), standby.stall()),
            None => live.clone(),
        };
        let gate = ChangedDisk::new(disk);
        if let Some(log) = &wanted.log {
            if wanted.read_only {
                return Err("-C: nothing changes that is read-only".into());
            }
            gate.log_to(log, &LogOptions::of(log))?;
        }
        let counted = CountedDisk::new(Arc::clone(&gate) as Arc<dyn Disk>);
        let export = Export::new("", Arc::clone(&counted) as Arc<dyn Disk>);
        let mut server = Server::new(vec![export], None, Limits::default())?;
        server.listen_unix(socket)?;
        let (ended, end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let thread = std::thread::Builder::new().name(format!("nbd-{minor}"));
        let thread = thread.spawn(move || server.serve(ended.as_fd()))?;
        let (serving, paused, mirror_failed) = (Some((end, thread)), None, false);
        Ok(Opened {
            minor,
            wanted,
            live,
            gate,
            mirror,
            mirror_failed,
            standby,
            counted,
            paused,
            serving,
        })
    }

    /// Ends the server; what was taken is carried out and flushed.
    pub(super) fn close(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        if let Err(e) = self.unpause(None) {
            tracing::error!("{}: what waits fails: {e}", self.wanted.args);
            self.paused = None;
            self.gate.resume();
        }
        self.standby = None;
        let Some((end, thread)) = self.serving.take() else { return Ok(()) };
        drop(end);
        let served = thread.join().map_err(|_| "the server panicked")?;
        Ok(served?)
    }

    /// Holds requests back, and closes the image: its file and its lock are let go.
    pub(super) fn pause(&mut self) -> Result<()> {
        if self.paused.is_some() {
            return Ok(());
        }
        // New requests wait here, and what was taken ends.
        self.gate.pause()?;
        let paused = self.live.pause(PATIENCE).and_then(|paused| {
            paused.close()?;
            Ok(paused)
        });
        match paused {
            Ok(paused) => self.paused = Some(paused),
            Err(e) => {
                self.gate.resume();
                return Err(e.into());
            }
        }
        self.mirror_failed |= self.mirror.take().is_some_and(|mirror| mirror.is_dropped());
        if let Some(args) = self.standby.as_ref().and_then(Standby::taken_over) {
            self.wanted.args = args;
        }
        Ok(())
    }

    /// Opens the image again, or another one, and lets requests go on.
    pub(super) fn unpause(&mut self, args: Option<String>) -> Result<()> {
        let Some(paused) = &self.paused else {
            return match args {
                Some(_) => Err("the image is open: pause it first".into()),
                None => Ok(()),
            };
        };
        let mut wanted = self.wanted.clone();
        wanted.args = args.unwrap_or(wanted.args);
        if self.mirror_failed {
            // It is not what the image is any more.
            wanted.secondary = None;
        }
        let (disk, mirror) = disks_of(&wanted)?;
        paused.install(disk)?;
        (self.wanted.args, self.mirror) = (wanted.args, mirror);
        self.paused = None;
        self.gate.resume();
        Ok(())
    }

    pub(super) fn state(&self) -> u32 {
        if self.paused.is_some() { PAUSED } else { RUNNING }
    }

    pub(super) fn args(&self) -> &str {
        &self.wanted.args
    }

    /// As tapdisk's dictionary: sectors and requests as [read, written].
    pub(super) fn stats(&self) -> Value {
        let both = |of: fn(&Counts) -> u64| [of(self.counted.reads()), of(self.counted.writes())];
        let args = &self.wanted.args;
        let (kind, file) = args.split_once(':').unwrap_or(("", args));
        let failed = self.mirror.as_ref().is_some_and(|m| m.is_dropped()) || self.mirror_failed;
        let failed_over = self.standby.as_ref().is_some_and(|s| s.taken_over().is_some());
        json!({
            "name": args,
            "minor": self.minor,
            "secs": both(|c| c.bytes() / 512),
            "images": [{
                "name": file,
                "hits": both(Counts::requests),
                "fail": both(Counts::failed),
                "driver": {"name": kind},
            }],
            "nbd_mirror_failed": u32::from(failed),
            "failed_over": u32::from(failed_over),
        })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            tracing::error!("{}: {e}", self.wanted.args);
        }
    }
}

/// A disk, and the mirror that it is, if it has one.
type Disks = (Arc<dyn Disk>, Option<Arc<MirrorDisk>>);

fn disks_of(wanted: &Wanted) -> Result<Disks> {
    let disk = disk_of(&wanted.args, wanted)?;
    match &wanted.secondary {
        Some(args) if !wanted.standby => {
            let mirror = MirrorDisk::new(disk, disk_of(args, wanted)?, OnError::Drop)?;
            Ok((Arc::clone(&mirror) as Arc<dyn Disk>, Some(mirror)))
        }
        _ => Ok((disk, None)),
    }
}

pub(super) fn disk_of(args: &str, wanted: &Wanted) -> Result<Arc<dyn Disk>> {
    let access = if wanted.read_only { Access::ReadOnly } else { Access::ReadWrite };
    if NbdTarget::is_meant(args) {
        let target = NbdTarget::parse(args)?;
        return Ok(NbdDisk::open(NbdOptions { access, ..NbdOptions::new(target) })?);
    }
    let (kind, path) = args.split_once(':').ok_or_else(|| format!("{args}: write TYPE:FILE"))?;
    let format: ImageFormat = match kind {
        "aio" => "raw".parse()?,
        kind => kind.parse()?,
    };
    let cached = wanted.no_o_direct || wanted.read_cache;
    let cache = if cached { Cache::Writeback } else { Cache::None };
    let file = OpenOptions::new(path).access(access).cache(cache);
    let backing = BackingPolicy::Allow(wanted.allow_backing.clone());
    Ok(image::open(&ImageOptions::new(format, file).backing(backing))?)
}
