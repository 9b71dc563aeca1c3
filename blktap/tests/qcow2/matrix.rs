//! Images of all kinds: what QEMU wrote is read, what we write QEMU reads, and both are clean.
use std::path::Path;
use std::sync::Arc;

use blktap::image::{BackingPolicy, Blocking, ImageDisk, ImageFormat, ImageOptions, open_layers};
use blktap::storage::{Access, Cache, OpenOptions};
use blktap::{Disk, Op, blocking};

use crate::qemu::{Dice, Folder, assert_same, noise};

pub fn open(path: &Path, access: Access) -> Arc<ImageDisk> {
    let file = OpenOptions::new(path).access(access).cache(Cache::Unsafe);
    let options =
        ImageOptions::new(ImageFormat::Qcow2, file).backing(BackingPolicy::Allow(Vec::new()));
    let layers = open_layers(&options).unwrap_or_else(|e| panic!("{e}"));
    ImageDisk::new(layers, 512, Blocking::Inline).expect("a disk")
}

pub fn read_all(disk: &ImageDisk) -> Vec<u8> {
    let mut queue = disk.queue(8).expect("a queue");
    let mut all = vec![0; disk.geometry().size as usize];
    for (i, part) in all.chunks_mut(1 << 20).enumerate() {
        blocking::read_at(&mut *queue, (i as u64) << 20, part).expect("read");
    }
    all
}

/// Random requests, on the disk and on the model.
pub fn play(disk: &ImageDisk, model: &mut [u8], seed: u64, requests: u64, largest: u64) {
    let mut queue = disk.queue(8).expect("a queue");
    let queue = &mut *queue;
    let mut dice = Dice(seed | 1);
    let sectors = model.len() as u64 / 512;
    for i in 0..requests {
        let at = dice.roll(sectors) * 512;
        let aligned = dice.roll(3) == 0;
        let at = if aligned { at & !0xffff } else { at };
        let len = ((1 + dice.roll(largest / 512)) * 512).min(model.len() as u64 - at);
        let len = if aligned && len > 0x10000 { len & !0xffff } else { len };
        let range = at as usize..(at + len) as usize;
        match dice.roll(10) {
            0..=4 => {
                let data = noise(seed + i, len as usize);
                blocking::write_at(queue, at, &data).expect("write");
                model[range].copy_from_slice(&data);
            }
            5 | 6 => {
                blocking::range(queue, Op::WriteZeroes, at, len).expect("zero");
                model[range].fill(0);
            }
            7 => {
                blocking::range(queue, Op::Discard, at, len).expect("discard");
                let mut after = vec![0; len as usize];
                blocking::read_at(queue, at, &mut after).expect("read");
                for (i, b) in range.zip(&after) {
                    assert!(*b == 0 || *b == model[i], "discard made up data at {i:#x}");
                    model[i] = *b;
                }
            }
            8 => {
                let mut data = vec![1; len as usize];
                blocking::read_at(queue, at, &mut data).expect("read");
                assert_same(&data, &model[range], &format!("read at {at:#x}, step {i}"));
            }
            _ => blocking::flush(queue).expect("flush"),
        }
    }
}

/// Requests of qemu-io.
fn qemu_work(seed: u64, size: u64, compressed: bool) -> Vec<String> {
    let mut dice = Dice(seed | 1);
    let mut list = Vec::new();
    for i in 0..24 {
        let at = dice.roll(size / 512 - 1) * 512;
        let len = ((1 + dice.roll(300)) * 512).min(size - at);
        list.push(match dice.roll(8) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            _ => format!("write -P {} {at} {len}", i + 1),
        });
    }
    if compressed {
        // Whole clusters, of all sizes that are tried.
        list.insert(0, "write -c -P 200 0 2M".into());
        list.insert(1, "write -c -P 201 4M 2M".into());
    }
    list
}

const SIZE: u64 = (9 << 20) + 512;

/// What qemu-img says on creation, and whether clusters can be compressed.
const KINDS: &[(&str, bool)] = &[
    ("compat=0.10", true),
    ("compat=0.10,cluster_size=512", true),
    ("compat=1.1", true),
    ("cluster_size=512", true),
    ("cluster_size=512,refcount_bits=64", true),
    ("cluster_size=4k,refcount_bits=1", false),
    ("cluster_size=1k,refcount_bits=64", true),
    ("cluster_size=8k,refcount_bits=2", false),
    ("refcount_bits=8", true),
    ("cluster_size=2M", true),
    ("cluster_size=2M,extended_l2=on", true),
    ("lazy_refcounts=on", true),
    ("extended_l2=on", true),
    ("extended_l2=on,cluster_size=16k", true),
    ("compression_type=zstd", true),
    ("preallocation=metadata", false),
    ("preallocation=metadata,extended_l2=on", false),
    ("preallocation=falloc", false),
    ("data_file=DATA", false),
    ("data_file=DATA,data_file_raw=on", false),
    ("data_file=DATA,extended_l2=on", false),
];

fn one(folder: &Folder, number: usize, kind: &str, compressed: bool, over: Option<&str>) {
    let image = format!("{number}.qcow2");
    let options = kind.replace("DATA", &format!("{number}.data"));
    let base = over.map_or(String::new(), |b| format!(" -b {b} -F raw"));
    let size = if over.is_some() { SIZE + (3 << 20) } else { SIZE };
    folder.img(&format!("create -q -f qcow2 -o {options}{base} {image} {size}"));
    folder.io(&image, &qemu_work(number as u64 + 1, size, compressed));
    let mut model = folder.bytes(&image);
    // Data files have none, and a refcount of one bit cannot count two.
    let snapshots = !kind.contains("data_file") && !kind.ends_with("refcount_bits=1");
    let before = snapshots.then(|| {
        folder.img(&format!("snapshot -c before {image}"));
        model.clone()
    });
    let path = folder.path(&image);
    let read = read_all(&open(&path, Access::ReadOnly));
    assert_same(&read, &model, &format!("{kind} as QEMU wrote it"));
    let disk = open(&path, Access::ReadWrite);
    play(&disk, &mut model, number as u64 + 77, 120, 400 << 10);
    assert_same(&read_all(&disk), &model, &format!("{kind} before it is closed"));
    disk.close().expect("close");
    drop(disk);
    folder.check(&image);
    assert_same(&folder.bytes(&image), &model, &format!("{kind} as QEMU reads it"));
    let read = read_all(&open(&path, Access::ReadOnly));
    assert_same(&read, &model, &format!("{kind} opened again"));
    if let Some(before) = before {
        folder.img(&format!("convert -f qcow2 -l before -O raw {image} before.raw"));
        let kept = std::fs::read(folder.path("before.raw")).expect("the snapshot");
        assert_same(&kept, &before, &format!("{kind}, the snapshot"));
    }
}

#[test]
fn images_of_all_kinds_agree_with_qemu() {
    let folder = Folder::new();
    for (number, (kind, compressed)) in KINDS.iter().enumerate() {
        one(&folder, number, kind, *compressed, None);
    }
}

#[test]
fn overlays_of_all_kinds_agree_with_qemu() {
    let folder = Folder::new();
    std::fs::write(folder.path("base.raw"), noise(5, SIZE as usize)).expect("a base");
    for (number, (kind, compressed)) in KINDS.iter().enumerate() {
        if !kind.contains("data_file_raw")
            && !kind.contains("falloc")
            && *kind != "preallocation=metadata"
        {
            one(&folder, number, kind, *compressed, Some("base.raw"));
        }
    }
}
