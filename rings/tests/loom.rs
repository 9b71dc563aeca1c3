//! The index protocol under the loom model checker: every interleaving and every permitted
//! reordering of small histories. Run alone: `cargo test -p ringback-rings --test loom`.
//!
//! Slots are loom cells, so a slot that is read without a happens-before edge from its writing
//! (or written without one from its reading) fails the model, also where the value would happen
//! to be right. Sleeping is modelled by its condition: whoever sleeps must have been notified.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicU32;
use loom::thread;
use rings::Notify;
use rings::index::{self, Barrier, Orders, Strong, Word};

struct LoomWord(AtomicU32);

impl Word for LoomWord {
    fn load(&self, order: Ordering) -> u32 {
        self.0.load(order)
    }
    fn store(&self, value: u32, order: Ordering) {
        self.0.store(value, order);
    }
    fn fence() {
        loom::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// The protocol with its `K`th ordering weakened.
struct Weak<const K: usize>;

const fn order(weak: bool, strong: Ordering) -> Ordering {
    if weak { Ordering::Relaxed } else { strong }
}
const fn barrier(weak: bool) -> Barrier {
    if weak { Barrier::None } else { Barrier::Full }
}

impl<const K: usize> Orders for Weak<K> {
    const PUBLISH: Ordering = order(K == 1, Strong::PUBLISH);
    const PUBLISH_BARRIER: Barrier = barrier(K == 2);
    const LOOK: Ordering = order(K == 3, Strong::LOOK);
    const ARM_BARRIER: Barrier = barrier(K == 4);
    const SECOND_LOOK: Ordering = order(K == 5, Strong::SECOND_LOOK);
}

/// A ring of one slot whose indices start at `start`; neither end has asked for events.
struct Ring {
    req_prod: LoomWord,
    req_event: LoomWord,
    rsp_prod: LoomWord,
    rsp_event: LoomWord,
    slot: UnsafeCell<u32>,
}

impl Ring {
    fn new(start: u32) -> Arc<Ring> {
        let word = || LoomWord(AtomicU32::new(start));
        Arc::new(Ring {
            req_prod: word(),
            req_event: word(),
            rsp_prod: word(),
            rsp_event: word(),
            slot: UnsafeCell::new(0),
        })
    }
    #[allow(unsafe_code)]
    fn write(&self, value: u32) {
        // SAFETY: loom checks that nobody else reaches the cell meanwhile.
        self.slot.with_mut(|slot| unsafe { *slot = value });
    }
    #[allow(unsafe_code)]
    fn read(&self) -> u32 {
        // SAFETY: as above.
        self.slot.with(|slot| unsafe { *slot })
    }
}

/// Looks, and if there is nothing arms events and looks again. Whether there was something.
fn look_or_sleep<O: Orders>(producer: &LoomWord, event: &LoomWord, consumed: u32) -> bool {
    let next = consumed.wrapping_add(1);
    let found = index::look::<_, O>(producer);
    if found == next {
        return true;
    }
    assert_eq!(found, consumed);
    index::arm::<_, O>(producer, event, next) == next
}

/// One request and its response, each side going to sleep when it finds nothing.
fn request_and_response<O: Orders>(start: u32) {
    let ring = Ring::new(start);
    let new = start.wrapping_add(1);
    let back = thread::spawn({
        let ring = ring.clone();
        move || {
            if !look_or_sleep::<O>(&ring.req_prod, &ring.req_event, start) {
                return None;
            }
            assert_eq!(ring.read(), 1, "the request");
            ring.write(2);
            Some(index::publish::<_, O>(&ring.rsp_prod, &ring.rsp_event, start, new))
        }
    });
    ring.write(1);
    let request = index::publish::<_, O>(&ring.req_prod, &ring.req_event, start, new);
    let answered = look_or_sleep::<O>(&ring.rsp_prod, &ring.rsp_event, start);
    if answered {
        assert_eq!(ring.read(), 2, "the response");
    }
    match back.join().expect("back") {
        None => assert_eq!(request, Notify::Send, "the back sleeps and was not notified"),
        Some(response) => {
            assert!(answered || response == Notify::Send, "the front sleeps and was not notified");
        }
    }
}

/// Two requests through one slot, both sides polling: the second may be written only after the
/// back has read the first, and after the front has read its response.
fn slot_is_reused<O: Orders>(start: u32) {
    let ring = Ring::new(start);
    let (one, two) = (start.wrapping_add(1), start.wrapping_add(2));
    let back = thread::spawn({
        let ring = ring.clone();
        move || {
            if index::look::<_, O>(&ring.req_prod) == start {
                return;
            }
            assert_eq!(ring.read(), 1);
            ring.write(2);
            let _ = index::publish::<_, O>(&ring.rsp_prod, &ring.rsp_event, start, one);
            if index::look::<_, O>(&ring.req_prod) == two {
                assert_eq!(ring.read(), 3);
            }
        }
    });
    ring.write(1);
    let _ = index::publish::<_, O>(&ring.req_prod, &ring.req_event, start, one);
    if index::look::<_, O>(&ring.rsp_prod) == one {
        assert_eq!(ring.read(), 2);
        ring.write(3);
        let _ = index::publish::<_, O>(&ring.req_prod, &ring.req_event, one, two);
    }
    back.join().expect("back");
}

fn all_models<O: Orders + 'static>() {
    for start in [0, u32::MAX] {
        loom::model(move || request_and_response::<O>(start));
        loom::model(move || slot_is_reused::<O>(start));
    }
}

fn some_model_fails<O: Orders + 'static>() {
    let outcome = catch_unwind(AssertUnwindSafe(all_models::<O>));
    assert!(outcome.is_err(), "no model noticed the weakened ordering");
}

#[test]
fn the_protocol_loses_no_wake_up_and_shows_no_unwritten_slot() {
    all_models::<Strong>();
}

#[test]
fn weakening_nothing_through_the_test_orders_changes_nothing() {
    all_models::<Weak<0>>();
}

#[test]
fn the_release_of_publish_is_needed() {
    some_model_fails::<Weak<1>>();
}

#[test]
fn the_barrier_of_publish_is_needed() {
    some_model_fails::<Weak<2>>();
}

#[test]
fn the_acquire_of_look_is_needed() {
    some_model_fails::<Weak<3>>();
}

#[test]
fn the_barrier_of_arm_is_needed() {
    some_model_fails::<Weak<4>>();
}

#[test]
fn the_acquire_of_the_second_look_is_needed() {
    some_model_fails::<Weak<5>>();
}
