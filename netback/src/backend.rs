//! A vif as the xenbus server sees it: negotiates, opens what it connects to, runs the queues.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use hypervisor::xenbus::knobs::Knobs;
use hypervisor::xenbus::{
    Backend, Device, DeviceId, Fault, Faults, Key, LogLimit, Meeting, Nodes, Parting, State, Stats,
    inflight,
};
use hypervisor::{DomId, Hypervisor};
use serde_json::{Value, json};

use crate::config::Config;
use crate::control::{self, Command};
use crate::endpoint::Endpoint;
use crate::endpoint::tap::{Persistence, Tap};
use crate::inflight::tables;
use crate::limit::{self, Limits};
use crate::negotiate::{Accepted, Offer};
use crate::queue::{Queue, Start};
use crate::rx::Shape;

/// Name of the hotplug script whose nodes are ours.
pub const SCRIPT: &str = "vif-ringback";

/// What a vif stands on.
pub trait Host: Send {
    /// What it connects to.
    fn endpoint(&self) -> &dyn Endpoint;
    /// A guest has connected: what is there stays for a successor, should this process die.
    fn keep(&self) -> std::io::Result<()>;
    /// Nobody will come after this one.
    fn forget(&self) -> std::io::Result<()>;
}

/// Opens what a vif connects to, before its frontend is told of the backend. Its error's text
/// reaches the guest's administrator.
pub type Open = dyn Fn(&Nodes) -> Result<Box<dyn Host>, Fault> + Send + Sync;

impl Host for Tap {
    fn endpoint(&self) -> &dyn Endpoint {
        self
    }
    fn keep(&self) -> std::io::Result<()> {
        self.persist(Persistence::Stays)
    }
    fn forget(&self) -> std::io::Result<()> {
        self.persist(Persistence::Goes)
    }
}

/// The TAP device of a vif: `vifDOMID.DEVID`, to which a hotplug script gives the name that the key
/// `vifname` wants. A new vif never takes a device that has that name already: it is another's.
pub fn open_tap(nodes: &Nodes) -> Result<Box<dyn Host>, Fault> {
    let id = nodes.id();
    let new = nodes.own("state")?.is_none_or(|state| State::parse(&state) == State::Initialising);
    let left = nodes.own("vifname")?.filter(|name| !new && Tap::exists(name));
    let name = left.unwrap_or_else(|| format!("vif{}.{}", id.domid, id.devid));
    Ok(Box::new(Tap::open(&name)?))
}

/// The network backend: gives the xenbus server its devices.
pub struct NetBackend {
    hypervisor: Arc<dyn Hypervisor>,
    config: Config,
    run_dir: PathBuf,
    open: Arc<Open>,
}

impl NetBackend {
    /// `run_dir` is where stats pages go; `open` opens what each vif connects to.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        config: Config,
        run_dir: PathBuf,
        open: Arc<Open>,
    ) -> NetBackend {
        NetBackend { hypervisor, config, run_dir, open }
    }
}

impl Backend for NetBackend {
    fn kind(&self) -> &'static str {
        "vif"
    }
    fn script(&self) -> &'static str {
        SCRIPT
    }
    fn device(&self, id: &DeviceId) -> Box<dyn Device> {
        Box::new(NetDevice {
            hypervisor: self.hypervisor.clone(),
            config: self.config.clone(),
            run_dir: self.run_dir.clone(),
            open: self.open.clone(),
            id: id.clone(),
            host: None,
            serving: None,
            log: LogLimit::default(),
        })
    }
}

struct NetDevice {
    hypervisor: Arc<dyn Hypervisor>,
    config: Config,
    run_dir: PathBuf,
    open: Arc<Open>,
    id: DeviceId,
    /// There from the first look at the node on: hotplug scripts want to find it.
    host: Option<Box<dyn Host>>,
    serving: Option<Serving>,
    /// The guest decides how often it connects.
    log: LogLimit,
}

/// What exists while a device is connected.
struct Serving {
    queues: Vec<Queue>,
    config: Config,
    limits: Arc<Limits>,
    _stats: Stats,
}

fn offer(config: &Config) -> Offer {
    Offer {
        scatter: true,
        tso4: true,
        tso6: true,
        checksum6: true,
        split: true,
        multicast: false,
        ctrl_ring: false,
        xdp_headroom: false,
        max_queues: config.max_queues,
        max_ring_page_order: config.max_ring_page_order,
    }
}

impl NetDevice {
    /// The device's own knobs over the process's.
    fn config_of(&self, nodes: &Nodes) -> Result<Config, Fault> {
        let mut config = self.config.clone();
        if let Some(options) = nodes.own("options")? {
            config.set_all(&options).map_err(|e| Fault(format!("options: {e}")))?;
        }
        if let Some(bytes) = nodes.own("rate")?.as_deref().and_then(limit::parse) {
            config.rate.bytes = bytes;
        }
        Ok(config)
    }

    /// What the vif stands on, opened if it is not.
    fn host(&mut self, nodes: &Nodes) -> Result<&dyn Host, Fault> {
        let host = match self.host.take() {
            Some(host) => host,
            None => (self.open)(nodes)?,
        };
        Ok(&**self.host.insert(host))
    }

    fn start(
        &mut self,
        nodes: &Nodes,
        config: &Config,
        accepted: &Accepted,
        (how, faults): (Meeting, &Faults),
    ) -> Result<Serving, Fault> {
        let (hypervisor, id) = (self.hypervisor.clone(), self.id.clone());
        let run_dir = self.run_dir.clone();
        let name = format!("vif{}", id.devid);
        let stats = Stats::create(&run_dir, &id, name, 3 * accepted.queues.len());
        let host = self.host(nodes)?;
        let endpoint = host.endpoint();
        endpoint.connect(accepted.queues.len(), accepted.accepts)?;
        let limits = Arc::new(Limits::new(config.rate, Instant::now()));
        let tables = tables(&run_dir, &id, accepted, how);
        let mut queues = Vec::new();
        let both = tables.memory.as_chunks().0.iter();
        for (number, (keys, [tx_table, rx_table])) in accepted.queues.iter().zip(both).enumerate() {
            queues.push(Queue::start(Start {
                hypervisor: &*hypervisor,
                endpoint: endpoint.queue(number)?,
                config,
                name: format!("vif-{}-{}.{number}", id.domid, id.devid),
                domid: id.domid as DomId,
                keys,
                tx_table,
                rx_table,
                past: &tables.past,
                accepts: accepted.accepts,
                leaves_host: endpoint.abilities().into(),
                rx_notify: accepted.rx_notify,
                limits: limits.clone(),
                shape: Shape { headroom: accepted.xdp_headroom },
                faults: faults.clone(),
                tx_counters: stats.block(&format!("tx-ring-{number}")),
                rx_counters: stats.block(&format!("rx-ring-{number}")),
                counters: stats.block(&format!("queue-{number}")),
            })?);
        }
        host.keep()?;
        Ok(Serving { queues, config: config.clone(), limits, _stats: stats })
    }

    /// Changes a knob of the running queues.
    fn set(&mut self, knob: &str, value: &str) -> Result<Value, Fault> {
        let Some(serving) = &mut self.serving else {
            return Err(Fault("the device is not connected".into()));
        };
        let mut config = serving.config.clone();
        config.set_live(knob, value).map_err(Fault)?;
        serving.limits.set(config.rate, Instant::now());
        serving.queues.iter().for_each(|queue| queue.set(&config));
        serving.config = config;
        Ok(json!({"knob": knob, "value": value}))
    }

    /// The guest is done with what the vif connects to.
    fn part(&self) {
        let Some(host) = &self.host else { return };
        host.endpoint().disconnect();
        if let Err(e) = host.forget() {
            tracing::warn!("{}: {e}", self.id);
        }
    }

    /// Ends the queues; whether there were any.
    fn stop(&mut self) -> bool {
        let Some(mut serving) = self.serving.take() else { return false };
        // All are told before the first is waited for.
        serving.queues.iter().for_each(Queue::stop);
        serving.queues.clear();
        true
    }
}

impl Device for NetDevice {
    fn advertise(&mut self, nodes: &Nodes) -> Result<Vec<Key>, Fault> {
        let config = self.config_of(nodes)?;
        self.host(nodes)?;
        Ok(offer(&config).keys())
    }

    fn connect(&mut self, nodes: &Nodes, how: Meeting, faults: Faults) -> Result<Vec<Key>, Fault> {
        self.disconnect(Parting::Frontend);
        let config = self.config_of(nodes)?;
        let accepted = Accepted::read(&offer(&config), |key| nodes.front(key).ok().flatten())
            .map_err(|e| Fault(e.to_string()))?;
        let serving = self.start(nodes, &config, &accepted, (how, &faults))?;
        if self.log.permits(&self.id) {
            tracing::info!(
                "{}: {} with {} queue(s)",
                self.id,
                if how == Meeting::Fresh { "connected" } else { "attached" },
                serving.queues.len()
            );
        }
        self.serving = Some(serving);
        Ok(Vec::new())
    }

    fn disconnect(&mut self, why: Parting) {
        if !self.stop() {
            return;
        }
        if why == Parting::Frontend {
            inflight::forget(&self.run_dir, &self.id);
            self.part();
        }
        if self.log.permits(&self.id) {
            tracing::info!("{}: disconnected", self.id);
        }
    }

    fn release(&mut self) {
        self.stop();
    }

    fn tick(&mut self, _: &Nodes) -> Result<(), Fault> {
        if let Some(serving) = &self.serving {
            serving.queues.iter().for_each(Queue::note_cpu);
        }
        Ok(())
    }

    fn control(&mut self, _: &Nodes, line: &str) -> String {
        control::answer(line, |command| match command {
            Command::Set { knob, value } => self.set(&knob, &value),
        })
    }
}
