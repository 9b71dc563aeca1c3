//! Counts allocations: a million requests through the ring, the in-flight table and the pool of
//! persistent grants make none.
// A global allocator that counts is unsafe to implement.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use rings::grants::{Access, GrantBatch, Wanted};
use rings::mem::HeapPages;
use rings::persistent::{Inserted, Limits, PersistentPool, Pin};
use rings::{BackRing, FrontRing, Notify, Pending, Protocol, Slot, Table};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|c| c.set(c.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    COUNT.with(Cell::get)
}

struct Toy;
impl Protocol for Toy {
    const NAME: &'static str = "toy";
    type Req = [u32; 28];
    type Rsp = [u32; 4];
}

/// A backend of one segment a request: its references lie in words 1 and 2.
struct Backend {
    ring: BackRing<Toy, Arc<HeapPages>, Table<[u32; 28]>>,
    pool: PersistentPool<u32>,
    batch: GrantBatch,
    held: Vec<Option<(Slot, u32, Option<Pin>)>>,
    unmapped: u64,
}

impl Backend {
    fn new(page: Arc<HeapPages>) -> Self {
        let slots = rings::slot_count::<Toy>(1);
        let limits = Limits { entries: 64, idle: 500, seed: 3 };
        Backend {
            ring: BackRing::attach(page, Table::on_heap(slots), Default::default())
                .expect("ring")
                .0,
            pool: PersistentPool::new(limits, Default::default()),
            batch: GrantBatch::new(slots as usize),
            held: (0..slots).map(|_| None).collect(),
            unmapped: 0,
        }
    }

    fn turn(&mut self, now: u64) -> Notify {
        while let Some(taken) = self.ring.take().expect("honest") {
            let (index, gref) = (taken.slot.index(), taken.req[1]);
            let pin = self.pool.get(gref, Access::ReadWrite);
            if pin.is_none() {
                let wanted = Wanted { request: index as u32, gref, access: Access::ReadWrite };
                self.batch.push(wanted).expect("room for each slot");
            }
            self.held[index] = Some((taken.slot, taken.req[0], pin));
        }
        let (pool, held, unmapped) = (&mut self.pool, &mut self.held, &mut self.unmapped);
        self.batch.map(
            |refs, _| if refs.len() % 3 == 2 { Err(()) } else { Ok(refs[0]) },
            |run, mapped| {
                for wanted in run.iter().filter(|_| mapped.is_ok()) {
                    if let Inserted::Kept { pin, out } =
                        pool.insert(wanted.gref, wanted.access, wanted.gref)
                    {
                        *unmapped += u64::from(out.is_some());
                        let entry = held[wanted.request as usize].as_mut().expect("held");
                        entry.2 = Some(pin);
                    }
                }
            },
        );
        for entry in &mut self.held {
            if let Some((slot, id, pin)) = entry.take() {
                if let Some(pin) = pin {
                    self.unmapped += u64::from(self.pool.unpin(pin, now).is_some());
                }
                self.ring.respond(slot, &[id, 0, 0, 0]);
            }
        }
        self.pool.expire(now, |_| self.unmapped += 1);
        self.ring.publish()
    }
}

#[test]
fn a_million_requests_allocate_nothing() {
    let page = Arc::new(HeapPages::new(1));
    let mut front = FrontRing::<Toy, _>::init(page.clone(), Default::default()).expect("ring");
    let mut back = Backend::new(page);
    let (mut sent, mut answered, mut notified) = (0u32, 0u32, 0u64);
    let before = allocations();
    while answered < 1_000_000 {
        // Grants come from a range larger than the pool, so that entries are evicted, too.
        let gref = |n: u32| n.wrapping_mul(2_654_435_761) % 97;
        while front.push(&std::array::from_fn(|i| if i == 1 { gref(sent) } else { sent })).is_ok() {
            sent += 1;
        }
        notified += u64::from(front.publish() == Notify::Send);
        notified += u64::from(back.turn(u64::from(answered)) == Notify::Send);
        while let Some(rsp) = front.take().expect("honest") {
            assert!(rsp[0] < sent);
            answered += 1;
        }
        assert_eq!(front.arm(), Ok(Pending::Nothing));
        assert_eq!(back.ring.arm(), Ok(Pending::Nothing));
    }
    assert_eq!(allocations() - before, 0);
    assert!(notified > 0 && back.unmapped > 1000);
    let counters = back.pool.counters();
    assert!(counters.hits.get() > 1000 && counters.evictions.get() > 1000);
    // The counter itself works.
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(allocations() - before, 1);
}
