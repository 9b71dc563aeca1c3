//! Block devices: loop devices of 512 and 4096 byte sectors over a file. Needs root and losetup.
#![allow(unsafe_code)]
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use blktap::engine::RingMode;
use blktap::storage::{Access, BlockSize, Cache, OpenOptions};
use blktap::{Disk, Op, RawDisk, Request, blocking};
use proptest::test_runner::{Config, TestRunner};
use support::model::{SIZE, run, steps};
use support::{Memory, allocated, folder, image, pattern, perform, request};

/// A loop device, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path, options: &[&str]) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(file)
            .output()
            .expect("losetup (Debian's mount) does not run");
        assert!(
            output.status.success(),
            "NO LOOP DEVICES HERE: this test needs root and /dev/loop-control (modprobe loop): {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Loop(String::from_utf8(output.stdout).expect("a path").trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn devices_are_the_model_in_every_cache_mode() {
    let dir = folder();
    for (sectors, block) in [("512", 512u32), ("4096", 4096)] {
        for (cache, mode) in [
            (Cache::None, RingMode::Deferred),
            (Cache::Writeback, RingMode::Cooperative),
            (Cache::None, RingMode::Plain),
        ] {
            let config = Config { cases: 6, failure_persistence: None, ..Config::default() };
            let mut runner = TestRunner::new(config);
            let path = image(&dir, "backing", SIZE);
            let device = Loop::over(&path, &["--sector-size", sectors]);
            let disk = RawDisk::open(&OpenOptions::new(&device.0).cache(cache)).expect("open");
            assert_eq!(disk.storage().cache, cache);
            let g = disk.geometry();
            assert_eq!((g.size, g.logical_block), (SIZE, block));
            runner
                .run(&steps(u64::from(block)), |s| {
                    let mut queue = disk.queue_in_mode(8, mode).expect("queue");
                    blocking::range(&mut queue, Op::WriteZeroes, 0, SIZE).expect("zeroes");
                    run(&mut queue, u64::from(block), &s);
                    Ok(())
                })
                .expect("as the model");
        }
    }
}

#[test]
fn discards_reach_the_file_below_without_blocking_the_queue() {
    let dir = folder();
    let path = image(&dir, "backing", SIZE);
    std::fs::write(&path, pattern(1, SIZE as usize)).expect("fill");
    std::fs::File::open(&path).and_then(|f| f.sync_all()).expect("sync");
    let full = allocated(&path);
    let device = Loop::over(&path, &[]);
    let disk = RawDisk::open(&OpenOptions::new(&device.0)).expect("open");
    let granularity = disk.geometry().discard.expect("loop devices discard");
    assert!(granularity.is_power_of_two());
    let mut queue = disk.queue(8).expect("queue");
    let mut memory = Memory::new(4096, 0);
    let buf = [memory.buf()];
    for n in 0..4 {
        let (offset, len) = (n * (SIZE / 8), SIZE / 8);
        let r = Request { op: Op::Discard, offset, len, bufs: &[], token: n };
        queue.submit(&r).expect("room");
    }
    queue.submit(&request(Op::Read, SIZE - 4096, &buf, 9)).expect("room");
    let mut done = support::finish(&mut *queue, 5);
    done.sort_by_key(|d| d.token);
    assert!(done.iter().all(|d| d.errno == 0), "{done:?}");
    assert_eq!(memory.slice(), &pattern(1, SIZE as usize)[SIZE as usize - 4096..]);
    assert_eq!(queue.counters().expect("counters").ioctls.get(), 4);
    assert!(allocated(&path) <= full / 2 + 16, "{} of {full}", allocated(&path));
    // Dropped with the helper thread at work: it drains.
    let r = Request { op: Op::Discard, offset: SIZE / 2, len: SIZE / 2, bufs: &[], token: 1 };
    queue.submit(&r).expect("room");
    drop(queue);
    assert!(allocated(&path) <= 16, "{}", allocated(&path));
}

#[test]
fn what_a_device_lacks_is_refused() {
    let dir = folder();
    let path = image(&dir, "backing", SIZE);
    let device = Loop::over(&path, &[]);
    let disk = RawDisk::open(&OpenOptions::new(&device.0)).expect("open");
    assert!(!disk.geometry().secure_discard);
    let mut queue = disk.queue(2).expect("queue");
    let r = Request { op: Op::SecureDiscard, offset: 0, len: 4096, bufs: &[], token: 1 };
    assert_eq!(perform(&mut *queue, &r), libc::EOPNOTSUPP);
    drop((queue, disk));
    drop(device);
    let device = Loop::over(&path, &["--sector-size", "4096"]);
    let options = OpenOptions::new(&device.0).logical_block(BlockSize::Bytes(512));
    let error = RawDisk::open(&options).map(drop).expect_err("too small").to_string();
    assert!(error.contains("the device's own is larger"), "{error}");
    drop(device);
    let device = Loop::over(&path, &["--read-only"]);
    let error = RawDisk::open(&OpenOptions::new(&device.0)).map(drop).expect_err("read-only");
    assert!(error.to_string().contains("is read-only"), "{error}");
    let disk = RawDisk::open(&OpenOptions::new(&device.0).access(Access::ReadOnly)).expect("open");
    assert!(disk.geometry().read_only && disk.geometry().discard.is_none());
}

#[test]
fn a_grown_device_is_noticed_by_refresh() {
    let dir = folder();
    let path = image(&dir, "backing", SIZE);
    let device = Loop::over(&path, &[]);
    let disk = RawDisk::open(&OpenOptions::new(&device.0)).expect("open");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open")
        .set_len(2 * SIZE)
        .expect("grow");
    let status = Command::new("losetup").arg("--set-capacity").arg(&device.0).status();
    assert!(status.expect("losetup").success());
    assert_eq!(disk.geometry().size, SIZE);
    assert_eq!(disk.refresh().expect("refresh").size, 2 * SIZE);
}
