//! The backend's end of a ring: requests come out, responses go in.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;
use core::num::NonZeroU32;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use perf::Handle;

use crate::counters::RingCounters;
use crate::front::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use crate::index::{self, Moving, Notify, Pending, Strong};
use crate::inflight::InFlight;
use crate::mem::{Row, SharedMem, kill_point};
use crate::protocol::{Corrupt, Protocol, SizeError, Slots, slots_of};

/// The right and duty to answer one request: it cannot be copied, and answering uses it up.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request that is never answered keeps its slot for ever"]
pub struct Slot(NonZeroU32);

/// In every [`Slot`], so that an `Option` of one takes no more room: entries are below it.
const SOME: u32 = 1 << 31;

impl Slot {
    #[inline(always)]
    fn of(entry: u32) -> Slot {
        Slot(NonZeroU32::new(entry | SOME).unwrap_or(NonZeroU32::MIN))
    }
    #[inline(always)]
    fn entry(&self) -> u32 {
        self.0.get() & !SOME
    }
    /// Index in the in-flight table, below the ring's slots; no two requests in flight have the
    /// same. Good for the caller's own array of request state.
    #[inline]
    pub fn index(&self) -> usize {
        self.entry() as usize
    }
}

/// A request taken from the ring: the only copy that may be looked at.
#[derive(Debug)]
pub struct Taken<R> {
    /// For the answer.
    pub slot: Slot,
    /// The request.
    pub req: R,
}

/// Why a ring cannot be attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttachError {
    /// The memory is no ring.
    Size(SizeError),
    /// The indices are impossible.
    Corrupt(Corrupt),
    /// The in-flight table has fewer entries than the ring has slots.
    Table {
        /// Entries that it has.
        entries: u32,
        /// Slots of the ring.
        slots: u32,
    },
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AttachError::Size(e) => e.fmt(f),
            AttachError::Corrupt(e) => e.fmt(f),
            AttachError::Table { entries, slots } => {
                write!(f, "an in-flight table of {entries} entries for a ring of {slots} slots")
            }
        }
    }
}
impl core::error::Error for AttachError {}
impl From<SizeError> for AttachError {
    fn from(e: SizeError) -> Self {
        AttachError::Size(e)
    }
}
impl From<Corrupt> for AttachError {
    fn from(e: Corrupt) -> Self {
        AttachError::Corrupt(e)
    }
}

/// A list of entries of the in-flight table, allocated once.
struct Stack {
    slots: Box<[u32]>,
    len: usize,
}

impl Stack {
    fn new(room: u32) -> Self {
        Stack { slots: vec![0; room as usize].into(), len: 0 }
    }
    #[inline]
    fn push(&mut self, slot: u32) {
        self.slots[self.len] = slot;
        self.len += 1;
    }
    #[inline]
    fn pop(&mut self) -> Option<u32> {
        self.len = self.len.checked_sub(1)?;
        Some(self.slots[self.len])
    }
}

/// The backend's end of a ring over 1, 2, 4 ... pages, with its in-flight table.
pub struct BackRing<P: Protocol, M, T> {
    ring: Row<M, Slots<P>>,
    /// Requests taken (`req_cons`): the table's own count, which need not be read back.
    taken: u32,
    /// Requests seen (the last `req_prod` that was read).
    seen: u32,
    /// How far they may be taken: not at all while there are some to be taken again.
    ready: u32,
    /// Responses written (`rsp_prod_pvt`) and published.
    written: u32,
    published: u32,
    table: T,
    entries: u32,
    /// Entries that a predecessor left unanswered, youngest first.
    replay: Stack,
    woken: bool,
    counters: Handle<RingCounters>,
    protocol: PhantomData<fn() -> P>,
}

impl<P: Protocol, M: SharedMem, T: InFlight<P::Req>> BackRing<P, M, T> {
    /// Takes the back end of a ring (`BACK_RING_ATTACH` at `rsp_prod`). What `table` holds and
    /// `rsp_prod` does not cover was taken by a predecessor and not answered: [`take`](Self::take)
    /// gives it again, oldest first, before anything new.
    ///
    /// `Notify::Send`: the predecessor may have died between publishing and notifying.
    pub fn attach(
        memory: M,
        table: T,
        counters: Handle<RingCounters>,
    ) -> Result<(Self, Notify), AttachError> {
        let ring = slots_of::<P, M>(memory)?;
        let slots = ring.count();
        let entries = table.slots();
        if entries < slots {
            return Err(AttachError::Table { entries, slots });
        }
        let rsp_prod = ring.region().word(RSP_PROD).load(Acquire);
        let mut ring = BackRing {
            ring,
            taken: rsp_prod,
            seen: rsp_prod,
            ready: rsp_prod,
            written: rsp_prod,
            published: rsp_prod,
            table,
            entries,
            replay: Stack::new(slots),
            woken: false,
            counters,
            protocol: PhantomData,
        };
        ring.recover()?;
        let _ = ring.look()?;
        Ok((ring, if rsp_prod == 0 { Notify::Skip } else { Notify::Send }))
    }

    /// Finds the unanswered entries: all that the table's order does not say are free. Changes
    /// nothing in the table, unless it is new.
    fn recover(&mut self) -> Result<(), Corrupt> {
        if self.table.taken().is_none() {
            self.table.begin(self.published);
        }
        let (taken, entries) = (self.table.taken().unwrap_or(self.published), self.entries);
        (self.taken, self.seen, self.ready) = (taken, taken, taken);
        let count = taken.wrapping_sub(self.published);
        if count > self.slots() {
            return Err(self.foreign(count));
        }
        // When each was last used, counted from E requests ago; 0 for before that.
        let mut used = vec![Some(0); entries as usize];
        for n in 1..=entries {
            let slot = self.table.order(taken.wrapping_sub(entries).wrapping_add(n - 1));
            if let Some(used) = used.get_mut(slot as usize) {
                *used = Some(n);
            }
        }
        for n in 0..entries - count {
            let slot = self.table.order(taken.wrapping_add(n));
            // Each is named once, if the producer index is what was published.
            if used.get_mut(slot as usize).and_then(Option::take).is_none() {
                return Err(self.foreign(count));
            }
        }
        let unanswered = used.iter().enumerate();
        let mut unanswered: Vec<_> =
            unanswered.filter_map(|(slot, used)| Some(((*used)?, slot as u32))).collect();
        unanswered.sort_unstable_by(|a, b| b.cmp(a));
        for (_, slot) in unanswered {
            self.replay.push(slot);
        }
        Ok(())
    }

    /// The ring's response index does not fit the table, by which `count` are unanswered.
    #[cold]
    fn foreign(&self, count: u32) -> Corrupt {
        let (found, least) = (self.published, self.published.wrapping_add(count));
        Corrupt { ring: P::NAME, index: "rsp_prod", found, least, room: self.slots() }
    }

    /// Slots of the ring.
    pub fn slots(&self) -> u32 {
        self.ring.count()
    }
    /// Requests taken and not answered, with those still to be taken again.
    pub fn in_flight(&self) -> u32 {
        self.taken.wrapping_sub(self.written)
    }
    /// Requests of a predecessor that [`take`](Self::take) is still to give again.
    pub fn replays(&self) -> u32 {
        self.replay.len as u32
    }
    /// The ring's memory.
    pub fn memory(&self) -> &M {
        self.ring.region().owner()
    }
    /// The in-flight table.
    pub fn table(&self) -> &T {
        &self.table
    }
    /// The ring's counters.
    pub fn counters(&self) -> &Handle<RingCounters> {
        &self.counters
    }

    /// The next request, copied out once. `None`: there is none now. `Corrupt`: the frontend's
    /// index is impossible; nothing more can be taken.
    #[inline(always)]
    pub fn take(&mut self) -> Result<Option<Taken<P::Req>>, Corrupt> {
        let at = self.taken;
        if at == self.ready {
            if self.replay.len > 0 {
                return Ok(self.take_again());
            }
            if self.look()? == Pending::Nothing {
                return Ok(None);
            }
        }
        // Its entry is free: no more requests are seen than the ring has slots.
        let (slot, req) = self.table.putting()(at, self.ring.arriving(at));
        self.taken = at.wrapping_add(1);
        Ok(Some(Taken { slot: Slot::of(slot), req }))
    }

    /// Takes all requests that are there, as [`take`](Self::take) would one by one: looks at the
    /// frontend's index once, where none is known to be there.
    #[inline]
    pub fn take_all(&mut self, mut each: impl FnMut(Taken<P::Req>)) -> Result<(), Corrupt> {
        if self.unconsumed() == 0 {
            let _ = self.look()?;
        }
        while let Some(taken) = self.take_again() {
            each(taken);
        }
        let (ready, ring, mut put) = (self.ready, self.ring.on_loan(), self.table.putting());
        let mut next = Moving::from(&mut self.taken);
        while next.at != ready {
            let (slot, req) = put(next.at, ring.arriving(next.at));
            next.at = next.at.wrapping_add(1);
            each(Taken { slot: Slot::of(slot), req });
        }
        Ok(())
    }

    #[cold]
    fn take_again(&mut self) -> Option<Taken<P::Req>> {
        let slot = self.next_again()?;
        Some(Taken { slot: Slot::of(slot), req: self.table.request(slot) })
    }

    /// The next entry that a predecessor has left, which comes before anything new.
    #[cold]
    fn next_again(&mut self) -> Option<u32> {
        let slot = self.replay.pop();
        if self.replay.len == 0 {
            self.ready = self.seen;
        }
        slot
    }

    /// Writes the response of a request, in any order. The frontend sees it after
    /// [`publish`](Self::publish). Panics if `slot` is another ring's and makes one too many.
    #[inline(always)]
    pub fn respond(&mut self, slot: Slot, rsp: &P::Rsp) {
        self.respond_all([(slot, *rsp)]);
    }

    /// Writes many responses, each as [`respond`](Self::respond).
    #[inline]
    pub fn respond_all(&mut self, answers: impl IntoIterator<Item = (Slot, P::Rsp)>) {
        let (ring, entries, taken) = (self.ring.on_loan(), self.entries, self.taken);
        let mut free = self.table.freeing();
        let mut next = Moving::from(&mut self.written);
        for (slot, rsp) in answers {
            assert!(next.at != taken, "a slot of another ring");
            ring.store(next.at, &rsp);
            free(next.at.wrapping_add(entries), slot.entry());
            next.at = next.at.wrapping_add(1);
        }
    }

    /// Shows the frontend all responses written so far
    /// (`RING_PUSH_RESPONSES_AND_CHECK_NOTIFY`); with that their requests are done.
    #[inline(always)]
    pub fn publish(&mut self) -> Notify {
        let (old, new) = (self.published, self.written);
        if old == new {
            return Notify::Skip;
        }
        let (producer, event) =
            (self.ring.region().word(RSP_PROD), self.ring.region().word(RSP_EVENT));
        kill_point();
        let notify = index::publish::<_, Strong>(producer, event, old, new);
        self.published = new;
        self.counters.responses.add(u64::from(new.wrapping_sub(old)));
        match notify {
            Notify::Send => self.counters.notifications_sent.add(1),
            Notify::Skip => self.counters.notifications_saved.add(1),
        }
        notify
    }

    /// Whether [`publish`](Self::publish) would now say `Send`: the frontend waits for one of the
    /// responses that are written. It may have changed a moment later.
    #[inline]
    pub fn is_awaited(&self) -> bool {
        let event = self.ring.region().word(RSP_EVENT).load(Relaxed);
        self.written.wrapping_sub(event) < self.written.wrapping_sub(self.published)
    }

    /// Looks whether there are requests, without asking for a notification.
    #[inline(always)]
    fn look(&mut self) -> Result<Pending, Corrupt> {
        let found = index::look::<_, Strong>(self.ring.region().word(REQ_PROD));
        let pending = self.found(found)?;
        if self.woken {
            self.woken = false;
            self.counters.spurious.add(u64::from(pending == Pending::Nothing));
        }
        Ok(pending)
    }

    /// Judges a producer index: it may lie from what was seen to one ring beyond the responses
    /// that the frontend could have taken.
    #[inline(always)]
    fn found(&mut self, req_prod: u32) -> Result<Pending, Corrupt> {
        if req_prod != self.seen {
            let new = req_prod.wrapping_sub(self.seen);
            if new > self.slots() - self.seen.wrapping_sub(self.published) {
                return Err(self.corrupt(req_prod));
            }
            self.seen = req_prod;
            if self.replay.len == 0 {
                self.ready = req_prod;
            }
            self.counters.requests.add(u64::from(new));
            self.counters.batch.record(u64::from(new));
        }
        Ok(if self.unconsumed() == 0 { Pending::Nothing } else { Pending::Work })
    }

    #[inline]
    fn unconsumed(&self) -> u32 {
        self.seen.wrapping_sub(self.taken).wrapping_add(self.replays())
    }

    #[cold]
    fn corrupt(&self, found: u32) -> Corrupt {
        let room = self.slots().saturating_sub(self.seen.wrapping_sub(self.published));
        Corrupt { ring: P::NAME, index: "req_prod", found, least: self.seen, room }
    }

    /// Looks whether there are requests to take.
    #[inline]
    pub fn peek(&mut self) -> Result<Pending, Corrupt> {
        if self.unconsumed() > 0 { Ok(Pending::Work) } else { self.look() }
    }

    /// Looks for requests while polling, and counts whether it paid.
    pub fn poll(&mut self) -> Result<Pending, Corrupt> {
        self.counters.polls.add(1);
        let pending = self.look()?;
        if pending == Pending::Work {
            self.counters.polls_paid.add(1);
        }
        Ok(pending)
    }

    /// Asks to be notified of the next request and looks a second time
    /// (`RING_FINAL_CHECK_FOR_REQUESTS`). Sleep only after `Nothing`.
    #[inline(always)]
    pub fn arm(&mut self) -> Result<Pending, Corrupt> {
        if self.unconsumed() > 0 || self.look()? == Pending::Work {
            return Ok(Pending::Work);
        }
        let wanted = self.taken.wrapping_add(1);
        let (producer, event) =
            (self.ring.region().word(REQ_PROD), self.ring.region().word(REQ_EVENT));
        let found = index::arm::<_, Strong>(producer, event, wanted);
        self.found(found)
    }

    /// Asks to be notified once `messages` more requests are there. `Nothing` says that there
    /// are fewer (not that there are none).
    pub fn arm_after(&mut self, messages: NonZeroU32) -> Result<Pending, Corrupt> {
        let _ = self.look()?;
        if self.unconsumed() < messages.get() {
            let wanted = self.taken.wrapping_add(messages.get());
            let (producer, event) =
                (self.ring.region().word(REQ_PROD), self.ring.region().word(REQ_EVENT));
            let found = index::arm::<_, Strong>(producer, event, wanted);
            let _ = self.found(found)?;
        }
        Ok(if self.unconsumed() >= messages.get() { Pending::Work } else { Pending::Nothing })
    }

    /// Asks for no notifications: this end polls.
    pub fn disarm(&mut self) {
        index::disarm(self.ring.region().word(REQ_EVENT), self.taken);
    }

    /// Counts a notification; if the next look finds nothing, it was spurious.
    pub fn woken(&mut self) {
        self.counters.notifications_received.add(1);
        self.woken = true;
    }
}

impl<P: Protocol, M, T> fmt::Debug for BackRing<P, M, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackRing")
            .field("ring", &P::NAME)
            .field("slots", &self.ring.count())
            .field("req_seen", &self.seen)
            .field("rsp_prod_pvt", &self.written)
            .finish_non_exhaustive()
    }
}
