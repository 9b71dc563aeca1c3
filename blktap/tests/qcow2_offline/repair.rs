//! Broken images: the same verdict as QEMU's before, clean and unchanged after a repair.
use blktap::formats::qcow2::check::{CHECK_MEMORY, Repair, repair, unwatched};
use blktap::formats::qcow2::entry::{COPIED, OFFSET};
use blktap::storage::MemStorage;

use crate::check::{busy, same_as_qemu};
use crate::qemu::Image;

fn be64(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().expect("8 bytes"))
}

fn put64(bytes: &mut [u8], at: u64, n: u64) {
    bytes[at as usize..][..8].copy_from_slice(&n.to_be_bytes());
}

/// A way to break an image, by its bytes. It keeps the disk's data.
type Break = fn(&mut Vec<u8>);

const BREAKS: [(&str, Break); 9] = [
    ("refcounts all zero", |b| {
        let block = be64(b, be64(b, 48)) as usize;
        b[block..block + 65536].fill(0);
    }),
    ("refcounts too high", |b| {
        let block = be64(b, be64(b, 48)) as usize;
        b[block + 2 * 5 + 1] += 3;
        b[block + 2 * 9 + 1] += 1;
    }),
    ("a refcount too low", |b| {
        let block = be64(b, be64(b, 48)) as usize;
        b[block + 2 * 5 + 1] = 0;
    }),
    ("no refcount block", |b| {
        let table = be64(b, 48);
        put64(b, table, 0);
    }),
    ("an unaligned refcount block", |b| {
        let table = be64(b, 48);
        let entry = be64(b, table);
        put64(b, table, entry + 512);
    }),
    ("a refcount block beyond the end", |b| {
        let table = be64(b, 48);
        put64(b, table, 1 << 40);
    }),
    ("no copied flags", |b| {
        let l1 = be64(b, 40);
        let entry = be64(b, l1);
        put64(b, l1, entry & !COPIED);
        let l2 = entry & OFFSET;
        let entry = be64(b, l2 + 8 * 5);
        put64(b, l2 + 8 * 5, entry & !COPIED);
    }),
    ("copied flags on shared clusters", |b| {
        let l2 = be64(b, be64(b, 40)) & OFFSET;
        for i in 0..100 {
            let entry = be64(b, l2 + 8 * i);
            if entry & OFFSET != 0 && entry & 1 << 62 == 0 {
                put64(b, l2 + 8 * i, entry | COPIED);
            }
        }
    }),
    ("the refcount table in a data cluster", |b| {
        let l2 = be64(b, be64(b, 40)) & OFFSET;
        let table = be64(b, 48);
        put64(b, l2 + 8 * 300, table | COPIED);
    }),
];

#[test]
fn broken_refcounts_are_found_and_repaired_as_by_qemu() {
    let good = busy("");
    let disk = good.disk();
    for (name, damage) in BREAKS {
        let mut bytes = good.bytes();
        damage(&mut bytes);
        let image = Image::of(&bytes);
        let (status, _) = image.check();
        let memory = image.memory();
        let report = repair(&memory, Repair::All, CHECK_MEMORY, &unwatched).expect(name);
        assert!(report.is_clean(), "{name}: {report:#?}");
        assert!(report.leaks_fixed + report.corruptions_fixed > 0, "{name}: {report:#?}");
        assert!(status > 0, "{name}: QEMU finds nothing");
        image.put(&memory);
        assert!(same_as_qemu(&image, name).is_clean(), "{name}");
        if !name.contains("data cluster") {
            assert!(image.disk() == disk, "{name}: the data have changed");
        }
    }
}

#[test]
fn leaks_alone_are_freed_without_touching_corruptions() {
    let good = busy("");
    let mut bytes = good.bytes();
    let block = be64(&bytes, be64(&bytes, 48)) as usize;
    bytes[block + 2 * 5 + 1] = 0;
    bytes[block + 2 * 9 + 1] += 1;
    let memory = MemStorage::new(bytes);
    let report = repair(&memory, Repair::Leaks, CHECK_MEMORY, &unwatched).expect("a repair");
    assert_eq!((report.leaks, report.leaks_fixed, report.corruptions_fixed), (0, 1, 0));
    assert!(report.corruptions > 0);
}
