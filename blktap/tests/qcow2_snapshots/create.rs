//! New images with every option, beside those of `qemu-img create`.
use std::sync::Arc;

use blktap::formats::qcow2::create::{
    CreateOptions, DataFile, DataFileKind, Preallocation, create,
};
use blktap::formats::qcow2::header::{Compression, Header, Version};
use blktap::formats::{BackingName, ImageError};
use blktap::storage::Storage;
use blktap::storage::record::{Effort, Journal, SparseBytes};
use serde_json::Value;

use crate::qemu::{Image, run, run_well, storage, text};

const MIB: u64 = 1 << 20;

/// Options of ours with those of `qemu-img create -o`, and the size.
fn kinds() -> Vec<(CreateOptions, String)> {
    let new = |f: &dyn Fn(&mut CreateOptions), theirs: &str, size: u64| {
        let mut options = CreateOptions::new(size);
        f(&mut options);
        (options, theirs.to_owned())
    };
    let mut kinds = vec![
        new(&|_| {}, "", 20 * MIB),
        new(&|_| {}, "", 0),
        new(&|_| {}, "", 5 << 40),
        new(&|_| {}, "", 20 * MIB + 1),
        new(&|o| o.version = Version::V2, "compat=0.10", 20 * MIB),
        new(&|o| o.lazy_refcounts = true, "lazy_refcounts=on", 20 * MIB),
        new(&|o| o.compression = Compression::Zstd, "compression_type=zstd", 20 * MIB),
    ];
    for bits in 9..=21 {
        let set = |o: &mut CreateOptions| o.cluster_size = 1 << bits;
        kinds.push(new(&set, &format!("cluster_size={}", 1u64 << bits), 20 * MIB));
    }
    for order in 0..=6 {
        let bits = 1 << order;
        let set = |o: &mut CreateOptions| {
            (o.refcount_bits, o.cluster_size) = (bits, 512);
        };
        // With an L1 table of many clusters.
        kinds.push(new(&set, &format!("refcount_bits={bits},cluster_size=512"), 4 << 30));
    }
    for bits in [14, 16, 21] {
        let set = |o: &mut CreateOptions| {
            (o.extended_l2, o.cluster_size) = (true, 1 << bits);
        };
        let theirs = format!("extended_l2=on,cluster_size={}", 1u64 << bits);
        kinds.push(new(&set, &theirs, 20 * MIB));
    }
    kinds
}

fn preallocated() -> Vec<(CreateOptions, String)> {
    let mut kinds = Vec::new();
    let how = [
        (Preallocation::Metadata, "metadata"),
        (Preallocation::Falloc, "falloc"),
        (Preallocation::Full, "full"),
    ];
    let shapes = [(16, 16, false), (9, 64, false), (12, 1, false), (14, 16, true)];
    for (preallocation, name) in how {
        for (bits, refcount_bits, extended_l2) in shapes {
            let mut o = CreateOptions::new(20 * MIB + 512);
            o.cluster_size = 1 << bits;
            (o.refcount_bits, o.extended_l2, o.preallocation) =
                (refcount_bits, extended_l2, preallocation);
            let extended = if extended_l2 { "on" } else { "off" };
            let theirs = format!(
                "cluster_size={},refcount_bits={refcount_bits},extended_l2={extended},\
                 preallocation={name}",
                1 << bits
            );
            kinds.push((o, theirs));
        }
    }
    kinds
}

/// What `qemu-img info` says of the image, without its name and the space that it takes.
fn described(image: &Image) -> Value {
    let mut info = image.info();
    let object = info.as_object_mut().expect("an object");
    for key in ["filename", "actual-size"] {
        object.remove(key);
    }
    let said = info.to_string().replace(text(image.dir.path()), "");
    serde_json::from_str(&said).expect("JSON")
}

fn disk_size(info: &Value) -> u64 {
    info["virtual-size"].as_u64().expect("a size")
}

/// Writes by qemu-io over the whole of the disk.
fn write_some(image: &Image, size: u64) {
    if size == 0 {
        return;
    }
    let at = |n: u64, len: u64| (size.saturating_sub(len) / 7 * n) / 512 * 512;
    let commands: Vec<String> = (0..8)
        .map(|n| (n, [512, 70_000, 1536, 300_000][n as usize % 4] / 512 * 512))
        .filter(|(_, len)| *len <= size)
        .map(|(n, len)| format!("write -P {} {} {len}", n + 1, at(n, len)))
        .collect();
    image.io(&commands.iter().map(String::as_str).collect::<Vec<_>>());
}

fn same_as_qemus(options: &CreateOptions, theirs: &str) {
    let what = format!("{theirs} {}", options.size);
    let (ours, qemus) = (Image::empty(), Image::create(theirs, &options.size.to_string()));
    create(&*ours.storage(), None, options).unwrap_or_else(|e| panic!("{what}: {e}"));
    let info = described(&ours);
    assert_eq!(info, described(&qemus), "{what}");
    ours.assert_clean(&what);
    let length = |image: &Image| std::fs::metadata(&image.path).expect("a file").len();
    // QEMU's file may end in the middle of a cluster; tables may take some more.
    let most = length(&qemus).next_multiple_of(options.cluster_size) * 11 / 10;
    assert!(length(&ours) <= most, "{what}: {} and {}", length(&ours), length(&qemus));
    [&ours, &qemus].iter().for_each(|image| write_some(image, disk_size(&info)));
    ours.assert_clean(&what);
    run_well("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", ours.name(), qemus.name()]);
}

#[test]
fn every_option_makes_what_qemu_makes() {
    for (options, theirs) in kinds() {
        same_as_qemus(&options, &theirs);
    }
}

#[test]
fn preallocated_images_have_their_clusters_and_their_space() {
    for (options, theirs) in preallocated() {
        same_as_qemus(&options, &theirs);
        let image = Image::empty();
        create(&*image.storage(), None, &options).expect("an image");
        assert!(image.disk() == vec![0; options.size as usize], "{theirs}");
        let check = image.img(&["check", "--output=json"]);
        let check: Value = serde_json::from_str(&check).expect("JSON");
        assert_eq!(check["allocated-clusters"], check["total-clusters"], "{theirs}");
        let taken = image.info()["actual-size"].as_u64().expect("a size");
        let full = options.preallocation != Preallocation::Metadata;
        assert_eq!(taken >= options.size, full, "{theirs}: {taken}");
    }
}

#[test]
fn with_a_backing_file() {
    for (extended_l2, preallocation, theirs) in [
        (false, Preallocation::Off, ""),
        (true, Preallocation::Off, ",extended_l2=on"),
        (true, Preallocation::Metadata, ",extended_l2=on,preallocation=metadata"),
    ] {
        let (ours, qemus) = (Image::empty(), Image::empty());
        let base = Image::create("", "3M");
        base.io(&["write -P 77 0 3M"]);
        let name = base.name().to_owned();
        let all = format!("backing_file={name},backing_fmt=qcow2{theirs}");
        qemus.recreate(&all, "5M");
        let mut options = CreateOptions::new(5 * MIB);
        let format = Some("qcow2".to_owned());
        options.backing = Some(BackingName { name, format });
        (options.extended_l2, options.preallocation) = (extended_l2, preallocation);
        create(&*ours.storage(), None, &options).expect("an image");
        assert_eq!(described(&ours), described(&qemus));
        ours.io(&["write -P 1 100k 3k", "write -P 2 4M 100k"]);
        qemus.io(&["write -P 1 100k 3k", "write -P 2 4M 100k"]);
        ours.assert_clean(&all);
        assert!(ours.disk() == qemus.disk(), "{all}");
    }
}

#[test]
fn with_an_external_data_file() {
    for (kind, raw) in [(DataFileKind::Mapped, "off"), (DataFileKind::Raw, "on")] {
        for (preallocation, theirs) in
            [(Preallocation::Off, "off"), (Preallocation::Metadata, "metadata")]
        {
            let (ours, qemus) = (Image::empty(), Image::empty());
            let data = [ours.beside("data"), qemus.beside("data")];
            let all = format!("data_file=data,data_file_raw={raw},preallocation={theirs}");
            let named = all.replace("=data,", &format!("={},", text(&data[1])));
            qemus.recreate(&named, "5M");
            std::fs::write(&data[0], vec![9; 6 << 20]).expect("something old");
            let mut options = CreateOptions::new(5 * MIB);
            options.data_file = Some(DataFile { name: text(&data[0]).to_owned(), kind });
            options.preallocation = preallocation;
            let files = (ours.storage(), storage(&data[0]));
            create(&*files.0, Some(&*files.1), &options).expect("an image");
            drop(files);
            assert_eq!(described(&ours), described(&qemus), "{all}");
            assert!(ours.disk() == vec![0; 5 << 20], "{all}");
            [&ours, &qemus].iter().for_each(|image| write_some(image, 5 * MIB));
            ours.assert_clean(&all);
            assert!(ours.disk() == qemus.disk(), "{all}");
            if kind == DataFileKind::Raw {
                assert!(std::fs::read(&data[0]).expect("the data file") == ours.disk(), "{all}");
            }
        }
    }
}

type Change = fn(&mut CreateOptions);

#[test]
fn senseless_options_are_refused_before_anything_is_touched() {
    let data = |kind| Some(DataFile { name: "d".to_owned(), kind });
    let backing = |name: &str, format: &str| {
        Some(BackingName { name: name.to_owned(), format: Some(format.to_owned()) })
    };
    let cases: [(Change, &str); 16] = [
        (|o| o.cluster_size = 0, "cluster_size"),
        (|o| o.cluster_size = 256, "cluster_size"),
        (|o| o.cluster_size = 4 << 20, "cluster_size"),
        (|o| o.cluster_size = 65_535, "cluster_size"),
        (|o| o.refcount_bits = 0, "refcount_bits"),
        (|o| o.refcount_bits = 3, "refcount_bits"),
        (|o| o.refcount_bits = 128, "refcount_bits"),
        (|o| (o.extended_l2, o.cluster_size) = (true, 8192), "extended_l2"),
        (|o| (o.version, o.refcount_bits) = (Version::V2, 8), "compat=1.1"),
        (|o| (o.version, o.lazy_refcounts) = (Version::V2, true), "compat=1.1"),
        (|o| (o.version, o.extended_l2) = (Version::V2, true), "compat=1.1"),
        (|o| (o.version, o.compression) = (Version::V2, Compression::Zstd), "compat=1.1"),
        (|o| (o.size, o.cluster_size) = ((128 << 30) + 512, 512), "at most 137438953472"),
        (|o| o.size = u64::MAX, "at most"),
        (|o| o.size = (1 << 63) - 511, "at most"),
        (
            |o| {
                (o.size, o.preallocation) = (128 << 30, Preallocation::Metadata);
                o.cluster_size = 512;
            },
            "too large to be preallocated",
        ),
    ];
    for (change, why) in cases {
        let mut options = CreateOptions::new(MIB);
        change(&mut options);
        refused(&options, why);
    }
    let with = |f: &dyn Fn(&mut CreateOptions)| {
        let mut options = CreateOptions::new(MIB);
        f(&mut options);
        options
    };
    let raw = with(&|o| {
        o.data_file = data(DataFileKind::Raw);
        o.backing = backing("b", "raw");
    });
    refused(&raw, "exclude each other");
    refused(&with(&|o| o.backing = backing("", "raw")), "backing_file");
    refused(&with(&|o| o.backing = backing(&"b".repeat(1024), "raw")), "backing_file");
    refused(&with(&|o| o.backing = backing("b", &"r".repeat(16))), "backing_fmt");
    refused(
        &with(&|o| {
            o.backing = backing("b", "raw");
            o.preallocation = Preallocation::Metadata;
        }),
        "extended_l2",
    );
    refused(&with(&|o| o.data_file = data(DataFileKind::Mapped)), "no storage for the data file");
    let long = with(&|o| {
        o.backing = backing(&"b".repeat(600), "raw");
        o.cluster_size = 512;
    });
    refused(&long, "does not fit");
}

fn refused(options: &CreateOptions, why: &str) {
    let image = Image::of(&[7; 100]);
    match create(&*image.storage(), None, options) {
        Err(e @ (ImageError::Invalid(_) | ImageError::NoSpace(_))) => {
            assert!(e.to_string().contains(why), "{e}: {why}");
        }
        other => panic!("{why}: {other:?}"),
    }
    assert_eq!(std::fs::read(&image.path).expect("the file"), [7; 100], "{why}");
}

#[test]
fn the_longest_backing_name_fits() {
    let image = Image::empty();
    let mut options = CreateOptions::new(MIB);
    options.backing = Some(BackingName { name: "b".repeat(1023), format: Some("raw".into()) });
    create(&*image.storage(), None, &options).expect("an image");
    let info = run("qemu-img", &["info", "-U", "--output=json", image.name()]);
    let info: Value = serde_json::from_slice(&info.stdout).expect("JSON");
    assert_eq!(info["backing-filename"].as_str().map(str::len), Some(1023));
}

/// At each point an older image is there whole (before anything is written), or none, or the new
/// one whole.
#[test]
fn a_power_cut_leaves_a_whole_image_or_none() {
    let old = Image::create("cluster_size=512", "1M");
    old.io(&["write -P 3 0 100k"]);
    let old = SparseBytes::of(&std::fs::read(&old.path).expect("the old image"));
    let mut options = CreateOptions::new(MIB);
    options.preallocation = Preallocation::Metadata;
    // With a header of several sectors.
    options.extended_l2 = true;
    options.backing = Some(BackingName { name: "b".repeat(700), format: Some("raw".into()) });
    let journal = Journal::new(vec![old.clone()]);
    create(&*journal.storages()[0], None, &options).expect("an image");
    let (recording, last) = (journal.recording(), journal.now()[0].to_vec());
    let mut cuts = recording.cuts();
    let (mut none, mut whole) = (0, 0);
    loop {
        for choice in cuts.choices(Effort { all: 512, sample: 40 }, 1) {
            let state = cuts.state(&choice).remove(0).to_vec();
            let kept = Journal::new(vec![SparseBytes::of(&state)]);
            let kept: Arc<dyn Storage> = kept.storages().remove(0);
            match Header::read(&*kept) {
                Ok(_) if state == last => whole += 1,
                Ok(_) => assert!(state == old.to_vec(), "neither the old image nor the new"),
                Err(_) => none += 1,
            }
        }
        if !cuts.step() {
            break;
        }
    }
    assert!(none > 50 && whole > 0, "{none} {whole}");
}
