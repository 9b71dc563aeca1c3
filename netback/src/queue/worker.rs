//! The loop of one queue: packets from the guest, packets to the guest, one grant copy and at most
//! one notification each a round, and a sleep when there is neither.

mod transmit;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::xenbus::Fault;
use hypervisor::xenbus::queue::{Shared, wait};
use hypervisor::{CopyOp, DomId, Grants};
use perf::Handle;
use perf::polling::Poller;
use rings::Pending;
use rustix::event::{PollFd, PollFlags};

use super::door::{Doorkeeper, Lists};
use super::to_guest::Rest;
use super::{BATCH, Channels, Ring, Settings, fault, stall};
use crate::counters::QueueCounters;
use crate::endpoint::EndpointQueue;
use crate::filter::Filter;
use crate::frame::{Frame, Pool};
use crate::hold::Hold;
use crate::limit::Limits;
use crate::live::{Live, Seen};
use crate::mailbox::Mailbox;
use crate::negotiate::RxNotify;
use crate::offload::Leaves;
use crate::proto::Tx;
use crate::staging::{Copied, Split};
use crate::tx;

/// Wake-ups without work after which the next ones are put off (XSA-332).
const SPURIOUS_STREAK: u32 = 32;
/// How long they are put off.
const BACK_OFF: Duration = Duration::from_millis(1);
/// How often to look for pages where the frontend does not tell of them.
const LOOK: Duration = Duration::from_millis(1);

/// One queue with all that it needs.
pub(super) struct Worker {
    pub name: String,
    pub domid: DomId,
    pub grants: Box<dyn Grants>,
    pub tx: Ring<Tx>,
    pub door: Doorkeeper,
    pub channels: Arc<Channels>,
    pub endpoint: Box<dyn EndpointQueue>,
    pub pool: Pool,
    pub shared: Arc<Shared<Settings>>,
    pub hold: Arc<Hold>,
    pub counters: Handle<QueueCounters>,
    /// Which of the vif's queues it is, and what others have for each.
    pub number: usize,
    pub inboxes: Arc<[Mailbox]>,
    pub live: Arc<Live>,
    pub seen: Seen,
    pub leaves_host: Leaves,
    pub rx_notify: RxNotify,
    pub limits: Arc<Limits>,
    pub filter: Filter,
    pub poller: Poller,
    pub run: Run,
}

/// What the loop remembers between rounds.
#[derive(Default)]
pub(super) struct Run {
    /// From the guest: slots taken, packets in them, and the frames that these become.
    taken: VecDeque<rings::Slot>,
    packets: tx::Batch,
    copied: VecDeque<Option<(Frame, std::ops::Range<usize>)>>,
    /// Frames for the endpoint, and those that it has been offered.
    to_host: VecDeque<Frame>,
    offered: VecDeque<Frame>,
    ops: Vec<CopyOp>,
    split: Split,
    /// Copies that were put off, and what copies to other guests take.
    rest: Vec<CopyOp>,
    crossing: Lists,
    /// The limit's wait; what waits for it stays in the ring.
    limited: Option<Duration>,
    spurious: u32,
    /// Ports with an event that is not acknowledged.
    rung: [bool; 2],
    changes: u64,
}

impl Worker {
    /// Serves until told to stop or until the frontend breaks the protocol.
    pub(super) fn run(mut self) -> Result<(), Fault> {
        while !self.shared.stopping() {
            if self.round()? {
                self.run.spurious = 0;
                self.counters.polls_paid.add(u64::from(self.poller.worked()));
            } else if !self.poller.spin() {
                self.sleep()?;
            }
        }
        Ok(())
    }

    /// One round; whether there was anything to do.
    fn round(&mut self) -> Result<bool, Fault> {
        self.take_knobs();
        self.live.refresh(&mut self.seen);
        let sent = self.transmit()?;
        let received = self.receive()?;
        Ok(sent || received)
    }

    /// Packets to the guest; whether there was any.
    fn receive(&mut self) -> Result<bool, Fault> {
        let mut way = self.door.open();
        let Some(way) = way.as_mut() else { return Ok(false) };
        way.round(&mut *self.endpoint, &mut self.pool, &*self.grants)
    }

    fn fault(&self, what: impl std::fmt::Display) -> Fault {
        fault(&self.name, what)
    }

    /// Makes the copies of packets from the guest.
    fn copy(&mut self) -> Result<Copied, Fault> {
        if self.run.ops.is_empty() {
            return Ok(Copied::default());
        }
        let staging = self.live.staging().get(self.number);
        // Every queue has one; packets that nobody has copied must never go on.
        let staging = staging.ok_or_else(|| self.fault("no table of pages"))?;
        let Run { copied, ops, split, .. } = &mut self.run;
        let frames = copied.iter_mut().flatten().map(|(frame, _)| frame);
        let copied = staging
            .copy(frames, ops, split, |ops| self.grants.copy(self.domid, self.pool.buffer(), ops));
        copied.map_err(|e| self.fault(format_args!("grant copy: {e}")))
    }

    /// Frames that other queues have for this one.
    fn inbox(&self) -> Option<&Mailbox> {
        self.inboxes.get(self.number)
    }

    /// Takes over knobs that were changed meanwhile.
    fn take_knobs(&mut self) {
        if let Some(settings) = self.shared.changed(&mut self.run.changes) {
            self.poller = Poller::new(settings.config.poll_us);
            if let Some(way) = self.door.open().as_mut() {
                way.stall = stall(&settings.config);
                way.filter = settings.filter.clone();
            }
            self.filter = settings.filter;
        }
    }

    // ---- sleep

    /// Lets the ports' next events through, once the rings' work is done: they stay masked while
    /// the queue works.
    fn acknowledge(&mut self) -> Result<(), Fault> {
        let [first, second] = std::mem::take(&mut self.run.rung);
        if first {
            self.channels
                .tx()
                .acknowledge()
                .map_err(|e| self.fault(format_args!("event channel: {e}")))?;
        }
        if let (true, Some(channel)) = (second, self.channels.second()) {
            channel.acknowledge().map_err(|e| self.fault(format_args!("event channel: {e}")))?;
        }
        Ok(())
    }

    /// Whether frames of the guest wait: then nothing more is taken from it.
    fn has_output(&self) -> bool {
        !self.run.to_host.is_empty() || !self.run.offered.is_empty()
    }

    /// Asks for the events that matter now; what to wait for, unless there is work after all.
    fn arm(&mut self) -> Result<Option<Rest>, Fault> {
        // While the endpoint takes nothing, no more can be held, or the limit is reached, nothing is taken from the guest.
        if !self.has_output() && self.run.limited.is_none() {
            let pending = self.tx.arm().map_err(|e| self.fault(e))?;
            if pending == Pending::Work {
                return Ok(None);
            }
        }
        self.door.open().as_mut().map_or(Ok(None), |way| way.rest())
    }

    /// When to wake without an event.
    fn deadline(&self, rest: &Rest) -> Option<Duration> {
        // What the endpoint has for the guest has to wait as well, but not what the guest has for it.
        let asks = rest.is_hungry || self.has_output();
        let endpoint = self.endpoint.waits().deadline.filter(|_| asks);
        let at = [rest.stall, endpoint].into_iter().flatten().min();
        let look = (self.rx_notify == RxNotify::No && rest.wants_pages).then_some(LOOK);
        // The clock is read only for what hangs on it.
        let wait = [at.map(|at| at.duration_since(Instant::now())), look];
        let wait = wait.into_iter().flatten().min()?;
        Some(wait.max(Duration::from_micros(50)))
    }

    /// Waits for the frontend, the endpoint or the device's control.
    fn sleep(&mut self) -> Result<(), Fault> {
        if self.run.spurious >= SPURIOUS_STREAK {
            let mut fds = [PollFd::from_borrowed_fd(self.shared.wake(), PollFlags::IN)];
            wait(&mut fds, Some(BACK_OFF))?;
        }
        self.acknowledge()?;
        let Some(rest) = self.arm()? else { return Ok(()) };
        self.counters.sleeps.add(1);
        let waits = [self.deadline(&rest), self.run.limited, rest.limited];
        let timeout = waits.into_iter().flatten().min();
        let before = self.poller.is_wanted().then(Instant::now);
        let [first, second, woken] = self.wait_for(&rest, timeout)?;
        before.inspect(|before| self.poller.slept(before.elapsed().as_nanos() as u64));
        if first {
            self.tx.woken();
        }
        if second {
            self.door.open().iter_mut().for_each(|way| way.ring.woken());
        }
        if first || second {
            self.run.spurious += 1;
            self.run.rung = [first, second];
        }
        if woken {
            self.shared.woken();
        }
        Ok(())
    }

    /// Which of the two ports and the wake-up have come.
    fn wait_for(&self, rest: &Rest, timeout: Option<Duration>) -> Result<[bool; 3], Fault> {
        let (hungry, waits) = (rest.is_hungry, self.endpoint.waits());
        let second = self.channels.second().map(|channel| channel.as_fd());
        let nothing = PollFlags::empty();
        let input = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        // Places that are not used stand for the wake-up with nothing asked.
        let unused = || PollFd::from_borrowed_fd(self.shared.wake(), nothing);
        let output = |fd| PollFd::from_borrowed_fd(fd, PollFlags::OUT);
        let mut fds = [
            input(self.channels.tx().as_fd()),
            second.map_or_else(unused, input),
            input(self.shared.wake()),
            waits.readable.filter(|_| hungry).map_or_else(unused, input),
            self.inbox().filter(|_| hungry).map_or_else(unused, |inbox| input(inbox.fd())),
            waits.writable.map_or_else(unused, output),
            waits.room.map_or_else(unused, input),
        ];
        wait(&mut fds, timeout)?;
        let ready = |n: usize| !fds[n].revents().is_empty();
        Ok([ready(0), second.is_some() && ready(1), ready(2)])
    }
}
