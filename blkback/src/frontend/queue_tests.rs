//! Backends that answer wrongly: the disk is disabled, as Linux's blkfront does it.

// The tests' own memory stands for a caller's and for granted pages.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};

use hypervisor::{GrantRef, Port};
use rings::mem::{HeapPages, SharedMem};
use rings::{BackRing, Table};
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::frontend::handshake::DiskInfo;
use crate::negotiate::DiskKeys;
use crate::proto::{RSP_ERROR, RSP_OKAY, Response};

struct Granted(Arc<HeapPages>, Vec<GrantRef>);

// SAFETY: it is the heap pages' own memory, kept by the Arc.
unsafe impl SharedMem for Granted {
    fn base(&self) -> *mut u8 {
        self.0.base()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
}

impl GrantedPages for Granted {
    fn refs(&self) -> &[GrantRef] {
        &self.1
    }
}

fn granted(pages: usize) -> (Arc<HeapPages>, Arc<dyn GrantedPages>) {
    let memory = Arc::new(HeapPages::new(pages));
    (memory.clone(), Arc::new(Granted(memory, (0..pages as u32).collect())))
}

struct Silent(OwnedFd);

impl EventChannel for Silent {
    fn notify(&self) -> io::Result<()> {
        Ok(())
    }
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn acknowledge(&self) -> io::Result<bool> {
        Ok(false)
    }
    fn port(&self) -> Port {
        1
    }
}

type Back = BackRing<Ring<X86_64>, Arc<HeapPages>, Table<<X86_64 as Abi>::Req>>;

/// A queue, and a backend's end of its ring that does as the test likes.
struct Scene {
    queue: Queue<X86_64>,
    back: Back,
    shared: Arc<Shared>,
    memory: Vec<u8>,
}

impl Scene {
    fn new() -> Scene {
        let ((memory, ring), (_, payload)) = (granted(1), granted(64));
        initialise(Protocol::X86_64, ring.clone()).unwrap();
        let disk = DiskKeys {
            size: 8192 * 512,
            logical_block: 512,
            physical_block: 4096,
            read_only: false,
            cdrom: false,
            removable: false,
            discard: Some(512),
            secure_discard: false,
        };
        let info = DiskInfo { disk, flush: true, barrier: false };
        let shared = Arc::new(Shared::new(info).unwrap());
        let queue = Queue::new(Parts {
            name: "vbd-51712.0".into(),
            ring,
            channel: Box::new(Silent(eventfd(0, EventfdFlags::CLOEXEC).unwrap())),
            payload,
            shared: shared.clone(),
            max_indirect: 32,
            poll_us: 0,
            ring_counters: Handle::default(),
            counters: Handle::default(),
        });
        let table = Table::on_heap(rings::slot_count::<Ring<X86_64>>(1));
        let (back, _) = BackRing::attach(memory, table, Handle::default()).unwrap();
        Scene { queue: queue.unwrap(), back, shared, memory: vec![0; 4096] }
    }
    fn submit(&mut self, op: Op, token: u64) {
        // SAFETY: the scene keeps the memory as long as the queue.
        let bufs = [unsafe { IoBuf::new(self.memory.as_mut_ptr(), 4096) }];
        let request = DiskRequest { op, offset: 0, len: 4096, bufs: &bufs, token };
        self.queue.submit(&request).unwrap();
        self.queue.submit_all().unwrap();
    }
    /// Answers the next request, changed by `change`, so many times.
    fn answer(&mut self, times: usize, change: impl Fn(&mut Response)) {
        let taken = self.back.take().unwrap().unwrap();
        let mut answer = X86_64::parse(&taken.req).answer(RSP_OKAY);
        change(&mut answer);
        self.back.respond(taken.slot, &X86_64::encode_response(&answer));
        for _ in 1..times {
            let taken = self.back.take().unwrap().unwrap();
            self.back.respond(taken.slot, &X86_64::encode_response(&answer));
        }
        let _ = self.back.publish();
    }
    fn done(&mut self) -> Vec<(u64, i32)> {
        let mut done = Vec::new();
        self.queue.poll(&mut done).unwrap();
        done.iter().map(|d| (d.token, d.errno)).collect()
    }
    /// All that is open fails, and what comes after it too.
    fn is_disabled(&mut self, open: &[u64], why: &str) {
        let errno = Errno::IO.raw_os_error();
        assert_eq!(self.done(), open.iter().map(|t| (*t, errno)).collect::<Vec<_>>());
        let reason = self.shared.health.reason().unwrap();
        assert!(reason.contains(why), "{reason}");
        self.submit_after(99);
        assert_eq!(self.done(), [(99, errno)]);
        assert_eq!(self.queue.in_flight(), 0);
        assert!(!self.queue.drain());
        // Whoever waits for something else can sleep.
        let quiet = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (begun, limit) = (Instant::now(), Duration::from_millis(30));
        assert_eq!(self.queue.wait(&[quiet.as_fd()], Some(limit)).unwrap(), 0);
        assert!(begun.elapsed() >= limit);
    }
    fn submit_after(&mut self, token: u64) {
        let request = DiskRequest { op: Op::Flush, offset: 0, len: 0, bufs: &[], token };
        self.queue.submit(&request).unwrap();
    }
}

#[test]
fn an_honest_answer_is_taken() {
    let mut scene = Scene::new();
    scene.submit(Op::Write, 1);
    scene.submit(Op::Read, 2);
    scene.answer(1, |_| {});
    assert_eq!(scene.done(), [(1, 0)]);
    scene.answer(1, |rsp| rsp.status = RSP_ERROR);
    assert_eq!(scene.done(), [(2, Errno::IO.raw_os_error())]);
    assert_eq!(scene.shared.health.reason(), None);
    assert_eq!(scene.queue.pages.free(), 63);
}

#[test]
fn an_answer_to_what_was_not_asked() {
    for id in [31, 32, u64::MAX, 1 << 32] {
        let mut scene = Scene::new();
        scene.submit(Op::Write, 1);
        scene.answer(1, |rsp| rsp.id = id);
        scene.is_disabled(&[1], "that is not open");
    }
}

#[test]
fn an_answer_with_another_operation() {
    let mut scene = Scene::new();
    scene.submit(Op::Write, 1);
    scene.answer(1, |rsp| rsp.operation = proto::OP_READ);
    scene.is_disabled(&[1], "answered operation 1 with operation 0");
}

#[test]
fn a_second_answer() {
    let mut scene = Scene::new();
    scene.submit(Op::Write, 1);
    scene.submit(Op::Write, 2);
    scene.answer(2, |_| {});
    assert_eq!(scene.done(), [(1, 0), (2, Errno::IO.raw_os_error())]);
    scene.is_disabled(&[], "that is not open");
}

#[test]
fn a_late_second_answer_does_not_pass_for_one_to_the_next_request() {
    let mut scene = Scene::new();
    scene.submit(Op::Write, 1);
    let first = Arc::new(parking_lot::Mutex::new(0));
    let keep = first.clone();
    scene.answer(1, move |rsp| *keep.lock() = rsp.id);
    assert_eq!(scene.done(), [(1, 0)]);
    scene.submit(Op::Write, 2);
    scene.answer(1, move |rsp| rsp.id = *first.lock());
    scene.is_disabled(&[2], "that is not open");
}

#[test]
fn an_index_that_cannot_be() {
    let mut scene = Scene::new();
    scene.submit(Op::Write, 1);
    // rsp_prod, by the ring's layout.
    scene.queue.ring.memory().word(8).store(7, std::sync::atomic::Ordering::Relaxed);
    scene.is_disabled(&[1], "rsp_prod");
}

#[test]
fn it_never_holds_more_than_its_depth() {
    let mut scene = Scene::new();
    scene.queue.set_depth(3);
    for token in 0..3 {
        scene.submit(Op::Read, token);
    }
    let request = DiskRequest { op: Op::Flush, offset: 0, len: 0, bufs: &[], token: 9 };
    assert_eq!(scene.queue.submit(&request), Err(Full));
    scene.answer(1, |_| {});
    assert_eq!(scene.done(), [(0, 0)]);
    assert_eq!(scene.queue.submit(&request), Ok(()));
    assert_eq!(scene.queue.in_flight(), 3);
}
