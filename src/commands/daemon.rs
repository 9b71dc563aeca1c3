//! `ringback daemon`: one backend process for each guest and kind of
//! device of ours; one for all guests' vifs, if they are to meet in it.

use std::collections::BTreeMap;
use std::fmt;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, after, bounded, select};
use hypervisor::DomId;
use hypervisor::store::{Client, Tx, Watched};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::{Context, Result, backend};
use crate::cli::{Daemon, Processes};
use crate::signals;

/// A backend that ends sooner than this has done nothing: the next one waits.
const SHORT_LIFE: Duration = Duration::from_millis(500);
/// How long after the first such end; after each further one twice as long,
const BACK_OFF: Duration = Duration::from_millis(100);
/// up to this.
const LONGEST: Duration = Duration::from_secs(3);
/// How often ended children and those that are to be started are looked for, if nothing calls.
const REAP: Duration = Duration::from_millis(200);

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Blk,
    Net,
}

const KINDS: [Kind; 2] = [Kind::Blk, Kind::Net];

impl Kind {
    /// Its name in `ringback backend`.
    fn command(self) -> &'static str {
        match self {
            Kind::Blk => "blk",
            Kind::Net => "net",
        }
    }
    /// Its folder below `backend/`.
    fn folder(self) -> &'static str {
        match self {
            Kind::Blk => "vbd",
            Kind::Net => "vif",
        }
    }
    /// The hotplug script of nodes that are ours.
    fn script(self) -> &'static str {
        match self {
            Kind::Blk => blkback::SCRIPT,
            Kind::Net => netback::SCRIPT,
        }
    }
}

/// Whose devices a process serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Whose {
    /// Those of all guests.
    All,
    /// One guest's.
    Domain(DomId),
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Whose::All => write!(f, "all domains"),
            Whose::Domain(domid) => write!(f, "domain {domid}"),
        }
    }
}

struct Guest {
    child: Option<Child>,
    started: Instant,
    /// When to start the next, once this one has ended.
    next: Instant,
    /// Ends after a short life, in a row.
    failures: u32,
}

impl Guest {
    fn ended(&mut self, now: Instant) {
        self.child = None;
        self.failures = match now.duration_since(self.started) < SHORT_LIFE {
            true => self.failures + 1,
            false => 0,
        };
        self.next = now + pause(self.failures);
    }
}

/// How long a guest waits for its next backend after so many failures in a row.
fn pause(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        n => (BACK_OFF * 2u32.saturating_pow(n - 1).min(1024)).min(LONGEST),
    }
}

/// Rings the bell when a child has ended.
fn watch(child: &Child, bell: Sender<()>) -> Result<()> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let wait = move || {
        while poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).is_err() {}
        // Full: it rings already.
        let _ = bell.try_send(());
    };
    std::thread::Builder::new().name("child".into()).spawn(wait)?;
    Ok(())
}

struct Running<'a> {
    store: Client,
    root: String,
    context: &'a Context,
    options: &'a Daemon,
    guests: BTreeMap<(Kind, Whose), Guest>,
    ended: (Sender<()>, Receiver<()>),
}

/// Runs until a signal or the end of xenstored.
pub fn run(context: &Context, options: &Daemon) -> Result {
    backend::config::<blkback::Config>(&options.serve.set)?;
    backend::config::<netback::Config>(&options.set_net)?;
    let stop = signals::stop()?;
    let hypervisor = context.hypervisor()?;
    let store = hypervisor.store()?;
    let root = format!("{}/backend", store.domain_path(hypervisor.domid())?);
    for kind in KINDS {
        store.watch(&format!("{root}/{}", kind.folder()), kind.folder())?;
    }
    let ended = bounded(1);
    let bell = ended.1.clone();
    let mut daemon = Running { store, root, context, options, guests: BTreeMap::new(), ended };
    tracing::info!("serving block and network devices at {}", daemon.root);
    let inbox = daemon.store.inbox().clone();
    let result = loop {
        select! {
            recv(stop) -> _ => break Ok(ExitCode::SUCCESS),
            recv(inbox.bell()) -> _ => {}
            recv(bell) -> _ => {}
            recv(after(REAP)) -> _ => {}
        }
        let events = inbox.take();
        if events.contains(&Watched::Closed) {
            break Err("xenstored is gone".into());
        }
        // The store is asked only when it has something to say, or a backend has ended.
        let ended = match daemon.reap() {
            Ok(ended) => ended,
            Err(e) => break Err(e),
        };
        if (!events.is_empty() || ended || daemon.waiting())
            && let Err(e) = daemon.look()
        {
            break Err(e);
        }
    };
    daemon.end();
    result
}

impl Running<'_> {
    /// Forgets backends that have ended; whether there were any.
    fn reap(&mut self) -> Result<bool> {
        let mut ended = false;
        for ((kind, whose), guest) in &mut self.guests {
            let Some(child) = &mut guest.child else { continue };
            if let Some(status) = child.try_wait()? {
                let kind = kind.command();
                tracing::info!("the {kind} backend of {whose} has ended: {status}");
                guest.ended(Instant::now());
                ended = true;
            }
        }
        Ok(ended)
    }

    /// Whether a guest has lost its backend and none was started yet.
    fn waiting(&self) -> bool {
        self.guests.values().any(|guest| guest.child.is_none())
    }

    /// Starts a backend for each guest that has a device and none.
    fn look(&mut self) -> Result<()> {
        let mut wanted = Vec::new();
        for kind in KINDS {
            for domid in self.store.list(Tx::NONE, &format!("{}/{}", self.root, kind.folder()))? {
                let Ok(domid) = domid.parse::<DomId>() else { continue };
                if self.has_device(kind, domid)? {
                    wanted.push((kind, self.whose(kind, domid)));
                }
            }
        }
        self.guests.retain(|guest, running| running.child.is_some() || wanted.contains(guest));
        for guest in wanted {
            let now = Instant::now();
            let failures = match self.guests.get(&guest) {
                Some(Guest { child: Some(_), .. }) => continue,
                Some(guest) if now < guest.next => continue,
                Some(guest) => guest.failures,
                None => 0,
            };
            let child = Some(self.spawn(guest)?);
            self.guests.insert(guest, Guest { child, started: now, next: now, failures });
        }
        Ok(())
    }

    /// Whether every node of a kind is taken.
    fn any(&self, kind: Kind) -> bool {
        self.options.serve.any || (kind == Kind::Net && self.options.any_vif)
    }

    fn has_device(&self, kind: Kind, domid: DomId) -> Result<bool> {
        let guest = format!("{}/{}/{domid}", self.root, kind.folder());
        for devid in self.store.list(Tx::NONE, &guest)? {
            let script = self.store.get(&format!("{guest}/{devid}/script"))?;
            let ours = script.is_some_and(|s| s.rsplit('/').next() == Some(kind.script()));
            if ours || self.any(kind) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Who is served by the process that serves a guest's devices.
    fn whose(&self, kind: Kind, domid: DomId) -> Whose {
        match (kind, self.options.net_processes) {
            (Kind::Net, Processes::One) => Whose::All,
            (Kind::Blk, _) | (Kind::Net, Processes::PerGuest) => Whose::Domain(domid),
        }
    }

    fn spawn(&self, (kind, whose): (Kind, Whose)) -> Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--run-dir").arg(&self.context.run_dir);
        if let Some(socket) = &self.context.socket {
            command.arg("--hypervisor").arg(socket);
        }
        command.args(["backend", kind.command()]);
        if let Whose::Domain(domid) = whose {
            command.args(["--domid", &domid.to_string()]);
        }
        if self.any(kind) {
            command.arg("--any");
        }
        let knobs = match kind {
            Kind::Blk => &self.options.serve.set,
            Kind::Net => &self.options.set_net,
        };
        for knob in knobs {
            command.arg("--set").arg(knob);
        }
        if kind == Kind::Blk {
            for folder in &self.options.serve.allow_backing {
                command.arg("--allow-backing").arg(folder);
            }
        }
        let child = command.spawn()?;
        if let Err(e) = watch(&child, self.ended.0.clone()) {
            tracing::debug!("process {} is looked after now and then: {e}", child.id());
        }
        tracing::info!("{}: process {} serves {whose}", kind.command(), child.id());
        Ok(child)
    }

    /// Asks the backends to drain and waits for them.
    fn end(&mut self) {
        let mut children: Vec<Child> =
            self.guests.values_mut().filter_map(|guest| guest.child.take()).collect();
        for child in &children {
            if let Some(pid) = Pid::from_raw(child.id() as i32)
                && let Err(e) = kill_process(pid, Signal::TERM)
            {
                tracing::warn!("cannot end process {}: {e}", child.id());
            }
        }
        for child in &mut children {
            if let Err(e) = child.wait() {
                tracing::warn!("process {}: {e}", child.id());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_backend_is_followed_at_once_and_a_failing_one_ever_later() {
        let started = Instant::now();
        let mut guest = Guest { child: None, started, next: started, failures: 0 };
        guest.ended(started + SHORT_LIFE);
        assert_eq!(guest.next, started + SHORT_LIFE);
        let mut pauses = Vec::new();
        for _ in 0..40 {
            guest.ended(started);
            pauses.push(guest.next - started);
        }
        assert!(pauses.is_sorted());
        assert_eq!((pauses[0], pauses[1], pauses[39]), (BACK_OFF, 2 * BACK_OFF, LONGEST));
        guest.ended(started + SHORT_LIFE);
        assert_eq!(guest.next, started + SHORT_LIFE);
    }
}
