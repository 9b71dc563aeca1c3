//! What each caching mode does with flushes, and when `none` gives way to `writeback`.
#![allow(unsafe_code)]
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blktap::storage::{Access, BlockSize, Cache, OpenOptions};
use blktap::{Disk, Op, RawDisk, blocking};
use support::{Memory, folder, image, perform, request};
use tracing::span;

const SIZE: u64 = 1 << 20;

/// Counts warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicU64>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Opens and counts the warnings it took.
fn open(options: &OpenOptions) -> (Arc<RawDisk>, u64) {
    let warnings = Warnings::default();
    let disk = tracing::subscriber::with_default(warnings.clone(), || RawDisk::open(options));
    (disk.expect("open"), warnings.0.load(Ordering::Relaxed))
}

#[test]
fn a_flush_is_an_fsync_except_where_it_is_unsafe() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    for (cache, syncs) in [(Cache::None, 1), (Cache::Writeback, 1), (Cache::Unsafe, 0)] {
        let (disk, warnings) = open(&OpenOptions::new(&path).cache(cache));
        assert_eq!(warnings, 0);
        let mut queue = disk.queue(2).expect("queue");
        blocking::write_at(&mut *queue, 0, &[1; 512]).expect("write");
        let counters = queue.counters().expect("counters");
        assert_eq!(counters.syncs.get(), 0, "a write alone syncs nothing");
        blocking::flush(&mut *queue).expect("flush");
        assert_eq!(counters.syncs.get(), syncs, "{cache:?}");
    }
    let (disk, _) = open(&OpenOptions::new(&path).access(Access::ReadOnly));
    let mut queue = disk.queue(2).expect("queue");
    blocking::flush(&mut *queue).expect("a reader's flush has nothing to do");
    assert_eq!(queue.counters().expect("counters").syncs.get(), 0);
}

/// Flushes that a device has completed.
fn flushes_issued(device: &str) -> u64 {
    let stat = std::fs::read_to_string(format!("/sys/block/{device}/stat")).expect("stat");
    // Documentation/block/stat.rst: the 16th is the number of completed flushes.
    stat.split_whitespace().nth(15).and_then(|n| n.parse().ok()).expect("flush count")
}

/// A loop device over a file, perhaps with a file system mounted; undone when dropped.
struct Device {
    path: PathBuf,
    mounted: Option<PathBuf>,
}

impl Device {
    fn over(file: &Path, sectors: &str) -> Self {
        let arguments = ["--find", "--show", "--sector-size", sectors];
        let output = Command::new("losetup").args(arguments).arg(file).output();
        let output = output.expect("losetup (Debian's mount) does not run");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "NO LOOP DEVICES HERE, this test needs root: {words}");
        let path = String::from_utf8(output.stdout).expect("a path").trim().into();
        Device { path, mounted: None }
    }
    fn mount(&mut self, at: &Path) {
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&self.path).status();
        assert!(made.expect("mkfs.ext4 (Debian's e2fsprogs)").success());
        std::fs::create_dir(at).expect("a folder");
        let mounted = Command::new("mount").arg(&self.path).arg(at).status();
        assert!(mounted.expect("mount").success());
        self.mounted = Some(at.into());
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(at) = &self.mounted {
            let _ = Command::new("umount").arg(at).status();
        }
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

#[test]
fn flushes_and_forced_writes_reach_the_device() {
    let dir = folder();
    let backing = image(&dir, "backing", SIZE);
    let device = Device::over(&backing, "512");
    let name = device.path.file_name().and_then(|n| n.to_str()).expect("a name").to_owned();
    for cache in [Cache::None, Cache::Writeback, Cache::Unsafe] {
        let (disk, _) = open(&OpenOptions::new(&device.path).cache(cache));
        let mut queue = disk.queue(2).expect("queue");
        let mut memory = Memory::of(&[3; 4096], 0);
        let buf = [memory.buf()];
        let before = flushes_issued(&name);
        assert_eq!(perform(&mut *queue, &request(Op::Write, 0, &buf, 1)), 0);
        assert_eq!(flushes_issued(&name), before, "a plain write flushes nothing");
        blocking::flush(&mut *queue).expect("flush");
        let flushed = flushes_issued(&name);
        assert_eq!(flushed > before, cache != Cache::Unsafe, "{cache:?}");
        assert_eq!(perform(&mut *queue, &request(Op::WriteFua, 0, &buf, 1)), 0);
        assert_eq!(flushes_issued(&name) > flushed, cache != Cache::Unsafe, "{cache:?}");
    }
}

#[test]
fn where_direct_io_is_not_possible_one_line_says_so() {
    let dir = folder();
    // A file system on a device of 4096-byte sectors takes no direct I/O of 512 bytes.
    let backing = image(&dir, "backing", 32 << 20);
    let mut device = Device::over(&backing, "4096");
    let at = dir.path().join("mounted");
    device.mount(&at);
    let path = at.join("a.raw");
    std::fs::File::create(&path).expect("a file").set_len(SIZE).expect("its size");
    let (disk, warnings) = open(&OpenOptions::new(&path));
    assert_eq!((disk.storage().cache, warnings), (Cache::Writeback, 1));
    let mut queue = disk.queue(1).expect("queue");
    blocking::write_at(&mut *queue, 512, &[1; 512]).expect("write of 512 bytes");
    drop((queue, disk));
    let options = OpenOptions::new(&path).logical_block(BlockSize::Bytes(4096));
    let (disk, warnings) = open(&options);
    assert_eq!((disk.storage().cache, warnings), (Cache::None, 0));
    let mut queue = disk.queue(1).expect("queue");
    let mut back = vec![0; 4096];
    blocking::read_at(&mut *queue, 0, &mut back).expect("read");
    assert!(back[512..1024].iter().all(|b| *b == 1) && back[..512].iter().all(|b| *b == 0));
    drop((queue, disk));
}

#[test]
fn a_tail_is_not_part_of_the_disk_and_one_line_says_so() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE + 700);
    let (disk, warnings) = open(&OpenOptions::new(&path));
    assert_eq!((disk.geometry().size, warnings), (SIZE + 512, 1));
}
