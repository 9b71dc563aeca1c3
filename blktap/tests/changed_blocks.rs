//! The changed-block log under power cuts: whatever of a disk differs from what it was when the
//! log began is in the log, at each point in time and whatever the cut keeps.
#![allow(unsafe_code)]
mod support;

use std::sync::Arc;

use blktap::filters::ChangedDisk;
use blktap::filters::changed::{Frozen, Left, LogOptions};
use blktap::formats::RawFormat;
use blktap::image::Blocking;
use blktap::storage::record::{Effort, Journal, Recording, SparseBytes};
use blktap::{Disk, ImageDisk, Op};
use support::{Memory, request};

const SIZE: u64 = 2 << 20;
const BLOCK: u64 = 512;

/// A disk in file 0, its log in file 1, and what happens to both.
fn recorded(seed: u64) -> (Recording, usize) {
    let mut bytes = SparseBytes::default();
    bytes.set_len(SIZE).expect("a size");
    let journal = Journal::new(vec![bytes, SparseBytes::default()]);
    let files = journal.storages();
    let raw = RawFormat::new(Arc::clone(&files[0])).expect("a disk");
    let below = ImageDisk::new(vec![Arc::new(raw)], 512, Blocking::Inline).expect("a disk");
    let disk = ChangedDisk::new(below);
    let options = LogOptions { name: "a".into(), granularity_bits: 9 };
    disk.start_in(Arc::clone(&files[1]), &options).expect("a log");
    let begun = journal.len();
    let mut queues = [disk.queue(8).expect("a queue"), disk.queue(8).expect("a queue")];
    let mut memory = Memory::of(&[7; 8192], 0);
    let (mut state, mut done) = (seed, Vec::new());
    let mut random = |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for step in 0..40 {
        let queue = &mut queues[(step % 2) as usize];
        for token in 0..1 + random(6) {
            let (at, len) = (random((SIZE - 8192) / 512) * 512, 512 * (1 + random(16)));
            let mut buf = [memory.buf()];
            // SAFETY: the first bytes of memory that outlives the queues.
            buf[0] = unsafe { blktap::IoBuf::new(buf[0].addr(), len as usize) };
            let op = [Op::Write, Op::WriteFua, Op::WriteZeroes, Op::Flush][random(4) as usize];
            let bufs = if matches!(op, Op::Write | Op::WriteFua) { &buf[..] } else { &[] };
            let r = blktap::Request { len, ..request(op, at, bufs, token) };
            queue.submit(&r).expect("room");
        }
        while queue.in_flight() > 0 {
            queue.poll(&mut done).expect("poll");
            queue.wait(&[], None).expect("wait");
        }
    }
    assert!(done.iter().all(|d| d.errno == 0));
    let recording = journal.recording();
    drop(queues);
    (recording, begun)
}

/// Blocks that differ from zeroes and are not in the log.
fn missing(state: &[SparseBytes]) -> Result<Vec<u64>, String> {
    let log = blktap::storage::MemStorage::new(state[1].to_vec());
    let frozen = Frozen::load(Arc::new(log)).map_err(|e| e.to_string())?;
    assert_eq!(frozen.header.left, Left::Claims);
    let mut out = Vec::new();
    frozen.stretches(0..SIZE, &mut out);
    let (mut at, mut missing, mut bytes) = (0, Vec::new(), vec![0; BLOCK as usize]);
    for (len, dirty) in out {
        if !dirty {
            for block in at / BLOCK..(at + len) / BLOCK {
                state[0].read(block * BLOCK, &mut bytes);
                if bytes.iter().any(|b| *b != 0) {
                    missing.push(block);
                }
            }
        }
        at += len;
    }
    Ok(missing)
}

fn lost(recording: &Recording, begun: usize, seed: u64) -> (u64, u64) {
    let (mut looked, mut lost) = (0, 0);
    let mut cuts = recording.cuts();
    loop {
        if cuts.position() >= begun {
            for choice in cuts.choices(Effort { all: 16, sample: 3 }, seed) {
                looked += 1;
                let bad = missing(&cuts.state(&choice)).map(|m| !m.is_empty());
                lost += u64::from(bad.unwrap_or(true));
            }
        }
        if !cuts.step() {
            return (looked, lost);
        }
    }
}

#[test]
fn no_power_cut_leaves_a_change_that_the_log_does_not_have() {
    let mut total = 0;
    for seed in 1..=2 {
        let (recording, begun) = recorded(seed);
        let (looked, lost) = lost(&recording, begun, seed);
        assert_eq!(lost, 0, "seed {seed}: of {looked} states");
        total += looked;
    }
    assert!(total > 500, "only {total} states");
}

#[test]
fn without_the_syncs_of_the_log_it_turns_red() {
    use blktap::storage::record::Action;
    let (mut recording, begun) = recorded(3);
    let mut at = 0;
    recording.entries.retain(|entry| {
        at += 1;
        at <= begun || entry.file != 1 || !matches!(entry.action, Action::Sync)
    });
    let (looked, lost) = lost(&recording, begun, 3);
    assert!(lost > 0, "none of {looked} states shows it");
}
