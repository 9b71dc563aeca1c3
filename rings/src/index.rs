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
    /// Memory fence.
    fn fence(order: Ordering);
}

impl Word for AtomicU32 {
    #[inline]
    fn load(&self, order: Ordering) -> u32 {
        AtomicU32::load(self, order)
    }
    #[inline]
    fn store(&self, value: u32, order: Ordering) {
        AtomicU32::store(self, value, order);
    }
    #[inline]
    fn fence(order: Ordering) {
        core::sync::atomic::fence(order);
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

#[inline]
fn barrier<W: Word>(kind: Barrier) {
    match kind {
        Barrier::Full => W::fence(Ordering::SeqCst),
        Barrier::None => {}
    }
}

/// Producer: makes everything up to `new` visible, where `old` was the last index published.
/// (`RING_PUSH_REQUESTS_AND_CHECK_NOTIFY`, but with `old` from private memory.)
#[inline]
pub fn publish<W: Word, O: Orders>(producer: &W, event: &W, old: u32, new: u32) -> Notify {
    producer.store(new, O::PUBLISH);
    barrier::<W>(O::PUBLISH_BARRIER);
    let event = event.load(Ordering::Relaxed);
    if new.wrapping_sub(event) < new.wrapping_sub(old) { Notify::Send } else { Notify::Skip }
}

/// Consumer: the producer index; what lies before it may be read afterwards.
#[inline]
pub fn look<W: Word, O: Orders>(producer: &W) -> u32 {
    producer.load(O::LOOK)
}

/// Consumer: asks to be notified when the producer index passes `wanted` (the index after which
/// to wake; one more than the consumer index to wake at the next message), and looks a second
/// time: what was published before the request was seen would not be announced.
#[inline]
pub fn arm<W: Word, O: Orders>(producer: &W, event: &W, wanted: u32) -> u32 {
    event.store(wanted, Ordering::Relaxed);
    barrier::<W>(O::ARM_BARRIER);
    producer.load(O::SECOND_LOOK)
}

/// Consumer: asks not to be notified before the indices have gone once around. A notification
/// may still come for what the producer published before it saw this.
#[inline]
pub fn disarm<W: Word>(event: &W, consumed: u32) {
    event.store(consumed, Ordering::Relaxed);
}
