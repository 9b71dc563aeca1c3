//! A queue that is dropped with requests at any stage: the image stays sound, other queues go on,
//! and nothing of it is held for good.
// Queues take the addresses of the data.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blktap::image::{Blocking, ImageDisk};
use blktap::storage::record::{Effort, Journal};
use blktap::{Disk, DiskQueue, Done, IoBuf, Op, Request};

use crate::case::Case;
use crate::history::{BASE, History, SECTOR, bytes_of};
use crate::power::{Plan, Tally, cut_all};
use crate::run::{Random, new_image};
use crate::{PLAN, cases, effort, on_all_processors, say};

/// What takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);
const DEPTH: u32 = 8;

/// Two queues on one image. Sectors are written once at most at a time.
struct Rig {
    journal: std::sync::Arc<Journal>,
    history: History,
    /// What is on its way from a queue: (queue, token) for (sector, write).
    flying: Vec<((usize, u64), (u64, u32))>,
    /// Memory of requests, for as long as the rig.
    memory: Vec<Box<[u8]>>,
    random: Random,
    next: u32,
    /// Sectors that a round has written to.
    touched: BTreeSet<u64>,
}

impl Rig {
    fn submit(&mut self, which: usize, queue: &mut dyn DiskQueue) {
        let sector = self.random.below(self.history.size());
        if self.flying.iter().any(|(_, (s, _))| *s == sector) {
            return;
        }
        self.next += 1;
        let (tag, token) = (self.next, u64::from(self.next));
        let op = match self.random.below(8) {
            0 => Op::WriteZeroes,
            1 => Op::WriteFua,
            _ => Op::Write,
        };
        let tag = if op == Op::WriteZeroes { 0 } else { tag };
        self.memory.push(bytes_of(tag, sector..sector + 1).into());
        let bytes = self.memory.last_mut().expect("just made");
        // SAFETY: the memory stays until all queues are gone.
        let buf = unsafe { IoBuf::new(bytes.as_mut_ptr(), SECTOR) };
        let bufs = if op == Op::WriteZeroes { &[][..] } else { &[buf] };
        let (offset, len) = (sector * SECTOR as u64, SECTOR as u64);
        self.touched.insert(sector);
        self.history.may_hold(sector..sector + 1, tag, self.journal.len());
        queue.submit(&Request { op, offset, len, bufs, token }).expect("it has room");
        self.flying.push(((which, token), (sector, tag)));
    }

    fn poll(&mut self, which: usize, queue: &mut dyn DiskQueue) {
        let mut done: Vec<Done> = Vec::new();
        queue.poll(&mut done).expect("poll");
        for d in done {
            assert_eq!(d.errno, 0, "request {}", d.token);
            let key = (which, d.token);
            let at = self.flying.iter().position(|(k, _)| *k == key).expect("on its way");
            let (_, (sector, tag)) = self.flying.swap_remove(at);
            self.history.holds(sector, tag, self.journal.len());
        }
    }

    fn drain(&mut self, which: usize, queue: &mut dyn DiskQueue) {
        let start = Instant::now();
        while queue.in_flight() > 0 {
            assert!(start.elapsed() < PATIENCE, "a request is held up for good");
            let waited = queue.wait(&[], Some(Duration::from_millis(200)));
            waited.expect("wait");
            self.poll(which, queue);
        }
    }

    /// Some requests on both queues, then one queue is dropped.
    fn round(&mut self, disk: &ImageDisk, kept: &mut dyn DiskQueue) -> u64 {
        let mut dropped = disk.queue(DEPTH).expect("a queue");
        for _ in 0..1 + self.random.below(u64::from(DEPTH) - 1) {
            match self.random.below(5) {
                0 if kept.in_flight() < DEPTH => self.submit(1, kept),
                1 => self.poll(0, &mut *dropped),
                2 => dropped.submit_all().expect("submit"),
                _ => self.submit(0, &mut *dropped),
            }
        }
        let left = u64::from(dropped.in_flight());
        drop(dropped);
        self.flying.retain(|((which, _), _)| *which != 0);
        self.drain(1, kept);
        left
    }
}

/// How many requests were dropped, and what power cuts at any time left.
fn drop_queues(case: &dyn Case, seed: u64, blocking: Blocking) -> (u64, Tally) {
    let journal = new_image(case);
    let layers = case.open(&journal.storages()).expect("open");
    let disk = ImageDisk::new(layers, 512, blocking).expect("a disk");
    let tag = |sector| if sector < case.base() { BASE } else { 0 };
    let history = History::new(case.sectors(), case.sectors(), tag);
    let (flying, memory, random) = (Vec::new(), Vec::new(), Random(seed));
    let mut rig = Rig {
        journal: journal.clone(),
        history,
        flying,
        memory,
        random,
        next: 0,
        touched: BTreeSet::new(),
    };
    let (mut kept, mut dropped) = (disk.queue(DEPTH).expect("a queue"), 0);
    for _ in 0..6 {
        dropped += rig.round(&disk, &mut *kept);
        // No cluster is anybody's any more: those that were written to can be again.
        for sector in std::mem::take(&mut rig.touched) {
            rig.next += 1;
            let (one, from) = (sector..sector + 1, journal.len());
            let data = bytes_of(rig.next, one.clone());
            rig.history.may_hold(one, rig.next, from);
            let write = blktap::blocking::write_at(&mut *kept, sector * 512, &data);
            write.expect("the other queue goes on");
            rig.history.holds(sector, rig.next, from);
        }
        blktap::blocking::flush(&mut *kept).expect("flush");
        rig.history.flushed(journal.len());
    }
    drop(kept);
    disk.close().expect("close");
    let effort = Effort { all: 4, sample: 1 };
    let plan = Plan { effort, used: 200, again: 0, qemu: 0, ..PLAN };
    (dropped, cut_all(case, &journal.recording(), &rig.history, plan))
}

#[test]
fn a_queue_dropped_at_any_stage_leaves_a_sound_image() {
    let mut cases = cases::all();
    cases.retain(|case| case.sectors() / case.cluster() < 1000);
    on_all_processors(cases.len(), |n| {
        let (mut dropped, mut total) = (0, Tally::default());
        for seed in 0..2 * effort() {
            for blocking in [Blocking::Threads, Blocking::Inline] {
                let (left, tally) = drop_queues(&*cases[n], seed, blocking);
                dropped += left;
                total.add(&tally);
            }
        }
        say(&format!("{:24} dropped: {dropped}, then {total}", cases[n].name()));
        assert!(total.lost == 0, "{}", total.why.join("\n"));
        assert!(dropped > 0, "{}: no request was dropped", cases[n].name());
    });
}

/// A thread that drops a queue which waits for its other queue's clusters.
#[test]
fn a_queue_that_waits_for_another_can_be_dropped() {
    let (send, done) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let case = cases::all().into_iter().find(|c| c.name() == "qcow2 65536");
        let case = case.expect("a case with large clusters");
        let journal = new_image(&*case);
        let layers = case.open(&journal.storages()).expect("open");
        let disk = ImageDisk::new(layers, 512, Blocking::Threads).expect("a disk");
        let [mut first, mut second] = [0; 2].map(|_| disk.queue(DEPTH).expect("a queue"));
        // With its table loaded the next write takes the cluster at once.
        blktap::blocking::write_at(&mut *first, 512 << 10, &[1; 512]).expect("write");
        let mut memory = [[2; 512], [3; 512]];
        let queues = [&mut first, &mut second];
        for (n, (queue, bytes)) in queues.into_iter().zip(&mut memory).enumerate() {
            // SAFETY: the memory stays until both queues are gone.
            let bufs = [unsafe { IoBuf::new(bytes.as_mut_ptr(), 512) }];
            let (op, offset, len, token) = (Op::Write, n as u64 * 512, 512, 0);
            queue.submit(&Request { op, offset, len, bufs: &bufs, token }).expect("submit");
        }
        drop(second);
        let mut polled = Vec::new();
        while polled.is_empty() {
            first.wait(&[], None).expect("wait");
            first.poll(&mut polled).expect("poll");
        }
        assert_eq!(polled[0].errno, 0);
        // It did wait, and was given up.
        let mut found = [9; 512];
        blktap::blocking::read_at(&mut *first, 512, &mut found).expect("read");
        assert!(found == [0; 512], "the second queue's write did not wait");
        blktap::blocking::write_at(&mut *first, 512, &[4; 512]).expect("its cluster is free");
        drop(first);
        disk.close().expect("close");
        send.send(()).expect("the test waits");
    });
    assert!(done.recv_timeout(PATIENCE).is_ok(), "dropping a queue hangs, or failed");
    thread.join().expect("the thread");
}
