//! After a queue is made, a request allocates nothing.
#![allow(unsafe_code)]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use blktap::storage::{Cache, OpenOptions};
use blktap::{Disk, DiskQueue, MemDisk, NullDisk, Op, RawDisk};
use support::{Memory, folder, image, request};

struct Counting;
thread_local!(static ALLOCATIONS: Cell<u64> = const { Cell::new(0) });

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
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

const DEPTH: usize = 32;
const SIZE: u64 = 4 << 20;

/// Allocations of `requests` requests, 32 deep, of two separate segments each.
fn allocations(queue: &mut dyn DiskQueue, ops: &[Op], requests: u64, odd: usize) -> u64 {
    let mut memory: Vec<_> = (0..DEPTH).map(|_| Memory::new(12288, odd)).collect();
    let bufs: Vec<_> = memory
        .iter_mut()
        .map(|m| {
            let parts = m.bufs(&[4096; 3]);
            [parts[0], parts[2]]
        })
        .collect();
    let mut done = Vec::with_capacity(DEPTH);
    let before = ALLOCATIONS.with(Cell::get);
    let (mut sent, mut answered) = (0, 0);
    let mut free: u64 = u64::from(u32::MAX);
    while answered < requests {
        while sent < requests && free != 0 {
            let slot = free.trailing_zeros() as usize;
            free &= free - 1;
            let op = ops[sent as usize % ops.len()];
            let offset = (sent * 7919 * 8192) % SIZE;
            queue.submit(&request(op, offset, &bufs[slot], slot as u64)).expect("room");
            sent += 1;
        }
        queue.poll(&mut done).expect("poll");
        if done.is_empty() {
            queue.wait(&[], None).expect("wait");
            queue.poll(&mut done).expect("poll");
        }
        for d in done.drain(..) {
            assert_eq!(d.errno, 0);
            free |= 1 << d.token;
            answered += 1;
        }
    }
    ALLOCATIONS.with(Cell::get) - before
}

#[test]
fn a_million_requests_allocate_nothing() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    let raw = |cache| RawDisk::open(&OpenOptions::new(&path).cache(cache)).expect("open");
    let reads = [Op::Read];
    let mixed = [Op::Read, Op::Write, Op::Read, Op::Flush];
    let disk = NullDisk::new(SIZE);
    assert_eq!(allocations(&mut *disk.queue(32).expect("queue"), &mixed, 1_000_000, 0), 0);
    let disk = MemDisk::new(SIZE as usize);
    assert_eq!(allocations(&mut *disk.queue(32).expect("queue"), &mixed, 100_000, 0), 0);
    {
        let disk = raw(Cache::Unsafe);
        let mut queue = disk.queue(32).expect("queue");
        assert_eq!(allocations(&mut *queue, &reads, 1_000_000, 0), 0);
        assert_eq!(allocations(&mut *queue, &mixed, 100_000, 0), 0);
    }
    {
        // Past the page cache, and through the bounce buffers.
        let disk = raw(Cache::None);
        let mut queue = disk.queue(32).expect("queue");
        assert_eq!(allocations(&mut *queue, &mixed, 2_000, 3), 0);
        assert!(queue.counters().expect("counters").bounced.get() > 0);
    }
    let counts = ALLOCATIONS.with(Cell::get);
    drop(std::hint::black_box(Box::new(1u8)));
    assert!(ALLOCATIONS.with(Cell::get) > counts, "the counter counts");
}
