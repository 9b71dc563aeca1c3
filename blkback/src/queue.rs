//! One queue of a device: its thread, and how the device's control reaches it.

mod memory;
mod slots;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blktap::Disk;
use blktap::engine::EngineCounters;
use blktap::filters::stall::Stall;
use hypervisor::xenbus::inflight::{Past, TableMemory};
use hypervisor::xenbus::queue::{Shared, Thread};
use hypervisor::xenbus::{Fault, Faults, Parting};
use hypervisor::{Access, DomId, Hypervisor, SharedMapping};
use perf::Handle;
use rings::inflight::Forget;
use rings::persistent::PoolCounters;
use rings::{BackRing, InFlight, Notify, Pending, RingCounters, Table};

use crate::config::{Config, GrantMode};
use crate::counters::QueueCounters;
use crate::negotiate::{Protocol, QueueKeys};
use crate::proto::{Abi, Limits, Native, Ring, X86_32, X86_64};
use memory::Memory;
use perf::polling::Pollers;
use slots::Slots;
use worker::{Run, Worker};

/// What the device tells its queue beside knobs.
pub(crate) struct Told {
    flush: AtomicBool,
    sectors: AtomicU64,
}

impl Told {
    fn flushing(&self) -> bool {
        self.flush.load(Ordering::Relaxed)
    }
    fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }
}

/// All that a queue needs to begin.
pub(crate) struct Start<'a> {
    pub hypervisor: &'a dyn Hypervisor,
    pub disk: &'a dyn Disk,
    pub stall: &'a Arc<Stall>,
    pub config: &'a Config,
    pub name: String,
    pub number: u32,
    pub domid: DomId,
    pub protocol: Protocol,
    pub keys: &'a QueueKeys,
    pub grants: GrantMode,
    /// Where its in-flight table lies, and what is in it.
    pub table: TableMemory,
    pub past: &'a Past,
    pub limits: Limits,
    pub faults: Faults,
    pub ring_counters: Handle<RingCounters>,
    pub pool_counters: Handle<PoolCounters>,
    pub counters: Handle<QueueCounters>,
    pub engine_counters: Handle<EngineCounters>,
}

/// A running queue; stopped and drained when dropped.
pub(crate) struct Queue {
    thread: Thread<Config>,
    told: Arc<Told>,
    counters: Handle<QueueCounters>,
    /// Requests of a predecessor that are served again.
    pub(crate) replays: u32,
}

/// A ring with its table.
type Served<A> = BackRing<Ring<A>, Arc<SharedMapping>, Table<<A as Abi>::Req, TableMemory>>;

/// Takes a ring over, with what a predecessor has left unanswered.
fn attach<A: Abi>(mapping: SharedMapping, start: &Start<'_>) -> Result<(Served<A>, Notify), Fault> {
    let fault = |e: &dyn std::fmt::Display| Fault(format!("{}: {e}", start.name));
    let (mapping, memory) = (Arc::new(mapping), start.table.clone());
    let slots = rings::slot_count::<Ring<A>>(start.keys.ring_refs.len());
    let table = match start.past {
        Past::None => Table::format(memory, slots),
        Past::Kept => Table::open(memory, slots),
        Past::Lost(why) => {
            // Before anything is noted from which another successor would believe otherwise.
            must_be_idle::<A>(&mapping, slots, why).map_err(|e| fault(&e))?;
            Table::format(memory, slots)
        }
    };
    let table = table.map_err(|e| fault(&format!("what the predecessor has left: {e}")))?;
    if *start.past == Past::Kept && table.taken().is_none() {
        let why = "nothing is noted of this ring";
        must_be_idle::<A>(&mapping, slots, why).map_err(|e| fault(&e))?;
    }
    BackRing::attach(mapping, table, start.ring_counters.clone()).map_err(|e| fault(&e))
}

/// Fails where something is unanswered. The ring does not say what: answers have gone into the
/// slots of other requests (see `rings::inflight`).
fn must_be_idle<A: Abi>(ring: &Arc<SharedMapping>, slots: u32, why: &str) -> Result<(), String> {
    let ring =
        BackRing::<Ring<A>, _, _>::attach(ring.clone(), Forget::new(slots), Handle::default());
    let (mut ring, _) = ring.map_err(|e| e.to_string())?;
    match ring.peek().map_err(|e| e.to_string())? {
        Pending::Nothing => Ok(()),
        Pending::Work => Err(format!(
            "requests are unanswered, and what the killed backend had begun is not known ({why}): \
             the guest must connect its disk anew"
        )),
    }
}

impl Queue {
    /// Maps the ring, binds the port and starts the thread.
    pub(crate) fn start(start: Start<'_>) -> Result<Queue, Fault> {
        match start.protocol {
            Protocol::X86_64 => Self::start_as::<X86_64>(start),
            Protocol::Native => Self::start_as::<Native>(start),
            Protocol::X86_32 => Self::start_as::<X86_32>(start),
        }
    }

    fn start_as<A: Abi>(start: Start<'_>) -> Result<Queue, Fault> {
        let (config, name, counters) = (start.config, &start.name, &start.counters);
        let grants = start.hypervisor.grants()?;
        let refs = &start.keys.ring_refs;
        let mapping = grants
            .map(start.domid, refs, Access::ReadWrite)
            .map_err(|e| Fault(format!("{name}: mapping ring-ref {refs:?}: {e}")))?
            .into_shared()
            .ok_or_else(|| Fault(format!("{name}: ring-ref {refs:?} is read-only")))?;
        let channel = start.hypervisor.bind(start.domid, start.keys.port).map_err(|e| {
            Fault(format!("{name}: binding event-channel {}: {e}", start.keys.port))
        })?;
        let size = rings::slot_count::<Ring<A>>(refs.len()) as usize;
        let (ring, notify) = attach::<A>(mapping, &start)?;
        let replays = ring.replays();
        counters.replayed.add(u64::from(replays));
        if notify == Notify::Send {
            channel.notify()?;
        }
        let segments =
            (usize::from(start.limits.max_indirect_segments)).max(crate::proto::MAX_SEGMENTS);
        let shared = Shared::new(config)?;
        let told = Arc::new(Told {
            flush: AtomicBool::new(false),
            sectors: AtomicU64::new(start.limits.sectors),
        });
        let mut disk = start.disk.queue(size as u32)?;
        disk.count_in(start.engine_counters);
        disk.prioritize(config.io_priority);
        let worker = Worker {
            name: name.clone(),
            ring,
            channel,
            disk,
            memory: Memory::new(
                start.domid,
                grants,
                start.grants,
                config,
                counters.clone(),
                start.pool_counters,
            ),
            slots: Slots::new(size, segments),
            shared: shared.clone(),
            told: told.clone(),
            stall: Arc::clone(start.stall),
            limits: start.limits,
            counters: counters.clone(),
            pollers: Pollers::new(config.poll_us),
            run: Run::new(size, segments),
        };
        let (placement, number) = (config.placement.clone(), start.number);
        let thread = Thread::start(name.clone(), shared, start.faults, move || {
            placement.bind(&worker.name, number);
            worker.run()
        })?;
        Ok(Queue { thread, told, counters: start.counters, replays })
    }

    /// Tells the queue of a new size.
    pub(crate) fn resize(&self, sectors: u64) {
        self.told.sectors.store(sectors, Ordering::Relaxed);
    }

    /// Gives the queue new values of its live knobs.
    pub(crate) fn set(&self, config: &Config) {
        self.thread.set(config);
    }

    /// Has the queue look again at what it keeps.
    pub(crate) fn wake(&self) {
        self.thread.ring();
    }

    /// Notes how much processor time the thread has used.
    pub(crate) fn note_cpu(&self) {
        if let Some(ns) = self.thread.cpu_ns() {
            self.counters.cpu_ns.set(ns);
        }
    }

    /// Asks the thread to stop; dropping the queue waits for it.
    pub(crate) fn stop(&self, why: Parting) {
        self.told.flush.fetch_or(why == Parting::Leave, Ordering::Relaxed);
        self.thread.stop();
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.note_cpu();
    }
}
