//! A vif as the xenbus server sees it: negotiates, opens what it connects to, runs the queues.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use hypervisor::xenbus::inflight::Past;
use hypervisor::xenbus::knobs::Knobs;
use hypervisor::xenbus::{
    Backend, Device, DeviceId, Fault, Faults, Key, LogLimit, Meeting, Nodes, Parting, State, Stats,
    inflight,
};
use hypervisor::{DomId, Hypervisor};
use serde_json::{Value, json};

use crate::config::{Carrier, Config};
use crate::control::{self, Command};
use crate::ctrl::{self, CtrlRing};
use crate::endpoint::Endpoint;
use crate::endpoint::named;
use crate::endpoint::tap::{Persistence, Tap};
use crate::filter::Filter;
use crate::filter::guard::{Addresses, AntiSpoof};
use crate::hold::{Amount, Then};
use crate::inflight::{Lasting, tables};
use crate::kept::Kept;
use crate::limit::{self, Limits};
use crate::live::{Live, Wishes};
use crate::mailbox::Mailbox;
use crate::negotiate::{Accepted, LIVE_KEYS, Multicast, Offer};
use crate::queue::{Queue, Settings, Start};
use crate::staging::Staging;
use crate::staging::noted::Noted;

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
    fn live_keys(&self) -> &'static [&'static str] {
        LIVE_KEYS
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
            carrier: None,
            output: Then::Pass,
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
    /// The link, if an operator has changed it.
    carrier: Option<Carrier>,
    /// What becomes of what the guest sends, now and when it connects again.
    output: Then,
    /// The guest decides how often it connects.
    log: LogLimit,
}

/// What exists while a device is connected.
struct Serving {
    queues: Vec<Queue>,
    ctrl: Option<CtrlRing>,
    live: Arc<Live>,
    offer: Offer,
    settings: Settings,
    addresses: Addresses,
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
        multicast: true,
        ctrl_ring: true,
        xdp_headroom: true,
        max_queues: config.max_queues,
        max_ring_page_order: config.max_ring_page_order,
    }
}

fn carrier_key(carrier: Carrier) -> Key {
    ("carrier".into(), if carrier == Carrier::Up { "1" } else { "0" }.into())
}

/// What holds when the queues begin.
fn live_of(config: &Config, accepted: &Accepted, lasting: &Lasting) -> Live {
    let mut wishes = Wishes {
        multicast: accepted.multicast,
        headroom: accepted.xdp_headroom,
        carrier: config.carrier,
        ..Wishes::default()
    };
    let kept = Kept::new(lasting.kept.clone());
    match lasting.past {
        Past::None => {}
        Past::Kept => kept.load(accepted.queues.len(), &mut wishes),
        Past::Lost(_) => wishes.multicast = Multicast::Flood,
    }
    let staging = accepted.queues.iter().map(|_| Staging::new(config.staging_grants)).collect();
    Live::new(wishes, kept, staging)
}

/// One for each queue, if there are several.
fn inboxes(queues: usize) -> std::io::Result<Arc<[Mailbox]>> {
    let made = if queues > 1 { queues } else { 0 };
    (0..made).map(|_| Mailbox::new()).collect()
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
        // Of a TAP device this key is the hotplug script's (Xen's vif-bridge, from 4.20 on).
        if let (false, Some(vlan)) = (named::is_tap(nodes)?, nodes.own("vlan")?) {
            config.set("vlan", vlan.trim()).map_err(Fault)?;
        }
        if let Some(mode) = nodes.own("antispoof")? {
            config.set("antispoof", mode.trim()).map_err(Fault)?;
        }
        config.carrier = self.carrier.unwrap_or(config.carrier);
        Ok(config)
    }

    /// The knobs with what they make of the node.
    fn settings(config: Config, nodes: &Nodes) -> Result<(Settings, Addresses), Fault> {
        let (mac, ip) = (nodes.own("mac")?, nodes.own("ip")?);
        let is_watched = config.antispoof != AntiSpoof::Off;
        let addresses = Addresses::parse(mac.as_deref(), ip.as_deref());
        // What nobody asks for may be anything.
        let addresses =
            if is_watched { addresses.map_err(Fault)? } else { addresses.unwrap_or_default() };
        let filter = Filter::new(&config, &addresses).map_err(Fault)?;
        Ok((Settings { config, filter }, addresses))
    }

    /// What the vif stands on, opened if it is not.
    fn host(&mut self, nodes: &Nodes) -> Result<&dyn Host, Fault> {
        let host = match self.host.take() {
            Some(host) => host,
            None => (self.open)(nodes)?,
        };
        Ok(&**self.host.insert(host))
    }

    /// What the frontend may choose from.
    fn offer(&mut self, nodes: &Nodes, config: &Config) -> Result<Offer, Fault> {
        let most = self.host(nodes)?.endpoint().most_queues();
        Ok(Offer { max_queues: config.max_queues.min(most), ..offer(config) })
    }

    fn start(
        &mut self,
        nodes: &Nodes,
        (settings, addresses): (Settings, Addresses),
        (mut offer, accepted): (Offer, &Accepted),
        (how, faults): (Meeting, &Faults),
    ) -> Result<Serving, Fault> {
        let config = &settings.config;
        let (hypervisor, id) = (self.hypervisor.clone(), self.id.clone());
        let (run_dir, output) = (self.run_dir.clone(), self.output);
        let name = format!("vif{}", id.devid);
        let stats = Stats::create(&run_dir, &id, name, 3 * accepted.queues.len() + 1);
        let host = self.host(nodes)?;
        let endpoint = host.endpoint();
        endpoint.connect(accepted.queues.len(), accepted.accepts)?;
        endpoint.link(config.carrier)?;
        let limits = Arc::new(Limits::new(config.rate, Instant::now()));
        let tables = tables(&run_dir, &id, accepted, how);
        let live = Arc::new(live_of(config, accepted, &tables));
        let inboxes = inboxes(accepted.queues.len())?;
        let name = format!("vif-{}-{}", id.domid, id.devid);
        let domid = id.domid as DomId;
        let mut queues = Vec::new();
        for (number, (keys, tables_of)) in accepted.queues.iter().zip(&tables.queues).enumerate() {
            let [tx_table, rx_table] = tables_of;
            queues.push(Queue::start(Start {
                hypervisor: &*hypervisor,
                endpoint: endpoint.queue(number)?,
                settings: &settings,
                output,
                name: format!("{name}.{number}"),
                domid,
                keys,
                tx_table,
                rx_table,
                past: &tables.past,
                accepts: accepted.accepts,
                leaves_host: config.offloads.left_to(endpoint.abilities()),
                rx_notify: accepted.rx_notify,
                limits: limits.clone(),
                number,
                inboxes: inboxes.clone(),
                live: live.clone(),
                faults: faults.clone(),
                tx_counters: stats.block(&format!("tx-ring-{number}")),
                rx_counters: stats.block(&format!("rx-ring-{number}")),
                counters: stats.block(&format!("queue-{number}")),
            })?);
        }
        let ctrl = accepted.ctrl.map(|keys| {
            CtrlRing::start(ctrl::Start {
                hypervisor: &*hypervisor,
                name: format!("{name}.ctrl"),
                domid,
                keys,
                table: &tables.ctrl,
                past: &tables.past,
                live: live.clone(),
                queues: queues.len(),
                noted: tables.noted.iter().cloned().map(Noted::new).collect(),
                faults: faults.clone(),
                counters: stats.block("ctrl-ring"),
            })
        });
        let ctrl = ctrl.transpose()?;
        host.keep()?;
        // The guest has named its groups and will not again: it gets all.
        offer.multicast &= !matches!(tables.past, Past::Lost(_));
        Ok(Serving { queues, ctrl, live, offer, settings, addresses, limits, _stats: stats })
    }

    /// Changes the link, for later connections too, and tells the guest.
    fn set_carrier(&mut self, nodes: &Nodes, value: &str) -> Result<Value, Fault> {
        self.config.set("carrier", value).map_err(Fault)?;
        let carrier = self.config.carrier;
        self.carrier = Some(carrier);
        nodes.write(&[carrier_key(carrier)])?;
        if let Some(serving) = &mut self.serving {
            serving.settings.config.carrier = carrier;
            serving.live.change(|wishes| wishes.carrier = carrier);
            if let Some(host) = &self.host {
                host.endpoint().link(carrier)?;
            }
        }
        Ok(json!({"knob": "carrier", "value": value}))
    }

    /// Changes a knob of the running queues.
    fn set(&mut self, knob: &str, value: &str) -> Result<Value, Fault> {
        let Some(serving) = &mut self.serving else {
            return Err(Fault("the device is not connected".into()));
        };
        let mut config = serving.settings.config.clone();
        config.set_live(knob, value).map_err(Fault)?;
        let filter = Filter::new(&config, &serving.addresses).map_err(Fault)?;
        serving.limits.set(config.rate, Instant::now());
        serving.settings = Settings { config, filter };
        serving.queues.iter().for_each(|queue| queue.set(&serving.settings));
        Ok(json!({"knob": knob, "value": value}))
    }

    /// Carries out a command on what is held of each queue.
    fn output(&mut self, then: Then, act: impl Fn(&Queue) -> Amount) -> Result<Value, Fault> {
        self.output = then;
        let queues = self.serving.iter().flat_map(|serving| &serving.queues);
        let (packets, bytes) = queues.map(act).fold((0, 0), |(packets, bytes), amount| {
            (packets + amount.packets, bytes + amount.bytes)
        });
        Ok(json!({"packets": packets, "bytes": bytes}))
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
        serving.ctrl.iter().for_each(CtrlRing::stop);
        serving.ctrl = None;
        serving.queues.clear();
        true
    }
}

impl Device for NetDevice {
    fn advertise(&mut self, nodes: &Nodes) -> Result<Vec<Key>, Fault> {
        let config = self.config_of(nodes)?;
        // What is missing is said before a guest is started.
        Self::settings(config.clone(), nodes)?;
        let mut keys = self.offer(nodes, &config)?.keys();
        keys.push(carrier_key(config.carrier));
        Ok(keys)
    }

    fn connect(&mut self, nodes: &Nodes, how: Meeting, faults: Faults) -> Result<Vec<Key>, Fault> {
        self.disconnect(Parting::Frontend);
        if how == Meeting::Attach && nodes.own("carrier")?.as_deref() == Some("0") {
            self.carrier = Some(Carrier::Down);
        }
        let config = self.config_of(nodes)?;
        let offer = self.offer(nodes, &config)?;
        let accepted = Accepted::read(&offer, |key| nodes.front(key).ok().flatten())
            .map_err(|e| Fault(e.to_string()))?;
        let settings = Self::settings(config, nodes)?;
        let serving = self.start(nodes, settings, (offer, &accepted), (how, &faults))?;
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

    fn reconfigure(&mut self, nodes: &Nodes) -> Result<(), Fault> {
        let Some(serving) = &self.serving else { return Ok(()) };
        let (multicast, headroom) =
            Accepted::live(&serving.offer, |key| nodes.front(key).ok().flatten())
                .map_err(|e| Fault(e.to_string()))?;
        let now = serving.live.look().wishes;
        if (now.multicast, now.headroom) != (multicast, headroom) {
            serving.live.change(|wishes| {
                (wishes.multicast, wishes.headroom) = (multicast, headroom);
            });
        }
        Ok(())
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

    fn control(&mut self, nodes: &Nodes, line: &str) -> String {
        control::answer(line, |command| match command {
            Command::Set { knob, value } if knob == "carrier" => self.set_carrier(nodes, &value),
            Command::Set { knob, value } => self.set(&knob, &value),
            Command::HoldOutput {} => self.output(Then::Hold, Queue::hold),
            Command::ReleaseOutput { then } => self.output(then, |queue| queue.release(then)),
            Command::DropOutput { then } => self.output(then, |queue| queue.discard(then)),
        })
    }
}
