//! Chains of differencing images: what they read, what they say about their parents, and several
//! queues on one.
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use blktap::blocking;
use blktap::formats::vhd::{Kind, Naming, NewParent, ParentState, Shape};
use blktap::formats::{Format, RawFormat};
use blktap::image::{self, ImageFormat, ImageOptions};
use blktap::storage::{Access, Cache, OpenOptions};

use super::driver::Driver;
use super::{Numbers, create, folder, open_vhd, pattern, qemu, storage};

const SIZE: u64 = (9 << 20) + 1536;

/// A new image on top of `parent`, which is a VHD.
fn create_child(path: &Path, parent: &Path, size: u64) {
    let id = open_vhd(parent, Access::ReadOnly).unique_id();
    create(path, size, Shape::Differencing(described(parent, id)));
}

fn modified(path: &Path) -> SystemTime {
    std::fs::metadata(path).expect("stat").modified().expect("a time")
}

fn described(parent: &Path, id: Option<[u8; 16]>) -> NewParent {
    NewParent {
        id,
        modified: modified(parent),
        relative: parent.file_name().and_then(|n| n.to_str()).expect("a name").to_owned(),
        absolute: parent.to_str().expect("a path").to_owned(),
    }
}

/// The chain of `paths`, the first for writing, the rest for reading.
fn chain(paths: &[PathBuf]) -> Driver {
    let open = |(i, path): (usize, &PathBuf)| -> Arc<dyn Format> {
        let access = if i == 0 { Access::ReadWrite } else { Access::ReadOnly };
        match path.extension().is_some_and(|e| e == "raw") {
            true => Arc::new(RawFormat::new(storage(path, access)).expect("raw")),
            false => open_vhd(path, access),
        }
    };
    Driver::new(paths.iter().enumerate().map(open).collect())
}

fn random_changes(disk: &mut Driver, numbers: &mut Numbers, model: &mut [u8]) {
    for _ in 0..60 {
        // Odd bytes now and then: no more than 512 is promised to be the unit.
        let unit = if numbers.below(4) == 0 { 1 } else { 512 };
        let at = numbers.below(model.len() as u64 / unit) * unit;
        let longest = if numbers.below(6) == 0 { 4 << 20 } else { 40_000 };
        let len = ((1 + numbers.below(longest / unit)) * unit).min(model.len() as u64 - at);
        let range = at as usize..(at + len) as usize;
        match numbers.below(8) {
            0 => {
                disk.discard(at, len).expect("discard");
                // Either is right.
                let now = disk.read(at, len as usize).expect("read");
                let before = &mut model[range];
                for (now, before) in now.iter().zip(before) {
                    assert!(*now == 0 || now == before, "neither zero nor as it was");
                    *before = *now;
                }
            }
            1 => {
                disk.zero(at, len).expect("zero");
                model[range].fill(0);
            }
            2 => disk.flush().expect("flush"),
            _ => {
                let data = pattern(numbers.below(1 << 30), len as usize);
                disk.write(at, &data).expect("write");
                model[range].copy_from_slice(&data);
            }
        }
    }
    assert!(disk.read(0, model.len()).expect("read") == model);
}

/// Three images deep on `base`, each with changes of its own.
fn three_deep(folder: &Path, base: &str, shape: Option<Shape>) {
    let mut numbers = Numbers(base.len() as u64);
    let path = |name: &str| folder.join(name);
    let mut paths = vec![path(base)];
    let mut model = vec![0; SIZE as usize];
    match shape {
        Some(shape) => create(&paths[0], SIZE, shape),
        None => std::fs::write(&paths[0], &model).expect("a raw file"),
    }
    let mut models = Vec::new();
    for (depth, name) in ["one.vhd", "two.vhd", "three.vhd"].into_iter().enumerate() {
        let mut disk = chain(&paths);
        random_changes(&mut disk, &mut numbers, &mut model);
        disk.close().expect("close");
        models.push(model.clone());
        match (depth, base.ends_with(".raw")) {
            (0, true) => {
                let parent = described(&paths[0], None);
                create(&path(name), SIZE, Shape::Differencing(parent));
            }
            _ => create_child(&path(name), &paths[0], SIZE),
        }
        paths.insert(0, path(name));
    }
    random_changes(&mut chain(&paths), &mut numbers, &mut model);
    // Each image still reads as it did when it got a child.
    for (i, model) in models.iter().enumerate() {
        let at = paths.len() - 1 - i;
        assert!(chain(&paths[at..]).read(0, model.len()).expect("read") == *model, "depth {i}");
    }
}

#[test]
fn on_a_dynamic_image() {
    three_deep(folder().path(), "base.vhd", Some(Shape::Dynamic));
}

#[test]
fn on_a_fixed_image() {
    three_deep(folder().path(), "fixed.vhd", Some(Shape::Fixed));
}

#[test]
fn on_a_raw_file() {
    three_deep(folder().path(), "base.raw", None);
}

#[test]
fn a_child_larger_than_its_parent_reads_zeroes_there() {
    let folder = folder();
    let [base, child] = ["base.vhd", "child.vhd"].map(|n| folder.path().join(n));
    create(&base, 1 << 20, Shape::Dynamic);
    let mut disk = chain(std::slice::from_ref(&base));
    disk.write(0, &pattern(1, 1 << 20)).expect("write");
    disk.close().expect("close");
    create_child(&child, &base, 3 << 20);
    let mut disk = chain(&[child, base]);
    let read = disk.read(0, 3 << 20).expect("read");
    assert!(read[..1 << 20] == pattern(1, 1 << 20) && read[1 << 20..].iter().all(|b| *b == 0));
}

#[test]
fn a_child_says_who_its_parent_is() {
    let folder = folder();
    let [base, child] = ["a b ü.vhd", "child.vhd"].map(|n| folder.path().join(n));
    create(&base, SIZE, Shape::Dynamic);
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_500_000_000);
    std::fs::File::open(&base).expect("the base").set_modified(time).expect("its time");
    create_child(&child, &base, SIZE);
    let child = open_vhd(&child, Access::ReadOnly);
    assert_eq!(child.kind(), Kind::Differencing);
    let parent = child.parent().expect("a parent");
    let absolute = base.to_str().expect("a path").to_owned();
    let names = [
        (Naming::Relative, "./a b ü.vhd".to_owned()),
        (Naming::Absolute, absolute.clone()),
        (Naming::Url, absolute),
        (Naming::FileName, "a b ü.vhd".to_owned()),
    ];
    assert_eq!(parent.names, names);
    assert_eq!(parent.modified, time);
    let backing = child.backing().expect("a parent");
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("./a b ü.vhd", Some("vpc")));

    let id = open_vhd(&base, Access::ReadOnly).unique_id();
    assert_eq!(parent.check(id, time).expect("the same"), ParentState::AsRecorded);
    let later = time + Duration::from_secs(2);
    assert_eq!(parent.check(id, later).expect("the same"), ParentState::Touched);
    let other = parent.check(Some([1; 16]), time).expect_err("another").to_string();
    assert!(other.contains("01010101-0101-0101-0101-010101010101"), "{other}");
    assert!(parent.check(None, time).is_err(), "a raw one");
}

#[test]
fn the_image_layer_finds_the_right_parent() {
    let folder = folder();
    let [base, other, child] = ["base.vhd", "o.vhd", "c.vhd"].map(|n| folder.path().join(n));
    create(&base, SIZE, Shape::Dynamic);
    create(&other, SIZE, Shape::Dynamic);
    let mut disk = chain(std::slice::from_ref(&base));
    disk.write(5 << 20, &pattern(1, 512)).expect("write");
    disk.close().expect("close");
    // The relative name leads nowhere, the absolute one does.
    let parent = described(&base, open_vhd(&base, Access::ReadOnly).unique_id());
    create(&child, SIZE, Shape::Differencing(NewParent { relative: "x/y".into(), ..parent }));
    let file = OpenOptions::new(&child).cache(Cache::Writeback);
    let options = ImageOptions::new(ImageFormat::Vhd, file);
    let disk = image::open(&options).unwrap_or_else(|e| panic!("{e}"));
    let mut queue = disk.queue(8).expect("a queue");
    let mut read = vec![0; 1024];
    blocking::write_at(&mut *queue, (5 << 20) + 512, &pattern(2, 512)).expect("write");
    blocking::read_at(&mut *queue, 5 << 20, &mut read).expect("read");
    assert!(read == [pattern(1, 512), pattern(2, 512)].concat());
    drop((queue, disk));

    std::fs::rename(&other, &base).expect("another image in its place");
    let refused = image::open(&options).err().expect("it is not the parent").to_string();
    assert!(refused.contains("c.vhd") && refused.contains("unique id"), "{refused}");
    std::fs::remove_file(&base).expect("gone");
    let refused = image::open(&options).err().expect("no parent").to_string();
    assert!(refused.contains("backing file"), "{refused}");
}

/// QEMU knows no parents, but an image that has every sector is a dynamic one to it.
#[test]
fn qemu_reads_a_child_that_has_everything() {
    let folder = folder();
    let [base, child] = ["base.vhd", "child.vhd"].map(|n| folder.path().join(n));
    create(&base, SIZE, Shape::Dynamic);
    create_child(&child, &base, SIZE);
    let mut disk = chain(&[child.clone(), base]);
    let (mut model, mut numbers) = (pattern(3, SIZE as usize), Numbers(5));
    let mut sectors: Vec<usize> = (0..model.len() / 512).collect();
    for i in (1..sectors.len()).rev() {
        sectors.swap(i, numbers.below(i as u64 + 1) as usize);
    }
    model[700 * 512..800 * 512].fill(0);
    for sector in sectors {
        let at = sector * 512;
        match (700..800).contains(&sector) {
            true => disk.zero(at as u64, 512).expect("zero"),
            false => disk.write(at as u64, &model[at..at + 512]).expect("write"),
        }
    }
    disk.close().expect("close");
    let [path, raw] = [child.clone(), folder.path().join("raw")];
    let [path, raw] = [&path, &raw].map(|p| p.to_str().expect("a path"));
    qemu("qemu-img", &["convert", "-f", "vpc", "-O", "raw", path, raw]);
    assert!(std::fs::read(raw).expect("the disk") == model);
    // Closed, its batmap says so too, behind block table and batmap header; the last block has
    // sectors that are not the disk's.
    let bytes = std::fs::read(&child).expect("the image");
    assert_eq!(&bytes[2048..2056], b"tdbatmap");
    assert_eq!(bytes[2560], 0b1111_0000);
}

/// Threads write sectors of their own in the same blocks, at random and in bursts.
#[test]
fn several_queues_on_one_image() {
    for differencing in [true, false] {
        let folder = folder();
        let [base, child] = ["base.vhd", "child.vhd"].map(|n| folder.path().join(n));
        create(&base, SIZE, Shape::Dynamic);
        match differencing {
            true => create_child(&child, &base, SIZE),
            false => create(&child, SIZE, Shape::Dynamic),
        }
        let top = open_vhd(&child, Access::ReadWrite);
        let run = |thread: u64| {
            let mut disk = Driver::new(vec![Arc::clone(&top) as Arc<dyn Format>]);
            let mut numbers = Numbers(thread);
            let mut model = vec![0u8; SIZE as usize];
            for n in 0..600 {
                let group = numbers.below(SIZE / 4096);
                let at = group * 4096 + thread * 1024;
                let data = pattern(n * 4 + thread, 1024);
                disk.write(at, &data).expect("write");
                model[at as usize..at as usize + 1024].copy_from_slice(&data);
                if n % 50 == 0 {
                    disk.flush().expect("flush");
                }
                assert!(disk.read(at, 1024).expect("read") == data);
            }
            model
        };
        let models = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|t| scope.spawn(move || run(t))).collect();
            threads.into_iter().map(|t| t.join().expect("a thread")).collect::<Vec<_>>()
        });
        top.close().expect("close");
        drop(top);
        let mut model = models[0].clone();
        for (i, byte) in model.iter_mut().enumerate() {
            *byte = models[i % 4096 / 1024][i];
        }
        assert!(chain(&[child, base]).read(0, SIZE as usize).expect("read") == model);
    }
}

/// Threads write the same sectors: each sector is one thread's, whole.
#[test]
fn several_queues_on_the_same_sectors() {
    let folder = folder();
    let [base, child] = ["base.vhd", "child.vhd"].map(|n| folder.path().join(n));
    create(&base, 1 << 20, Shape::Dynamic);
    create_child(&child, &base, 1 << 20);
    let top = open_vhd(&child, Access::ReadWrite);
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let top = Arc::clone(&top);
            scope.spawn(move || {
                let mut disk = Driver::new(vec![top as Arc<dyn Format>]);
                let mut numbers = Numbers(u64::from(thread));
                for _ in 0..400 {
                    let at = numbers.below(2000) * 512;
                    let len = (1 + numbers.below(8)) * 512;
                    disk.write(at, &vec![thread + 1; len as usize]).expect("write");
                }
            });
        }
    });
    let read = chain(&[base]).read(0, 1).expect("read");
    assert_eq!(read, [0]);
    top.close().expect("close");
    let mut disk = Driver::new(vec![top as Arc<dyn Format>]);
    for sector in disk.read(0, 1 << 20).expect("read").chunks(512) {
        assert!(sector[0] <= 4 && sector.iter().all(|b| *b == sector[0]));
    }
}
