//! A hundred thousand packets from a frontend through the rings to a backend's loopback and back
//! allocate nothing, at either end.
// A global allocator that counts is unsafe to implement.
#![allow(unsafe_code)]

#[allow(dead_code)]
#[path = "vif/rig.rs"]
mod rig;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hypervisor::store::Client;
use hypervisor::{
    Access, Buffer, CopyOp, DomId, EventChannel, GrantRef, Grants, Hypervisor, Mapping, Port,
    Transfer,
};
use netback::endpoint::loopback::Loopback;
use netback::endpoint::named::Plain;
use netback::endpoint::{Abilities, Accepts, Waits};
use netback::frontend::StagingUse;
use netback::{Endpoint, EndpointQueue, Frame, FrontOptions, Host, Pool};
use rig::{Driver, Rig};

struct Counting;
thread_local!(static COUNT: Cell<u64> = const { Cell::new(0) });

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|n| n.set(n.get() + 1));
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations of the backend's thread up to the last frames that it has sent.
static BACKEND: AtomicU64 = AtomicU64::new(0);

/// Tells with each batch how much its thread has allocated.
struct Telling(Loopback);
struct TellingQueue(Box<dyn EndpointQueue>);

impl Endpoint for Telling {
    fn abilities(&self) -> Abilities {
        self.0.abilities()
    }
    fn connect(&self, queues: usize, accepts: Accepts) -> io::Result<()> {
        self.0.connect(queues, accepts)
    }
    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        Ok(Box::new(TellingQueue(self.0.queue(number)?)))
    }
    fn disconnect(&self) {
        self.0.disconnect();
    }
}

impl EndpointQueue for TellingQueue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        BACKEND.store(COUNT.with(Cell::get), Relaxed);
        self.0.send(frames, pool)
    }
    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        self.0.receive(frames, room, pool)
    }
    fn waits(&self) -> Waits<'_> {
        self.0.waits()
    }
    fn take_dropped(&mut self) -> u64 {
        self.0.take_dropped()
    }
}

/// A hypervisor whose grant copies are not counted: on the bundled one they are messages.
struct Uncounted(Arc<dyn Hypervisor>);
struct UncountedGrants(Box<dyn Grants>);

impl Uncounted {
    fn over(below: Arc<dyn Hypervisor>) -> Arc<dyn Hypervisor> {
        Arc::new(Uncounted(below))
    }
}

impl Hypervisor for Uncounted {
    fn domid(&self) -> DomId {
        self.0.domid()
    }
    fn store(&self) -> io::Result<Client> {
        self.0.store()
    }
    fn grants(&self) -> io::Result<Box<dyn Grants>> {
        Ok(Box::new(UncountedGrants(self.0.grants()?)))
    }
    fn bind(&self, domid: DomId, port: Port) -> io::Result<Box<dyn EventChannel>> {
        self.0.bind(domid, port)
    }
}

impl Grants for UncountedGrants {
    fn map(&self, domid: DomId, refs: &[GrantRef], access: Access) -> io::Result<Mapping> {
        self.0.map(domid, refs, access)
    }
    fn copy(&self, domid: DomId, buffer: &Buffer, ops: &mut [CopyOp]) -> io::Result<()> {
        let before = COUNT.with(Cell::get);
        let result = self.0.copy(domid, buffer, ops);
        COUNT.with(|n| n.set(before));
        result
    }
    fn transfer(&self, domid: DomId, buffer: &Buffer, ops: &mut [Transfer]) -> io::Result<()> {
        let before = COUNT.with(Cell::get);
        let result = self.0.transfer(domid, buffer, ops);
        COUNT.with(|n| n.set(before));
        result
    }
    fn buffer(&self, len: usize) -> io::Result<Buffer> {
        self.0.buffer(len)
    }
}

const LENGTHS: [usize; 6] = [60, 128, 1514, 60, 9014, 600];

/// Sends `count` frames, a batch at a time, and takes them back.
fn run(driver: &mut Driver, count: usize) {
    let mut sent = 0;
    while sent < count {
        for n in 0..32 {
            let mut frame = driver.pool.take().expect("a frame");
            frame.set_len(LENGTHS[(sent + n) % LENGTHS.len()]);
            frame[12..14].copy_from_slice(&[0x88, 0xb5]);
            driver.sent.push_back(frame);
        }
        driver.until_got(32);
        sent += driver.got.len();
        driver.got.drain(..).for_each(|frame| driver.pool.give(frame));
    }
}

#[test]
fn a_hundred_thousand_packets_allocate_nothing_at_either_end() {
    let open = |_: &_| Ok(Box::new(Plain(Telling(Loopback::new(65_535)))) as Box<dyn Host>);
    let keys = [("mtu", "65535"), ("options", "max_queues=1,staging_grants=32")];
    let rig = Rig::with(Arc::new(open), Uncounted::over, "loopback", &keys);
    // Some of the second one's pages are kept mapped, so that its packets have both kinds.
    let mixed = FrontOptions { staging: StagingUse::Offered, ..FrontOptions::default() };
    for options in [FrontOptions::default(), mixed] {
        let front = rig.connect(&options);
        let mut driver = Driver::new(front.queue(0).expect("a queue"), 128);
        // All that is made when first needed is made: lists grown.
        run(&mut driver, 10_000);
        let before = (COUNT.with(Cell::get), BACKEND.load(Relaxed));
        run(&mut driver, 100_000);
        assert_eq!(COUNT.with(Cell::get) - before.0, 0, "allocations of the frontend");
        assert_eq!(BACKEND.load(Relaxed) - before.1, 0, "allocations of the backend");
        assert!(before.1 > 0, "the backend's thread is not counted");
        let staged = ["tx_staged", "tx_copied", "rx_staged", "rx_copied"];
        let staged = staged.map(|name| rig.counter(rig::DEVID, name) > 0);
        let mixes = options.staging == StagingUse::Offered;
        assert_eq!(staged, [mixes, true, mixes, true]);
        drop(driver);
        front.close().expect("closed");
    }
}
