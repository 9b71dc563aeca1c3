//! The way to the guest: its rx ring, the pages that it has given, and the frames that wait for them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::xenbus::Fault;
use hypervisor::{CopyOp, DomId, Grants};
use perf::Handle;
use rings::{Notify, Pending};

use super::door::Crossing;
use super::{BATCH, Channels, Held, Ring, fault};
use crate::config::Carrier;
use crate::counters::QueueCounters;
use crate::endpoint::{Accepts, EndpointQueue};
use crate::filter::Filter;
use crate::frame::{Checksum, Frame, Pool};
use crate::hash::Hash;
use crate::limit::Limits;
use crate::live::{Live, Seen};
use crate::mailbox::Mailbox;
use crate::offload::{Leaves, pass};
use crate::proto::{Rx, RxRequest};
use crate::rx::{self, Shape};
use crate::staging::{Copied, Split};

/// See the module.
pub(crate) struct ToGuest {
    pub name: String,
    pub domid: DomId,
    pub ring: Ring<Rx>,
    pub channels: Arc<Channels>,
    pub counters: Handle<QueueCounters>,
    /// Which of the vif's queues it is, and what others have for each.
    pub number: usize,
    pub inboxes: Arc<[Mailbox]>,
    pub live: Arc<Live>,
    pub seen: Seen,
    pub accepts: Accepts,
    pub leaves: Leaves,
    pub limits: Arc<Limits>,
    pub filter: Filter,
    pub stall: Duration,
    pub run: Run,
}

/// What is remembered between rounds.
#[derive(Default)]
pub(crate) struct Run {
    /// The guest's free pages, and slots whose answers are on their way.
    pages: Held<RxRequest>,
    answered: VecDeque<rings::Slot>,
    /// Frames that have just come, or are being copied; and those that wait.
    arrived: VecDeque<Frame>,
    waiting: VecDeque<Frame>,
    laid_out: rx::Batch,
    ops: Vec<CopyOp>,
    split: Split,
    /// Since when frames have been waiting for pages.
    blocked: Option<Instant>,
    /// The limit's wait.
    limited: Option<Duration>,
    /// They waited for too long: frames are dropped until pages come.
    stalled: bool,
}

/// What there is to wait for.
pub(crate) struct Rest {
    /// Frames of the endpoint are taken: they are left there while others wait for the guest.
    pub is_hungry: bool,
    /// Frames wait for pages.
    pub wants_pages: bool,
    /// The limit's wait.
    pub limited: Option<Duration>,
    /// When frames have waited for too long.
    pub stall: Option<Instant>,
}

impl ToGuest {
    /// One round: takes frames from the endpoint and copies what there are pages for; whether there
    /// was any.
    pub(crate) fn round(
        &mut self,
        endpoint: &mut dyn EndpointQueue,
        pool: &mut Pool,
        grants: &dyn Grants,
    ) -> Result<bool, Fault> {
        self.live.refresh(&mut self.seen);
        let pages = self.take_pages()?;
        let arrived = self.take_frames(endpoint, pool)?;
        let copied = self.lay_out(pool, grants)?;
        self.watch_stall(pages, pool);
        Ok(arrived || copied)
    }

    /// Asks for events if they matter; what to wait for, unless there is work after all.
    pub(crate) fn rest(&mut self) -> Result<Option<Rest>, Fault> {
        let wants_pages = !self.run.waiting.is_empty() || self.run.stalled;
        if wants_pages && self.run.limited.is_none() {
            let pending = self.ring.arm().map_err(|e| fault(&self.name, e))?;
            if pending == Pending::Work {
                return Ok(None);
            }
        }
        Ok(Some(Rest {
            is_hungry: self.run.waiting.is_empty() || self.run.stalled,
            wants_pages,
            limited: self.run.limited,
            stall: self.run.blocked.map(|since| since + self.stall),
        }))
    }

    // ---- from the endpoint

    /// The guest's free pages, in ring order; whether there are new ones.
    fn take_pages(&mut self) -> Result<bool, Fault> {
        let before = self.run.pages.len();
        while let Some(entry) = self.ring.take().map_err(|e| fault(&self.name, e))? {
            self.run.pages.push_back((entry.slot, entry.req));
        }
        Ok(self.run.pages.len() > before)
    }

    /// Frames from the endpoint, if those before them are gone: where the guest has no pages, frames
    /// wait there.
    fn take_frames(
        &mut self,
        endpoint: &mut dyn EndpointQueue,
        pool: &mut Pool,
    ) -> Result<bool, Fault> {
        if !self.run.waiting.is_empty() && !self.run.stalled {
            return Ok(false);
        }
        let room = BATCH.min(pool.free());
        let mut arrived = std::mem::take(&mut self.run.arrived);
        // What another queue has found to be for this one.
        if let Some(inbox) = self.inboxes.get(self.number) {
            inbox.take(&mut arrived, room, pool);
        }
        let chosen = arrived.len();
        endpoint
            .receive(&mut arrived, room - chosen, pool)
            .map_err(|e| fault(&self.name, format_args!("receiving: {e}")))?;
        let any = !arrived.is_empty();
        for (number, frame) in arrived.drain(..).enumerate() {
            if number < chosen { self.accept(frame, pool) } else { self.admit(frame, pool) }
        }
        self.run.arrived = arrived;
        Ok(any)
    }

    /// Passes a frame on that the guest may have and wants, to the queue where it wants it.
    fn admit(&mut self, mut frame: Frame, pool: &mut Pool) {
        let wishes = &self.seen.wishes;
        if wishes.carrier == Carrier::Down {
            self.counters.rx_dropped_link.add(1);
            return pool.give(frame);
        }
        // The guest's own list and hash are of frames as it sees them: without the tag.
        if !self.filter.to_guest(&mut frame) {
            self.counters.rx_dropped_vlan.add(1);
            return pool.give(frame);
        }
        if !wishes.wants(&frame) {
            self.counters.rx_filtered.add(1);
            return pool.give(frame);
        }
        frame.hash = None;
        if wishes.spread.is_on() {
            frame.hash = wishes.spread.hash(&frame);
            let queue = wishes.spread.queue(frame.hash, self.inboxes.len());
            if queue != self.number
                && let Some(inbox) = self.inboxes.get(queue)
            {
                let counter = if inbox.put(&frame) {
                    &self.counters.rx_steered
                } else {
                    &self.counters.rx_dropped_steered
                };
                counter.add(1);
                return pool.give(frame);
            }
        }
        self.accept(frame, pool);
    }

    fn accept(&mut self, frame: Frame, pool: &mut Pool) {
        let (hash, from) = (frame.hash, self.run.waiting.len());
        if !pass(frame, &self.leaves, pool, &mut self.run.waiting) {
            self.counters.rx_dropped_offload.add(1);
        }
        // The pieces of a packet that was cut are of the same flow.
        self.run.waiting.range_mut(from..).for_each(|frame| frame.hash = hash);
    }

    /// Lays out and copies frames as far as there are pages; whether there was any.
    fn lay_out(&mut self, pool: &mut Pool, grants: &dyn Grants) -> Result<bool, Fault> {
        self.run.ops.clear();
        let mut sent = 0;
        self.run.limited = None;
        let now = self.limits.rx.now();
        while let Some(frame) = self.run.waiting.front() {
            if !self.fits(frame) {
                self.counters.rx_dropped_size.add(1);
                self.run.waiting.pop_front().into_iter().for_each(|frame| pool.give(frame));
                continue;
            }
            let slots = self.shape().slots(frame.len(), frame.offload.gso, frame.hash);
            // A ring's worth of pages is never too few for a packet.
            if slots > self.run.pages.len() || sent == BATCH {
                break;
            }
            self.run.limited = now.and_then(|now| self.limits.rx.wait(now));
            if self.run.limited.is_some() {
                break;
            }
            let Some(frame) = self.run.waiting.pop_front() else { break };
            now.inspect(|now| self.limits.rx.charge(frame.len(), *now));
            self.spread(&frame, frame.hash, slots);
            // Its memory is read by the copy; only then does it go back to the pool.
            self.run.arrived.push_back(frame);
            sent += 1;
        }
        if sent > 0 {
            let copied = self.copy(pool, grants)?;
            self.counters.rx_batches.add(copied.calls());
            self.counters.rx_staged.add(copied.staged);
            self.counters.rx_copied.add(copied.copied);
            self.run.arrived.drain(..).for_each(|frame| pool.give(frame));
            self.answer()?;
        }
        Ok(sent > 0)
    }

    /// Makes the copies of frames that are here.
    fn copy(&mut self, pool: &Pool, grants: &dyn Grants) -> Result<Copied, Fault> {
        let staging = self.live.staging().get(self.number);
        // Every queue has one; packets that nobody has copied must never go on.
        let staging = staging.ok_or_else(|| fault(&self.name, "no table of pages"))?;
        let (domid, Run { arrived, ops, split, .. }) = (self.domid, &mut self.run);
        staging
            .copy(arrived.iter_mut(), ops, split, |ops| grants.copy(domid, pool.buffer(), ops))
            .map_err(|e| fault(&self.name, format_args!("grant copy: {e}")))
    }

    // ---- from another guest

    /// Puts the leading frames of another vif's guest, at most `count`, into this one's pages; how many.
    /// Those stay behind which have to wait, or to be changed: they come by the endpoint.
    pub(super) fn cross(
        &mut self,
        frames: &VecDeque<Frame>,
        count: usize,
        crossing: &mut Crossing<'_>,
    ) -> usize {
        self.live.refresh(&mut self.seen);
        // A ring that makes no sense is for the queue's own thread to complain of.
        if !self.is_open() || self.take_pages().is_err() {
            return 0;
        }
        self.run.ops.clear();
        let now = self.limits.rx.now();
        let mut crossed = 0;
        for frame in frames.range(..count.min(BATCH)) {
            let slots = self.shape().slots(frame.len(), frame.offload.gso, None);
            let is_limited = now.is_some_and(|now| self.limits.rx.wait(now).is_some());
            let fits = self.fits(frame) && slots <= self.run.pages.len();
            if !fits || is_limited || !self.leaves.takes(frame) || !self.seen.wishes.wants(frame) {
                break;
            }
            now.inspect(|now| self.limits.rx.charge(frame.len(), *now));
            // The guest wants no hash, whatever the sender says of it.
            self.spread(frame, None, slots);
            crossed += 1;
        }
        if crossed > 0 {
            crossing.copy(self.domid, frames.range(..crossed), &mut self.run.ops);
            crossing.crossed += crossed as u64;
            self.counters.rx_batches.add(1);
            self.counters.rx_copied.add(self.run.ops.len() as u64);
            self.counters.rx_crossed.add(crossed as u64);
            if let Err(e) = self.answer() {
                tracing::debug!("{}", e.0);
            }
        }
        crossed
    }

    /// Whether frames may overtake nothing here, and need nothing but to be copied.
    fn is_open(&self) -> bool {
        let wishes = &self.seen.wishes;
        let kept = self.live.staging().get(self.number);
        let inbox = self.inboxes.get(self.number);
        self.run.waiting.is_empty()
            && !self.run.stalled
            && inbox.is_none_or(Mailbox::is_empty)
            && wishes.carrier == Carrier::Up
            && !wishes.spread.is_on()
            && self.filter.is_off()
            // To pages that are kept mapped the long way is the shorter one.
            && kept.is_some_and(|kept| kept.is_empty())
    }

    // ---- to the guest

    /// How the guest wants its packets.
    fn shape(&self) -> Shape {
        Shape { headroom: self.seen.wishes.headroom }
    }

    /// Whether the guest takes a frame that long at all.
    fn fits(&self, frame: &Frame) -> bool {
        let data = self.shape().data_slots(frame.len());
        frame.len() <= usize::from(u16::MAX) && (self.accepts.scatter || data == 1)
    }

    /// Lays a frame out over the next pages, as many as it takes with this hash.
    fn spread(&mut self, frame: &Frame, hash: Option<Hash>, slots: usize) {
        let shape = self.shape();
        let run = &mut self.run;
        let answered = &mut run.answered;
        let pages = run.pages.drain(..slots).map(|(slot, page)| {
            answered.push_back(slot);
            page
        });
        let place = (frame.at(), frame.len());
        run.laid_out.push(shape, place, (&frame.offload, hash), pages, &mut run.ops);
        self.count(frame, slots);
    }

    /// Answers what was copied, and publishes.
    fn answer(&mut self) -> Result<(), Fault> {
        let (ring, answered) = (&mut self.ring, &mut self.run.answered);
        let failed = self.run.laid_out.finish(&self.run.ops, |response| {
            if let Some(slot) = answered.pop_front() {
                ring.respond(slot, &response);
            }
        });
        self.counters.rx_dropped_copy.add(failed);
        if self.ring.publish() == Notify::Send {
            let notified = self.channels.rx().notify();
            notified.map_err(|e| fault(&self.name, format_args!("event channel: {e}")))?;
        }
        Ok(())
    }

    /// Drops what has been waiting for pages for too long, and then all that comes until there are
    /// new ones (XSA-392: it is the frame that waits, however many pages there are).
    fn watch_stall(&mut self, new_pages: bool, pool: &mut Pool) {
        if new_pages {
            self.run.stalled = false;
        }
        // Who waits for the limit does not wait for the guest.
        if self.run.waiting.is_empty() || self.run.limited.is_some() {
            self.run.blocked = None;
            return;
        }
        let now = Instant::now();
        let since = *self.run.blocked.get_or_insert(now);
        if now.duration_since(since) >= self.stall && !self.run.stalled {
            self.run.stalled = true;
            self.counters.rx_stalls.add(1);
        }
        if self.run.stalled {
            self.counters.rx_dropped_stalled.add(self.run.waiting.len() as u64);
            self.run.waiting.drain(..).for_each(|frame| pool.give(frame));
        }
    }

    fn count(&self, frame: &Frame, slots: usize) {
        let c = &self.counters;
        c.rx_packets.add(1);
        c.rx_bytes.add(frame.len() as u64);
        c.rx_slots.add(slots as u64);
        c.rx_gso.add(u64::from(frame.offload.gso.is_some()));
        let blank = matches!(frame.offload.checksum, Checksum::Blank { .. });
        c.rx_csum_blank.add(u64::from(blank));
    }
}
