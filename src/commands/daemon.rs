//! `ringback daemon`: one backend process for each guest that has a device of ours.

use std::collections::BTreeMap;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use crossbeam::channel::{after, select};
use hypervisor::DomId;
use hypervisor::store::{Client, Tx, Watched};
use rustix::process::{Pid, Signal, kill_process};

use super::{Context, Result, backend};
use crate::cli::Serve;
use crate::signals;

/// A backend that ends sooner than this is not started again at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// How long it then waits.
const BACK_OFF: Duration = Duration::from_secs(2);
/// How often ended children are looked for.
const REAP: Duration = Duration::from_millis(200);

struct Guest {
    child: Option<Child>,
    started: Instant,
}

struct Daemon<'a> {
    store: Client,
    root: String,
    context: &'a Context,
    serve: &'a Serve,
    guests: BTreeMap<DomId, Guest>,
}

/// Runs until a signal or the end of xenstored.
pub fn run(context: &Context, serve: &Serve) -> Result {
    backend::config(serve)?;
    let stop = signals::stop()?;
    let hypervisor = context.hypervisor()?;
    let store = hypervisor.store()?;
    let root = format!("{}/backend/vbd", store.domain_path(hypervisor.domid())?);
    store.watch(&root, "backend")?;
    let mut daemon = Daemon { store, root, context, serve, guests: BTreeMap::new() };
    tracing::info!("serving block devices at {}", daemon.root);
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

impl Daemon<'_> {
    /// Forgets backends that have ended; whether there were any.
    fn reap(&mut self) -> Result<bool> {
        let mut ended = false;
        for (domid, guest) in &mut self.guests {
            let Some(child) = &mut guest.child else { continue };
            if let Some(status) = child.try_wait()? {
                tracing::info!("the backend of domain {domid} has ended: {status}");
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
        for domid in self.store.list(Tx::NONE, &self.root)? {
            let Ok(domid) = domid.parse::<DomId>() else { continue };
            if self.has_device(domid)? {
                wanted.push(domid);
            }
        }
        self.guests.retain(|domid, guest| guest.child.is_some() || wanted.contains(domid));
        for domid in wanted {
            let idle = match self.guests.get(&domid) {
                Some(Guest { child: Some(_), .. }) => false,
                // It failed at once: not again and again.
                Some(Guest { child: None, started }) => started.elapsed() > SHORT_LIFE + BACK_OFF,
                None => true,
            };
            if idle {
                let child = self.spawn(domid)?;
                self.guests.insert(domid, Guest { child: Some(child), started: Instant::now() });
            }
        }
        Ok(())
    }

    fn has_device(&self, domid: DomId) -> Result<bool> {
        for devid in self.store.list(Tx::NONE, &format!("{}/{domid}", self.root))? {
            let script = self.store.get(&format!("{}/{domid}/{devid}/script", self.root))?;
            let ours = script.is_some_and(|s| s.rsplit('/').next() == Some(blkback::SCRIPT));
            if ours || self.serve.any {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn spawn(&self, domid: DomId) -> Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--run-dir").arg(&self.context.run_dir);
        if let Some(socket) = &self.context.socket {
            command.arg("--hypervisor").arg(socket);
        }
        command.args(["backend", "blk", "--domid", &domid.to_string()]);
        if self.serve.any {
            command.arg("--any");
        }
        for knob in &self.serve.set {
            command.arg("--set").arg(knob);
        }
        for folder in &self.serve.allow_backing {
            command.arg("--allow-backing").arg(folder);
        }
        let child = command.spawn()?;
        tracing::info!("process {} serves domain {domid}", child.id());
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
