//! Serves all devices of one kind: watches the backend's directory and gives each device a thread.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, after, bounded, select};

use super::control::Claim;
use super::device::{Device, Runner, Thread, Word};
use super::log_limit::LogLimit;
use super::nodes::{DeviceId, Nodes};
use crate::store::{Client, Tx, Watched};
use crate::{DomId, Hypervisor};

/// A kind of device.
pub trait Backend: Send + Sync {
    /// The directory below `backend/`: `vbd`, `vif`, ...
    fn kind(&self) -> &'static str;
    /// Name of the hotplug script whose nodes are ours.
    fn script(&self) -> &'static str;
    /// Keys of the frontend's directory that may change while it is connected: a change of one
    /// calls [`Device::reconfigure`].
    fn live_keys(&self) -> &'static [&'static str] {
        &[]
    }
    /// A device for a node that has appeared. Nothing is opened or mapped yet.
    fn device(&self, id: &DeviceId) -> Box<dyn Device>;
}

/// Whose devices are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every guest's.
    All,
    /// One guest's; serving ends with the guest.
    Domain(DomId),
}

/// Which nodes are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nodesets {
    /// Those whose `script` is the backend's own.
    Ours,
    /// All of the kind (`--any`).
    Any,
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose devices.
    pub scope: Scope,
    /// Which of their nodes.
    pub nodes: Nodesets,
    /// Where locks and control sockets go.
    pub run_dir: PathBuf,
}

/// Serves until `stop` fires or closes, xenstored is gone, or the one guest of the scope is.
pub fn serve(
    hypervisor: &dyn Hypervisor,
    backend: &dyn Backend,
    options: &Options,
    stop: &Receiver<()>,
) -> io::Result<()> {
    let store = Arc::new(hypervisor.store()?);
    let home = store.domain_path(hypervisor.domid())?;
    let root = format!("{home}/backend/{}", backend.kind());
    let watched = match options.scope {
        Scope::All => root.clone(),
        Scope::Domain(domid) => format!("{root}/{domid}"),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build()?;
    store.watch(&watched, "backend")?;
    store.watch("@releaseDomain", "release")?;
    let mut server = Server {
        store,
        home,
        root,
        backend,
        options,
        runtime,
        devices: BTreeMap::new(),
        refused: BTreeMap::new(),
        guest_seen: false,
    };
    let result = server.run(stop);
    server.leave();
    result
}

struct Server<'a> {
    store: Arc<Client>,
    home: String,
    root: String,
    backend: &'a dyn Backend,
    options: &'a Options,
    runtime: tokio::runtime::Runtime,
    devices: BTreeMap<DeviceId, Thread>,
    /// Nodes that we may not serve, with the reason that was logged.
    refused: BTreeMap<DeviceId, String>,
    guest_seen: bool,
}

impl Server<'_> {
    fn run(&mut self, stop: &Receiver<()>) -> io::Result<()> {
        let inbox = self.store.inbox().clone();
        loop {
            select! {
                recv(inbox.bell()) -> _ => {}
                recv(stop) -> _ => return Ok(()),
                // A refused node may have become free, and a finished thread wants to be joined.
                recv(after(Duration::from_secs(1))) -> _ => self.rescan()?,
            }
            for event in inbox.take() {
                match event {
                    Watched::Path { path, token } => self.watched(&path, &token)?,
                    Watched::Everything => {
                        self.rescan()?;
                        self.devices.values().for_each(poke);
                    }
                    Watched::Closed => return Err(io::Error::other("xenstored is gone")),
                }
            }
            if self.guest_is_gone()? {
                return Ok(());
            }
        }
    }

    fn watched(&mut self, path: &str, token: &str) -> io::Result<()> {
        if token == "release" {
            return Ok(());
        }
        if let Some(id) = token.strip_prefix("frontend:") {
            let device = self.devices.iter().find(|(known, _)| known.to_string() == id);
            if let Some((_, thread)) = device {
                poke(thread);
            }
            return Ok(());
        }
        let below = path.strip_prefix(&self.root).unwrap_or_default();
        let mut parts = below.split('/').skip(1);
        let domid = parts.next().and_then(|p| p.parse().ok());
        let devid = parts.next().and_then(|p| p.parse().ok());
        match (domid, devid) {
            (Some(domid), Some(devid)) => {
                self.changed(DeviceId { kind: self.backend.kind(), domid, devid })
            }
            _ => self.rescan(),
        }
    }

    /// Something at or below a device's backend node changed.
    fn changed(&mut self, id: DeviceId) -> io::Result<()> {
        if let Some(thread) = self.devices.get(&id) {
            if !thread.handle.is_finished() {
                poke(thread);
                return Ok(());
            }
            self.bury(&id)?;
        }
        let nodes = Nodes::open(self.store.clone(), &self.home, id.clone())?;
        // Its directory is made in one transaction: without `frontend` it is gone or not ours.
        if nodes.frontend_path().is_empty() || nodes.own("state")?.is_none() {
            self.refused.remove(&id);
            return Ok(());
        }
        if self.options.nodes == Nodesets::Ours && !self.is_ours(&nodes)? {
            return Ok(());
        }
        match self.start(nodes) {
            Ok(thread) => {
                self.refused.remove(&id);
                self.devices.insert(id, thread);
            }
            Err(e) => {
                let reason = e.to_string();
                if self.refused.get(&id) != Some(&reason) {
                    tracing::error!("{id}: {reason}");
                    self.refused.insert(id, reason);
                }
            }
        }
        Ok(())
    }

    fn is_ours(&self, nodes: &Nodes) -> io::Result<bool> {
        let script = nodes.own("script")?.unwrap_or_default();
        Ok(Path::new(&script).file_name().is_some_and(|name| name == self.backend.script()))
    }

    fn start(&mut self, nodes: Nodes) -> io::Result<Thread> {
        let id = nodes.id().clone();
        let bound =
            format!("/sys/bus/xen-backend/devices/{}-{}-{}/driver", id.kind, id.domid, id.devid);
        if let Ok(driver) = std::fs::read_link(&bound) {
            let name = driver.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(io::Error::other(format!(
                "the kernel's driver {name} has this device; unload and blacklist its module (xen-{name}back)"
            )));
        }
        let mut claim = Claim::take(&self.options.run_dir, &id)?;
        let (words, heard) = bounded(1);
        let (ask, requests) = bounded(16);
        claim.listen(self.runtime.handle(), ask)?;
        let frontend_path = nodes.frontend_path().to_owned();
        for key in watched_keys(self.backend) {
            self.store.watch(&format!("{frontend_path}/{key}"), &format!("frontend:{id}"))?;
        }
        let device = self.backend.device(&id);
        let runner = Runner { nodes, device, words: heard, requests, log: LogLimit::default() };
        let handle = std::thread::Builder::new()
            .name(format!("{}-{}-{}", id.kind, id.domid, id.devid))
            .spawn(move || runner.run())?;
        Ok(Thread { words, handle, frontend_path, _kept: Arc::new(claim) })
    }

    /// Looks for nodes that no event told of, and buries devices that ended.
    fn rescan(&mut self) -> io::Result<()> {
        let ended: Vec<DeviceId> = self
            .devices
            .iter()
            .filter(|(_, thread)| thread.handle.is_finished())
            .map(|(id, _)| id.clone())
            .collect();
        for id in ended {
            self.bury(&id)?;
        }
        let domids = match self.options.scope {
            Scope::Domain(domid) => vec![domid.to_string()],
            Scope::All => self.store.list(Tx::NONE, &self.root)?,
        };
        for domid in domids {
            for devid in self.store.list(Tx::NONE, &format!("{}/{domid}", self.root))? {
                if let (Ok(domid), Ok(devid)) = (domid.parse(), devid.parse()) {
                    let id = DeviceId { kind: self.backend.kind(), domid, devid };
                    if !self.devices.contains_key(&id) {
                        self.changed(id)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Joins a device's thread and drops what it held.
    fn bury(&mut self, id: &DeviceId) -> io::Result<()> {
        let Some(thread) = self.devices.remove(id) else { return Ok(()) };
        if thread.handle.join().is_err() {
            tracing::error!("{id}: its thread panicked");
        }
        for key in watched_keys(self.backend) {
            let path = format!("{}/{key}", thread.frontend_path);
            match self.store.unwatch(&path, &format!("frontend:{id}")) {
                Err(e) if !e.is_not_found() => return Err(e.into()),
                _ => {}
            }
        }
        Ok(())
    }

    fn guest_is_gone(&mut self) -> io::Result<bool> {
        let Scope::Domain(domid) = self.options.scope else { return Ok(false) };
        let home = self.store.domain_path(domid)?;
        let there = self.store.get(&home)?.is_some();
        self.guest_seen |= there;
        if there || !self.guest_seen {
            return Ok(false);
        }
        self.rescan()?;
        Ok(self.devices.is_empty())
    }

    /// Ends all devices and leaves their nodes to a successor.
    fn leave(&mut self) {
        for thread in self.devices.values() {
            // The thread may have ended by itself.
            drop(thread.words.send_timeout(Word::Leave, Duration::from_secs(10)));
        }
        for (id, thread) in std::mem::take(&mut self.devices) {
            if thread.handle.join().is_err() {
                tracing::error!("{id}: its thread panicked");
            }
        }
    }
}

/// Keys of each frontend's directory whose changes are told to its device.
fn watched_keys(backend: &dyn Backend) -> impl Iterator<Item = &'static str> {
    ["state"].into_iter().chain(backend.live_keys().iter().copied())
}

fn poke(thread: &Thread) {
    // Full: it will look anyway.
    drop(thread.words.try_send(Word::Look));
}
