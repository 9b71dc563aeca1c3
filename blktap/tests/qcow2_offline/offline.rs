//! Allocation and refcounts on the file itself.
use blktap::formats::qcow2::check::{CHECK_MEMORY, check, unwatched};
use blktap::formats::qcow2::offline::Offline;
use blktap::storage::Storage;

use crate::check::{KINDS, busy, same_as_qemu};
use crate::qemu::Image;

#[test]
fn what_is_allocated_is_counted_and_what_is_freed_is_not() {
    for options in KINDS {
        let image = busy(options);
        let memory = image.memory();
        let before = check(&memory, CHECK_MEMORY, &unwatched).expect("a check");
        let mut offline = Offline::open(&memory).expect("open");
        let bytes = offline.layout().cluster_size();
        let runs: Vec<(u64, u64)> = (0..((2 << 20) / bytes).clamp(2, 300))
            .map(|i| 1 + i * 7 % 23)
            .map(|n| (offline.allocate(n * bytes).expect("allocate"), n))
            .collect();
        // QEMU judges what lies in the file.
        let end = runs.iter().map(|(at, n)| at + n * bytes).max().expect("runs");
        offline.sync().expect("sync");
        memory.set_size(memory.size().expect("size").max(end)).expect("grow");
        image.put(&memory);
        let report = same_as_qemu(&image, options);
        let total: u64 = runs.iter().map(|(_, n)| n).sum();
        assert_eq!((report.leaks, report.corruptions), (total, 0), "{options}");
        for (at, n) in runs {
            offline.free(at, n * bytes).expect("free");
        }
        offline.sync().expect("sync");
        image.put(&memory);
        let report = same_as_qemu(&image, options);
        assert!(report.is_clean() && report.allocated_clusters == before.allocated_clusters);
    }
}

#[test]
fn refcount_blocks_and_their_table_grow() {
    let image = Image::create("cluster_size=512,refcount_bits=64", "1M");
    let memory = image.memory();
    let mut offline = Offline::open(&memory).expect("open");
    let before = offline.header().refcount_table_clusters;
    for run in [1, 70, 5000, 3, 9000] {
        offline.allocate(run * 512).expect("allocate");
    }
    offline.sync().expect("sync");
    assert!(offline.header().refcount_table_clusters > before, "the table did not grow");
    memory.set_size(memory.size().expect("size") + (14_100 << 9)).expect("grow");
    image.put(&memory);
    let report = same_as_qemu(&image, "grown");
    assert_eq!((report.leaks, report.corruptions), (1 + 70 + 5000 + 3 + 9000, 0));
}

#[test]
fn a_refcount_that_does_not_fit_is_refused() {
    let image = Image::create("cluster_size=4k,refcount_bits=1", "1M");
    let memory = image.memory();
    let mut offline = Offline::open(&memory).expect("open");
    let at = offline.allocate(4096).expect("allocate");
    assert!(offline.take(at >> 12).is_err());
    assert_eq!(offline.refcount(at >> 12).expect("refcount"), 1);
    offline.drop_one(at >> 12).expect("free");
    assert!(offline.drop_one(at >> 12).is_err(), "freed twice");
}
