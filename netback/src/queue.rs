//! One queue of a vif: its thread, and how the device's control reaches it.

pub mod door;
mod to_guest;
mod worker;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use hypervisor::xenbus::inflight::{Past, TableMemory};
use hypervisor::xenbus::queue::{Shared, Thread};
use hypervisor::xenbus::{Fault, Faults};
use hypervisor::{Access, DomId, EventChannel, Grants, Hypervisor, SharedMapping};
use perf::Handle;
use perf::polling::Poller;
use rings::{BackRing, Notify, Protocol, RingCounters, Table};

use crate::config::Config;
use crate::counters::QueueCounters;
use crate::endpoint::{Accepts, EndpointQueue};
use crate::filter::Filter;
use crate::frame::Pool;
use crate::hold::{Amount, Hold, Then};
use crate::limit::Limits;
use crate::live::Live;
use crate::mailbox::Mailbox;
use crate::negotiate::{Ports, QueueKeys, RxNotify};
use crate::offload::Leaves;
use crate::proto::Rx;
use door::Doorkeeper;
use to_guest::ToGuest;
use worker::{Run, Worker};

/// Frames of one queue, both ways.
const FRAMES: usize = 256;
/// Packets of one round, each way.
const BATCH: usize = 64;

/// What can change while a queue runs by an operator's hand: the knobs, and the filter that they make.
#[derive(Clone)]
pub(crate) struct Settings {
    pub config: Config,
    pub filter: Filter,
}

/// The event channels of a queue's two rings.
pub(crate) enum Channels {
    /// One for both.
    Shared(Box<dyn EventChannel>),
    /// One each.
    Split { tx: Box<dyn EventChannel>, rx: Box<dyn EventChannel> },
}

impl Channels {
    fn bind(hypervisor: &dyn Hypervisor, domid: DomId, ports: Ports) -> Result<Channels, Fault> {
        let bind = |port| {
            let channel = hypervisor.bind(domid, port);
            channel.map_err(|e| Fault(format!("binding event channel {port}: {e}")))
        };
        Ok(match ports {
            Ports::Shared(port) => Channels::Shared(bind(port)?),
            Ports::Split { tx, rx } => Channels::Split { tx: bind(tx)?, rx: bind(rx)? },
        })
    }
    fn tx(&self) -> &dyn EventChannel {
        match self {
            Channels::Shared(both) => &**both,
            Channels::Split { tx, .. } => &**tx,
        }
    }
    fn rx(&self) -> &dyn EventChannel {
        match self {
            Channels::Shared(both) => &**both,
            Channels::Split { rx, .. } => &**rx,
        }
    }
    /// The second one, if there are two.
    fn second(&self) -> Option<&dyn EventChannel> {
        match self {
            Channels::Shared(_) => None,
            Channels::Split { rx, .. } => Some(&**rx),
        }
    }
}

/// All that a queue needs to begin.
pub(crate) struct Start<'a> {
    pub hypervisor: &'a dyn Hypervisor,
    pub endpoint: Box<dyn EndpointQueue>,
    pub settings: &'a Settings,
    /// What becomes of what the guest sends.
    pub output: Then,
    pub name: String,
    pub domid: DomId,
    pub keys: &'a QueueKeys,
    /// Where the in-flight tables of its rings lie, and what is in them.
    pub tx_table: &'a TableMemory,
    pub rx_table: &'a TableMemory,
    pub past: &'a Past,
    pub accepts: Accepts,
    pub leaves_host: Leaves,
    pub rx_notify: RxNotify,
    /// Which of the vif's queues it is.
    pub number: usize,
    /// Frames that another queue has taken from the endpoint, for each; none where there is but one.
    pub inboxes: Arc<[Mailbox]>,
    pub live: Arc<Live>,
    pub limits: Arc<Limits>,
    pub faults: Faults,
    pub tx_counters: Handle<RingCounters>,
    pub rx_counters: Handle<RingCounters>,
    pub counters: Handle<QueueCounters>,
}

impl Start<'_> {
    /// The way to the guest, over its rx ring.
    fn way(&self, ring: Ring<Rx>, channels: Arc<Channels>) -> ToGuest {
        ToGuest {
            name: self.name.clone(),
            domid: self.domid,
            ring,
            channels,
            counters: self.counters.clone(),
            number: self.number,
            inboxes: self.inboxes.clone(),
            live: self.live.clone(),
            seen: self.live.look(),
            accepts: self.accepts,
            leaves: self.accepts.into(),
            limits: self.limits.clone(),
            filter: self.settings.filter.clone(),
            stall: stall(&self.settings.config),
            run: to_guest::Run::default(),
        }
    }
}

/// How long frames wait for the guest's pages.
fn stall(config: &Config) -> Duration {
    Duration::from_secs(config.rx_stall_s.into())
}

/// What has ended a queue.
fn fault(name: &str, what: impl std::fmt::Display) -> Fault {
    Fault(format!("{name}: {what}"))
}

/// A running queue; stopped when dropped.
pub(crate) struct Queue {
    thread: Thread<Settings>,
    hold: Arc<Hold>,
    counters: Handle<QueueCounters>,
}

pub(crate) type Ring<P> = BackRing<P, SharedMapping, Table<<P as Protocol>::Req, TableMemory>>;

/// Maps a ring of the guest `domid` and takes its back end where a predecessor left it. Without its
/// table that is `rsp_prod`: answers that it had written and not shown lie over slots that are read
/// as requests then, which costs the guest packets.
pub(crate) fn attach<P: Protocol>(
    grants: &dyn Grants,
    (name, domid): (&str, DomId),
    (refs, table, past): (&[u32], &TableMemory, &Past),
    counters: Handle<RingCounters>,
) -> Result<(Ring<P>, Notify), Fault> {
    let ring = P::NAME;
    let mapping = grants
        .map(domid, refs, Access::ReadWrite)
        .map_err(|e| Fault(format!("{name}: mapping the {ring} ring {refs:?}: {e}")))?
        .into_shared()
        .ok_or_else(|| Fault(format!("{name}: the {ring} ring {refs:?} is read-only")))?;
    let (slots, memory) = (rings::slot_count::<P>(refs.len()), table.clone());
    let table = match past {
        Past::Kept => Table::open(memory, slots),
        Past::None | Past::Lost(_) => Table::format(memory, slots),
    };
    let table = table.map_err(|e| Fault(format!("{name}: what the predecessor has left: {e}")))?;
    BackRing::attach(mapping, table, counters).map_err(|e| Fault(format!("{name}: {e}")))
}

impl Queue {
    /// Maps the rings, binds the ports and starts the thread.
    pub(crate) fn start(mut start: Start<'_>) -> Result<Queue, Fault> {
        let grants = start.hypervisor.grants()?;
        let (counters, faults) = (start.counters.clone(), start.faults.clone());
        let (tx_counters, rx_counters) =
            (std::mem::take(&mut start.tx_counters), std::mem::take(&mut start.rx_counters));
        let place = (&start.name[..], start.domid);
        let (tx_table, rx_table) = (start.tx_table, start.rx_table);
        let (tx, tx_notify) =
            attach(&*grants, place, (&start.keys.tx_refs, tx_table, start.past), tx_counters)?;
        let (rx, rx_notify) =
            attach(&*grants, place, (&start.keys.rx_refs, rx_table, start.past), rx_counters)?;
        let channels = Channels::bind(start.hypervisor, start.domid, start.keys.ports)
            .map_err(|e| Fault(format!("{}: {}", start.name, e.0)))?;
        if tx_notify == Notify::Send {
            channels.tx().notify()?;
        }
        if rx_notify == Notify::Send {
            channels.rx().notify()?;
        }
        let pool = Pool::new(grants.buffer(Pool::bytes(FRAMES))?);
        let shared = Shared::new(start.settings)?;
        let channels = Arc::new(channels);
        let door = Doorkeeper::new(start.way(rx, channels.clone()));
        start.endpoint.meet(door.door());
        let hold = Arc::new(Hold::new(start.output));
        let worker = Worker {
            name: start.name.clone(),
            domid: start.domid,
            grants,
            tx,
            door,
            channels,
            endpoint: start.endpoint,
            pool,
            shared: shared.clone(),
            hold: hold.clone(),
            counters: start.counters,
            number: start.number,
            inboxes: start.inboxes,
            seen: start.live.look(),
            live: start.live,
            leaves_host: start.leaves_host,
            rx_notify: start.rx_notify,
            limits: start.limits,
            filter: start.settings.filter.clone(),
            poller: Poller::new(start.settings.config.poll_us),
            run: Run::default(),
        };
        let placement = start.settings.config.placement.clone();
        let thread = Thread::start(start.name, shared, faults, move || {
            placement.bind(&worker.name, worker.number as u32);
            worker.run()
        })?;
        Ok(Queue { thread, hold, counters })
    }

    /// Gives the queue new values of its live knobs.
    pub(crate) fn set(&self, settings: &Settings) {
        self.thread.set(settings);
    }

    /// Holds the guest's packets from now on.
    pub(crate) fn hold(&self) -> Amount {
        let mut held = self.hold.lock();
        held.begin();
        held.amount()
    }

    /// Lets the packets go that are held now.
    pub(crate) fn release(&self, then: Then) -> Amount {
        let amount = self.hold.lock().release(then);
        self.thread.ring();
        amount
    }

    /// Drops the packets that are held now.
    pub(crate) fn discard(&self, then: Then) -> Amount {
        let amount = self.hold.lock().discard(then);
        self.thread.ring();
        amount
    }

    /// Notes how much processor time the thread has used.
    pub(crate) fn note_cpu(&self) {
        if let Some(ns) = self.thread.cpu_ns() {
            self.counters.cpu_ns.set(ns);
        }
    }

    /// Asks the thread to stop; dropping the queue waits for it.
    pub(crate) fn stop(&self) {
        self.thread.stop();
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.note_cpu();
    }
}

/// Slots of a ring that were taken and not answered, oldest first, with what goes with each.
pub(crate) type Held<T> = VecDeque<(rings::Slot, T)>;
