//! The image layer under a small format: random requests of several queues against a model.
#[allow(dead_code)]
#[path = "../examples/own_format.rs"]
mod own_format;

use std::sync::Arc;

use blktap::formats::{Format, RawFormat};
use blktap::image::{Blocking, ImageDisk};
use blktap::storage::{MemStorage, OpenOptions, Storage, open};
use blktap::{Disk, Op, blocking};
use own_format::Sparse;

/// A disk that is not a whole number of clusters, over a shorter parent.
const SIZE: u64 = (3 << 20) + 7 * 512;
const PARENT: u64 = (1 << 20) + 512;

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    std::iter::repeat_with(step).take(len).collect()
}

fn chain(storage: Arc<dyn Storage>, blocking: Blocking) -> (Arc<ImageDisk>, Vec<u8>) {
    let parent = bytes(7, PARENT as usize);
    let mut model = parent.clone();
    model.resize(SIZE as usize, 0);
    Sparse::create(&*storage, SIZE).expect("create");
    let parent: Arc<dyn Format> =
        Arc::new(RawFormat::new(Arc::new(MemStorage::new(parent))).expect("raw"));
    let top: Arc<dyn Format> = Sparse::open(storage).expect("open");
    (ImageDisk::new(vec![top, parent], 512, blocking).expect("a disk"), model)
}

fn work(disk: &ImageDisk, model: &mut [u8]) {
    let mut queues = [disk.queue(8).expect("queue"), disk.queue(8).expect("queue")];
    for i in 0..400u64 {
        let r = bytes(i + 100, 24);
        let number =
            |at: usize| u64::from(u32::from_le_bytes([r[at], r[at + 1], r[at + 2], r[at + 3]]));
        let at = number(0) % (SIZE / 512) * 512;
        let len = (512 * (1 + number(4) % 300)).min(SIZE - at);
        let range = at as usize..(at + len) as usize;
        let queue = &mut *queues[(i % 2) as usize];
        match number(8) % 5 {
            0 | 1 => {
                let data = bytes(i, len as usize);
                blocking::write_at(queue, at, &data).expect("write");
                model[range].copy_from_slice(&data);
            }
            2 => {
                blocking::range(queue, Op::WriteZeroes, at, len).expect("zero");
                model[range].fill(0);
            }
            3 => blocking::flush(queue).expect("flush"),
            _ => {
                let mut read = vec![1; len as usize];
                blocking::read_at(queue, at, &mut read).expect("read");
                assert!(read == model[range], "request {i}, {len} bytes at {at}");
            }
        }
    }
    let mut all = vec![1; model.len()];
    blocking::read_at(&mut *queues[0], 0, &mut all).expect("read");
    assert!(all == *model);
}

#[test]
fn requests_agree_with_a_model_in_memory_and_in_a_file() {
    for blocking in [Blocking::Inline, Blocking::Threads] {
        let (disk, mut model) = chain(Arc::new(MemStorage::default()), blocking);
        work(&disk, &mut model);
        disk.close().expect("close");
    }
    let dir = tempfile::tempdir_in(".").expect("a folder");
    let path = dir.path().join("a.sparse");
    std::fs::File::create(&path).expect("a file");
    let (disk, mut model) =
        chain(Arc::new(open(&OpenOptions::new(&path)).expect("open")), Blocking::Threads);
    work(&disk, &mut model);
    drop(disk);
    let again = Sparse::open(Arc::new(open(&OpenOptions::new(&path)).expect("open, unlocked")));
    let disk = ImageDisk::new(vec![again.expect("open")], 512, Blocking::Threads).expect("a disk");
    let mut map = Vec::new();
    let mut at = 0;
    while at < SIZE {
        map.clear();
        disk.map(at..SIZE, &mut map).expect("map");
        at += map.iter().map(|r| r.len).sum::<u64>();
    }
    assert_eq!(at, SIZE);
}

/// Writes to one cluster, all in flight together, on two threads: none is lost.
#[test]
fn writes_that_share_a_new_cluster_wait_for_each_other() {
    let (disk, _) = chain(Arc::new(MemStorage::default()), Blocking::Threads);
    let writers: Vec<_> = (0..2u64)
        .map(|half| {
            let disk = Arc::clone(&disk);
            std::thread::spawn(move || {
                let mut queue = disk.queue(64).expect("queue");
                let mut pages = vec![[half as u8 + 1; 512]; 1 << 11];
                let mut done = Vec::new();
                for (i, page) in pages.iter_mut().enumerate() {
                    let offset = (2 * i as u64 + half) * 512;
                    // SAFETY: `pages` lives until the queue, declared before it, has no request.
                    #[allow(unsafe_code)]
                    let buf = unsafe { blktap::IoBuf::new(page.as_mut_ptr(), 512) };
                    let request =
                        blktap::Request { op: Op::Write, offset, len: 512, bufs: &[buf], token: 0 };
                    while queue.submit(&request).is_err() {
                        queue.wait(&[], None).expect("wait");
                        queue.poll(&mut done).expect("poll");
                    }
                }
                while queue.in_flight() > 0 {
                    queue.wait(&[], None).expect("wait");
                    queue.poll(&mut done).expect("poll");
                }
                assert!(done.len() == 1 << 11 && done.iter().all(|d| d.errno == 0));
            })
        })
        .collect();
    writers.into_iter().for_each(|w| w.join().expect("a writer"));
    let mut all = vec![0; 2 << 20];
    blocking::read_at(&mut *disk.queue(1).expect("queue"), 0, &mut all).expect("read");
    for (i, sector) in all.chunks(512).enumerate() {
        assert!(sector.iter().all(|b| *b == (i % 2) as u8 + 1), "sector {i}");
    }
}
