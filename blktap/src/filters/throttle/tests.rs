// Requests name memory by address.
#![allow(unsafe_code)]

use super::*;
use crate::disk::{Done, IoBuf, MemDisk, NullDisk};

fn group(list: &[(&str, &str)]) -> Arc<Group> {
    let mut limits = Limits::default();
    list.iter().for_each(|(name, value)| limits.set(name, value).expect("a limit"));
    Group::new(limits)
}

fn request(op: Op, len: u64, token: u64) -> Request<'static> {
    Request { op, offset: 0, len, bufs: &[], token }
}

/// Keeps `depth` requests on their way for a time: how many were answered.
fn run(queue: &mut dyn DiskQueue, depth: u32, r: Request<'_>, time: Duration) -> u32 {
    let (begin, mut count, mut done) = (Instant::now(), 0, Vec::new());
    while begin.elapsed() < time {
        while queue.in_flight() < depth {
            queue.submit(&r).expect("room");
        }
        queue.wait(&[], Some(Duration::from_millis(50))).expect("wait");
        done.clear();
        queue.poll(&mut done).expect("poll");
        assert!(done.iter().all(|d| d.errno == 0));
        count += done.len() as u32;
    }
    count
}

fn nearly(what: u32, wanted: u32) -> bool {
    what.abs_diff(wanted) * 20 <= wanted
}

#[test]
fn requests_and_bytes_are_held_to_their_rates() {
    let second = Duration::from_secs(1);
    let disk = ThrottleDisk::new(NullDisk::new(1 << 30), group(&[("iops_read", "1000")]));
    let mut queue = disk.queue(32).expect("a queue");
    run(&mut *queue, 32, request(Op::Read, 4096, 0), second / 4);
    let n = run(&mut *queue, 32, request(Op::Read, 4096, 0), second);
    assert!(nearly(n, 1000), "{n} reads");
    drop(queue);
    let disk = ThrottleDisk::new(NullDisk::new(1 << 30), group(&[("bps_total", "10M")]));
    let mut queue = disk.queue(8).expect("a queue");
    run(&mut *queue, 8, request(Op::WriteZeroes, 65536, 0), second / 4);
    let n = run(&mut *queue, 8, request(Op::WriteZeroes, 65536, 0), second);
    assert!(nearly(n, 160), "{n} times 64 KiB");
    // A flush is free, and so is what has another way.
    queue.submit(&request(Op::Flush, 0, 7)).expect("room");
    let mut done = Vec::new();
    queue.poll(&mut done).expect("poll");
    assert!(done.contains(&Done { token: 7, errno: 0 }));
}

#[test]
fn a_change_reaches_what_waits() {
    let limits = group(&[("iops_total", "1")]);
    let disk = ThrottleDisk::new(NullDisk::new(1 << 20), Arc::clone(&limits));
    let mut queue = disk.queue(4).expect("a queue");
    (0..4).for_each(|n| queue.submit(&request(Op::Read, 512, n)).expect("room"));
    assert_eq!(queue.submit(&request(Op::Read, 512, 9)), Err(Full));
    let mut done = Vec::new();
    queue.poll(&mut done).expect("poll");
    assert_eq!(done.len(), 1, "the others take seconds");
    limits.set(Limits::default());
    let begin = Instant::now();
    while done.len() < 4 {
        queue.wait(&[], None).expect("wait");
        queue.poll(&mut done).expect("poll");
    }
    assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
    assert_eq!(done.iter().map(|d| d.token).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn whoever_leaves_does_not_wait_and_loses_nothing() {
    let memory = MemDisk::new(4096);
    let below = Arc::clone(&memory) as Arc<dyn Disk>;
    let disk = ThrottleDisk::new(below, group(&[("iops_write", "1")]));
    let mut queue = disk.queue(8).expect("a queue");
    let counters = Handle::<EngineCounters>::default();
    queue.count_in(counters.clone());
    let mut data = [[1u8; 512], [2; 512], [3; 512]];
    for (n, part) in data.iter_mut().enumerate() {
        // SAFETY: `data` outlives the queue.
        let bufs = [unsafe { IoBuf::new(part.as_mut_ptr(), 512) }];
        let r = Request { bufs: &bufs, offset: n as u64 * 512, ..request(Op::Write, 512, 0) };
        queue.submit(&r).expect("room");
    }
    queue.submit_all().expect("sent");
    assert_eq!(counters.throttled.get(), 2);
    let begin = Instant::now();
    drop(queue);
    assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
    memory.with_bytes(|bytes| assert_eq!((bytes[0], bytes[600], bytes[1100]), (1, 2, 3)));
}
