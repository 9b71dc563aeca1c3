//! The index protocol of io/ring.h, on nothing but its words.
//!
//! Each direction of a ring has a producer index, written by the producer, and an event index,
//! written by the consumer: "notify me when you pass this". Requests use `req_prod` and
//! `req_event`, responses `rsp_prod` and `rsp_event`. Indices count up freely and wrap at 2^32.
//!
//! The functions are generic over the word, so that a model checker can run them, and over the
//! memory orderings, so that its tests can show that each one is needed.

use core::sync::atomic::{AtomicU32, Ordering};

/// Whether the other side must be notified. The ring does not notify; its caller does.
#[must_use = "a lost notification leaves the other side asleep"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// The other side asked to be told: send an event.
    Send,
    /// The other side is awake, or wants to be told later.
    Skip,
}

/// Whether there is work, as seen by a look at the other side's index.
#[must_use = "work that came while events were off is not announced again"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// There is something to take: don't sleep.
    Work,
    /// There is nothing, and the other side will notify if events are armed.
    Nothing,
}

/// A 32-bit word that both sides can reach.
pub trait Word {
    /// Atomic load.
    fn load(&self, order: Ordering) -> u32;
    /// Atomic store.
    fn store(&self, value: u32, order: Ordering);
    /// Full fence.
    fn fence();
    /// A store and a full barrier between it and [`load_behind`](Self::load_behind) of another
    /// word.
    fn store_barrier(&self, value: u32, order: Ordering) {
        self.store(value, order);
        Self::fence();
    }
    /// A load behind that barrier.
    fn load_behind(&self, order: Ordering) -> u32 {
        self.load(order)
    }
}

/// The barrier is made of sequentially consistent accesses: of a store and a load of two words
/// on either side, at least one load then sees the other side's store. On x86-64 that is one
/// `xchg`, half the price of the `mfence` that a fence becomes; elsewhere no dearer than a fence.
impl Word for AtomicU32 {
    #[inline(always)]
    fn load(&self, order: Ordering) -> u32 {
        AtomicU32::load(self, order)
    }
    #[inline(always)]
    fn store(&self, value: u32, order: Ordering) {
        AtomicU32::store(self, value, order);
    }
    #[inline(always)]
    fn fence() {
        core::sync::atomic::fence(Ordering::SeqCst);
    }
    #[inline(always)]
    fn store_barrier(&self, value: u32, _: Ordering) {
        AtomicU32::store(self, value, Ordering::SeqCst);
    }
    #[inline(always)]
    fn load_behind(&self, _: Ordering) -> u32 {
        AtomicU32::load(self, Ordering::SeqCst)
    }
}

/// A fence between a store and a later load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barrier {
    /// `xen_mb()`.
    Full,
    /// None: for tests that show that it is missed.
    None,
}

/// The orderings that the protocol needs. Only tests override one.
pub trait Orders {
    /// Of the store of the producer index: the consumer sees the slots before it, and the
    /// producer has read what was in them (`xen_wmb` in `RING_PUSH_*`).
    const PUBLISH: Ordering = Ordering::Release;
    /// Between that store and the load of the event index (`xen_mb` in `RING_PUSH_*_AND_CHECK_NOTIFY`).
    const PUBLISH_BARRIER: Barrier = Barrier::Full;
    /// Of the load of the producer index (`xen_rmb` after it).
    const LOOK: Ordering = Ordering::Acquire;
    /// Between the store of the event index and the second look (`xen_mb` in `RING_FINAL_CHECK_FOR_*`).
    const ARM_BARRIER: Barrier = Barrier::Full;
    /// Of the second look's load of the producer index.
    const SECOND_LOOK: Ordering = Ordering::Acquire;
}

/// The orderings as they must be.
#[derive(Clone, Copy, Debug)]
pub struct Strong;
impl Orders for Strong {}

#[inline(always)]
fn store_then_load<W: Word>(
    to: (&W, u32, Ordering),
    barrier: Barrier,
    from: (&W, Ordering),
) -> u32 {
    let ((to, value, store), (from, load)) = (to, from);
    match barrier {
        Barrier::Full => {
            to.store_barrier(value, store);
            from.load_behind(load)
        }
        Barrier::None => {
            to.store(value, store);
            from.load(load)
        }
    }
}

/// Producer: makes everything up to `new` visible, where `old` was the last index published.
/// (`RING_PUSH_REQUESTS_AND_CHECK_NOTIFY`, but with `old` from private memory.)
#[inline(always)]
pub fn publish<W: Word, O: Orders>(producer: &W, event: &W, old: u32, new: u32) -> Notify {
    let store = (producer, new, O::PUBLISH);
    let event = store_then_load(store, O::PUBLISH_BARRIER, (event, Ordering::Relaxed));
    if new.wrapping_sub(event) < new.wrapping_sub(old) { Notify::Send } else { Notify::Skip }
}

/// Consumer: the producer index; what lies before it may be read afterwards.
#[inline(always)]
pub fn look<W: Word, O: Orders>(producer: &W) -> u32 {
    producer.load(O::LOOK)
}

/// Consumer: asks to be notified when the producer index passes `wanted` (the index after which
/// to wake; one more than the consumer index to wake at the next message), and looks a second
/// time: what was published before the request was seen would not be announced.
#[inline(always)]
pub fn arm<W: Word, O: Orders>(producer: &W, event: &W, wanted: u32) -> u32 {
    let store = (event, wanted, Ordering::Relaxed);
    store_then_load(store, O::ARM_BARRIER, (producer, O::SECOND_LOOK))
}

/// Consumer: asks not to be notified before the indices have gone once around. A notification
/// may still come for what the producer published before it saw this.
#[inline(always)]
pub fn disarm<W: Word>(event: &W, consumed: u32) {
    event.store(consumed, Ordering::Relaxed);
}

/// An end's own index while a loop moves it on: in a register, where a call for each message would
/// read and write it in memory (with all else that an end knows, a quarter of a ring's time). It
/// counts however the loop ends.
pub(crate) struct Moving<'a> {
    pub(crate) at: u32,
    index: &'a mut u32,
}

impl<'a> From<&'a mut u32> for Moving<'a> {
    #[inline(always)]
    fn from(index: &'a mut u32) -> Self {
        Moving { at: *index, index }
    }
}

impl Drop for Moving<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        *self.index = self.at;
    }
}
