//! An image that a tapdisk has open and serves.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use blktap::export::nbd::{Export, Limits, Server};
use blktap::filters::changed::LogOptions;
use blktap::filters::counted::Counts;
use blktap::filters::mirror::OnError;
use blktap::filters::{ChangedDisk, CountedDisk, MirrorDisk};
use blktap::image::{self, BackingPolicy, ImageFormat, ImageOptions};
use blktap::storage::{Access, Cache, OpenOptions};
use blktap::{Disk, NbdDisk, NbdOptions, NbdTarget};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::Result;

/// State of an image that is served.
const RUNNING: u32 = 0;
/// Quiesced, closed and paused, as blktap's tapdisk has a paused one.
const PAUSED: u32 = 0x2a;

/// What to open.
#[derive(Deserialize)]
pub(super) struct Wanted {
    args: String,
    read_only: bool,
    no_o_direct: bool,
    log: Option<PathBuf>,
    secondary: Option<String>,
    allow_backing: Vec<PathBuf>,
}

/// See the module.
pub(super) struct Opened {
    minor: u32,
    args: String,
    gate: Arc<ChangedDisk>,
    mirror: Option<Arc<MirrorDisk>>,
    counted: Arc<CountedDisk>,
    state: u32,
    /// The server's thread, and what ends it when it is dropped.
    serving: Option<(OwnedFd, JoinHandle<std::io::Result<()>>)>,
}

impl Opened {
    /// Opens the image and serves it at `socket`.
    pub(super) fn open(wanted: Wanted, minor: u32, socket: &Path) -> Result<Opened> {
        let disk = disk_of(&wanted.args, &wanted)?;
        let mirror = match &wanted.secondary {
            None => None,
            Some(args) => {
                let second = disk_of(args, &wanted)?;
                Some(MirrorDisk::new(Arc::clone(&disk), second, OnError::Drop)?)
            }
        };
        let disk = mirror.clone().map_or(disk, |mirror| mirror as Arc<dyn Disk>);
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
        let (args, serving) = (wanted.args, Some((end, thread)));
        Ok(Opened { minor, args, gate, mirror, counted, state: RUNNING, serving })
    }

    /// Ends the server; what was taken is carried out and flushed.
    pub(super) fn close(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.resume();
        let Some((end, thread)) = self.serving.take() else { return Ok(()) };
        drop(end);
        let served = thread.join().map_err(|_| "the server panicked")?;
        Ok(served?)
    }

    pub(super) fn pause(&mut self) -> Result<()> {
        self.gate.pause()?;
        self.state = PAUSED;
        Ok(())
    }

    pub(super) fn resume(&mut self) {
        self.gate.resume();
        self.state = RUNNING;
    }

    pub(super) fn state(&self) -> u32 {
        self.state
    }

    pub(super) fn args(&self) -> &str {
        &self.args
    }

    /// As tapdisk's dictionary: sectors and requests as [read, written].
    pub(super) fn stats(&self) -> Value {
        let both = |of: fn(&Counts) -> u64| [of(self.counted.reads()), of(self.counted.writes())];
        let (kind, file) = self.args.split_once(':').unwrap_or(("", &self.args));
        json!({
            "name": self.args,
            "minor": self.minor,
            "secs": both(|c| c.bytes() / 512),
            "images": [{
                "name": file,
                "hits": both(Counts::requests),
                "fail": both(Counts::failed),
                "driver": {"name": kind},
            }],
            "nbd_mirror_failed": u32::from(self.mirror.as_ref().is_some_and(|m| m.is_dropped())),
        })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            tracing::error!("{}: {e}", self.args);
        }
    }
}

fn disk_of(args: &str, wanted: &Wanted) -> Result<Arc<dyn Disk>> {
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
    let cache = if wanted.no_o_direct { Cache::Writeback } else { Cache::None };
    let file = OpenOptions::new(path).access(access).cache(cache);
    let backing = BackingPolicy::Allow(wanted.allow_backing.clone());
    Ok(image::open(&ImageOptions::new(format, file).backing(backing))?)
}
