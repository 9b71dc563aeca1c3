//! QCOW images of version 1: QEMU's read by us, ours by QEMU, and broken ones against a reader
//! that shares no code with ours. Needs qemu-img (Debian's qemu-utils).
#[path = "../vhd/driver.rs"]
mod driver;
mod hostile;
mod model;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use blktap::formats::qcow::{CreateOptions, Packing, Qcow, QcowWriter};
use blktap::formats::{Format, ImageError, RawFormat};
use blktap::storage::{Access, Cache, Lock, MemStorage, OpenOptions, Storage, open};

use driver::Driver;

const SIZE: usize = (5 << 20) + 512;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

fn qemu_img(args: &[&str]) {
    let out = Command::new("qemu-img")
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("qemu-img (Debian: qemu-utils): {e}"));
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn storage(path: &Path, access: Access) -> Arc<dyn Storage> {
    let options = OpenOptions::new(path).cache(Cache::Writeback).access(access).lock(Lock::Off);
    Arc::new(open(&options).unwrap_or_else(|e| panic!("{e}")))
}

fn open_qcow(path: &Path) -> Arc<dyn Format> {
    Arc::new(Qcow::open(storage(path, Access::ReadOnly)).unwrap_or_else(|e| panic!("{e}")))
}

/// A disk with zeroes, text that packs well, and noise that does not.
fn disk() -> Vec<u8> {
    let mut x = 1u64;
    let mut disk = vec![0; SIZE];
    for (i, sector) in disk.chunks_mut(512).enumerate() {
        for (n, byte) in sector.iter_mut().enumerate() {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = match i / 40 % 3 {
                0 => 0,
                1 => (n % 17) as u8 + (i % 7) as u8,
                _ => (x >> 56) as u8,
            };
        }
    }
    disk
}

#[test]
fn what_qemu_writes_is_read() {
    let folder = folder();
    let [raw, image] = ["raw", "image"].map(|n| folder.path().join(n));
    let disk = disk();
    std::fs::write(&raw, &disk).expect("a raw file");
    for packed in [false, true] {
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow"];
        args.extend(packed.then_some("-c"));
        args.extend([text(&raw), text(&image)]);
        // QEMU 7.2 writes packed images whole and says that it failed, without a reason.
        match packed {
            true => _ = Command::new("qemu-img").args(&args).status().expect("qemu-img"),
            false => qemu_img(&args),
        }
        qemu_img(&["compare", "-f", "raw", "-F", "qcow", text(&raw), text(&image)]);
        let mut ours = Driver::new(vec![open_qcow(&image)]);
        assert_eq!(ours.size(), SIZE as u64);
        assert!(ours.read(0, SIZE).expect("read") == disk, "packed: {packed}");
        assert!(ours.read(700_001, 9_999).expect("read") == disk[700_001..710_000]);
    }
}

#[test]
fn what_qemu_writes_on_a_backing_file_is_read() {
    let folder = folder();
    let [raw, image] = ["base.raw", "image"].map(|n| folder.path().join(n));
    let mut disk = disk();
    std::fs::write(&raw, &disk).expect("a raw file");
    qemu_img(&["create", "-q", "-f", "qcow", "-b", text(&raw), "-F", "raw", text(&image)]);
    for at in [0, 1024, 600_064, SIZE - 512] {
        let write = format!("write -P 99 {at} 512");
        let out = Command::new("qemu-io").args(["-f", "qcow", "-c", &write, text(&image)]).output();
        assert!(out.expect("qemu-io (Debian: qemu-utils)").status.success());
        disk[at..at + 512].fill(99);
    }
    let top = open_qcow(&image);
    let backing = top.backing().expect("a backing file");
    assert_eq!((backing.name.as_str(), backing.format), (text(&raw), None));
    let base = RawFormat::new(storage(&raw, Access::ReadOnly)).expect("raw");
    let mut ours = Driver::new(vec![top, Arc::new(base)]);
    assert!(ours.read(0, SIZE).expect("read") == disk);
}

fn write(path: &Path, disk: &[u8], backing: Option<&str>, packing: Packing) {
    std::fs::write(path, []).expect("a file");
    let options = CreateOptions { size: disk.len() as u64, backing: backing.map(str::to_owned) };
    let storage = storage(path, Access::ReadWrite);
    let mut writer = QcowWriter::create(storage, &options).unwrap_or_else(|e| panic!("{e}"));
    let cluster = writer.cluster() as usize;
    // The second half first: tables are left and come back to.
    let clusters: Vec<_> = disk.chunks(cluster).enumerate().collect();
    let (first, second) = clusters.split_at(clusters.len() / 2);
    for (n, data) in second.iter().chain(first) {
        if backing.is_some() || data.iter().any(|b| *b != 0) {
            writer.write(*n as u64, data, packing).expect("write");
        }
    }
    writer.finish().expect("finish");
}

#[test]
fn qemu_reads_what_we_write() {
    let folder = folder();
    let [raw, image, base] = ["raw", "image", "base"].map(|n| folder.path().join(n));
    let disk = disk();
    std::fs::write(&base, vec![77; SIZE]).expect("a base");
    let mut sizes = Vec::new();
    for packing in [Packing::Plain, Packing::Compressed] {
        for backing in [None, Some(text(&base))] {
            write(&image, &disk, backing, packing);
            qemu_img(&["convert", "-f", "qcow", "-O", "raw", text(&image), text(&raw)]);
            assert!(std::fs::read(&raw).expect("the disk") == disk, "{packing:?} {backing:?}");
            let mut ours = Driver::new(vec![open_qcow(&image)]);
            assert!(ours.read(0, SIZE).expect("read") == disk, "{packing:?} {backing:?}");
            sizes.push(std::fs::metadata(&image).expect("stat").len());
        }
    }
    assert!(sizes[2] < sizes[0] * 3 / 4, "nothing was packed: {sizes:?}");
}

#[test]
fn a_cluster_that_is_not_written_is_the_backing_files() {
    let folder = folder();
    let [image, base] = ["image", "base"].map(|n| folder.path().join(n));
    std::fs::write(&base, vec![77; SIZE]).expect("a base");
    std::fs::write(&image, []).expect("a file");
    let options = CreateOptions { size: SIZE as u64, backing: Some(text(&base).to_owned()) };
    let storage = storage(&image, Access::ReadWrite);
    let mut writer = QcowWriter::create(storage, &options).expect("create");
    writer.write(3, &[5; 512], Packing::Plain).expect("write");
    assert!(writer.write(3, &[5; 512], Packing::Plain).is_err(), "a second time");
    assert!(writer.write(SIZE as u64, &[5; 512], Packing::Plain).is_err(), "outside");
    writer.finish().expect("finish");
    let raw = folder.path().join("raw");
    qemu_img(&["convert", "-f", "qcow", "-O", "raw", text(&image), text(&raw)]);
    let mut disk = vec![77; SIZE];
    disk[3 * 512..4 * 512].fill(5);
    assert!(std::fs::read(&raw).expect("the disk") == disk);
}

#[test]
fn what_cannot_be_used_is_named() {
    let bytes = hostile::image();
    let refusals = [
        (vec![(39, 1)], "AES"),
        (vec![(39, 2)], "encryption method 2"),
        (vec![(7, 2)], "QCOW2"),
        (vec![(7, 9)], "version 9"),
        (vec![(0, b'X')], "not a QCOW image"),
        (vec![(32, 8)], "2^8"),
        (vec![(33, 14)], "2^14"),
        (vec![(24, 0x10)], "L1 table"),
        (vec![(40, 0x10)], "cannot be at byte"),
        (vec![(15, 1), (18, 8)], "name cannot be"),
    ];
    for (changes, reason) in refusals {
        let mut bytes = bytes.clone();
        changes.iter().for_each(|(at, byte)| bytes[*at] = *byte);
        let opened = Qcow::open(Arc::new(MemStorage::new(bytes)));
        let error = opened.err().unwrap_or_else(|| panic!("{reason}: opened")).to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
    let image = Qcow::open(Arc::new(MemStorage::new(bytes))).unwrap_or_else(|e| panic!("{e}"));
    let written = Driver::new(vec![Arc::new(image)]).write(0, &[0; 512]);
    assert!(matches!(written, Err(ImageError::Unsupported(what)) if what.contains("convert")));
}
