//! One queue of a vif: its thread, and how the device's control reaches it.

mod worker;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hypervisor::xenbus::inflight::{Past, TableMemory};
use hypervisor::xenbus::{Fault, Faults};
use hypervisor::{Access, DomId, EventChannel, Grants, Hypervisor, SharedMapping};
use parking_lot::Mutex;
use perf::Handle;
use perf::polling::Poller;
use rings::{BackRing, Notify, Protocol, RingCounters, Table};
use rustix::event::{EventfdFlags, eventfd};

use crate::config::Config;
use crate::counters::QueueCounters;
use crate::endpoint::{Accepts, EndpointQueue};
use crate::filter::Filter;
use crate::frame::Pool;
use crate::hold::{Amount, Hold, Then};
use crate::limit::Limits;
use crate::negotiate::{Ports, QueueKeys, RxNotify};
use crate::offload::Leaves;
use crate::rx::Shape;
use worker::{Run, Worker};

/// Frames of one queue, both ways.
const FRAMES: usize = 256;

/// What can change while a queue runs.
#[derive(Clone)]
pub(crate) struct Live {
    pub config: Config,
    pub filter: Filter,
}

/// What a queue's thread and the device's control share.
pub(crate) struct Shared {
    stop: AtomicBool,
    /// Knobs that can change while the queue runs; `changes` counts the changes.
    knobs: Mutex<Live>,
    changes: AtomicU64,
    hold: Hold,
    wake: OwnedFd,
}

impl Shared {
    fn new(live: &Live, output: Then) -> io::Result<Shared> {
        Ok(Shared {
            stop: AtomicBool::new(false),
            knobs: Mutex::new(live.clone()),
            changes: AtomicU64::new(0),
            hold: Hold::new(output),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
    /// The knobs, if they have changed since change number `known`.
    fn changed(&self, known: &mut u64) -> Option<Live> {
        let changes = self.changes.load(Ordering::Acquire);
        if changes == *known {
            return None;
        }
        *known = changes;
        Some(self.knobs.lock().clone())
    }
    /// Takes the wake-up, so that the next sleep lasts.
    fn woken(&self) {
        if let Err(e) = rustix::io::read(&self.wake, &mut [0; 8]) {
            tracing::debug!("a queue's wake-up: {e}");
        }
    }
    fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
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
    pub live: &'a Live,
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
    pub shape: Shape,
    pub limits: Arc<Limits>,
    pub faults: Faults,
    pub tx_counters: Handle<RingCounters>,
    pub rx_counters: Handle<RingCounters>,
    pub counters: Handle<QueueCounters>,
}

/// A running queue; stopped when dropped.
pub(crate) struct Queue {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
    tid: Arc<AtomicU64>,
    counters: Handle<QueueCounters>,
}

type Ring<P> = BackRing<P, SharedMapping, Table<<P as Protocol>::Req, TableMemory>>;

/// Maps a ring and takes its back end where a predecessor left it. Without its table that is
/// `rsp_prod`: answers that it had written and not shown lie over slots that are read as requests
/// then, which costs the guest packets.
fn attach<P: Protocol>(
    grants: &dyn Grants,
    start: &Start<'_>,
    (refs, table): (&[u32], &TableMemory),
    counters: Handle<RingCounters>,
) -> Result<(Ring<P>, Notify), Fault> {
    let (name, ring) = (&start.name, P::NAME);
    let mapping = grants
        .map(start.domid, refs, Access::ReadWrite)
        .map_err(|e| Fault(format!("{name}: mapping the {ring} ring {refs:?}: {e}")))?
        .into_shared()
        .ok_or_else(|| Fault(format!("{name}: the {ring} ring {refs:?} is read-only")))?;
    let (slots, memory) = (rings::slot_count::<P>(refs.len()), table.clone());
    let table = match start.past {
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
        let (tx, tx_notify) =
            attach(&*grants, &start, (&start.keys.tx_refs, start.tx_table), tx_counters)?;
        let (rx, rx_notify) =
            attach(&*grants, &start, (&start.keys.rx_refs, start.rx_table), rx_counters)?;
        let channels = Channels::bind(start.hypervisor, start.domid, start.keys.ports)
            .map_err(|e| Fault(format!("{}: {}", start.name, e.0)))?;
        if tx_notify == Notify::Send {
            channels.tx().notify()?;
        }
        if rx_notify == Notify::Send {
            channels.rx().notify()?;
        }
        let pool = Pool::new(grants.buffer(Pool::bytes(FRAMES))?);
        let shared = Arc::new(Shared::new(start.live, start.output)?);
        let worker = Worker {
            name: start.name.clone(),
            domid: start.domid,
            grants,
            tx,
            rx,
            channels,
            endpoint: start.endpoint,
            pool,
            shared: shared.clone(),
            counters: start.counters,
            shape: start.shape,
            accepts: start.accepts,
            leaves_host: start.leaves_host,
            leaves_guest: start.accepts.into(),
            rx_notify: start.rx_notify,
            limits: start.limits,
            filter: start.live.filter.clone(),
            poller: Poller::new(start.live.config.poll_us),
            stall: std::time::Duration::from_secs(start.live.config.rx_stall_s.into()),
            run: Run::default(),
        };
        let tid = Arc::new(AtomicU64::new(0));
        let seen = tid.clone();
        let thread = std::thread::Builder::new().name(start.name).spawn(move || {
            seen.store(rustix::thread::gettid().as_raw_nonzero().get() as u64, Ordering::Relaxed);
            // A panic is a bug of ours; without a report the guest would wait for ever.
            let ended = catch_unwind(AssertUnwindSafe(|| worker.run()));
            let result = ended.unwrap_or_else(|_| Err(Fault("a queue's thread panicked".into())));
            if let Err(fault) = result {
                faults.report(fault);
            }
        })?;
        Ok(Queue { shared, thread: Some(thread), tid, counters })
    }

    /// Gives the queue new values of its live knobs.
    pub(crate) fn set(&self, live: &Live) {
        *self.shared.knobs.lock() = live.clone();
        self.shared.changes.fetch_add(1, Ordering::Release);
        self.wake();
    }

    /// Holds the guest's packets from now on.
    pub(crate) fn hold(&self) -> Amount {
        let mut held = self.shared.hold.lock();
        held.begin();
        held.amount()
    }

    /// Lets the packets go that are held now.
    pub(crate) fn release(&self, then: Then) -> Amount {
        let amount = self.shared.hold.lock().release(then);
        self.wake();
        amount
    }

    /// Drops the packets that are held now.
    pub(crate) fn discard(&self, then: Then) -> Amount {
        let amount = self.shared.hold.lock().discard(then);
        self.wake();
        amount
    }

    fn wake(&self) {
        // It fails where the count is full, and then the thread wakes anyway.
        if let Err(e) = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes()) {
            tracing::debug!("waking a queue: {e}");
        }
    }

    /// Notes how much processor time the thread has used: what this host spends on the guest.
    pub(crate) fn note_cpu(&self) {
        let path = format!("/proc/self/task/{}/schedstat", self.tid.load(Ordering::Relaxed));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if let Some(ns) = text.split(' ').next().and_then(|ns| ns.parse().ok()) {
            self.counters.cpu_ns.set(ns);
        }
    }

    /// Asks the thread to stop; dropping the queue waits for it.
    pub(crate) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.note_cpu();
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a queue's thread panicked");
        }
    }
}

/// Slots of a ring that were taken and not answered, oldest first, with what goes with each.
pub(crate) type Held<T> = VecDeque<(rings::Slot, T)>;
