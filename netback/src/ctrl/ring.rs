//! The thread of a control ring: the queues' threads are kept from waiting for it, and the
//! device's from waiting for a guest that asks without end.

use std::sync::Arc;
use std::time::Duration;

use hypervisor::xenbus::inflight::{Past, TableMemory};
use hypervisor::xenbus::queue::{Shared, Thread, wait};
use hypervisor::xenbus::{Fault, Faults};
use hypervisor::{CopyOp, Direction, DomId, EventChannel, Grants, Hypervisor};
use perf::Handle;
use rings::{Notify, Pending, RingCounters};
use rustix::event::{PollFd, PollFlags};

use super::serve;
use crate::frame::{Frame, Pool};
use crate::live::Live;
use crate::negotiate::CtrlKeys;
use crate::proto::{Ctrl, CtrlRequest, CtrlResponse};
use crate::queue::{Ring, attach};

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
        let worker = Worker {
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
        };
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
            let mut served = 0;
            while served < BURST
                && let Some(taken) = self.ring.take().map_err(|e| self.failed(&e))?
            {
                let answer = self.serve(&taken.req);
                self.ring.respond(taken.slot, &answer);
                served += 1;
            }
            if self.ring.publish() == Notify::Send {
                self.channel.notify().map_err(|e| self.failed(&e))?;
            }
            if served == BURST {
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
        let now = self.live.look().wishes.spread.clone();
        let queues = self.queues;
        let served = serve(request, &now, queues, |gref, into| self.read(gref, into));
        // The queues see it before the guest hears that it is done.
        if let Some(spread) = served.spread {
            self.live.change(|wishes| wishes.spread = Arc::new(spread));
        }
        served.answer
    }

    /// Copies the beginning of a page of the guest's.
    fn read(&mut self, gref: u32, into: &mut [u8]) -> bool {
        self.copied.set_len(into.len());
        let mut ops = [CopyOp {
            gref,
            offset: 0,
            len: into.len() as u16,
            at: self.copied.at(),
            direction: Direction::FromGrant,
            status: 0,
        }];
        let copied = self.grants.copy(self.domid, self.pool.buffer(), &mut ops);
        let good = copied.is_ok() && ops[0].status == 0;
        if good {
            into.copy_from_slice(&self.copied);
        }
        good
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
