//! The frontend's end of a ring: requests go in, responses come out.

use core::fmt;
use core::marker::PhantomData;
use core::num::NonZeroU32;
use core::sync::atomic::Ordering::Relaxed;

use perf::Handle;

use crate::counters::RingCounters;
use crate::index::{self, Moving, Notify, Pending, Strong};
use crate::mem::{Row, SharedMem};
use crate::protocol::{Corrupt, HEADER, Protocol, SizeError, Slots, slots_of};

pub(crate) const REQ_PROD: usize = 0;
pub(crate) const REQ_EVENT: usize = 4;
pub(crate) const RSP_PROD: usize = 8;
pub(crate) const RSP_EVENT: usize = 12;

/// Every slot holds a request without a response: take responses first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the ring is full")
    }
}
impl core::error::Error for Full {}

/// The frontend's end of a ring over 1, 2, 4 ... pages.
pub struct FrontRing<P: Protocol, M> {
    ring: Row<M, Slots<P>>,
    /// Requests written (`req_prod_pvt`) and published.
    written: u32,
    published: u32,
    /// Responses taken (`rsp_cons`) and seen (the last `rsp_prod` that was read).
    taken: u32,
    seen: u32,
    woken: bool,
    counters: Handle<RingCounters>,
    protocol: PhantomData<fn() -> P>,
}

impl<P: Protocol, M: SharedMem> FrontRing<P, M> {
    /// Makes `memory` an empty ring (`XEN_FRONT_RING_INIT`) and takes its front end. Must not be
    /// done to a ring that a backend is connected to.
    pub fn init(memory: M, counters: Handle<RingCounters>) -> Result<Self, SizeError> {
        let ring = slots_of::<P, M>(memory)?;
        for offset in (RSP_EVENT + 4..HEADER).step_by(4) {
            ring.region().word(offset).store(0, Relaxed);
        }
        for (offset, value) in [(REQ_PROD, 0), (RSP_PROD, 0), (REQ_EVENT, 1), (RSP_EVENT, 1)] {
            ring.region().word(offset).store(value, Relaxed);
        }
        Ok(Self::at(ring, 0, counters))
    }

    /// Takes the front end of a ring that has no request in flight, at the index `at`
    /// (`FRONT_RING_ATTACH`).
    pub fn attach(memory: M, at: u32, counters: Handle<RingCounters>) -> Result<Self, SizeError> {
        Ok(Self::at(slots_of::<P, M>(memory)?, at, counters))
    }

    fn at(ring: Row<M, Slots<P>>, at: u32, counters: Handle<RingCounters>) -> Self {
        FrontRing {
            ring,
            written: at,
            published: at,
            taken: at,
            seen: at,
            woken: false,
            counters,
            protocol: PhantomData,
        }
    }

    /// Slots of the ring.
    pub fn slots(&self) -> u32 {
        self.ring.count()
    }
    /// Slots that are free for requests (`RING_FREE_REQUESTS`).
    #[inline]
    pub fn free(&self) -> u32 {
        self.slots() - self.in_flight()
    }
    /// Requests written whose response has not been taken.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.written.wrapping_sub(self.taken)
    }
    /// The ring's memory.
    pub fn memory(&self) -> &M {
        self.ring.region().owner()
    }
    /// The ring's counters.
    pub fn counters(&self) -> &Handle<RingCounters> {
        &self.counters
    }

    /// Writes a request into the next slot. The backend sees it after [`publish`](Self::publish).
    #[inline(always)]
    pub fn push(&mut self, req: &P::Req) -> Result<(), Full> {
        if self.free() == 0 {
            self.counters.ring_full.add(1);
            return Err(Full);
        }
        self.ring.store(self.written, req);
        self.written = self.written.wrapping_add(1);
        Ok(())
    }

    /// Shows the backend all requests written so far
    /// (`RING_PUSH_REQUESTS_AND_CHECK_NOTIFY`).
    #[inline(always)]
    pub fn publish(&mut self) -> Notify {
        let (old, new) = (self.published, self.written);
        if old == new {
            return Notify::Skip;
        }
        let (producer, event) =
            (self.ring.region().word(REQ_PROD), self.ring.region().word(REQ_EVENT));
        let notify = index::publish::<_, Strong>(producer, event, old, new);
        self.published = new;
        self.counters.requests.add(u64::from(new.wrapping_sub(old)));
        match notify {
            Notify::Send => self.counters.notifications_sent.add(1),
            Notify::Skip => self.counters.notifications_saved.add(1),
        }
        notify
    }

    /// The next response, copied out. `Corrupt`: the backend claims responses to requests that
    /// were not made.
    #[inline(always)]
    pub fn take(&mut self) -> Result<Option<P::Rsp>, Corrupt> {
        if self.taken == self.seen && self.look()? == Pending::Nothing {
            return Ok(None);
        }
        let rsp = self.ring.load(self.taken);
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(rsp))
    }

    /// Takes all responses that are there, as [`take`](Self::take) would one by one: looks at the
    /// backend's index once, where none is known to be there.
    #[inline]
    pub fn take_all(&mut self, mut each: impl FnMut(P::Rsp)) -> Result<(), Corrupt> {
        if self.taken == self.seen {
            let _ = self.look()?;
        }
        let (seen, ring) = (self.seen, self.ring.on_loan());
        let mut next = Moving::from(&mut self.taken);
        while next.at != seen {
            let rsp = ring.load(next.at);
            next.at = next.at.wrapping_add(1);
            each(rsp);
        }
        Ok(())
    }

    /// Looks whether there are responses, without asking for a notification.
    #[inline(always)]
    fn look(&mut self) -> Result<Pending, Corrupt> {
        let found = index::look::<_, Strong>(self.ring.region().word(RSP_PROD));
        let pending = self.found(found)?;
        if self.woken {
            self.woken = false;
            self.counters.spurious.add(u64::from(pending == Pending::Nothing));
        }
        Ok(pending)
    }

    /// Judges a producer index: it may lie from what was seen to the requests published.
    #[inline(always)]
    fn found(&mut self, rsp_prod: u32) -> Result<Pending, Corrupt> {
        if rsp_prod != self.seen {
            let new = rsp_prod.wrapping_sub(self.seen);
            if new > self.published.wrapping_sub(self.seen) {
                return Err(self.corrupt(rsp_prod));
            }
            self.seen = rsp_prod;
            self.counters.responses.add(u64::from(new));
            self.counters.batch.record(u64::from(new));
        }
        Ok(if self.taken == self.seen { Pending::Nothing } else { Pending::Work })
    }

    #[cold]
    fn corrupt(&self, found: u32) -> Corrupt {
        let room = self.published.wrapping_sub(self.seen);
        Corrupt { ring: P::NAME, index: "rsp_prod", found, least: self.seen, room }
    }

    /// Looks for responses while polling, and counts whether it paid.
    pub fn poll(&mut self) -> Result<Pending, Corrupt> {
        self.counters.polls.add(1);
        let pending = self.look()?;
        if pending == Pending::Work {
            self.counters.polls_paid.add(1);
        }
        Ok(pending)
    }

    /// Asks to be notified of the next response and looks a second time
    /// (`RING_FINAL_CHECK_FOR_RESPONSES`). Sleep only after `Nothing`.
    #[inline(always)]
    pub fn arm(&mut self) -> Result<Pending, Corrupt> {
        if self.taken != self.seen || self.look()? == Pending::Work {
            return Ok(Pending::Work);
        }
        let wanted = self.taken.wrapping_add(1);
        let (producer, event) =
            (self.ring.region().word(RSP_PROD), self.ring.region().word(RSP_EVENT));
        let found = index::arm::<_, Strong>(producer, event, wanted);
        self.found(found)
    }

    /// Asks to be notified once `messages` more responses are there. `Nothing` says that there
    /// are fewer (not that there are none).
    pub fn arm_after(&mut self, messages: NonZeroU32) -> Result<Pending, Corrupt> {
        let enough = |ring: &Self| ring.seen.wrapping_sub(ring.taken) >= messages.get();
        let _ = self.look()?;
        if !enough(self) {
            let wanted = self.taken.wrapping_add(messages.get());
            let (producer, event) =
                (self.ring.region().word(RSP_PROD), self.ring.region().word(RSP_EVENT));
            let found = index::arm::<_, Strong>(producer, event, wanted);
            let _ = self.found(found)?;
        }
        Ok(if enough(self) { Pending::Work } else { Pending::Nothing })
    }

    /// Asks for no notifications: this end polls.
    pub fn disarm(&mut self) {
        index::disarm(self.ring.region().word(RSP_EVENT), self.taken);
    }

    /// Counts a notification; if the next look finds nothing, it was spurious.
    pub fn woken(&mut self) {
        self.counters.notifications_received.add(1);
        self.woken = true;
    }
}

impl<P: Protocol, M> fmt::Debug for FrontRing<P, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontRing")
            .field("ring", &P::NAME)
            .field("slots", &self.ring.count())
            .field("req_prod_pvt", &self.written)
            .field("rsp_cons", &self.taken)
            .finish_non_exhaustive()
    }
}
