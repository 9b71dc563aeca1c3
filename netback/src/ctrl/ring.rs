//! The thread of a control ring: the queues' threads are kept from waiting for it, and the
//! device's from waiting for a guest that asks without end.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use hypervisor::xenbus::inflight::{Past, TableMemory};
use hypervisor::xenbus::queue::{Shared, Thread, wait};
use hypervisor::xenbus::{Fault, Faults};
use hypervisor::{Access, CopyOp, Direction, DomId, EventChannel, GrantRef, Grants, Hypervisor};
use perf::Handle;
use rings::{Notify, Pending, RingCounters};
use rustix::event::{PollFd, PollFlags};

use super::{lists, serve};
use crate::frame::{Frame, Pool};
use crate::live::Live;
use crate::negotiate::CtrlKeys;
use crate::proto::{CTRL_ADD_GREF_MAPPING, CTRL_DEL_GREF_MAPPING, Ctrl, CtrlRequest, CtrlResponse};
use crate::queue::{Ring, attach};
use crate::staging::Memory;
use crate::staging::noted::Noted;

/// Requests after which a guest has to wait, and for how long: a driver has a few at a time.
const BURST: u32 = 64;
const PAUSE: Duration = Duration::from_millis(1);

/// All that a control ring needs to begin.
pub(crate) struct Start<'a> {
    pub hypervisor: &'a dyn Hypervisor,
    pub name: String,
    pub domid: DomId,
    pub keys: CtrlKeys,
    pub table: &'a TableMemory,
    pub past: &'a Past,
    pub live: Arc<Live>,
    pub queues: usize,
    /// Of each queue: which pages a successor is to map.
    pub noted: Vec<Noted>,
    pub faults: Faults,
    pub counters: Handle<RingCounters>,
}

/// A running control ring; stopped when dropped.
pub(crate) struct CtrlRing {
    thread: Thread<()>,
}

struct Worker {
    name: String,
    domid: DomId,
    grants: Box<dyn Grants>,
    ring: Ring<Ctrl>,
    channel: Box<dyn EventChannel>,
    /// What a request's page says is copied here.
    pool: Pool,
    copied: Frame,
    shared: Arc<Shared<()>>,
    live: Arc<Live>,
    queues: usize,
    noted: Vec<Noted>,
    /// The queue whose pages are more than is noted of them.
    added: Option<usize>,
}

impl CtrlRing {
    /// Maps the ring, binds its port and starts the thread.
    pub(crate) fn start(start: Start<'_>) -> Result<CtrlRing, Fault> {
        let grants = start.hypervisor.grants()?;
        let refs = [start.keys.ring_ref];
        let place = (&start.name[..], start.domid);
        let (ring, notify) =
            attach(&*grants, place, (&refs, start.table, start.past), start.counters)?;
        let channel = start.hypervisor.bind(start.domid, start.keys.port).map_err(|e| {
            Fault(format!("{}: binding event channel {}: {e}", start.name, start.keys.port))
        })?;
        if notify == Notify::Send {
            channel.notify()?;
        }
        let shared = Shared::new(&())?;
        let mut pool = Pool::new(grants.buffer(Pool::bytes(1))?);
        let copied = pool.take().ok_or_else(|| Fault(format!("{}: no memory", start.name)))?;
        let mut worker = Worker {
            name: start.name.clone(),
            domid: start.domid,
            grants,
            pool,
            copied,
            ring,
            channel,
            shared: shared.clone(),
            live: start.live,
            queues: start.queues,
            noted: start.noted,
            added: None,
        };
        if *start.past == Past::Kept {
            worker.map_again();
        }
        let thread = Thread::start(start.name, shared, start.faults, move || worker.run())?;
        Ok(CtrlRing { thread })
    }

    /// Asks the thread to stop; dropping the ring waits for it.
    pub(crate) fn stop(&self) {
        self.thread.stop();
    }
}

impl Worker {
    fn run(mut self) -> Result<(), Fault> {
        while !self.shared.stopping() {
            let mut served = 0u32;
            while served < BURST
                && let Some(taken) = self.ring.take().map_err(|e| self.failed(&e))?
            {
                let answer = self.serve(&taken.req);
                self.ring.respond(taken.slot, &answer);
                served += weight(&taken.req);
            }
            if self.ring.publish() == Notify::Send {
                self.channel.notify().map_err(|e| self.failed(&e))?;
            }
            self.note();
            if served >= BURST {
                self.pause()?;
            } else {
                self.sleep()?;
            }
        }
        Ok(())
    }

    fn failed(&self, e: &dyn std::error::Error) -> Fault {
        Fault(format!("{}: {e}", self.name))
    }

    fn serve(&mut self, request: &CtrlRequest) -> CtrlResponse {
        if lists::is_one(request) {
            let live = self.live.clone();
            let served = lists::serve(request, live.staging(), self);
            self.added = served.added;
            return served.answer;
        }
        let now = self.live.look().wishes.spread.clone();
        let queues = self.queues;
        let served =
            serve(request, &now, queues, |gref, into| lists::Reach::read(self, gref, into));
        // The queues see it before the guest hears that it is done.
        if let Some(spread) = served.spread {
            self.live.change(|wishes| wishes.spread = Arc::new(spread));
        }
        served.answer
    }

    /// Copies between the beginning of a page of the guest's and the frame; whether it could.
    fn copy(&mut self, gref: GrantRef, direction: Direction) -> bool {
        let mut ops = [CopyOp {
            gref,
            offset: 0,
            len: self.copied.len() as u16,
            at: self.copied.at(),
            direction,
            status: 0,
        }];
        let copied = self.grants.copy(self.domid, self.pool.buffer(), &mut ops);
        copied.is_ok() && ops[0].status == 0
    }

    /// Notes pages for a successor once the guest has heard that they are mapped: before, the
    /// successor is asked for them again, and would refuse what it has.
    fn note(&mut self) {
        if let Some(queue) = self.added.take() {
            self.note_all_but(queue, &HashSet::new());
        }
    }

    fn note_all_but(&self, queue: usize, going: &HashSet<GrantRef>) {
        if let (Some(table), Some(noted)) = (self.live.staging().get(queue), self.noted.get(queue))
        {
            noted.save(&table.runs(), going);
        }
    }

    /// Maps what a predecessor had.
    fn map_again(&mut self) {
        let (live, noted) = (self.live.clone(), std::mem::take(&mut self.noted));
        for (table, noted) in live.staging().iter().zip(&noted) {
            noted.restore(table, |refs, access| lists::Reach::map(self, refs, access));
        }
        self.noted = noted;
    }

    fn pause(&self) -> Result<(), Fault> {
        let mut fds = [PollFd::from_borrowed_fd(self.shared.wake(), PollFlags::IN)];
        wait(&mut fds, Some(PAUSE)).map_err(|e| self.failed(&e))
    }

    /// Waits for the frontend. Events without requests behind them are let through one by one,
    /// with a pause between (XSA-332).
    fn sleep(&mut self) -> Result<(), Fault> {
        if self.ring.arm().map_err(|e| self.failed(&e))? == Pending::Work {
            return Ok(());
        }
        let input = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = [input(self.channel.as_fd()), input(self.shared.wake())];
        wait(&mut fds, None).map_err(|e| self.failed(&e))?;
        let rung = !fds[0].revents().is_empty();
        if rung {
            self.ring.woken();
            self.channel.acknowledge().map_err(|e| self.failed(&e))?;
            if self.ring.peek().map_err(|e| self.failed(&e))? == Pending::Nothing {
                return self.pause();
            }
        }
        Ok(())
    }
}

impl lists::Reach for Worker {
    type Memory = Memory;

    fn read(&mut self, gref: GrantRef, into: &mut [u8]) -> bool {
        self.copied.set_len(into.len());
        let good = self.copy(gref, Direction::FromGrant);
        if good {
            into.copy_from_slice(&self.copied);
        }
        good
    }

    fn write(&mut self, gref: GrantRef, from: &[u8]) -> bool {
        self.copied.set_len(from.len());
        self.copied.copy_from_slice(from);
        self.copy(gref, Direction::ToGrant)
    }

    fn map(&mut self, refs: &[GrantRef], access: Access) -> Option<Memory> {
        match self.grants.map(self.domid, refs, access) {
            Ok(mapping) => Memory::of(mapping),
            Err(e) => {
                tracing::debug!("{}: mapping {} pages: {e}", self.name, refs.len());
                None
            }
        }
    }

    /// A successor does not map what the guest takes back now. Where this process is killed before it
    /// has answered, the successor is asked once more and has nothing to remove, as it says of each.
    fn leaving(&mut self, queue: usize, going: &HashSet<GrantRef>) {
        self.note_all_but(queue, going);
    }
}

/// A list may hold as much work as a burst.
fn weight(request: &CtrlRequest) -> u32 {
    match request.kind {
        CTRL_ADD_GREF_MAPPING | CTRL_DEL_GREF_MAPPING => BURST,
        _ => 1,
    }
}
