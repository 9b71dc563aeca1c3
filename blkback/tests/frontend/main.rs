//! The frontend against the backend, over the bundled hypervisor.
// Requests name the memory of these tests by address.
#![allow(unsafe_code, clippy::unwrap_used)]

mod bounced;
mod counting;
mod filters;
mod rig;

use std::sync::Arc;
use std::time::Duration;

use blkback::config::GrantMode;
use blkback::frontend::FrontOptions;
use blkback::frontend::handshake::KeySet;
use blkback::negotiate::Protocol;
use blktap::{Disk, DiskQueue, Op};
use rig::{Rig, answers, memory, pattern, perform, read, same, until, write};

/// Writes and reads in many sizes, offsets and ways; then compares the whole disk.
fn exercise(disk: &blktap::MemDisk, queue: &mut dyn DiskQueue, base: u64) {
    let mut expected = Vec::new();
    let mut at = base;
    for (seed, sectors) in [1, 2, 7, 8, 9, 88, 89, 100, 256, 2048].into_iter().enumerate() {
        let bytes = pattern(sectors * 512, seed as u64 + base);
        assert_eq!(write(queue, at, &bytes), 0, "{sectors} sectors");
        same(&read(queue, at, bytes.len()), &bytes);
        at += bytes.len() as u64;
        expected.extend_from_slice(&bytes);
    }
    assert_eq!(perform(queue, Op::Flush, 0, &mut [], 0), 0);
    let end = base as usize + expected.len();
    disk.with_bytes(|bytes| same(&bytes[base as usize..end], &expected));
}

#[test]
fn each_abi() {
    for protocol in [Protocol::X86_64, Protocol::X86_32, Protocol::Native] {
        let disk = memory(8);
        let rig = Rig::with_disk(disk.clone(), "", &[]);
        let front = rig.connect(FrontOptions { protocol, ..Default::default() });
        assert_eq!(front.geometry().size, 8 << 20);
        exercise(&disk, &mut *front.queue(32).unwrap(), 0);
        front.close().unwrap();
        assert_eq!(rig.back_key("state").as_deref(), Some("6"));
    }
}

#[test]
fn queues_rings_and_grant_modes() {
    for (queues, order, grants) in [
        (1, 0, GrantMode::Persistent),
        (2, 2, GrantMode::Copy),
        (4, 4, GrantMode::Persistent),
        (4, 0, GrantMode::Copy),
        (1, 4, GrantMode::Copy),
        (2, 0, GrantMode::Persistent),
    ] {
        let disk = memory(16);
        let rig = Rig::with_disk(disk.clone(), "", &[]);
        let front = rig.connect(FrontOptions {
            max_queues: queues,
            max_ring_page_order: order,
            grants,
            ..Default::default()
        });
        assert_eq!(front.queues(), queues as usize);
        assert_eq!(front.chosen().queues[0].ring_refs.len(), 1 << order);
        let threads = (0..queues).map(|n| {
            let (mut queue, disk) = (front.queue(32).unwrap(), disk.clone());
            std::thread::spawn(move || exercise(&disk, &mut *queue, u64::from(n) << 22))
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        let reads = 10 * u64::from(queues);
        rig.until_counted("queue-", "rd_req", |count| count == reads);
        let copied = rig.counter("queue-", "grants_copied") > 100;
        assert_eq!(copied, grants == GrantMode::Copy);
        let hits = rig.counter("grants-", "hits") > 100;
        assert_eq!(hits, grants == GrantMode::Persistent);
    }
}

#[test]
fn pages_mapped_for_one_request() {
    let disk = memory(8);
    let rig = Rig::with_disk(disk.clone(), "grants=map,cache=writeback", &[]);
    let front = rig.connect(FrontOptions { max_queues: 1, ..Default::default() });
    let mut queue = front.queue(32).unwrap();
    exercise(&disk, &mut *queue, 0);
    let bytes = pattern(1 << 20, 5);
    assert_eq!(write(&mut *queue, 1 << 20, &bytes), 0);
    same(&read(&mut *queue, 1 << 20, 1 << 20), &bytes);
    rig.until_counted("queue-", "rd_req", |count| count == 11);
    assert!(rig.counter("queue-", "grants_mapped") >= 512);
    // The tables of indirect requests.
    assert!(rig.counter("queue-", "grants_copied") < 20);
    assert_eq!(rig.counter("grants-", "hits"), 0);
}

#[test]
fn all_queues_taken_is_an_error_and_a_dropped_one_comes_back() {
    let disk = memory(1);
    let rig = Rig::with_disk(disk, "", &[]);
    let front = rig.connect(FrontOptions { max_queues: 2, ..Default::default() });
    let (first, second) = (front.queue(8).unwrap(), front.queue(8).unwrap());
    let refused = front.queue(8).err().unwrap().to_string();
    assert_eq!(refused, "all 2 queues are in use");
    drop(first);
    let mut again = front.queue(8).unwrap();
    assert_eq!(write(&mut *again, 0, &pattern(4096, 1)), 0);
    drop((again, second));
    front.close().unwrap();
}

#[test]
fn one_mebibyte_is_one_indirect_request() {
    let disk = memory(4);
    let rig = Rig::with_disk(disk, "", &[]);
    let front = rig.connect(FrontOptions { max_queues: 1, ..Default::default() });
    let mut queue = front.queue(4).unwrap();
    let bytes = pattern(1 << 20, 3);
    assert_eq!(write(&mut *queue, 1 << 20, &bytes), 0);
    same(&read(&mut *queue, 1 << 20, 1 << 20), &bytes);
    rig.until_counted("queue-", "rd_req", |count| count == 1);
    assert_eq!(rig.counter("queue-", "indirect"), 2);
    assert_eq!(rig.counter("queue-", "largest"), 1 << 20);
    assert_eq!(front.counters()[0].queue.wr_req.get(), 1);
}

#[test]
fn a_barrier_alone() {
    let disk = memory(8);
    let rig = Rig::with_disk(disk.clone(), "ordering=barrier", &[]);
    let front = rig.connect(FrontOptions::default());
    assert!(front.info().barrier && !front.info().flush);
    let mut queue = front.queue(32).unwrap();
    exercise(&disk, &mut *queue, 0);
    let mut bytes = pattern(8192, 9);
    assert_eq!(perform(&mut *queue, Op::WriteFua, 4096, &mut bytes, 8192), 0);
    rig.until_counted("queue-", "barriers", |count| count == 2);
    assert_eq!(rig.counter("queue-", "indirect"), 0);
}

#[test]
fn discards_zeroes_and_what_is_out_of_range() {
    let disk = memory(4);
    let rig = Rig::with_disk(disk.clone(), "", &[]);
    let front = rig.connect(FrontOptions::default());
    let mut queue = front.queue(32).unwrap();
    let bytes = pattern(3 << 20, 5);
    assert_eq!(write(&mut *queue, 0, &bytes), 0);
    assert_eq!(perform(&mut *queue, Op::Discard, 4096, &mut [], 1 << 20), 0);
    assert_eq!(perform(&mut *queue, Op::WriteZeroes, 2 << 20, &mut [], (1 << 20) - 512), 0);
    let mut expected = bytes;
    expected[4096..4096 + (1 << 20)].fill(0);
    expected[2 << 20..(3 << 20) - 512].fill(0);
    same(&read(&mut *queue, 0, 3 << 20), &expected);
    let invalid = rustix::io::Errno::INVAL.raw_os_error();
    let unsupported = rustix::io::Errno::OPNOTSUPP.raw_os_error();
    assert_eq!(perform(&mut *queue, Op::Read, 4 << 20, &mut [0; 512], 512), invalid);
    assert_eq!(perform(&mut *queue, Op::Write, 100, &mut [0; 512], 512), invalid);
    assert_eq!(perform(&mut *queue, Op::Read, 0, &mut [0; 512], 1024), invalid);
    assert_eq!(perform(&mut *queue, Op::SecureDiscard, 0, &mut [], 512), unsupported);
    assert_eq!(perform(&mut *queue, Op::Discard, 0, &mut [], 0), 0);
}

#[test]
fn more_than_the_pool_holds_goes_in_parts() {
    let disk = memory(16);
    let rig = Rig::with_disk(disk.clone(), "", &[]);
    let front = rig.connect(FrontOptions {
        max_queues: 1,
        pool_pages: 1,
        max_indirect_segments: 32,
        max_ring_page_order: 0,
        ..Default::default()
    });
    let mut queue = front.queue(8).unwrap();
    let begun = std::time::Instant::now();
    let bytes = pattern(10 << 20, 6);
    assert_eq!(write(&mut *queue, 4096, &bytes), 0);
    same(&read(&mut *queue, 4096, 10 << 20), &bytes);
    // Some 160 requests: none of them waited for the second that a wait here lasts at most.
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn memory_of_the_device_is_used_without_a_copy() {
    use hypervisor::GrantedPages;
    use rings::mem::SharedMem;
    for grants in [GrantMode::Persistent, GrantMode::Copy] {
        let disk = memory(4);
        let rig = Rig::with_disk(disk.clone(), "", &[]);
        let front = rig.connect(FrontOptions { grants, ..Default::default() });
        let mut queue = front.queue(8).unwrap();
        let buffer = front.buffer(2 << 20).unwrap();
        let memory: &Arc<dyn GrantedPages> = buffer.memory();
        let bytes = pattern(2 << 20, 8);
        memory.write(0, &bytes);
        // Not at a page's beginning, in two pieces.
        // SAFETY: the buffer outlives the queue's use of it.
        let bufs = unsafe {
            [
                blktap::IoBuf::new(buffer.base().add(512), 512 * 1000),
                blktap::IoBuf::new(buffer.base().add(1 << 20), 4096),
            ]
        };
        let len = 512 * 1000 + 4096;
        for op in [Op::Write, Op::Read] {
            queue
                .submit(&blktap::Request { op, offset: 8192, len, bufs: &bufs, token: 1 })
                .unwrap();
            assert_eq!(answers(&mut *queue, 1)[0].errno, 0);
        }
        let expected = [&bytes[512..512 * 1001], &bytes[1 << 20..(1 << 20) + 4096]].concat();
        disk.with_bytes(|b| same(&b[8192..8192 + expected.len()], &expected));
        let mut back = vec![0; 2 << 20];
        memory.read(0, &mut back);
        assert!(back == bytes, "a read into granted memory changed what it should not");
    }
}

#[test]
fn closed_and_opened_again() {
    let disk = memory(8);
    let rig = Rig::with_disk(disk.clone(), "", &[]);
    for round in 0..3 {
        let front = rig.connect(FrontOptions::default());
        exercise(&disk, &mut *front.queue(32).unwrap(), round << 20);
        drop(front);
        assert_eq!(rig.front_key("state").as_deref(), Some("6"));
        assert_eq!(rig.back_key("state").as_deref(), Some("6"));
    }
}

#[test]
fn a_frontend_that_starts_anew_without_closing() {
    let disk = memory(8);
    let rig = Rig::with_disk(disk.clone(), "", &[]);
    // Each finds another one's keys, and a backend that may still be noticing its end.
    for (round, queues) in [4, 1, 2, 1, 4, 4].into_iter().enumerate() {
        let front = rig.connect(FrontOptions { max_queues: queues, ..Default::default() });
        exercise(&disk, &mut *front.queue(32).unwrap(), (round as u64) << 20);
        let told = rig.front_key("multi-queue-num-queues").unwrap_or("1".into());
        assert_eq!(told, queues.to_string());
        front.abandon();
    }
    rig.connect(FrontOptions::default()).close().unwrap();
}

#[test]
fn a_resize_is_seen_while_connected() {
    let disk = memory(2);
    let rig = Rig::with_disk(disk.clone(), "", &[]);
    let front = rig.connect(FrontOptions::default());
    let mut queue = front.queue(32).unwrap();
    let beyond = |queue: &mut dyn DiskQueue| write(queue, 3 << 20, &pattern(4096, 1));
    assert_ne!(beyond(&mut *queue), 0);
    disk.with_bytes(|bytes| bytes.resize(4 << 20, 0));
    until("the new size is seen", || front.geometry().size == 4 << 20);
    assert_eq!(beyond(&mut *queue), 0);
    exercise(&disk, &mut *queue, 0);
}

#[test]
fn a_read_only_disk_and_a_cd() {
    let rofs = rustix::io::Errno::ROFS.raw_os_error();
    for (keys, cdrom) in [
        (&[("mode", "r")][..], false),
        (&[("mode", "r"), ("device-type", "cdrom"), ("removable", "1")], true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, pattern(1 << 20, 4)).unwrap();
        let params = format!("raw:{}", path.display());
        let rig = Rig::start(blkback::opener(blktap::image::BackingPolicy::Refuse));
        rig.attach("cache=writeback", &[keys, &[("params", &*params)]].concat());
        let front = rig.connect(FrontOptions::default());
        assert!(front.geometry().read_only);
        assert_eq!((front.info().disk.cdrom, front.info().disk.removable), (cdrom, cdrom));
        let mut queue = front.queue(8).unwrap();
        same(&read(&mut *queue, 0, 1 << 20), &pattern(1 << 20, 4));
        assert_eq!(write(&mut *queue, 0, &[0; 512]), rofs);
        drop(queue);
        front.close().unwrap();
    }
}

#[test]
fn a_frontend_that_knows_none_of_the_optional_keys() {
    let disk = memory(8);
    let rig = Rig::with_disk(disk.clone(), "", &[]);
    let front = rig.connect(FrontOptions { keys: KeySet::Essential, ..Default::default() });
    exercise(&disk, &mut *front.queue(32).unwrap(), 0);
    assert_eq!(front.queues(), 1);
    assert_eq!(rig.front_key("feature-persistent"), None);
    assert_eq!(rig.counter("queue-", "indirect"), 0);
    front.close().unwrap();
}

#[test]
fn a_detached_device_takes_nothing_new_and_closes() {
    let disk = memory(4);
    let rig = Rig::with_disk(disk, "", &[]);
    let front = rig.connect(FrontOptions::default());
    let mut queue = front.queue(8).unwrap();
    assert_eq!(write(&mut *queue, 0, &pattern(4096, 1)), 0);
    let nodev = rustix::io::Errno::NODEV.raw_os_error();
    std::thread::scope(|scope| {
        let detached = scope.spawn(|| rig.detach());
        until("the frontend is told", || front.is_closing());
        assert_eq!(write(&mut *queue, 0, &pattern(4096, 1)), nodev);
        drop(queue);
        drop(front);
        assert_eq!(detached.join().unwrap(), hypervisor::xenbus::toolstack::Detached::Closed);
    });
    assert_eq!(rig.back_key("state"), None);
}

#[test]
fn a_backend_that_closes_without_a_word_disables_the_disk() {
    let rig = Rig::with_disk(memory(4), "", &[]);
    let front =
        rig.connect(FrontOptions { patience: Duration::from_secs(3), ..Default::default() });
    let mut queue = front.queue(8).unwrap();
    rig.set_back_key("state", "6");
    until("it is seen", || front.fault().is_some());
    let io = rustix::io::Errno::IO.raw_os_error();
    assert_eq!(write(&mut *queue, 0, &pattern(4096, 1)), io);
    assert_eq!(front.fault().unwrap(), "the backend has closed the device");
}

/// Keeps 32 requests in flight, `rounds` times.
fn many(queue: &mut dyn DiskQueue, memory: &mut [u8], rounds: u64, done: &mut Vec<blktap::Done>) {
    for round in 0..rounds {
        for token in 0..32 {
            let part = &mut memory[token * 4096..(token + 1) * 4096];
            // SAFETY: the memory outlives the round, in which all is answered.
            let bufs = [unsafe { blktap::IoBuf::new(part.as_mut_ptr(), 4096) }];
            let op = if round % 2 == 0 { Op::Write } else { Op::Read };
            let (offset, token) = (token as u64 * 4096, token as u64);
            let request = blktap::Request { op, offset, len: 4096, bufs: &bufs, token };
            queue.submit(&request).unwrap();
        }
        let mut answered = 0;
        while answered < 32 {
            queue.poll(done).unwrap();
            answered += done.drain(..).map(|d| assert_eq!(d.errno, 0)).count();
            if answered < 32 {
                queue.wait(&[], None).unwrap();
            }
        }
    }
}

#[test]
fn no_request_allocates() {
    let rig = Rig::with_disk(memory(1), "", &[]);
    let front = rig.connect(FrontOptions { max_queues: 1, ..Default::default() });
    let mut queue = front.queue(32).unwrap();
    let (mut memory, mut done) = (vec![5; 32 * 4096], Vec::with_capacity(64));
    many(&mut *queue, &mut memory, 10, &mut done);
    let before = counting::allocations();
    many(&mut *queue, &mut memory, 3_000, &mut done);
    assert_eq!(counting::allocations() - before, 0);
}

#[test]
fn a_refused_frontend_may_come_again() {
    let disk = memory(2);
    let fail = std::sync::atomic::AtomicBool::new(true);
    let backing = disk.clone();
    let rig = Rig::start(Arc::new(move |_| {
        match fail.swap(false, std::sync::atomic::Ordering::AcqRel) {
            true => Err(hypervisor::xenbus::Fault("no disk today".into())),
            false => Ok(backing.clone() as Arc<dyn Disk>),
        }
    }));
    rig.attach("", &[]);
    let first = blkback::BlkFront::connect(rig.guest(), rig::DEVID, FrontOptions::default());
    assert_eq!(first.err().unwrap().kind(), std::io::ErrorKind::ConnectionRefused);
    let second = rig.connect(FrontOptions::default());
    exercise(&disk, &mut *second.queue(8).unwrap(), 0);
    second.close().unwrap();
}
