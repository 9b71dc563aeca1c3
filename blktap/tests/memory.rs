//! Random reads over an image of 1 TiB with all its tables: memory stays within the cache's limit
//! and 32 MiB. A process of its own, whose memory nobody else uses.

#![allow(clippy::print_stdout)]

use std::process::Command;

use blktap::blocking;
use blktap::formats::qcow2::L2Cache;
use blktap::image::{self, ImageFormat, ImageOptions};
use blktap::storage::{Access, OpenOptions};

const TIB: u64 = 1 << 40;
const CACHE: u64 = 8 << 20;

/// Bytes of this process's memory at its peak.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("VmHWM");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib << 10
}

#[test]
fn a_large_sparse_image_takes_no_more_than_the_cache() {
    let dir = tempfile::tempdir_in(".").expect("a folder");
    let path = dir.path().join("a.qcow2");
    // 128 MiB of L2 tables.
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]);
    let status = command.arg(&path).arg("1T").status();
    assert!(status.expect("qemu-img (Debian: qemu-utils)").success());
    let file = OpenOptions::new(&path).access(Access::ReadOnly);
    let options = ImageOptions::new(ImageFormat::Qcow2, file).l2_cache(L2Cache::Bytes(CACHE));
    let before = peak();
    let disk = image::open(&options).expect("open");
    let mut queue = disk.queue(32).expect("queue");
    let (mut random, mut page) = (0x2545_f491_4f6c_dd1du64, [1; 4096]);
    for _ in 0..20_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        page.fill(1);
        blocking::read_at(&mut *queue, random % (TIB / 4096) * 4096, &mut page).expect("read");
        assert!(page.iter().all(|b| *b == 0));
    }
    let grown = peak() - before;
    println!("1 TiB, a cache of {} MiB: {} KiB more", CACHE >> 20, grown >> 10);
    assert!(grown <= CACHE + (32 << 20), "{grown} bytes");
}
