//! `ringback daemon`: one backend process for each guest and kind of
//! device of ours.

use std::collections::BTreeMap;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use crossbeam::channel::{after, select};
use hypervisor::DomId;
use hypervisor::store::{Client, Tx, Watched};
use rustix::process::{Pid, Signal, kill_process};

use super::{Context, Result, backend};
use crate::cli::Daemon;
use crate::signals;

/// A backend that ends sooner than this is not started again at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// How long it then waits.
const BACK_OFF: Duration = Duration::from_secs(2);
/// How often ended children are looked for.
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

struct Guest {
    child: Option<Child>,
    started: Instant,
}

struct Running<'a> {
    store: Client,
    root: String,
    context: &'a Context,
    options: &'a Daemon,
    guests: BTreeMap<(Kind, DomId), Guest>,
}

/// Runs until a signal or the end of xenstored.
pub fn run(context: &Context, options: &Daemon) -> Result {
    backend::config(&options.serve)?;
    backend::net_config(&options.set_net)?;
    let stop = signals::stop()?;
    let hypervisor = context.hypervisor()?;
    let store = hypervisor.store()?;
    let root = format!("{}/backend", store.domain_path(hypervisor.domid())?);
    for kind in KINDS {
        store.watch(&format!("{root}/{}", kind.folder()), kind.folder())?;
    }
    let mut daemon = Running { store, root, context, options, guests: BTreeMap::new() };
    tracing::info!("serving block and network devices at {}", daemon.root);
    let inbox = daemon.store.inbox().clone();
    let result = loop {
        select! {
            recv(stop) -> _ => break Ok(ExitCode::SUCCESS),
            recv(inbox.bell()) -> _ => {}
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
        for ((kind, domid), guest) in &mut self.guests {
            let Some(child) = &mut guest.child else { continue };
            if let Some(status) = child.try_wait()? {
                let kind = kind.command();
                tracing::info!("the {kind} backend of domain {domid} has ended: {status}");
                guest.child = None;
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
                    wanted.push((kind, domid));
                }
            }
        }
        self.guests.retain(|guest, running| running.child.is_some() || wanted.contains(guest));
        for (kind, domid) in wanted {
            let idle = match self.guests.get(&(kind, domid)) {
                Some(Guest { child: Some(_), .. }) => false,
                // It failed at once: not again and again.
                Some(Guest { child: None, started }) => started.elapsed() > SHORT_LIFE + BACK_OFF,
                None => true,
            };
            if idle {
                let guest =
                    Guest { child: Some(self.spawn(kind, domid)?), started: Instant::now() };
                self.guests.insert((kind, domid), guest);
            }
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

    fn spawn(&self, kind: Kind, domid: DomId) -> Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--run-dir").arg(&self.context.run_dir);
        if let Some(socket) = &self.context.socket {
            command.arg("--hypervisor").arg(socket);
        }
        command.args(["backend", kind.command(), "--domid", &domid.to_string()]);
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
        tracing::info!(
            "process {} is the {} backend of domain {domid}",
            child.id(),
            kind.command()
        );
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
