//! Live disks with several queues and threads: nothing is lost, windows exclude, copies are equal.

#![allow(clippy::print_stdout)]

mod kill;
mod late;
#[path = "../support/mod.rs"]
mod support;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blktap::copy::{Before, CopyOptions, copy, plan_of};
use blktap::disk::MemDisk;
use blktap::live::{Discards, LiveDisk, LiveError, Pass, WINDOW};
use blktap::{Disk, DiskQueue, Done, Op, Request, blocking};
use late::{LateDisk, next};
use support::{Memory, request};

const SIZE: usize = 4 * WINDOW as usize + 12288;
const LIMIT: Duration = Duration::from_secs(10);

/// Guests that change the disk as fast as they can, each with a queue and a thread.
struct Guests {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Guests {
    fn start(live: &Arc<LiveDisk>, count: u64, seed: u64) -> Guests {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = (0..count).map(|n| {
            let (live, stop, done) = (live.clone(), stop.clone(), done.clone());
            std::thread::spawn(move || guest(&*live, &stop, &done, seed * 7919 + n + 1))
        });
        let threads = threads.collect();
        Guests { stop, done, threads }
    }
    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
    /// Some requests later.
    fn later(&self) {
        let (from, end) = (self.done(), Instant::now() + LIMIT);
        while self.done() < from + 50 {
            assert!(Instant::now() < end, "requests do not end");
            std::thread::yield_now();
        }
    }
    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|t| t.join().expect("a guest"));
    }
}

/// Keeps up to 8 requests in flight, of all kinds, also across windows, until told to stop; each
/// is answered once, with 0.
fn guest(disk: &dyn Disk, stop: &AtomicBool, done: &AtomicU64, mut seed: u64) {
    const DEPTH: usize = 8;
    let mut memory: Vec<Memory> = (0..DEPTH).map(|_| Memory::new(65536, 0)).collect();
    let mut queue = disk.queue(DEPTH as u32).expect("queue");
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let mut answers: Vec<Done> = Vec::new();
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        while let (false, Some(&slot)) = (stopping, free.last()) {
            let (kind, number) = (next(&mut seed) % 16, next(&mut seed));
            let op = match kind {
                0 => Op::Flush,
                1 => Op::Discard,
                2 => Op::WriteZeroes,
                3 | 4 => Op::Read,
                _ => Op::Write,
            };
            let most = if op == Op::Discard { SIZE as u64 } else { 65536 };
            let at = number % (SIZE as u64 / 512) * 512;
            let len = (512 + next(&mut seed) % most / 512 * 512).min(SIZE as u64 - at);
            if op == Op::Write {
                memory[slot].slice_mut().fill(number as u8 | 1);
            }
            let buf = memory[slot].bufs(&[len.min(65536) as usize]);
            let bufs = if matches!(op, Op::Read | Op::Write) { &buf[..] } else { &[] };
            let (offset, len) = if op == Op::Flush { (0, 0) } else { (at, len) };
            let request = Request { op, offset, len, bufs, token: slot as u64 };
            if queue.submit(&request).is_err() {
                break;
            }
            free.pop();
        }
        if stopping && free.len() == DEPTH {
            return;
        }
        queue.wait(&[], Some(Duration::from_millis(100))).expect("wait");
        queue.poll(&mut answers).expect("poll");
        for d in answers.drain(..) {
            assert_eq!(d.errno, 0);
            assert!(!free.contains(&(d.token as usize)), "answered twice");
            free.push(d.token as usize);
            done.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn pauses_hold_all_requests_and_lose_none() {
    let disk = LateDisk::new(SIZE, 1);
    let carried = disk.carried.clone();
    let live = LiveDisk::new(disk);
    let guests = Guests::start(&live, 3, 1);
    for _ in 0..20 {
        guests.later();
        let paused = live.pause(LIMIT).expect("a pause");
        let before = carried.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(carried.load(Ordering::Relaxed), before, "carried out in a pause");
        assert!(matches!(live.pause(LIMIT), Err(LiveError::Taken)));
        paused.resume();
    }
    guests.later();
    guests.end();
}

#[test]
fn a_disk_is_swapped_for_another() {
    let disks: Vec<_> = (0..6).map(|n| LateDisk::new(SIZE, n + 5)).collect();
    let live = LiveDisk::new(disks[0].clone());
    let guests = Guests::start(&live, 2, 2);
    for pair in disks.windows(2) {
        guests.later();
        let paused = live.pause(LIMIT).expect("a pause");
        paused.close().expect("flushed");
        let bytes = pair[0].bytes();
        pair[1].inner.with_bytes(|b| *b = bytes.clone());
        paused.install(pair[1].clone()).expect("it fits");
        paused.resume();
        guests.later();
        // Nothing goes to the old one any more.
        assert!(pair[0].bytes() == bytes);
        assert!(pair[1].bytes() != bytes);
    }
    guests.end();
    // A smaller one does not fit, and a pause without a disk is no end of the world.
    let paused = live.pause(LIMIT).expect("a pause");
    paused.close().expect("flushed");
    assert!(matches!(paused.install(MemDisk::new(512)), Err(LiveError::Unfit(_))));
    paused.resume();
    assert!(live.with(|_| ()).is_none());
    let paused = live.pause(LIMIT).expect("a pause again");
    paused.install(disks[5].clone()).expect("it fits");
    paused.resume();
    let mut queue = live.queue(1).expect("queue");
    blocking::write_at(&mut *queue, 0, &[7; 512]).expect("a write");
}

#[test]
fn a_pause_that_comes_too_late_is_taken_back() {
    let disk = LateDisk::new(SIZE, 3);
    let stuck = disk.stuck.clone();
    let live = LiveDisk::new(disk);
    let guests = Guests::start(&live, 2, 3);
    guests.later();
    stuck.store(true, Ordering::Relaxed);
    let refused = live.pause(Duration::from_millis(50)).err();
    assert!(matches!(refused, Some(LiveError::Busy(_))), "{refused:?}");
    let refused = live.track(None).err();
    stuck.store(false, Ordering::Relaxed);
    assert!(matches!(refused, Some(LiveError::Busy(_))), "{refused:?}");
    guests.later();
    live.pause(LIMIT).expect("a pause").resume();
    guests.later();
    guests.end();
}

/// One request at a time of the caller's, polled by hand.
struct Hand {
    queue: Box<dyn DiskQueue>,
    memory: Vec<Memory>,
}

impl Hand {
    fn submit(&mut self, op: Op, offset: u64, len: usize) {
        let mut memory = Memory::new(len, 0);
        memory.slice_mut().fill(9);
        let bufs = memory.bufs(&[len]);
        let token = self.memory.len() as u64;
        self.memory.push(memory);
        self.queue.submit(&request(op, offset, &bufs, token)).expect("room");
    }
    fn answers(&mut self, patience: Duration) -> Vec<u64> {
        let (mut done, end) = (Vec::new(), Instant::now() + patience);
        while Instant::now() < end {
            self.queue.wait(&[], Some(Duration::from_millis(1))).expect("wait");
            self.queue.poll(&mut done).expect("poll");
        }
        done.iter().map(|d| d.token).collect()
    }
}

#[test]
fn a_window_excludes_changes() {
    let disk = LateDisk::new(SIZE, 4);
    let (stuck, inner) = (disk.stuck.clone(), disk.inner.clone());
    let live = LiveDisk::new(disk);
    let copy = MemDisk::new(SIZE);
    let mut tracked = live.track(Some((copy.clone(), Discards::Pass))).expect("tracked");
    let mut hand = Hand { queue: live.queue(8).expect("queue"), memory: Vec::new() };
    // A change that is in flight when the window comes is waited for.
    stuck.store(true, Ordering::Relaxed);
    hand.submit(Op::Write, WINDOW - 4096, 8192);
    let moved = std::thread::scope(|scope| {
        let moving = scope.spawn(|| tracked.advance(WINDOW));
        assert!(hand.answers(Duration::from_millis(50)).is_empty());
        assert!(!moving.is_finished(), "the window has passed a change in flight");
        stuck.store(false, Ordering::Relaxed);
        assert_eq!(hand.answers(Duration::from_millis(50)), [0]);
        moving.join().expect("a thread").expect("a window")
    });
    assert_eq!(moved, 0..WINDOW);
    // Inside it: held. Reads, and what lies above: not.
    hand.submit(Op::Write, 4096, 4096);
    hand.submit(Op::Read, 4096, 4096);
    hand.submit(Op::Write, WINDOW, 4096);
    let mut answers = hand.answers(Duration::from_millis(50));
    answers.sort_unstable();
    assert_eq!(answers, [2, 3]);
    assert!(inner.with_bytes(|b| b[4096..8192] == [0; 4096]), "written inside the window");
    // Behind it: to both.
    assert_eq!(tracked_advance(&mut tracked, &mut hand, WINDOW..2 * WINDOW), [1]);
    for disk in [&inner, &copy] {
        assert!(disk.with_bytes(|b| b[4096..8192] == [9; 4096]), "not written to both");
    }
    assert!(copy.with_bytes(|b| b[WINDOW as usize..] == vec![0; SIZE - WINDOW as usize]));
    // What was held goes on when the job ends.
    hand.submit(Op::Write, WINDOW, 4096);
    assert!(hand.answers(Duration::from_millis(20)).is_empty());
    drop(tracked);
    assert_eq!(hand.answers(Duration::from_millis(50)), [4]);
}

fn tracked_advance(
    tracked: &mut blktap::live::Tracked,
    hand: &mut Hand,
    wanted: std::ops::Range<u64>,
) -> Vec<u64> {
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| tracked.advance(WINDOW));
        let answers = hand.answers(Duration::from_millis(50));
        assert_eq!(moving.join().expect("a thread").expect("a window"), wanted);
        answers
    })
}

/// The disks of a mirror, with whatever was in the copy before.
fn mirrored(seed: u64) -> (Arc<LateDisk>, Arc<LateDisk>, Arc<LiveDisk>) {
    let (disk, copy) = (LateDisk::new(SIZE, seed), LateDisk::new(SIZE, seed + 1));
    copy.inner.with_bytes(|b| b.fill(0xee));
    let live = LiveDisk::new(disk.clone());
    (disk, copy, live)
}

#[test]
fn a_mirror_is_equal_whatever_the_guests_do() {
    for seed in 1..6 {
        let (disk, copy, live) = mirrored(seed);
        let guests = Guests::start(&live, 3, seed);
        guests.later();
        let mut tracked = live.track(Some((copy.clone(), Discards::Pass))).expect("tracked");
        let mut pass = Pass::new(&*disk, &*copy, Before::Unknown).expect("a pass");
        let mut plan = plan_of(&*disk);
        let before = guests.done();
        let mut tick = |_| ControlFlow::Continue(());
        pass.run(&mut tracked, &mut plan, &mut tick).expect("a copy");
        assert!(guests.done() > before, "the guests have stood still");
        guests.later();
        let paused = tracked.pause(LIMIT).expect("a pause");
        assert!(disk.bytes() == copy.bytes(), "seed {seed}: the copy is another");
        paused.resume();
        guests.later();
        guests.end();
    }
}

/// The control of the test above: a copy that holds nothing back is seen to be wrong.
#[test]
fn an_unguarded_copy_is_seen() {
    let (disk, copied, live) = mirrored(9);
    let guests = Guests::start(&live, 3, 9);
    guests.later();
    let mut plan = plan_of(&*disk);
    let mut tick = |_| ControlFlow::Continue(());
    let options = CopyOptions::new(SIZE as u64 / 4096 * 4096);
    copy(&*disk, &*copied, &options, &mut plan, None, &mut tick).expect("a copy");
    guests.later();
    let paused = live.pause(LIMIT).expect("a pause");
    assert!(disk.bytes() != copied.bytes(), "a copy without a window cannot be right");
    paused.resume();
    guests.end();
}

#[test]
fn jobs_end_in_the_middle_and_guests_go_on() {
    let (disk, copy, live) = mirrored(20);
    let guests = Guests::start(&live, 3, 20);
    for windows in 0..5 {
        let mut tracked = live.track(Some((copy.clone(), Discards::Drop))).expect("tracked");
        for _ in 0..windows {
            tracked.advance(WINDOW).expect("a window");
        }
        // The window stands: in the end all that the guests have in flight may wait for it.
        std::thread::sleep(Duration::from_millis(20));
        drop(tracked);
        guests.later();
    }
    // An error of the copy ends the job, never a guest's request.
    let bad = blktap::faults::FaultDisk::new(
        MemDisk::new(SIZE),
        &[blktap::faults::Fault::Fail { op: Op::Write, nth: 0, errno: 5 }],
    );
    let mut tracked = live.track(Some((bad, Discards::Pass))).expect("tracked");
    for _ in 0..4 {
        tracked.advance(WINDOW).expect("a window");
    }
    let end = Instant::now() + LIMIT;
    while tracked.failure().is_none() {
        assert!(Instant::now() < end, "the error is not told");
        std::thread::yield_now();
    }
    assert!(matches!(tracked.pause(LIMIT), Err(LiveError::Unfit(_))));
    guests.later();
    guests.end();
    drop(disk);
}

#[test]
fn queues_come_and_go_in_every_state() {
    let (_disk, copy, live) = mirrored(30);
    let guests = Guests::start(&live, 1, 30);
    let paused = live.pause(LIMIT).expect("a pause");
    let late = Guests::start(&live, 2, 31);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(late.done(), 0);
    paused.resume();
    late.later();
    let mut tracked = live.track(Some((copy, Discards::Pass))).expect("tracked");
    tracked.advance(WINDOW).expect("a window");
    let more = Guests::start(&live, 2, 32);
    let end = Instant::now() + LIMIT;
    while more.done() == 0 {
        assert!(Instant::now() < end, "new queues do nothing");
        std::thread::yield_now();
    }
    // One that leaves while the window holds its requests: they are given up.
    let mut hand = Hand { queue: live.queue(8).expect("queue"), memory: Vec::new() };
    hand.submit(Op::Write, 0, 4096);
    drop(hand.queue);
    tracked.advance(WINDOW).expect("a window");
    drop(tracked);
    [guests, late, more].into_iter().for_each(Guests::end);
}
