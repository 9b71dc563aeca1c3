//! Raw files against a model in memory, and what the contract says of single requests.
#![allow(unsafe_code)]
mod support;

use std::fs;

use blktap::engine::RingMode;
use blktap::storage::{Access, BlockSize, Cache, OpenOptions};
use blktap::{Disk, MemDisk, NullDisk, Op, RawDisk, Request};
use proptest::prelude::*;
use support::model::{SIZE, Step, run, steps};
use support::{Memory, Scattered, allocated, finish, folder, image, pattern, perform, request};

fn on_file(cache: Cache, mode: RingMode, block: u32, steps: &[Step]) {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    let options = OpenOptions::new(&path).cache(cache).logical_block(BlockSize::Bytes(block));
    let disk = RawDisk::open(&options).expect("open");
    assert_eq!(disk.storage().cache, cache, "direct I/O is not possible in {}", path.display());
    let mut queue = disk.queue_in_mode(8, mode).expect("queue");
    run(&mut queue, u64::from(block), steps);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn direct_file_is_the_model(s in steps(512)) {
        on_file(Cache::None, RingMode::Deferred, 512, &s);
    }
    #[test]
    fn direct_file_with_4k_blocks_is_the_model(s in steps(4096)) {
        on_file(Cache::None, RingMode::Cooperative, 4096, &s);
    }
    #[test]
    fn cached_file_is_the_model(s in steps(512)) {
        on_file(Cache::Writeback, RingMode::Plain, 512, &s);
    }
    #[test]
    fn memory_disk_is_the_model(s in steps(512)) {
        let disk = MemDisk::new(SIZE as usize);
        run(&mut *disk.queue(4).expect("queue"), 512, &s);
    }
}

#[test]
fn discarded_space_goes_back_to_the_file_system() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    fs::write(&path, pattern(1, SIZE as usize)).expect("fill");
    fs::File::open(&path).and_then(|f| f.sync_all()).expect("sync");
    let full = allocated(&path);
    let disk = RawDisk::open(&OpenOptions::new(&path)).expect("open");
    let mut queue = disk.queue(4).expect("queue");
    let half = Request { op: Op::Discard, offset: 0, len: SIZE / 2, bufs: &[], token: 1 };
    assert_eq!(perform(&mut *queue, &half), 0);
    assert!(allocated(&path) <= full / 2 + 16, "{} of {full}", allocated(&path));
    assert_eq!(fs::metadata(&path).expect("stat").len(), SIZE);
}

#[test]
fn a_request_outside_the_contract_is_einval_and_touches_nothing() {
    let dir = folder();
    let path = image(&dir, "a.raw", 4096);
    for disk in [
        RawDisk::open(&OpenOptions::new(&path)).expect("open") as std::sync::Arc<dyn Disk>,
        MemDisk::new(4096),
    ] {
        let mut queue = disk.queue(2).expect("queue");
        let mut m = Memory::of(&[7; 8192], 0);
        let buf = m.bufs(&[512]);
        let r = |op, offset, len| Request { op, offset, len, bufs: &buf, token: 9 };
        for bad in [
            r(Op::Write, 1, 512),
            r(Op::Write, 0, 511),
            r(Op::Write, 0, 1024),
            r(Op::Write, 4096, 512),
            r(Op::Write, u64::MAX - 511, 512),
            r(Op::Discard, 3584, 1024),
            r(Op::WriteZeroes, 512, u64::MAX - 511),
        ] {
            assert_eq!(perform(&mut *queue, &bad), libc::EINVAL, "{bad:?}");
        }
        let mut out = Memory::of(&[1; 4096], 0);
        let all = [out.buf()];
        assert_eq!(perform(&mut *queue, &request(Op::Read, 0, &all, 1)), 0);
        assert_eq!(out.slice(), [0; 4096]);
    }
}

#[test]
fn too_many_separate_pieces_are_einval_and_joined_ones_are_not() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    let disk = RawDisk::open(&OpenOptions::new(&path)).expect("open");
    let mut queue = disk.queue(2).expect("queue");
    let mut m = Memory::new(SIZE as usize, 0);
    let pieces = m.bufs(&[512; 2048]);
    assert_eq!(perform(&mut *queue, &request(Op::Read, 0, &pieces, 1)), 0);
    assert!(queue.counters().expect("counters").merged.get() >= 2047);
    let apart: Vec<_> = pieces.iter().step_by(2).copied().collect();
    assert_eq!(perform(&mut *queue, &request(Op::Read, 0, &apart, 2)), libc::EINVAL);
    let most = &apart[..blktap::MAX_SEGMENTS];
    assert_eq!(perform(&mut *queue, &request(Op::Read, 0, most, 3)), 0);
}

#[test]
fn a_full_queue_says_so_and_loses_nothing() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    let raw = RawDisk::open(&OpenOptions::new(&path)).expect("open");
    let disks: [std::sync::Arc<dyn Disk>; 3] = [raw, NullDisk::new(SIZE), MemDisk::new(4096)];
    for disk in disks {
        let mut queue = disk.queue(3).expect("queue");
        let mut m = Memory::new(512, 0);
        let buf = [m.buf()];
        for token in 0..3 {
            assert_eq!(queue.submit(&request(Op::Read, 0, &buf, token)), Ok(()));
        }
        assert_eq!(queue.submit(&request(Op::Read, 0, &buf, 3)), Err(blktap::Full));
        assert_eq!(queue.in_flight(), 3);
        let mut tokens: Vec<_> = finish(&mut *queue, 3).iter().map(|d| d.token).collect();
        tokens.sort_unstable();
        assert_eq!((tokens, queue.in_flight()), (vec![0, 1, 2], 0));
    }
}

#[test]
fn read_only_refuses_every_change() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    let disk = RawDisk::open(&OpenOptions::new(&path).access(Access::ReadOnly)).expect("open");
    assert!(disk.geometry().read_only);
    let mut queue = disk.queue(2).expect("queue");
    let mut m = Memory::new(512, 0);
    let buf = [m.buf()];
    for op in [Op::Write, Op::WriteFua] {
        assert_eq!(perform(&mut *queue, &request(op, 0, &buf, 1)), libc::EROFS);
    }
    for op in [Op::Discard, Op::WriteZeroes, Op::SecureDiscard] {
        let r = Request { op, offset: 0, len: 512, bufs: &[], token: 1 };
        assert_eq!(perform(&mut *queue, &r), libc::EROFS);
    }
    assert_eq!(perform(&mut *queue, &request(Op::Read, 0, &buf, 1)), 0);
}

#[test]
fn a_grown_file_is_noticed_by_refresh_and_a_shrunk_one_is_eio() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    for cache in [Cache::None, Cache::Writeback] {
        let disk = RawDisk::open(&OpenOptions::new(&path).cache(cache)).expect("open");
        let mut queue = disk.queue(2).expect("queue");
        let mut m = Memory::new(4096, 0);
        let buf = [m.buf()];
        let file = fs::OpenOptions::new().write(true).open(&path).expect("open");
        file.set_len(2 * SIZE + 100).expect("grow");
        assert_eq!(perform(&mut *queue, &request(Op::Read, SIZE, &buf, 1)), libc::EINVAL);
        assert_eq!(disk.refresh().expect("refresh").size, 2 * SIZE, "whole blocks only");
        assert_eq!(perform(&mut *queue, &request(Op::Read, SIZE, &buf, 1)), 0);
        file.set_len(SIZE + 1000).expect("shrink");
        assert_eq!(perform(&mut *queue, &request(Op::Read, SIZE, &buf, 1)), libc::EIO);
        assert_eq!(perform(&mut *queue, &request(Op::Read, SIZE + 8192, &buf, 1)), libc::EIO);
        file.set_len(SIZE).expect("as before");
    }
}

/// Two queues on two threads, 32 requests in flight on each, every write to a block of its own,
/// through odd memory and good, in every mode.
#[test]
fn concurrent_requests_do_not_mix_up_their_data() {
    const BLOCK: usize = 24 << 10;
    const EACH: usize = 96;
    let dir = folder();
    for (mode, cache) in [
        (RingMode::Deferred, Cache::None),
        (RingMode::Cooperative, Cache::Writeback),
        (RingMode::Plain, Cache::None),
    ] {
        let path = image(&dir, "many.raw", (2 * EACH * BLOCK) as u64);
        let disk = RawDisk::open(&OpenOptions::new(&path).cache(cache)).expect("open");
        let pass = |op: Op| {
            std::thread::scope(|s| {
                for half in 0..2 {
                    let disk = &disk;
                    s.spawn(move || {
                        let mut queue = disk.queue_in_mode(32, mode).expect("queue");
                        let blocks: Vec<_> = (0..EACH).map(|n| n * 2 + half).collect();
                        for part in blocks.chunks(32) {
                            many(&mut queue, op, part, BLOCK);
                        }
                    });
                }
            });
        };
        pass(Op::Write);
        pass(Op::Read);
    }
}

/// All of `blocks` in flight together; a read compares what it got.
fn many(queue: &mut dyn blktap::DiskQueue, op: Op, blocks: &[usize], len: usize) {
    let data = |n: usize| pattern(n as u64, len);
    let mut memory: Vec<_> = blocks
        .iter()
        .map(|n| {
            let mut m = Scattered::new(&[len / 3; 3], [0, 3, 512][n % 3]);
            if op == Op::Write {
                m.set(&data(*n));
            }
            m
        })
        .collect();
    for (at, m) in memory.iter_mut().enumerate() {
        let offset = (blocks[at] * len) as u64;
        queue.submit(&request(op, offset, &m.bufs(), at as u64)).expect("room");
    }
    let mut done = finish(queue, blocks.len());
    done.sort_by_key(|d| d.token);
    for (at, d) in done.iter().enumerate() {
        assert_eq!((d.token, d.errno), (at as u64, 0));
        assert!(memory[at].get() == data(blocks[at]), "{op:?} of block {}", blocks[at]);
    }
}
