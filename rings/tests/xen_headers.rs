//! This crate's rings against Xen's own C macros: the same operations with each end in Rust or
//! in C, all four combinations side by side, must leave the same bytes in the shared pages and
//! give the same answers.
// Calls into C by address.
#![allow(unsafe_code)]

mod c_ring;
#[path = "c_ring/roundtrip.rs"]
mod roundtrip;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use c_ring::{CRing, End, Toy};
use proptest::prelude::*;
use rings::mem::{HeapPages, SharedMem};
use rings::{BackRing, FrontRing, Notify, Pending, Slot, Table};

type Shared = Arc<HeapPages>;
type Req = [u64; 14];
type Rsp = [u64; 2];

fn c() -> CRing {
    let folder = tempfile::tempdir().expect("folder");
    CRing::load(folder.path()).unwrap_or_else(|why| panic!("{why}"))
}

enum Front<'a> {
    Rust(FrontRing<Toy, Shared>),
    C(&'a CRing, End),
}
enum Back<'a> {
    Rust(Box<BackRing<Toy, Shared, Table<Req>>>, Vec<Slot>),
    C(&'a CRing, End),
}

impl Front<'_> {
    fn push(&mut self, req: &Req) -> bool {
        match self {
            Front::Rust(ring) => ring.push(req).is_ok(),
            // SAFETY: a live front end, and a request of the C side's size.
            Front::C(c, end) => unsafe { (c.front_push)(*end, req) == 1 },
        }
    }
    fn publish(&mut self) -> bool {
        match self {
            Front::Rust(ring) => ring.publish() == Notify::Send,
            // SAFETY: a live front end.
            Front::C(c, end) => unsafe { (c.front_publish)(*end) == 1 },
        }
    }
    fn take(&mut self) -> Option<Rsp> {
        match self {
            Front::Rust(ring) => ring.take().expect("honest"),
            Front::C(c, end) => {
                let mut rsp = [0; 2];
                // SAFETY: a live front end, and room for a response.
                unsafe { ((c.front_take)(*end, &mut rsp) == 1).then_some(rsp) }
            }
        }
    }
    fn arm(&mut self) -> bool {
        match self {
            Front::Rust(ring) => ring.arm().expect("honest") == Pending::Work,
            // SAFETY: a live front end.
            Front::C(c, end) => unsafe { (c.front_arm)(*end) == 1 },
        }
    }
}

impl Back<'_> {
    fn take(&mut self) -> Option<Req> {
        match self {
            Back::Rust(ring, slots) => ring.take().expect("honest").map(|t| {
                slots.push(t.slot);
                t.req
            }),
            Back::C(c, end) => {
                let mut req = [0; 14];
                // SAFETY: a live back end, and room for a request.
                match unsafe { (c.back_take)(*end, &mut req) } {
                    0 => None,
                    1 => Some(req),
                    n => panic!("overflow: {n}"),
                }
            }
        }
    }
    fn respond(&mut self, which: usize, rsp: &Rsp) {
        match self {
            Back::Rust(ring, slots) => ring.respond(slots.swap_remove(which), rsp),
            // SAFETY: a live back end, and a response of the C side's size.
            Back::C(c, end) => unsafe { (c.back_respond)(*end, rsp) },
        }
    }
    fn publish(&mut self) -> bool {
        match self {
            Back::Rust(ring, _) => ring.publish() == Notify::Send,
            // SAFETY: a live back end.
            Back::C(c, end) => unsafe { (c.back_publish)(*end) == 1 },
        }
    }
    fn arm(&mut self) -> bool {
        match self {
            Back::Rust(ring, _) => ring.arm().expect("honest") == Pending::Work,
            // SAFETY: a live back end.
            Back::C(c, end) => unsafe { (c.back_arm)(*end) == 1 },
        }
    }
}

impl Drop for Front<'_> {
    fn drop(&mut self) {
        if let Front::C(c, end) = self {
            // SAFETY: made by front_attach, freed once.
            unsafe { (c.free)(*end) }
        }
    }
}
impl Drop for Back<'_> {
    fn drop(&mut self) {
        if let Back::C(c, end) = self {
            // SAFETY: made by back_attach, freed once.
            unsafe { (c.free)(*end) }
        }
    }
}

struct Pair<'a> {
    page: Shared,
    front: Front<'a>,
    back: Back<'a>,
}

#[derive(Clone, Copy)]
enum Side {
    Rust,
    C,
}

/// A ring initialised by its front end, then moved to the index `start` as after that many
/// requests.
fn pair<'a>(c: &'a CRing, pages: usize, start: u32, front: Side, back: Side) -> Pair<'a> {
    let page = Arc::new(HeapPages::new(pages));
    page.write(0, &vec![0xa5; page.len()]);
    let (base, bytes) = (page.base(), page.len());
    match front {
        Side::Rust => {
            FrontRing::<Toy, _>::init(page.clone(), Default::default()).expect("ring");
        }
        // SAFETY: the page outlives the end.
        Side::C => unsafe { (c.free)((c.front_init)(base, bytes)) },
    }
    for offset in [0, 4, 8, 12] {
        let word = page.word(offset);
        word.store(word.load(Relaxed).wrapping_add(start), Relaxed);
    }
    let front = match front {
        Side::Rust => {
            Front::Rust(FrontRing::attach(page.clone(), start, Default::default()).expect("front"))
        }
        // SAFETY: the page outlives the end.
        Side::C => Front::C(c, unsafe { (c.front_attach)(base, bytes, start) }),
    };
    let back = match back {
        Side::Rust => {
            let table = Table::on_heap(rings::slot_count::<Toy>(pages));
            let ring = BackRing::attach(page.clone(), table, Default::default());
            Back::Rust(Box::new(ring.expect("back").0), Vec::new())
        }
        // SAFETY: the page outlives the end.
        Side::C => Back::C(c, unsafe { (c.back_attach)(base, bytes) }),
    };
    Pair { page, front, back }
}

fn content(page: &Shared) -> Vec<u8> {
    let mut bytes = vec![0; page.len()];
    page.read(0, &mut bytes);
    bytes
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Push,
    PublishRequests,
    Take,
    Respond(usize),
    PublishResponses,
    TakeResponse,
    ArmBack,
    ArmFront,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => Just(Op::Push),
        2 => Just(Op::PublishRequests),
        4 => Just(Op::Take),
        4 => any::<u16>().prop_map(|n| Op::Respond(n.into())),
        2 => Just(Op::PublishResponses),
        4 => Just(Op::TakeResponse),
        1 => Just(Op::ArmBack),
        1 => Just(Op::ArmFront),
    ];
    prop::collection::vec(op, 1..400)
}

/// What an operation answered, for comparison.
type Answer = Vec<u64>;

fn flag(set: bool) -> Answer {
    vec![u64::from(set)]
}

fn step(pair: &mut Pair<'_>, op: Op, id: u64, held: &[Req]) -> Answer {
    match op {
        Op::Push => flag(pair.front.push(&std::array::from_fn(|i| id * 100 + i as u64))),
        Op::PublishRequests => flag(pair.front.publish()),
        Op::Take => pair.back.take().map_or(vec![], |r| r.to_vec()),
        Op::Respond(_) if held.is_empty() => vec![],
        Op::Respond(n) => {
            let which = n % held.len();
            pair.back.respond(which, &[held[which][0], !held[which][13]]);
            vec![]
        }
        Op::PublishResponses => flag(pair.back.publish()),
        Op::TakeResponse => pair.front.take().map_or(vec![], |r| r.to_vec()),
        Op::ArmBack => flag(pair.back.arm()),
        Op::ArmFront => flag(pair.front.arm()),
    }
}

fn compare(c: &CRing, pages: usize, start: u32, ops: &[Op]) {
    let ends = [
        (Side::Rust, Side::Rust),
        (Side::Rust, Side::C),
        (Side::C, Side::Rust),
        (Side::C, Side::C),
    ];
    let mut pairs: Vec<_> = ends.iter().map(|(f, b)| pair(c, pages, start, *f, *b)).collect();
    let mut held: Vec<Req> = Vec::new();
    for (id, op) in (1..).zip(ops) {
        let answers: Vec<_> = pairs.iter_mut().map(|p| step(p, *op, id, &held)).collect();
        let pages: Vec<_> = pairs.iter().map(|p| content(&p.page)).collect();
        for other in 1..4 {
            assert_eq!(answers[0], answers[other], "{op:?} answered otherwise by pair {other}");
            assert!(pages[0] == pages[other], "{op:?} left other bytes in pair {other}");
        }
        match op {
            Op::Take => held.extend(<Req>::try_from(&answers[0][..])),
            Op::Respond(n) if !held.is_empty() => _ = held.swap_remove(n % held.len()),
            _ => {}
        }
    }
}

#[test]
fn ring_sizes_are_those_of_the_header() {
    let c = c();
    for pages in [1, 2, 4, 8, 16, 32] {
        // SAFETY: plain arithmetic.
        let slots = unsafe { (c.slots)(pages * 4096) };
        assert_eq!(rings::slot_count::<Toy>(pages), slots, "{pages} pages");
    }
}

#[test]
fn rust_and_c_ends_leave_the_same_bytes() {
    let c = c();
    let starts = prop_oneof![Just(0u32), (0u32..200).prop_map(|n| u32::MAX - n), any::<u32>()];
    let pages = prop_oneof![3 => Just(1usize), 1 => Just(2), 1 => Just(4)];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(150));
    runner
        .run(&(pages, starts, ops()), |(pages, start, ops)| {
            compare(&c, pages, start, &ops);
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn the_comparison_notices_a_byte() {
    // Negative control: two pairs whose pages differ in one byte of a slot must not compare equal.
    let c = c();
    let a = pair(&c, 1, 0, Side::Rust, Side::Rust);
    let b = pair(&c, 1, 0, Side::C, Side::C);
    assert!(content(&a.page) == content(&b.page));
    a.page.write(4000, &[1]);
    assert!(content(&a.page) != content(&b.page));
}

#[test]
fn the_round_trips_that_the_benchmark_compares_do_the_same() {
    let c = c();
    for (pages, batch) in [(1, 1), (1, 7), (1, 40), (16, 512)] {
        let page = Arc::new(HeapPages::new(pages));
        // SAFETY: the page outlives the call, and nobody else uses it meanwhile.
        let expected = unsafe { (c.roundtrips)(page.base(), page.len(), 300, batch) };
        let table = Table::on_heap(rings::slot_count::<Toy>(pages));
        let ours = roundtrip::rust_roundtrips(&page, table, 300, batch);
        assert_eq!(ours, Ok(expected), "{pages} pages, batch {batch}");
    }
}
