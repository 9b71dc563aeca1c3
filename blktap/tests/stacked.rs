//! Filters over a disk that is paused: what they hold goes on with it, and nothing is lost.
#![allow(unsafe_code)]
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blktap::filters::changed::LogOptions;
use blktap::filters::throttle::{Group, Limits};
use blktap::filters::{ChangedDisk, DelayDisk, ThrottleDisk};
use blktap::live::LiveDisk;
use blktap::{Disk, MemDisk, Op};
use support::{Memory, finish, folder, request};

const SIZE: usize = 1 << 20;
const COUNT: usize = 16;

/// Writes that come while the disk is paused, and go on when it does.
fn goes_on(live: &Arc<LiveDisk>, disk: &dyn Disk, what: &str) {
    let mut queue = disk.queue(COUNT as u32).expect("a queue");
    let mut memory: Vec<Memory> = (0..COUNT).map(|n| Memory::of(&[n as u8 + 1; 512], 0)).collect();
    // It pauses with something in flight.
    let pause = {
        let live = Arc::clone(live);
        std::thread::spawn(move || live.pause(Duration::from_secs(10)).expect("a pause"))
    };
    let mut done = Vec::new();
    while !pause.is_finished() {
        queue.poll(&mut done).expect("poll");
        queue.wait(&[], Some(Duration::from_millis(5))).expect("wait");
    }
    let paused = pause.join().expect("no panic");
    let mut sent = 0;
    for (n, memory) in memory.iter_mut().enumerate() {
        let bufs = [memory.buf()];
        let write = request(Op::Write, n as u64 * 65536, &bufs, n as u64);
        sent += usize::from(queue.submit(&write).is_ok());
    }
    let (begin, mut turns) = (Instant::now(), 0);
    while begin.elapsed() < Duration::from_millis(300) {
        queue.poll(&mut done).expect("poll");
        queue.wait(&[], Some(Duration::from_millis(50))).expect("wait");
        turns += 1;
    }
    assert!(done.is_empty() && turns < 40, "{what}: {} done in {turns} turns", done.len());
    paused.resume();
    assert_eq!(finish(&mut *queue, sent).len(), sent, "{what}");
    for (n, memory) in memory.iter_mut().enumerate().skip(sent) {
        let bufs = [memory.buf()];
        let write = request(Op::Write, n as u64 * 65536, &bufs, n as u64);
        queue.submit(&write).expect("room");
    }
    assert_eq!(finish(&mut *queue, COUNT - sent).len(), COUNT - sent, "{what}");
}

fn assert_written(memory: &MemDisk, what: &str) {
    memory.with_bytes(|bytes| {
        for n in 0..COUNT {
            let at = n * 65536;
            assert!(bytes[at..at + 512].iter().all(|b| *b == n as u8 + 1), "{what}: write {n}");
        }
    });
}

#[test]
fn what_filters_hold_goes_on_after_a_pause() {
    let folder = folder();
    for what in ["nothing", "throttle", "delay", "changed", "all"] {
        let memory = MemDisk::new(SIZE);
        let live = LiveDisk::new(memory.clone());
        let mut disk: Arc<dyn Disk> = live.clone();
        if matches!(what, "changed" | "all") {
            let changed = ChangedDisk::new(disk);
            let path = folder.path().join(what);
            changed.log_to(&path, &LogOptions::of(&path)).expect("a log");
            disk = changed;
        }
        if matches!(what, "delay" | "all") {
            disk = DelayDisk::new(disk, "1000-20000:seed=3".parse().expect("a delay"));
        }
        if matches!(what, "throttle" | "all") {
            let mut limits = Limits::default();
            limits.set("iops_total", "1000").expect("a limit");
            disk = ThrottleDisk::new(disk, Group::new(limits));
        }
        goes_on(&live, &*disk, what);
        assert_written(&memory, what);
    }
}
