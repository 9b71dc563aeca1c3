//! A million requests from a frontend through a ring to a backend's null disk and back allocate
//! nothing, at either end.
// A global allocator that counts is unsafe to implement.
#![allow(unsafe_code)]

#[allow(dead_code)]
#[path = "frontend/rig.rs"]
mod rig;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use blkback::FrontOptions;
use blktap::{Disk, DiskQueue, Done, Full, Geometry, IoBuf, NullDisk, Op, Request};
use rig::Rig;

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

/// Allocations of the backend's thread up to its last request.
static BACKEND: AtomicU64 = AtomicU64::new(0);

/// Tells with each request how much its thread has allocated.
struct Telling(Arc<NullDisk>);
struct TellingQueue(Box<dyn DiskQueue>);

impl Disk for Telling {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn refresh(&self) -> io::Result<Geometry> {
        self.0.refresh()
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        Ok(Box::new(TellingQueue(self.0.queue(depth)?)))
    }
}

impl DiskQueue for TellingQueue {
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        BACKEND.store(COUNT.with(Cell::get), Relaxed);
        self.0.submit(request)
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.0.submit_all()
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        self.0.poll(done)
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        self.0.wait(fds, timeout)
    }
    fn in_flight(&self) -> u32 {
        self.0.in_flight()
    }
}

const SIZE: u64 = 1 << 30;
const DEPTH: u64 = 32;

/// Requests of every kind that a null disk answers, copied and granted.
fn request<'a>(n: u64, copied: &'a [IoBuf], granted: &'a [IoBuf]) -> Request<'a> {
    let offset = n * 7919 * 4096 % (SIZE - 8192);
    let with = |op, bufs: &'a [IoBuf]| Request { op, offset, len: 8192, bufs, token: n };
    match n % 8 {
        0 => Request { op: Op::Flush, offset: 0, len: 0, bufs: &[], token: n },
        1 | 2 => with(Op::Write, copied),
        3 => with(Op::Read, copied),
        4 => with(Op::Discard, &[]),
        5 => with(Op::WriteFua, granted),
        6 => with(Op::Write, granted),
        _ => with(Op::Read, granted),
    }
}

fn run(queue: &mut dyn DiskQueue, count: u64, copied: &[IoBuf], granted: &[IoBuf]) {
    let mut done = Vec::with_capacity(2 * DEPTH as usize);
    let (mut sent, mut answered) = (0, 0);
    while answered < count {
        while sent < count && sent - answered < DEPTH {
            queue.submit(&request(sent, copied, granted)).expect("room");
            sent += 1;
        }
        queue.wait(&[], Some(Duration::from_secs(10))).expect("wait");
        queue.poll(&mut done).expect("poll");
        assert!(done.iter().all(|d| d.errno == 0), "{done:?}");
        answered += done.len() as u64;
        done.clear();
    }
}

#[test]
fn a_million_requests_allocate_nothing_at_either_end() {
    let rig = Rig::with_disk(Arc::new(Telling(NullDisk::new(SIZE))), "", &[]);
    let front = rig.connect(FrontOptions { max_queues: 1, ..FrontOptions::default() });
    let mut queue = front.queue(2 * DEPTH as u32).expect("a queue");
    let granted = front.buffer(8192).expect("memory");
    let mut own = vec![0u8; 8192];
    // SAFETY: both live until the queue has answered everything, which `run` waits for.
    let granted_bufs = [unsafe { IoBuf::new(granted.base(), 8192) }];
    // SAFETY: as above.
    let copied = [unsafe { IoBuf::new(own.as_mut_ptr(), 8192) }];
    // All that is made when first needed is made: pages mapped, lists grown.
    run(&mut *queue, 2_000, &copied, &granted_bufs);
    let before = (COUNT.with(Cell::get), BACKEND.load(Relaxed));
    run(&mut *queue, 1_000_000, &copied, &granted_bufs);
    // One is the list of answers in `run` itself.
    assert_eq!(COUNT.with(Cell::get) - before.0, 1, "allocations of the frontend");
    assert_eq!(BACKEND.load(Relaxed) - before.1, 0, "allocations of the backend");
    assert!(before.1 > 0, "the backend's thread is not counted");
}
