//! Several queues at once, with caches that are too small for them.
use std::sync::Arc;

use blktap::formats::Format;
use blktap::formats::qcow2::{L2Cache, Qcow2, Qcow2Options};
use blktap::image::{Blocking, ImageDisk};
use blktap::storage::{Cache, OpenOptions, open};
use blktap::{Disk, DiskQueue, Op, blocking};

use crate::qemu::{Dice, Folder, assert_same, noise};

const SIZE: u64 = 24 << 20;
const THREADS: u64 = 4;
/// Bytes that belong to one thread; the next ones to another, within a cluster.
const STRIPE: u64 = 1536;

fn disk(
    folder: &Folder,
    image: &str,
    options: &Qcow2Options,
    blocking: Blocking,
) -> Arc<ImageDisk> {
    let file = open(&OpenOptions::new(folder.path(image)).cache(Cache::Unsafe)).expect("open");
    let image: Arc<dyn Format> =
        Arc::new(Qcow2::open(Arc::new(file), None, options).expect("open"));
    ImageDisk::new(vec![image], 512, blocking).expect("a disk")
}

/// Works on the stripes of one thread, and reads its own back.
fn work(queue: &mut dyn DiskQueue, mine: u64, seed: u64) -> Vec<(u64, Option<u64>)> {
    let mut dice = Dice(seed * 1000 + mine + 1);
    let stripes = SIZE / STRIPE / THREADS;
    let mut written: Vec<Option<u64>> = vec![None; stripes as usize];
    for i in 0..600 {
        let stripe = dice.roll(stripes);
        let at = (stripe * THREADS + mine) * STRIPE;
        let last = &mut written[stripe as usize];
        match dice.roll(8) {
            0..=3 => {
                let seed = seed + mine * 100_000 + i;
                blocking::write_at(queue, at, &noise(seed, STRIPE as usize)).expect("write");
                *last = Some(seed);
            }
            4 => {
                blocking::range(queue, Op::WriteZeroes, at, STRIPE).expect("zero");
                *last = None;
            }
            5 if i % 7 == 0 => blocking::flush(queue).expect("flush"),
            _ => {
                let mut bytes = vec![1; STRIPE as usize];
                blocking::read_at(queue, at, &mut bytes).expect("read");
                let expected = last.map_or(vec![0; STRIPE as usize], |s| noise(s, bytes.len()));
                assert_same(&bytes, &expected, &format!("thread {mine}, {at:#x}"));
            }
        }
    }
    let place = |(i, seed): (usize, Option<u64>)| ((i as u64 * THREADS + mine) * STRIPE, seed);
    written.into_iter().enumerate().map(place).collect()
}

#[test]
fn queues_that_share_clusters_do_not_lose_each_others_data() {
    let folder = Folder::new();
    let small = Qcow2Options { l2_cache: L2Cache::Bytes(4096), ..Qcow2Options::default() };
    let all = Qcow2Options { l2_cache: L2Cache::All, ..Qcow2Options::default() };
    for (number, (kind, options)) in [
        ("compat=1.1", &all),
        ("cluster_size=4k", &small),
        ("extended_l2=on", &small),
        ("cluster_size=2k,refcount_bits=64", &small),
        ("lazy_refcounts=on", &all),
    ]
    .into_iter()
    .enumerate()
    {
        let image = format!("{number}.qcow2");
        folder.img(&format!("create -q -f qcow2 -o {kind} {image} {SIZE}"));
        let disk = disk(&folder, &image, options, Blocking::Threads);
        let mut model = vec![0; SIZE as usize];
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|mine| {
                    let disk = &disk;
                    scope.spawn(move || {
                        let mut queue = disk.queue(8).expect("a queue");
                        work(&mut *queue, mine, 7)
                    })
                })
                .collect();
            for thread in threads {
                for (at, seed) in thread.join().expect("a thread") {
                    let part = &mut model[at as usize..][..STRIPE as usize];
                    seed.inspect(|s| part.copy_from_slice(&noise(*s, STRIPE as usize)));
                }
            }
        });
        disk.close().expect("close");
        drop(disk);
        folder.check(&image);
        assert_same(&folder.bytes(&image), &model, kind);
    }
}

/// Discarding gives the file's space back: what is written next takes it.
#[test]
fn discarded_clusters_are_used_again() {
    let folder = Folder::new();
    folder.img(&format!("create -q -f qcow2 a.qcow2 {SIZE}"));
    let disk = disk(&folder, "a.qcow2", &Qcow2Options::default(), Blocking::Inline);
    let mut queue = disk.queue(4).expect("a queue");
    let data = noise(1, 4 << 20);
    for round in 0..8u64 {
        let at = round % 4 * (4 << 20);
        blocking::write_at(&mut *queue, at, &data).expect("write");
        blocking::flush(&mut *queue).expect("flush");
        blocking::range(&mut *queue, Op::Discard, at, 4 << 20).expect("discard");
        blocking::flush(&mut *queue).expect("flush");
    }
    drop(queue);
    disk.close().expect("close");
    drop(disk);
    folder.check("a.qcow2");
    let size = std::fs::metadata(folder.path("a.qcow2")).expect("metadata").len();
    assert!(size < 20 << 20, "{size} bytes for 4 MiB of data at a time");
}
