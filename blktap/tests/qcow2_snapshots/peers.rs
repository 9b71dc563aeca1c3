//! Snapshots of ours in QEMU's hands, and of QEMU's in ours.
use std::time::{Duration, UNIX_EPOCH};

use blktap::formats::qcow2::snapshots::{self, Snapshot, Which};
use serde_json::Value;

use crate::qemu::{Image, run, run_well};

/// Options of `qemu-img create`.
pub const KINDS: [&str; 8] = [
    "",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=64k,extended_l2=on",
    "cluster_size=16k,extended_l2=on,refcount_bits=32",
    "cluster_size=2M,refcount_bits=32",
    "lazy_refcounts=on,compression_type=zstd",
];

/// An image with data, compressed clusters that share host clusters, zeroes and holes.
pub fn busy(options: &str) -> Image {
    let image = Image::create(options, "12M");
    image.io(&[
        "write -P 1 0 300k",
        "write -P 2 1M 5k",
        "write -P 3 900k 70k",
        "write -c -P 4 2M 2M",
        "write -c -P 5 4M 2M",
        "write -P 6 10M 1M",
        "discard 10M 512k",
    ]);
    if !options.contains("0.10") {
        image.io(&["write -z 8M 1M", "write -z 128k 64k", "write -z 11000k 3k"]);
    }
    image
}

fn change(image: &Image, round: u8) {
    let write = |at: &str| format!("write -P {} {at}", 100 + round);
    image.io(&[&write("64k 100k"), &write("2100k 9k"), &write("8500k 20k"), "discard 0 64k"]);
    if round == 1 {
        // QEMU compresses only where nothing was before.
        image.io(&["write -c -P 120 6M 2M"]);
    }
}

pub fn create(image: &Image, name: &str) -> Snapshot {
    let date = UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    snapshots::create(&*image.storage(), name, date).unwrap_or_else(|e| panic!("{name}: {e}"))
}

pub fn apply(image: &Image, which: Which<'_>) {
    snapshots::apply(&*image.storage(), which).unwrap_or_else(|e| panic!("{which:?}: {e}"));
}

pub fn delete(image: &Image, which: Which<'_>) {
    snapshots::delete(&*image.storage(), which).unwrap_or_else(|e| panic!("{which:?}: {e}"));
}

/// Our list says what QEMU's says. Gives ids and names.
pub fn list(image: &Image) -> Vec<(String, String)> {
    let ours = snapshots::list(&*image.storage()).expect("a list");
    let info = image.info();
    let none = Vec::new();
    let theirs = info["snapshots"].as_array().unwrap_or(&none);
    assert_eq!(ours.len(), theirs.len());
    for (our, their) in ours.iter().zip(theirs) {
        let number = |key: &str| their[key].as_u64();
        assert_eq!(their["id"], our.id.as_str());
        assert_eq!(their["name"], our.name.as_str());
        assert_eq!(number("date-sec"), Some(u64::from(our.date_sec)));
        assert_eq!(number("date-nsec"), Some(u64::from(our.date_nsec)));
        assert_eq!(number("vm-state-size"), Some(our.vm_state_size));
        let clock = number("vm-clock-sec").zip(number("vm-clock-nsec"));
        assert_eq!(clock, Some((our.vm_clock / 1_000_000_000, our.vm_clock % 1_000_000_000)));
        assert_eq!(number("icount"), our.icount);
    }
    ours.into_iter().map(|s| (s.id, s.name)).collect()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(id, name)| ((*id).to_owned(), (*name).to_owned())).collect()
}

#[test]
fn ours_are_qemus() {
    for options in KINDS {
        let image = busy(options);
        let first = image.disk();
        create(&image, "one");
        image.assert_clean(options);
        change(&image, 1);
        image.assert_clean(options);
        let second = image.disk();
        assert!(first != second);
        let made = create(&image, "a second, with a longer name");
        assert_eq!((made.id.as_str(), made.disk_size), ("2", 12 << 20));
        create(&image, "3");
        image.assert_clean(options);
        change(&image, 2);
        image.assert_clean(options);
        let third = image.disk();
        let named = [("1", "one"), ("2", "a second, with a longer name"), ("3", "3")];
        assert_eq!(list(&image), pairs(&named));
        assert!(image.snapshot("one") == first && image.snapshot("3") == second, "{options}");
        image.img(&["snapshot", "-a", "one"]);
        image.assert_clean(options);
        assert!(image.disk() == first && image.snapshot("3") == second, "{options}");
        image.img(&["snapshot", "-d", "one"]);
        image.assert_clean(options);
        assert_eq!(list(&image), pairs(&named[1..]));
        apply(&image, Which::IdOrName("2"));
        assert!(image.disk() == second && second != third, "{options}");
        image.assert_clean(options);
        change(&image, 3);
        image.img(&["snapshot", "-d", "3"]);
        delete(&image, Which::Id("2"));
        image.assert_clean(options);
        assert_eq!(list(&image), []);
        change(&image, 4);
        image.assert_clean(options);
    }
}

#[test]
fn qemus_are_ours() {
    for options in KINDS {
        let image = busy(options);
        let first = image.disk();
        image.img(&["snapshot", "-c", "one"]);
        change(&image, 1);
        let second = image.disk();
        image.img(&["snapshot", "-c", "two"]);
        change(&image, 2);
        let third = image.disk();
        assert_eq!(list(&image), pairs(&[("1", "one"), ("2", "two")]));
        apply(&image, Which::Name("one"));
        image.assert_clean(options);
        assert!(image.disk() == first && image.snapshot("two") == second, "{options}");
        change(&image, 2);
        image.assert_clean(options);
        assert!(image.snapshot("one") == first && image.disk() != third, "{options}");
        delete(&image, Which::Name("one"));
        image.assert_clean(options);
        change(&image, 3);
        image.assert_clean(options);
        assert!(image.snapshot("two") == second, "{options}");
        apply(&image, Which::IdOrName("two"));
        delete(&image, Which::IdOrName("two"));
        image.assert_clean(options);
        assert!(image.disk() == second, "{options}");
        change(&image, 4);
        image.assert_clean(options);
    }
}

#[test]
fn a_new_id_is_the_one_that_qemu_gives() {
    let image = busy("");
    let twin = Image::of(&std::fs::read(&image.path).expect("the image"));
    for step in ["a", "b", "-a", "c", "-c", "c", "c", "-b", "d"] {
        match step.strip_prefix('-') {
            Some(name) => {
                delete(&image, Which::Name(name));
                twin.img(&["snapshot", "-d", name]);
            }
            None => {
                create(&image, step);
                twin.img(&["snapshot", "-c", step]);
            }
        }
        assert_eq!(list(&image), list(&twin), "{step}");
    }
    // Names before ids where names are asked for, ids before names where both are.
    create(&image, "3");
    let before = list(&image);
    assert!(before.iter().any(|(id, name)| id == "3" && name != "3"), "{before:?}");
    delete(&image, Which::Name("3"));
    assert_eq!(list(&image).len(), before.len() - 1);
    assert!(list(&image).iter().any(|(id, _)| id == "3"));
    image.assert_clean("ids");
}

#[test]
fn the_disk_gets_the_size_that_it_had() {
    for options in ["", "cluster_size=512", "extended_l2=on"] {
        let image = busy(options);
        let small = image.disk();
        create(&image, "small");
        let name = image.name().to_owned();
        run_well("qemu-img", &["resize", "-q", "-f", "qcow2", &name, "60M"]);
        image.io(&["write -P 50 59M 1M", "write -P 51 11M 4M"]);
        let large = image.disk();
        create(&image, "large");
        apply(&image, Which::Name("small"));
        image.assert_clean(options);
        assert!(image.disk() == small, "{options}");
        change(&image, 1);
        image.assert_clean(options);
        apply(&image, Which::Name("large"));
        image.assert_clean(options);
        // QEMU reads a snapshot with the size that the disk has now.
        assert!(image.disk() == large && image.snapshot("small").starts_with(&small), "{options}");
        delete(&image, Which::Name("large"));
        delete(&image, Which::Name("small"));
        image.assert_clean(options);
        assert!(image.disk() == large, "{options}");
    }
}

#[test]
fn with_a_backing_file() {
    let image = Image::empty();
    let base = Image::create("", "12M");
    base.io(&["write -P 33 0 12M"]);
    let named = format!("backing_file={},backing_fmt=qcow2", base.name());
    image.recreate(&named, "12M");
    change(&image, 1);
    let first = image.disk();
    create(&image, "one");
    change(&image, 2);
    let second = image.disk();
    image.assert_clean("backing");
    apply(&image, Which::Name("one"));
    assert!(image.disk() == first && first != second);
    change(&image, 2);
    image.assert_clean("backing");
    assert!(image.snapshot("one") == first);
    delete(&image, Which::Name("one"));
    image.assert_clean("backing");
}

#[test]
fn an_empty_disk_has_snapshots_too() {
    let image = Image::create("", "0");
    create(&image, "one");
    create(&image, "two");
    image.assert_clean("empty");
    apply(&image, Which::Name("one"));
    image.img(&["snapshot", "-a", "two"]);
    delete(&image, Which::Name("two"));
    image.img(&["snapshot", "-d", "one"]);
    image.assert_clean("empty");
    assert_eq!(list(&image), []);
}

/// Space that a snapshot alone had goes back to the file system.
#[test]
fn a_deleted_snapshot_takes_no_space() {
    let image = Image::create("", "64M");
    let taken = |image: &Image| image.info()["actual-size"].as_u64().expect("a size");
    image.io(&["write -P 1 0 32M"]);
    create(&image, "one");
    image.io(&["write -P 2 0 32M"]);
    assert!(taken(&image) > 60 << 20, "{}", taken(&image));
    delete(&image, Which::Name("one"));
    assert!(taken(&image) < 36 << 20, "{}", taken(&image));
    image.assert_clean("deleted");
    assert!(image.disk().iter().take(32 << 20).all(|b| *b == 2));
}

#[test]
fn dirty_bitmaps_stay_and_keep_a_snapshot_from_being_applied() {
    let image = busy("");
    create(&image, "one");
    let name = image.name().to_owned();
    run_well("qemu-img", &["bitmap", "--add", &name, "b0"]);
    change(&image, 1);
    let bitmaps =
        |image: &Image| -> Value { image.info()["format-specific"]["data"]["bitmaps"].clone() };
    let before = bitmaps(&image);
    assert!(before.is_array());
    create(&image, "two");
    image.assert_clean("bitmaps");
    let bytes = std::fs::read(&image.path).expect("the image");
    let refused = snapshots::apply(&*image.storage(), Which::Name("one"));
    assert!(refused.expect_err("bitmaps").to_string().contains("bitmaps"));
    assert!(std::fs::read(&image.path).expect("the image") == bytes);
    let theirs = run("qemu-img", &["snapshot", "-a", "one", &name]);
    assert!(!theirs.status.success(), "QEMU applies it");
    delete(&image, Which::Name("one"));
    image.assert_clean("bitmaps");
    assert_eq!(bitmaps(&image), before);
    run_well("qemu-img", &["bitmap", "--remove", &name, "b0"]);
    apply(&image, Which::Name("two"));
    image.assert_clean("bitmaps");
}
