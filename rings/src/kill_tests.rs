//! The backend is killed before each of its stores to shared memory, in every operation, and a
//! successor goes on from what it finds: no request may be lost, none answered twice.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread_local;

use perf::Handle;

use crate::mem::{HeapPages, SharedMem};
use crate::{BackRing, FrontRing, Pending, Protocol, Slot, Table, Taken};

thread_local! {
    /// Stores that the backend may still make; `None` while nobody is to be killed.
    static LIFE: Cell<Option<u32>> = const { Cell::new(None) };
}

struct Killed;

/// See [`crate::mem`].
pub(crate) fn kill_point() {
    match LIFE.get() {
        None => {}
        // The unwinding drops private memory and touches no shared memory, as a kill does.
        Some(0) => resume_unwind(Box::new(Killed)),
        Some(n) => LIFE.set(Some(n - 1)),
    }
}

/// Requests large enough that a page has 4 slots.
struct Wide;
impl Protocol for Wide {
    const NAME: &'static str = "wide";
    type Req = [u64; 126];
    type Rsp = [u64; 2];
}
const SLOTS: u32 = 4;

type Shared = Arc<HeapPages>;
type Back = BackRing<Wide, Shared, Table<[u64; 126], Shared>>;

fn request(id: u64) -> [u64; 126] {
    core::array::from_fn(|i| id.wrapping_mul(i as u64 + 1))
}

/// What outlives the backend: the ring, the table, and the frontend.
struct Survivors {
    ring: Shared,
    table: Shared,
    front: FrontRing<Wide, Shared>,
    next_id: u64,
    /// What was asked and not answered.
    outstanding: BTreeMap<u64, ()>,
    answered: u64,
}

impl Survivors {
    fn new(start: u32) -> Self {
        let ring = Arc::new(HeapPages::new(1));
        let bytes = Table::<[u64; 126], Shared>::bytes(SLOTS);
        let table = Arc::new(HeapPages::new(bytes.div_ceil(4096)));
        let front = FrontRing::<Wide, _>::init(ring.clone(), Handle::default()).expect("front");
        assert_eq!(front.slots(), SLOTS);
        for offset in [0, 8] {
            ring.word(offset).store(start, core::sync::atomic::Ordering::Relaxed);
        }
        let front =
            FrontRing::attach(ring.clone(), start, front.counters().clone()).expect("front");
        Table::<[u64; 126], _>::format(table.clone(), SLOTS).expect("table");
        Survivors { ring, table, front, next_id: 1, outstanding: BTreeMap::new(), answered: 0 }
    }

    fn attach(&self) -> Back {
        let table = Table::open(self.table.clone(), SLOTS).expect("table");
        BackRing::attach(self.ring.clone(), table, Handle::default()).expect("attach").0
    }

    /// The frontend takes what there is, checks it, and asks for more. The order is free.
    fn front_turn(&mut self, total: u64, most: u32) {
        while let Some([id, proof]) = self.front.take().expect("honest backend") {
            assert!(self.outstanding.remove(&id).is_some(), "request {id} answered twice");
            assert_eq!(proof, request(id)[125], "request {id} was not kept whole");
            self.answered += 1;
        }
        for _ in 0..most {
            if self.next_id > total || self.front.push(&request(self.next_id)).is_err() {
                break;
            }
            self.outstanding.insert(self.next_id, ());
            self.next_id += 1;
        }
        let _ = self.front.publish();
    }
}

/// A cheap deterministic source of choices.
struct Choice(u64);
impl Choice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % n
    }
}

/// One life of a backend: takes, answers out of order, publishes now and then. Ends when all is
/// answered, or by being killed.
fn live(survivors: &mut Survivors, total: u64, choice: &mut Choice) {
    let mut back = survivors.attach();
    let mut held: VecDeque<(Slot, u64, u64)> = VecDeque::new();
    let mut rounds = 0;
    while survivors.answered < total {
        rounds += 1;
        assert!(rounds < 10_000, "request lost: {:?}", survivors.outstanding);
        match choice.below(6) {
            0 => {
                // Only the backend is killed.
                let life = LIFE.take();
                survivors.front_turn(total, 1 + choice.below(4) as u32);
                LIFE.set(life);
            }
            1 => {
                let keep = |taken: Taken<[u64; 126]>| {
                    held.push_back((taken.slot, taken.req[0], taken.req[125]));
                };
                back.take_all(keep).expect("honest frontend");
            }
            2 => {
                if let Some(taken) = back.take().expect("honest frontend") {
                    held.push_back((taken.slot, taken.req[0], taken.req[125]));
                }
            }
            3 if held.len() > 1 => {
                back.respond_all(held.drain(1..).map(|(slot, id, proof)| (slot, [id, proof])));
            }
            4 if !held.is_empty() => {
                let at = choice.below(held.len() as u64) as usize;
                let (slot, id, proof) = held.remove(at).expect("in range");
                back.respond(slot, &[id, proof]);
            }
            5 => _ = back.publish(),
            _ => {}
        }
    }
    assert!(held.is_empty());
    assert_eq!(back.arm(), Ok(Pending::Nothing));
    assert_eq!(back.in_flight(), 0);
}

/// Runs a history with a kill after `first` stores and another after `second` more; says whether
/// the first came.
fn history(seed: u64, start: u32, first: u32, second: u32) -> bool {
    let mut survivors = Survivors::new(start);
    let mut choice = Choice(seed);
    let total = 13;
    let mut kills = 0;
    for life in [Some(first), Some(second), None] {
        LIFE.set(life);
        let end = catch_unwind(AssertUnwindSafe(|| live(&mut survivors, total, &mut choice)));
        LIFE.set(None);
        match end {
            Ok(()) => break,
            Err(cause) if cause.is::<Killed>() => kills += 1,
            Err(cause) => resume_unwind(cause),
        }
    }
    assert_eq!((survivors.answered, survivors.outstanding.len()), (total, 0));
    kills > 0
}

#[test]
fn killed_at_every_step_no_request_is_lost_and_none_answered_twice() {
    let mut histories = 0;
    for seed in 0..40 {
        let start = if seed % 2 == 0 { 0 } else { u32::MAX - seed as u32 % 8 };
        let mut first = 0;
        while history(seed, start, first, u32::MAX) {
            histories += 1;
            first += 1;
        }
        assert!(first > 50, "the history was cut short at {first} stores");
    }
    assert!(histories > 2000);
}

#[test]
fn killed_again_while_recovering_or_soon_after() {
    for seed in 100..108 {
        for first in 0..100 {
            for second in 0..12 {
                history(seed, 7, first, second);
            }
        }
    }
}

#[test]
fn what_was_left_is_given_again_in_the_order_of_taking() {
    let mut survivors = Survivors::new(0);
    survivors.front_turn(4, 4);
    let mut back = survivors.attach();
    let mut taken: Vec<Slot> = Vec::new();
    while let Some(t) = back.take().expect("take") {
        taken.push(t.slot);
    }
    // 2 is answered and published, 4 answered only; then the process dies.
    back.respond(taken.remove(1), &[2, request(2)[125]]);
    let _ = back.publish();
    back.respond(taken.remove(2), &[4, request(4)[125]]);
    drop(back);
    let mut back = survivors.attach();
    assert_eq!((back.replays(), back.in_flight()), (3, 3));
    let mut ids = Vec::new();
    while let Some(t) = back.take().expect("take") {
        assert_eq!(t.req, request(t.req[0]));
        ids.push(t.req[0]);
        back.respond(t.slot, &[t.req[0], t.req[125]]);
    }
    assert_eq!(ids, [1, 3, 4]);
    let _ = back.publish();
    survivors.front_turn(0, 0);
    assert_eq!(survivors.answered, 4);
}

#[test]
fn what_was_left_comes_before_what_is_new_also_all_at_once() {
    let mut survivors = Survivors::new(0);
    survivors.front_turn(3, 3);
    let mut back = survivors.attach();
    let mut taken: Vec<Slot> = Vec::new();
    back.take_all(|t| taken.push(t.slot)).expect("take");
    back.respond_all([(taken.remove(1), [2, request(2)[125]])]);
    let _ = back.publish();
    drop(back);
    survivors.front_turn(5, 2);
    let mut back = survivors.attach();
    let mut ids = Vec::new();
    back.take_all(|t| ids.push(t.req[0])).expect("take");
    assert_eq!(ids, [1, 3, 4, 5]);
    assert_eq!((back.replays(), back.in_flight()), (0, 4));
    assert!(back.take().expect("take").is_none());
}

#[test]
fn what_was_taken_before_a_panic_is_taken() {
    let mut survivors = Survivors::new(0);
    survivors.front_turn(3, 3);
    let mut back = survivors.attach();
    let mut first = None;
    let stops = AssertUnwindSafe(|| {
        back.take_all(|t| match t.req[0] {
            1 => first = Some(t.slot),
            _ => panic!("enough"),
        })
    });
    assert!(catch_unwind(stops).is_err());
    assert_eq!(back.in_flight(), 2);
    assert_eq!(back.take().expect("take").expect("the third").req[0], 3);
    let answers = first.into_iter().map(|slot| (slot, [1, request(1)[125]]));
    let stops =
        AssertUnwindSafe(|| back.respond_all(answers.chain(std::iter::once_with(|| panic!()))));
    assert!(catch_unwind(stops).is_err());
    assert_eq!(back.in_flight(), 2);
}

#[test]
fn a_table_that_forgets_is_caught() {
    // Negative control: wipe the table at the kill, as if it had lain in the process.
    let mut survivors = Survivors::new(0);
    survivors.front_turn(4, 4);
    let mut back = survivors.attach();
    let first = back.take().expect("take").expect("first");
    let second = back.take().expect("take").expect("second");
    back.respond(second.slot, &[2, request(2)[125]]);
    let _ = back.publish();
    drop((back, first.slot));
    Table::<[u64; 126], _>::format(survivors.table.clone(), SLOTS).expect("table");
    let outcome = catch_unwind(AssertUnwindSafe(|| live(&mut survivors, 4, &mut Choice(1))));
    assert!(outcome.is_err(), "an answer that came twice or never was not noticed");
}

#[test]
fn foreign_and_small_tables_are_refused() {
    use crate::inflight::TableError;
    let memory = Arc::new(HeapPages::new(2));
    let open = |slots| Table::<[u64; 126], _>::open(memory.clone(), slots).err();
    assert_eq!(open(4), Some(TableError::Foreign));
    Table::<[u64; 126], _>::format(memory.clone(), 4).expect("room");
    assert_eq!(open(4), None);
    assert_eq!(open(2), Some(TableError::Foreign));
    assert!(matches!(open(64), Some(TableError::TooSmall { .. })));
    assert!(Table::<[u64; 3], _>::open(memory.clone(), 4).is_err());
}

/// Whatever a table's bytes are: it is refused, or each of its entries is given once.
#[test]
fn spoilt_tables_are_refused_or_harmless() {
    let mut choice = Choice(7);
    let (mut refused, mut taken_up) = (0, 0);
    for round in 0..4000 {
        let mut survivors = Survivors::new(if round % 2 == 0 { 0 } else { u32::MAX - 3 });
        survivors.front_turn(4, 4);
        let mut back = survivors.attach();
        let mut held: VecDeque<Slot> = VecDeque::new();
        for _ in 0..1 + choice.below(4) {
            held.extend(back.take().expect("take").map(|taken| taken.slot));
        }
        if choice.below(2) == 0 {
            let at = choice.below(held.len() as u64) as usize;
            back.respond(held.remove(at).expect("in range"), &[0, 0]);
            let _ = back.publish();
        }
        drop((back, held));
        let bytes = Table::<[u64; 126], Shared>::bytes(SLOTS) as u64;
        for _ in 0..1 + choice.below(3) {
            // Mostly where it says what is free and what is not.
            let most = if choice.below(4) == 0 { bytes } else { 64 + 32 };
            let value = [choice.below(256) as u8];
            survivors.table.write(choice.below(most) as usize, &value);
        }
        let Ok(table) = Table::open(survivors.table.clone(), SLOTS) else {
            refused += 1;
            continue;
        };
        let Ok((mut back, _)) =
            BackRing::<Wide, _, _>::attach(survivors.ring.clone(), table, Handle::default())
        else {
            refused += 1;
            continue;
        };
        taken_up += 1;
        let mut given: Vec<Slot> = Vec::new();
        while let Ok(Some(taken)) = back.take() {
            assert!(given.iter().all(|slot| slot.index() != taken.slot.index()));
            assert!(taken.slot.index() < SLOTS as usize);
            given.push(taken.slot);
        }
        assert!(given.len() <= SLOTS as usize);
        for slot in given {
            back.respond(slot, &[0, 0]);
        }
        let _ = back.publish();
    }
    assert!(refused > 500 && taken_up > 500, "{refused} refused, {taken_up} not");
}
