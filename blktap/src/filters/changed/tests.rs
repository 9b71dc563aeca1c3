use std::sync::atomic::AtomicBool;

use super::*;
use crate::blocking;
use crate::disk::{MemDisk, Op};
use crate::storage::MemStorage;

const SIZE: usize = 8 << 20;
const BLOCK: usize = 4096;

fn options(name: &str) -> LogOptions {
    LogOptions { name: name.into(), granularity_bits: BLOCK.trailing_zeros() as u8 }
}

fn changed(disk: &ChangedDisk, name: &str) -> Vec<u64> {
    let mut out = Vec::new();
    disk.bitmap(name, 0..SIZE as u64, &mut out).expect("a bitmap");
    blocks(&out)
}

fn blocks(stretches: &[(u64, bool)]) -> Vec<u64> {
    let mut at = 0;
    let mut all = Vec::new();
    for (len, dirty) in stretches {
        let part = at / BLOCK as u64..(at + len) / BLOCK as u64;
        all.extend(part.filter(|_| *dirty));
        at += len;
    }
    all
}

fn in_file(bytes: Vec<u8>) -> (Left, Vec<u64>) {
    let frozen = Frozen::load(Arc::new(MemStorage::new(bytes))).expect("a log");
    let mut out = Vec::new();
    frozen.stretches(0..SIZE as u64, &mut out);
    (frozen.header.left, blocks(&out))
}

#[test]
fn what_changes_is_shown_and_kept() {
    let disk = ChangedDisk::new(MemDisk::new(SIZE));
    let mut queue = disk.queue(4).expect("a queue");
    blocking::write_at(&mut *queue, 0, &[1; 512]).expect("no log, no entry");
    let storage = Arc::new(MemStorage::default());
    disk.start_in(Arc::clone(&storage) as Arc<dyn Storage>, &options("a")).expect("a log");
    assert_eq!(disk.bitmaps(), ["a"]);
    blocking::write_at(&mut *queue, 5 * BLOCK as u64, &[1; BLOCK + 512]).expect("write");
    blocking::range(&mut *queue, Op::Discard, 900 * BLOCK as u64, BLOCK as u64).expect("discard");
    blocking::range(&mut *queue, Op::WriteZeroes, 40 * BLOCK as u64, 512).expect("zeroes");
    blocking::read_at(&mut *queue, 77 * BLOCK as u64, &mut [0; 512]).expect("read");
    blocking::flush(&mut *queue).expect("flush");
    let exact = [5, 6, 40, 900];
    assert_eq!(changed(&disk, "a"), exact);
    // As a crash would leave it: groups of 16 blocks.
    let (left, claims) = in_file(storage.bytes());
    let groups: Vec<u64> = (0..16).chain(32..48).chain(896..912).collect();
    assert_eq!((left, claims), (Left::Claims, groups));
    drop(queue);
    drop(disk);
    assert_eq!(in_file(storage.bytes()), (Left::Exact, exact.to_vec()));
}

#[test]
fn a_log_is_replaced_while_others_write() {
    let disk = ChangedDisk::new(MemDisk::new(SIZE));
    disk.start_in(Arc::new(MemStorage::default()), &options("0")).expect("a log");
    let stop = Arc::new(AtomicBool::new(false));
    let write = |from: u64| {
        let (disk, stop) = (Arc::clone(&disk), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut queue = disk.queue(4).expect("a queue");
            let mut at = from;
            while !stop.load(Ordering::Relaxed) && at < SIZE as u64 {
                blocking::write_at(&mut *queue, at, &[1; BLOCK]).expect("write");
                at += 2 * BLOCK as u64;
                std::thread::sleep(Duration::from_micros(200));
            }
        })
    };
    let threads = [write(0), write(BLOCK as u64)];
    for n in 1..20 {
        let name = n.to_string();
        disk.start(&std::env::temp_dir().join("no-such-folder/x"), &options("x")).expect_err("no");
        disk.start_in(Arc::new(MemStorage::default()), &options(&name)).expect("another log");
        std::thread::sleep(Duration::from_millis(3));
    }
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|t| t.join().expect("no panic"));
    // Every block that was written is in exactly one log.
    let mut all: Vec<u64> = (0..20).flat_map(|n| changed(&disk, &n.to_string())).collect();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count);
    let mut bytes = vec![0; SIZE];
    blocking::read_at(&mut *disk.queue(1).expect("a queue"), 0, &mut bytes).expect("read");
    let written = (0..SIZE / BLOCK).filter(|n| bytes[n * BLOCK] == 1).map(|n| n as u64);
    assert_eq!(all, written.collect::<Vec<_>>());
    assert!(all.len() > 40, "they wrote meanwhile");
    disk.remove("0").expect("gone");
    assert!(disk.remove("19").expect_err("in use").to_string().contains("stop it first"));
    disk.stop().expect("stopped");
    disk.remove("19").expect("gone");
    assert_eq!(disk.names().len(), 18);
}

#[test]
fn a_disk_that_grows_has_its_new_part_in_the_log() {
    let memory = MemDisk::new(SIZE / 2);
    let disk = ChangedDisk::new(Arc::clone(&memory) as Arc<dyn Disk>);
    disk.start_in(Arc::new(MemStorage::default()), &options("a")).expect("a log");
    let mut queue = disk.queue(4).expect("a queue");
    memory.with_bytes(|bytes| bytes.resize(SIZE, 0));
    let early = blocking::write_at(&mut *queue, SIZE as u64 / 2, &[1; 512]).expect_err("not yet");
    assert_eq!(early.raw_os_error(), Some(libc::EINVAL));
    blocking::write_at(&mut *queue, 0, &[1; 512]).expect("write");
    assert_eq!(disk.refresh().expect("a size").size, SIZE as u64);
    blocking::write_at(&mut *queue, SIZE as u64 / 2, &[1; 512]).expect("write");
    let half = (SIZE / BLOCK / 2) as u64;
    let all: Vec<u64> = std::iter::once(0).chain(half..2 * half).collect();
    assert_eq!(changed(&disk, "a"), all);
}

#[test]
fn a_log_that_cannot_be_written_fails_the_writes_that_need_it() {
    use crate::faults::{Call, Carried, StorageFault, StorageFaults, Strikes};
    let faults = StorageFaults::new(vec![Arc::new(MemStorage::default())]);
    let disk = ChangedDisk::new(MemDisk::new(SIZE));
    disk.start_in(Arc::clone(&faults.storages()[0]), &options("a")).expect("a log");
    let mut queue = disk.queue(4).expect("a queue");
    blocking::write_at(&mut *queue, 0, &[1; 512]).expect("write");
    faults.set(Some(StorageFault::Fail {
        call: Call::Write,
        nth: 0,
        errno: libc::ENOSPC,
        strikes: Strikes::Once,
        carried: Carried::Nothing,
    }));
    let error = blocking::write_at(&mut *queue, 1 << 20, &[1; 512]).expect_err("no room");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    blocking::write_at(&mut *queue, 512, &[1; 512]).expect("what is claimed goes on");
    blocking::write_at(&mut *queue, 1 << 20, &[1; 512]).expect("the next one is tried again");
    assert_eq!(changed(&disk, "a"), [0, 256]);
}

#[test]
fn a_paused_disk_holds_everything_and_goes_on() {
    let disk = ChangedDisk::new(MemDisk::new(SIZE));
    disk.pause().expect("paused");
    let writer = {
        let disk = Arc::clone(&disk);
        std::thread::spawn(move || {
            blocking::write_at(&mut *disk.queue(1).expect("a queue"), 0, &[1; 512]).expect("write");
        })
    };
    std::thread::sleep(Duration::from_millis(100));
    assert!(!writer.is_finished());
    disk.start_in(Arc::new(MemStorage::default()), &options("a")).expect("a log meanwhile");
    assert!(changed(&disk, "a").is_empty());
    let mut queue = disk.queue(2).expect("a queue");
    let wild = crate::Request { op: Op::Discard, offset: 0, len: !511, bufs: &[], token: 1 };
    queue.submit(&crate::Request { offset: 4096, len: 512, ..wild }).expect("room");
    queue.submit(&wild).expect("room");
    disk.resume();
    let mut done = Vec::new();
    while done.len() < 2 {
        queue.wait(&[], None).expect("wait");
        queue.poll(&mut done).expect("poll");
    }
    done.sort_by_key(|d| d.errno);
    assert_eq!([done[0].errno, done[1].errno], [0, libc::EINVAL]);
    writer.join().expect("written");
    assert_eq!(changed(&disk, "a"), [0, 1]);
}
