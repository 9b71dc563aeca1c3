//! An image that waits for the first one to have no room: then it takes over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use blktap::filters::stall::{Policies, Policy, Stall};
use blktap::image::{BackingPolicy, ImageOptions, open_image};
use blktap::live::LiveDisk;
use blktap::storage::{Access, Lock, OpenOptions};

use super::super::Result;
use super::vbd::{Wanted, disk_of};

/// How long the requests in flight may take before the image is changed.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked whether all is over, and how long it takes to try again.
const LOOK: Duration = Duration::from_millis(200);

/// What the thread that waits shares with the minor.
struct Shared {
    live: Arc<LiveDisk>,
    stall: Arc<Stall>,
    wanted: Wanted,
    /// TYPE:FILE of the second image.
    second: String,
    taken_over: AtomicBool,
    ending: AtomicBool,
}

/// See the module. It waits no more when this is dropped.
pub(super) struct Standby {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Standby {
    /// For an open disk.
    pub(super) fn new(wanted: &Wanted, live: &Arc<LiveDisk>, minor: u32) -> Result<Standby> {
        let second = wanted.secondary.clone().ok_or("-s: name the second image with -2")?;
        builds_on(&second, &wanted.args)?;
        let policies = Policies { on_error: Policy::Report, on_enospc: Policy::Pause };
        let shared = Arc::new(Shared {
            live: Arc::clone(live),
            stall: Stall::new(format!("minor {minor}"), policies),
            wanted: wanted.clone(),
            second,
            taken_over: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(format!("standby-{minor}"));
        let thread = Some(thread.spawn(move || own.run())?);
        Ok(Standby { shared, thread })
    }

    /// What stops the disk when it is full.
    pub(super) fn stall(&self) -> Arc<Stall> {
        Arc::clone(&self.shared.stall)
    }

    /// The second image, once it is the disk.
    pub(super) fn taken_over(&self) -> Option<String> {
        let taken = self.shared.taken_over.load(Ordering::Acquire);
        taken.then(|| self.shared.second.clone())
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the standby's thread panicked");
        }
        // What waits has its error.
        self.shared.stall.end();
    }
}

impl Shared {
    fn run(&self) {
        while !self.ending.load(Ordering::Acquire) {
            if self.stall.wait(LOOK).is_none() {
                continue;
            }
            if self.taken_over.load(Ordering::Acquire) {
                // This one is full too: its errors are the client's.
                return self.stall.end();
            }
            if let Err(e) = self.take_over() {
                tracing::error!("{}: it does not take over: {e}", self.second);
                std::thread::sleep(LOOK);
            }
        }
    }

    /// Puts the second image, which builds on the first, in its place.
    fn take_over(&self) -> Result<()> {
        let paused = self.live.pause(PATIENCE)?;
        paused.close()?;
        let installed = disk_of(&self.second, &self.wanted).and_then(|disk| {
            paused.install(disk)?;
            Ok(())
        });
        if let Err(e) = installed {
            paused.install(disk_of(&self.wanted.args, &self.wanted)?)?;
            return Err(e);
        }
        self.taken_over.store(true, Ordering::Release);
        drop(paused);
        tracing::warn!("{} has no room: {} takes over", self.wanted.args, self.second);
        self.stall.go_on();
        Ok(())
    }
}

/// Whether the image `second` builds on the file of `first`: else it would hide what that has.
fn builds_on(second: &str, first: &str) -> Result<()> {
    let split =
        |args: &str| args.split_once(':').map(|(kind, file)| (kind.to_owned(), file.to_owned()));
    let (Some((kind, path)), Some((_, below))) = (split(second), split(first)) else {
        return Err("-s: both images are written TYPE:FILE".into());
    };
    let file = OpenOptions::new(&path).access(Access::ReadOnly).lock(Lock::Off);
    let options = ImageOptions::new(kind.parse()?, file).backing(BackingPolicy::Ignore);
    let image = open_image(&options)?;
    let named = image.format().backing().map(|name| name.name.clone());
    let folder = std::path::Path::new(&path).parent().unwrap_or(std::path::Path::new("."));
    let same = named.is_some_and(|name| {
        let found = folder.join(name).canonicalize().ok();
        found.is_some() && found == std::path::Path::new(&below).canonicalize().ok()
    });
    match same {
        true => Ok(()),
        false => {
            Err(format!("-s: {path} does not build on {below}: make it an overlay of it").into())
        }
    }
}
