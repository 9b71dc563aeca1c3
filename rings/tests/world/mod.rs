//! Both ends of one ring beside a plain model of it, driven by a list of operations. The model
//! knows the words of the page and decides by enumeration, not by the formulas of the code.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rings::mem::{HeapPages, SharedMem};
use rings::{BackRing, Corrupt, FrontRing, Notify, Pending, Protocol, Slot, Table, Taken};

/// 24-byte requests, 16-byte responses; the first word is an id.
pub(crate) struct Toy;
impl Protocol for Toy {
    const NAME: &'static str = "toy";
    type Req = [u64; 3];
    type Rsp = [u64; 2];
}

/// One step. The numbers are reduced to what makes sense.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Push,
    PublishRequests,
    Take,
    Respond(u8),
    PublishResponses,
    TakeResponse,
    TakeAll,
    RespondAll(u8),
    TakeAllResponses,
    ArmBack(u8),
    ArmFront(u8),
    DisarmBack,
    DisarmFront,
    PollBack,
    PollFront,
    /// The frontend's index becomes its last value plus this.
    LieRequests(i32),
    /// The backend's index becomes its last value plus this.
    LieResponses(i32),
    /// An event index becomes anything.
    LieEvent(bool, u32),
    /// The frontend writes over a slot at a bad time.
    Scribble(u8, u64),
}

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;

/// One consumer's view of one direction.
#[derive(Clone, Copy)]
struct Lane {
    taken: u32,
    seen: u32,
    written: u32,
    published: u32,
}

pub(crate) struct World {
    page: Arc<HeapPages>,
    front: FrontRing<Toy, Arc<HeapPages>>,
    back: BackRing<Toy, Arc<HeapPages>, Table<[u64; 3]>>,
    slots: u32,
    requests: Lane,
    responses: Lane,
    /// Nobody has lied so far, so contents can be followed through.
    honest: bool,
    next_id: u64,
    outstanding: BTreeMap<u64, [u64; 3]>,
    in_flight: Vec<(Slot, [u64; 3])>,
    /// Lies that an end refused.
    pub(crate) refused: u32,
}

fn same<T: std::fmt::Debug>(got: &Result<T, Corrupt>, expected_corrupt: Option<u32>) {
    match (got, expected_corrupt) {
        (Ok(_), None) => {}
        (Err(e), Some(found)) => assert_eq!(e.found, found),
        (got, expected) => panic!("got {got:?}, expected corrupt index {expected:?}"),
    }
}

impl World {
    /// A ring whose indices are at `start`, with events armed as in a fresh ring.
    pub(crate) fn new(start: u32) -> World {
        let page = Arc::new(HeapPages::new(1));
        for (offset, value) in
            [(REQ_PROD, start), (RSP_PROD, start), (REQ_EVENT, start + 1), (RSP_EVENT, start + 1)]
        {
            page.word(offset).store(value, Relaxed);
        }
        let front = FrontRing::attach(page.clone(), start, Default::default()).expect("front");
        let slots = rings::slot_count::<Toy>(1);
        let (back, _) = BackRing::attach(page.clone(), Table::on_heap(slots), Default::default())
            .expect("back");
        let lane = Lane { taken: start, seen: start, written: start, published: start };
        World {
            page,
            front,
            back,
            slots,
            requests: lane,
            responses: lane,
            honest: true,
            next_id: 1,
            outstanding: BTreeMap::new(),
            in_flight: Vec::new(),
            refused: 0,
        }
    }

    fn word(&self, offset: usize) -> u32 {
        self.page.word(offset).load(Relaxed)
    }
    fn slot<const N: usize>(&self, index: u32) -> [u64; N] {
        let offset = 64 + (index % self.slots) as usize * 24;
        std::array::from_fn(|i| {
            let mut bytes = [0; 8];
            self.page.read(offset + 8 * i, &mut bytes);
            u64::from_le_bytes(bytes)
        })
    }

    /// What a look at the requests must give: the new producer index, or `Err` with the bad one.
    fn look_requests(&self) -> Result<u32, u32> {
        let found = self.word(REQ_PROD);
        // A frontend that follows the rules has at most one ring of requests that it has not
        // seen a response to, and never takes a request back.
        let mut allowed = self.requests.seen;
        loop {
            if allowed == found {
                return Ok(found);
            }
            if allowed == self.responses.published.wrapping_add(self.slots) {
                return Err(found);
            }
            allowed = allowed.wrapping_add(1);
        }
    }

    fn look_responses(&self) -> Result<u32, u32> {
        let found = self.word(RSP_PROD);
        let mut allowed = self.responses.seen;
        loop {
            if allowed == found {
                return Ok(found);
            }
            if allowed == self.requests.published {
                return Err(found);
            }
            allowed = allowed.wrapping_add(1);
        }
    }

    /// Runs one operation at both the rings and the model.
    pub(crate) fn step(&mut self, op: Op) {
        match op {
            Op::Push => self.push(),
            Op::PublishRequests => self.publish_requests(),
            Op::Take => self.take(),
            Op::Respond(which) => self.respond(which),
            Op::PublishResponses => self.publish_responses(),
            Op::TakeResponse => self.take_response(),
            Op::TakeAll => self.take_all(),
            Op::RespondAll(most) => self.respond_all(most),
            Op::TakeAllResponses => self.take_all_responses(),
            Op::ArmBack(n) => {
                self.arm_back(NonZeroU32::from(NonZeroU32::MIN.saturating_add(u32::from(n % 4))))
            }
            Op::ArmFront(n) => self.arm_front(NonZeroU32::MIN.saturating_add(u32::from(n % 4))),
            Op::DisarmBack => {
                self.back.disarm();
                assert_eq!(self.word(REQ_EVENT), self.requests.taken);
            }
            Op::DisarmFront => {
                self.front.disarm();
                assert_eq!(self.word(RSP_EVENT), self.responses.taken);
            }
            Op::PollBack => self.poll_back(),
            Op::PollFront => self.poll_front(),
            Op::LieRequests(by) => self.lie(REQ_PROD, by),
            Op::LieResponses(by) => self.lie(RSP_PROD, by),
            Op::LieEvent(request, value) => {
                let offset = if request { REQ_EVENT } else { RSP_EVENT };
                self.page.word(offset).store(value, Relaxed);
            }
            Op::Scribble(slot, value) => {
                self.honest = false;
                let offset = 64 + u32::from(slot) % self.slots * 24;
                self.page.write(offset as usize, &value.to_le_bytes());
            }
        }
        assert_eq!(
            self.front.in_flight(),
            self.requests.written.wrapping_sub(self.responses.taken)
        );
        assert_eq!(self.back.in_flight(), self.requests.taken.wrapping_sub(self.responses.written));
    }

    fn push(&mut self) {
        let full = self.requests.written.wrapping_sub(self.responses.taken) == self.slots;
        let req = [self.next_id, self.next_id * 3, !self.next_id];
        assert_eq!(self.front.push(&req).is_err(), full);
        if !full {
            assert_eq!(self.slot::<3>(self.requests.written), req);
            self.requests.written = self.requests.written.wrapping_add(1);
            self.outstanding.insert(self.next_id, req);
            self.next_id += 1;
        }
    }

    fn publish_requests(&mut self) {
        let expected = crossed(self.requests, self.word(REQ_EVENT));
        assert_eq!(self.front.publish(), expected);
        if self.requests.published != self.requests.written {
            self.requests.published = self.requests.written;
            assert_eq!(self.word(REQ_PROD), self.requests.written);
        }
    }

    fn take(&mut self) {
        let looked = if self.requests.taken == self.requests.seen {
            self.look_requests()
        } else {
            Ok(self.requests.seen)
        };
        let slot = self.slot::<3>(self.requests.taken);
        let got = self.back.take();
        same(&got, looked.err());
        let (Ok(got), Ok(seen)) = (got, looked) else { return self.come_clean() };
        self.requests.seen = seen;
        assert_eq!(got.is_some(), self.requests.taken != seen);
        if let Some(taken) = got {
            self.taken(taken, slot);
        }
    }

    fn taken(&mut self, taken: Taken<[u64; 3]>, slot: [u64; 3]) {
        self.requests.taken = self.requests.taken.wrapping_add(1);
        assert_eq!(taken.req, slot);
        if self.honest {
            assert_eq!(self.outstanding.get(&taken.req[0]), Some(&taken.req));
        }
        let index = taken.slot.index();
        assert!(self.in_flight.iter().all(|(s, _)| s.index() != index), "slot used twice");
        self.in_flight.push((taken.slot, taken.req));
    }

    fn take_all(&mut self) {
        let looked = if self.requests.taken == self.requests.seen {
            self.look_requests()
        } else {
            Ok(self.requests.seen)
        };
        let mut all = Vec::new();
        let got = self.back.take_all(|taken| all.push(taken));
        same(&got, looked.err());
        let (Ok(()), Ok(seen)) = (got, looked) else {
            assert!(all.is_empty());
            return self.come_clean();
        };
        self.requests.seen = seen;
        for taken in all {
            self.taken(taken, self.slot::<3>(self.requests.taken));
        }
        assert_eq!(self.requests.taken, seen);
    }

    fn respond_all(&mut self, most: u8) {
        let count = self.in_flight.len().min(usize::from(most));
        let all: Vec<_> = self.in_flight.drain(..count).collect();
        let expected: Vec<_> = all.iter().map(|(_, req)| [req[0], req[1] + 1]).collect();
        self.back.respond_all(all.into_iter().map(|(slot, req)| (slot, [req[0], req[1] + 1])));
        for rsp in expected {
            assert_eq!(self.slot::<2>(self.responses.written), rsp);
            self.responses.written = self.responses.written.wrapping_add(1);
        }
    }

    fn respond(&mut self, which: u8) {
        if self.in_flight.is_empty() {
            return;
        }
        let (slot, req) = self.in_flight.swap_remove(usize::from(which) % self.in_flight.len());
        self.back.respond(slot, &[req[0], req[1] + 1]);
        assert_eq!(self.slot::<2>(self.responses.written), [req[0], req[1] + 1]);
        self.responses.written = self.responses.written.wrapping_add(1);
    }

    fn publish_responses(&mut self) {
        let expected = crossed(self.responses, self.word(RSP_EVENT));
        assert_eq!(self.back.publish(), expected);
        if self.responses.published != self.responses.written {
            self.responses.published = self.responses.written;
            assert_eq!(self.word(RSP_PROD), self.responses.written);
        }
    }

    fn take_response(&mut self) {
        let looked = if self.responses.taken == self.responses.seen {
            self.look_responses()
        } else {
            Ok(self.responses.seen)
        };
        let slot = self.slot::<2>(self.responses.taken);
        let got = self.front.take();
        same(&got, looked.err());
        let (Ok(got), Ok(seen)) = (got, looked) else { return self.come_clean() };
        self.responses.seen = seen;
        assert_eq!(got.is_some(), self.responses.taken != seen);
        if let Some(rsp) = got {
            self.answered(rsp, slot);
        }
    }

    fn answered(&mut self, rsp: [u64; 2], slot: [u64; 2]) {
        self.responses.taken = self.responses.taken.wrapping_add(1);
        assert_eq!(rsp, slot);
        if self.honest {
            let req = self.outstanding.remove(&rsp[0]).expect("answered once");
            assert_eq!(rsp, [req[0], req[1] + 1]);
        }
    }

    fn take_all_responses(&mut self) {
        let looked = if self.responses.taken == self.responses.seen {
            self.look_responses()
        } else {
            Ok(self.responses.seen)
        };
        let mut all = Vec::new();
        let got = self.front.take_all(|rsp| all.push(rsp));
        same(&got, looked.err());
        let (Ok(()), Ok(seen)) = (got, looked) else {
            assert!(all.is_empty());
            return self.come_clean();
        };
        self.responses.seen = seen;
        for rsp in all {
            self.answered(rsp, self.slot::<2>(self.responses.taken));
        }
        assert_eq!(self.responses.taken, seen);
    }

    fn poll_back(&mut self) {
        let looked = self.look_requests();
        let got = self.back.poll();
        same(&got, looked.err());
        let (Ok(got), Ok(seen)) = (got, looked) else { return self.come_clean() };
        self.requests.seen = seen;
        assert_eq!(got == Pending::Work, seen != self.requests.taken);
    }

    fn poll_front(&mut self) {
        let looked = self.look_responses();
        let got = self.front.poll();
        same(&got, looked.err());
        let (Ok(got), Ok(seen)) = (got, looked) else { return self.come_clean() };
        self.responses.seen = seen;
        assert_eq!(got == Pending::Work, seen != self.responses.taken);
    }

    fn arm_back(&mut self, n: NonZeroU32) {
        // What was seen before needs no look; `arm` then asks for no event either.
        let known = n == NonZeroU32::MIN && self.requests.seen != self.requests.taken;
        let looked = if known { Ok(self.requests.seen) } else { self.look_requests() };
        let got = if n == NonZeroU32::MIN { self.back.arm() } else { self.back.arm_after(n) };
        same(&got, looked.err());
        let (Ok(got), Ok(seen)) = (got, looked) else { return self.come_clean() };
        self.requests.seen = seen;
        let enough = seen.wrapping_sub(self.requests.taken) >= n.get();
        assert_eq!(got == Pending::Work, enough);
        if !enough {
            assert_eq!(self.word(REQ_EVENT), self.requests.taken.wrapping_add(n.get()));
        }
    }

    fn arm_front(&mut self, n: NonZeroU32) {
        // What was seen before needs no look; `arm` then asks for no event either.
        let known = n == NonZeroU32::MIN && self.responses.seen != self.responses.taken;
        let looked = if known { Ok(self.responses.seen) } else { self.look_responses() };
        let got = if n == NonZeroU32::MIN { self.front.arm() } else { self.front.arm_after(n) };
        same(&got, looked.err());
        let (Ok(got), Ok(seen)) = (got, looked) else { return self.come_clean() };
        self.responses.seen = seen;
        let enough = seen.wrapping_sub(self.responses.taken) >= n.get();
        assert_eq!(got == Pending::Work, enough);
        if !enough {
            assert_eq!(self.word(RSP_EVENT), self.responses.taken.wrapping_add(n.get()));
        }
    }

    fn lie(&mut self, offset: usize, by: i32) {
        self.honest = false;
        let word = self.page.word(offset);
        word.store(word.load(Relaxed).wrapping_add_signed(by), Relaxed);
    }

    /// After a corrupt index was refused, it is put right: the end that refused goes on.
    fn come_clean(&mut self) {
        self.refused += 1;
        self.page.word(REQ_PROD).store(self.requests.seen, Relaxed);
        self.page.word(RSP_PROD).store(self.responses.seen, Relaxed);
    }
}

/// Whether publication passes the event index: it is one of the indices published now.
fn crossed(lane: Lane, event: u32) -> Notify {
    let mut index = lane.published;
    while index != lane.written {
        index = index.wrapping_add(1);
        if index == event {
            return Notify::Send;
        }
    }
    Notify::Skip
}
