//! Images that were not closed, and images that contradict themselves.
use std::os::unix::fs::FileExt;
use std::path::Path;

use blktap::formats::qcow2::header::Header;
use blktap::storage::{Access, Cache, OpenOptions, open as open_file};
use blktap::{Disk, blocking};

use crate::matrix::{open, play, read_all};
use crate::qemu::{Folder, assert_same, noise};

const SIZE: usize = 8 << 20;
const EIO: i32 = 5;

fn header(path: &Path) -> Header {
    let options = OpenOptions::new(path).access(Access::ReadOnly).cache(Cache::Unsafe);
    Header::read(&open_file(&options).expect("open")).expect("a header")
}

#[test]
fn an_image_with_late_refcounts_is_repaired_when_it_is_opened() {
    let folder = Folder::new();
    let (image, copy) = (folder.path("a.qcow2"), folder.path("b.qcow2"));
    folder.img(&format!("create -q -f qcow2 -o lazy_refcounts=on a.qcow2 {SIZE}"));
    let mut model = vec![0; SIZE];
    let disk = open(&image, Access::ReadWrite);
    play(&disk, &mut model, 3, 60, 200 << 10);
    blocking::flush(&mut *disk.queue(1).expect("a queue")).expect("flush");
    std::fs::copy(&image, &copy).expect("a copy");
    disk.close().expect("close");
    drop(disk);
    folder.check("a.qcow2");
    assert!(header(&copy).is_dirty() && !header(&image).is_dirty());
    let disk = open(&copy, Access::ReadWrite);
    assert_same(&read_all(&disk), &model, "after the repair");
    play(&disk, &mut model, 4, 30, 200 << 10);
    disk.close().expect("close");
    drop(disk);
    folder.check("b.qcow2");
    assert_same(&folder.bytes("b.qcow2"), &model, "and more writes");
}

/// An image with data in its first 256 KiB; gives where its first L2 table is.
fn with_data(folder: &Folder, name: &str) -> u64 {
    folder.img(&format!("create -q -f qcow2 {name} {SIZE}"));
    folder.io(name, &["write -P 7 0 256k".into()]);
    let file = std::fs::File::open(folder.path(name)).expect("open");
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, header(&folder.path(name)).l1_offset).expect("read");
    u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00
}

fn poke(path: &Path, at: u64, word: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).expect("open");
    file.write_all_at(&word.to_be_bytes(), at).expect("write");
}

#[test]
fn a_data_cluster_that_cannot_be_makes_the_image_corrupt_and_unwritten() {
    let folder = Folder::new();
    let l2 = with_data(&folder, "a.qcow2");
    let path = folder.path("a.qcow2");
    poke(&path, l2 + 8, 1 << 63 | 0x50200);
    let disk = open(&path, Access::ReadWrite);
    let mut queue = disk.queue(4).expect("a queue");
    let mut bytes = vec![0; 4096];
    blocking::read_at(&mut *queue, 0, &mut bytes).expect("the others can be read");
    assert!(bytes.iter().all(|b| *b == 7));
    let error = blocking::read_at(&mut *queue, 65536, &mut bytes).expect_err("corrupt");
    assert_eq!(error.raw_os_error(), Some(EIO));
    let error = blocking::write_at(&mut *queue, 0, &bytes).expect_err("not written any more");
    assert_eq!(error.raw_os_error(), Some(EIO));
    blocking::flush(&mut *queue).expect("flush");
    drop(queue);
    disk.close().expect("close");
    drop(disk);
    assert!(header(&path).is_corrupt());
}

#[test]
fn metadata_is_not_overwritten_by_the_guest() {
    let folder = Folder::new();
    let l2 = with_data(&folder, "a.qcow2");
    let path = folder.path("a.qcow2");
    let header = header(&path);
    let before = std::fs::read(&path).expect("the image");
    // Not the header's cluster: an entry with offset 0 names none.
    for (i, victim) in [header.l1_offset, header.refcount_table_offset, l2].iter().enumerate() {
        std::fs::write(&path, &before).expect("the image again");
        poke(&path, l2 + 8, 1 << 63 | victim);
        let disk = open(&path, Access::ReadWrite);
        let mut queue = disk.queue(4).expect("a queue");
        let error = blocking::write_at(&mut *queue, 65536, &noise(1, 4096)).expect_err("refused");
        assert_eq!(error.raw_os_error(), Some(EIO), "victim {i}");
        drop(queue);
        disk.close().expect("close");
        drop(disk);
        let now = std::fs::read(&path).expect("the image");
        let (at, end) = (*victim as usize, *victim as usize + 65536);
        let same = (at..end.min(now.len()))
            .all(|b| now[b] == before[b] || (l2 + 8..l2 + 16).contains(&(b as u64)));
        assert!(same, "victim {i} was written");
    }
}

/// A free cluster of the refcounts that is a table in truth is not handed out.
#[test]
fn tables_that_count_as_free_are_not_handed_out() {
    let folder = Folder::new();
    let l2 = with_data(&folder, "a.qcow2");
    let path = folder.path("a.qcow2");
    let table = header(&path).refcount_table_offset;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("open");
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, table).expect("read");
    let block = u64::from_be_bytes(entry);
    file.write_all_at(&[0, 0], block + (l2 >> 16) * 2).expect("write");
    let disk = open(&path, Access::ReadWrite);
    let mut queue = disk.queue(4).expect("a queue");
    blocking::write_at(&mut *queue, 4 << 20, &noise(1, 4096)).expect_err("corrupt");
    drop(queue);
    disk.close().expect("close");
    drop(disk);
    assert!(header(&path).is_corrupt());
}
