//! Our check and `qemu-img check` say the same of the same image.
use blktap::formats::qcow2::check::{CHECK_MEMORY, CheckReport, check, unwatched};
use blktap::storage::MemStorage;
use serde_json::Value;

use crate::qemu::Image;

/// The report in the form of `qemu-img check --output=json`.
fn numbers(report: &CheckReport) -> [(&'static str, u64); 8] {
    [
        ("image-end-offset", report.image_end_offset),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("leaks", report.leaks),
        ("corruptions", report.corruptions),
        ("check-errors", report.check_errors),
    ]
}

/// Checks `image` and compares with QEMU.
pub fn same_as_qemu(image: &Image, what: &str) -> CheckReport {
    let report = check(&image.memory(), CHECK_MEMORY, &unwatched).expect(what);
    let (status, json) = image.check();
    for (name, ours) in numbers(&report) {
        // QEMU leaves out what is 0.
        let theirs = json.get(name).and_then(Value::as_u64).unwrap_or(0);
        assert_eq!(ours, theirs, "{what}: {name}; ours: {:#?}", report.findings);
    }
    assert_eq!(i32::from(report.status()), status, "{what}");
    report
}

/// Options of `qemu-img create`, all of them good.
pub const KINDS: [&str; 12] = [
    "",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=2M,refcount_bits=64",
    "cluster_size=1k,refcount_bits=8",
    "cluster_size=64k,extended_l2=on",
    "cluster_size=16k,extended_l2=on,refcount_bits=32",
    "lazy_refcounts=on",
    "compression_type=zstd",
];

/// An image with some of everything that its kind can have.
pub fn busy(options: &str) -> Image {
    let image = Image::create(options, "24M");
    image.io(&[
        "write -P 1 0 300k",
        "write -P 2 1M 5k",
        "write -P 3 900k 70k",
        "write -c -P 4 2M 2M",
        "write -c -P 5 4M 2M",
        "write -P 6 20M 1M",
        "discard 20M 512k",
    ]);
    if !options.contains("0.10") {
        image.io(&["write -z 8M 1M", "write -z 128k 64k", "write -z 21000k 3k"]);
    }
    if !["refcount_bits=1", "refcount_bits=2", "refcount_bits=8"]
        .iter()
        .any(|narrow| options.ends_with(narrow))
    {
        image.img(&["snapshot", "-c", "one"]);
        image.io(&["write -P 7 100k 100k", "write -P 8 10M 100k"]);
        image.img(&["snapshot", "-c", "two and a longer name"]);
        image.io(&["write -P 9 0 64k"]);
    }
    if !options.contains("0.10") {
        let name = image.name().to_owned();
        crate::qemu::run_well("qemu-img", &["bitmap", "--add", "-g", "65536", &name, "b0"]);
        crate::qemu::run_well("qemu-img", &["bitmap", "--add", "--disable", &name, "b1"]);
        image.io(&["write -P 10 15M 1M"]);
    }
    image
}

#[test]
fn good_images_of_every_kind_are_clean_and_have_the_same_numbers() {
    for options in KINDS {
        let report = same_as_qemu(&Image::create(options, "3G"), options);
        assert!(report.is_clean());
        let report = same_as_qemu(&busy(options), options);
        assert!(report.is_clean() && report.allocated_clusters > 0);
    }
}

#[test]
fn a_preallocated_image_is_allocated_in_one_piece() {
    let report = same_as_qemu(&Image::create("preallocation=metadata", "64M"), "preallocated");
    assert_eq!((report.allocated_clusters, report.fragmented_clusters), (1024, 0));
}

#[test]
fn little_memory_makes_more_passes_and_the_same_report() {
    for options in ["cluster_size=512", "cluster_size=4k,refcount_bits=2"] {
        let image = busy(options);
        // Far apart in the file, so that the counts do not fit.
        let file = std::fs::OpenOptions::new().write(true).open(&image.path).expect("open");
        file.set_len(400 << 20).expect("grow");
        drop(file);
        image.io(&["write -P 11 5M 1M"]);
        let memory = image.memory();
        let whole = check(&memory, CHECK_MEMORY, &unwatched).expect("a check");
        let passes = std::cell::Cell::new(0);
        let small = check(&memory, 1, &|progress| {
            passes.set(progress.pass);
            std::ops::ControlFlow::Continue(())
        });
        assert_eq!(small.expect("a check"), whole, "{options}");
    }
}

#[test]
fn a_check_can_be_broken_off() {
    let image = busy("");
    let stop = |_| std::ops::ControlFlow::Break(());
    assert!(check(&image.memory(), CHECK_MEMORY, &stop).is_err());
}

#[test]
fn what_is_no_image_is_refused() {
    for bytes in [Vec::new(), vec![0; 100_000], b"QFI\xfb".to_vec()] {
        assert!(check(&MemStorage::new(bytes), CHECK_MEMORY, &unwatched).is_err());
    }
}
