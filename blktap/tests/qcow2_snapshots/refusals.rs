//! What cannot be done safely is refused before anything is changed.
use std::time::UNIX_EPOCH;

use blktap::formats::ImageError;
use blktap::formats::qcow2::header::{Header, MAX_SNAPSHOTS};
use blktap::formats::qcow2::snapshots::{self, Which};
use blktap::storage::MemStorage;

use crate::peers::{busy, create};
use crate::qemu::{Image, text};

fn be64(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().expect("8 bytes"))
}

fn put(bytes: &mut [u8], at: u64, n: &[u8]) {
    bytes[at as usize..][..n.len()].copy_from_slice(n);
}

/// All three operations fail with `why` in the text and change nothing.
fn all_refused(bytes: &[u8], why: &str) {
    let memory = MemStorage::new(bytes.to_vec());
    let results = [
        snapshots::create(&memory, "new", UNIX_EPOCH).map(|_| ()),
        snapshots::apply(&memory, Which::Name("one")),
        snapshots::delete(&memory, Which::Name("one")),
    ];
    for result in results {
        let said = result.expect_err(why).to_string();
        assert!(said.contains(why), "{said}: {why}");
    }
    assert!(memory.bytes() == bytes, "{why}: something was changed");
}

type Break = fn(&mut Vec<u8>);

/// Ways to break an image with one snapshot, and what is said of them.
const BREAKS: [(&str, Break); 13] = [
    ("not closed properly", |b| put(b, 72, &1u64.to_be_bytes())),
    ("corrupt", |b| put(b, 72, &2u64.to_be_bytes())),
    ("refcount", |b| {
        let block = be64(b, be64(b, 48)) as usize;
        b[block..block + 65536].fill(0);
    }),
    ("refcount", |b| {
        // One too few of a cluster that disk and snapshot share.
        let l2 = be64(b, be64(b, 40)) & 0x00ff_ffff_ffff_fe00;
        let cluster = (be64(b, l2) & 0x00ff_ffff_ffff_fe00) >> 16;
        let block = be64(b, be64(b, 48));
        put(b, block + cluster * 2, &1u16.to_be_bytes());
    }),
    ("refcount block", |b| {
        let table = be64(b, 48);
        put(b, table, &0x200u64.to_be_bytes());
    }),
    ("L2 table", |b| {
        let l1 = be64(b, 40);
        put(b, l1, &0x1_0200u64.to_be_bytes());
    }),
    ("snapshot", |b| put(b, 60, &60_000u32.to_be_bytes())),
    ("snapshots", |b| put(b, 60, &(MAX_SNAPSHOTS + 1).to_be_bytes())),
    ("snapshot table", |b| put(b, 64, &0x1_0001u64.to_be_bytes())),
    ("extra data", |b| {
        let table = be64(b, 64);
        put(b, table + 36, &2000u32.to_be_bytes());
    }),
    ("L1 entries", |b| {
        let table = be64(b, 64);
        put(b, table + 8, &u32::MAX.to_be_bytes());
    }),
    ("not aligned", |b| {
        let table = be64(b, 64);
        put(b, table, &0x1_0001u64.to_be_bytes());
    }),
    ("refcount", |b| {
        // The snapshot's L1 table is the disk's.
        let (table, l1) = (be64(b, 64), be64(b, 40));
        put(b, table, &l1.to_be_bytes());
    }),
];

#[test]
fn broken_images_are_left_alone() {
    let image = busy("");
    create(&image, "one");
    let good = std::fs::read(&image.path).expect("the image");
    for (why, damage) in BREAKS {
        let mut bytes = good.clone();
        damage(&mut bytes);
        all_refused(&bytes, why);
    }
}

#[test]
fn a_snapshot_of_an_impossible_size_is_not_applied() {
    let image = busy("");
    create(&image, "one");
    let good = std::fs::read(&image.path).expect("the image");
    for size in [u64::MAX, 1 << 63, (12 << 20) + 1, 1 << 60] {
        let mut bytes = good.clone();
        let table = be64(&bytes, 64);
        put(&mut bytes, table + 48, &size.to_be_bytes());
        let memory = MemStorage::new(bytes.clone());
        let refused = snapshots::apply(&memory, Which::Name("one"));
        assert!(matches!(refused, Err(ImageError::Corrupt(_))), "{size:#x}: {refused:?}");
        assert!(memory.bytes() == bytes);
    }
}

#[test]
fn an_external_data_file_excludes_snapshots() {
    let image = Image::empty();
    let data = image.beside("data");
    image.recreate(&format!("data_file={}", text(&data)), "5M");
    let bytes = std::fs::read(&image.path).expect("the image");
    all_refused(&bytes, "external data file");
    assert_eq!(snapshots::list(&MemStorage::new(bytes)).expect("a list"), []);
}

#[test]
fn names_that_are_not_there_or_cannot_be() {
    let image = busy("");
    create(&image, "one");
    let before = std::fs::read(&image.path).expect("the image");
    let storage = image.storage();
    for which in [Which::Id("2"), Which::Id("one"), Which::Name("1"), Which::IdOrName("x")] {
        for result in [snapshots::apply(&*storage, which), snapshots::delete(&*storage, which)] {
            assert!(result.expect_err("no such").to_string().contains("there is no snapshot"));
        }
    }
    for name in ["", "a\0b", &"n".repeat(256)] {
        assert!(snapshots::create(&*storage, name, UNIX_EPOCH).is_err(), "{name:?}");
    }
    assert!(std::fs::read(&image.path).expect("the image") == before);
}

/// With refcounts of few bits there is an end, before which all is well.
#[test]
fn refcounts_that_would_not_fit_are_refused() {
    for (bits, most) in [(1, 0), (2, 2), (4, 14)] {
        let image = Image::create(&format!("cluster_size=4k,refcount_bits={bits}"), "1M");
        image.io(&["write -P 7 0 200k", "write -z 300k 100k"]);
        let disk = image.disk();
        (0..most).for_each(|n| {
            create(&image, &format!("s{n}"));
        });
        let before = std::fs::read(&image.path).expect("the image");
        let refused = snapshots::create(&*image.storage(), "too many", UNIX_EPOCH);
        let said = refused.expect_err("too many").to_string();
        assert!(said.contains("do not fit"), "{said}");
        assert!(std::fs::read(&image.path).expect("the image") == before);
        image.assert_clean("narrow refcounts");
        assert!(image.disk() == disk && (most == 0 || image.snapshot("s1") == disk));
    }
    // Compressed clusters share a host cluster, which is used many times over.
    let image = Image::create("cluster_size=4k,refcount_bits=8", "1M");
    image.io(&["write -c -P 7 0 200k"]);
    while snapshots::create(&*image.storage(), "s", UNIX_EPOCH).is_ok() {}
    let made = snapshots::list(&*image.storage()).expect("a list").len();
    assert!(made > 0 && made < 100, "{made}");
    image.assert_clean("compressed");
}

#[test]
fn features_that_are_not_known_are_cleared_where_that_is_allowed() {
    let image = busy("");
    let mut bytes = std::fs::read(&image.path).expect("the image");
    put(&mut bytes, 88, &(1u64 << 40).to_be_bytes());
    let memory = MemStorage::new(bytes);
    snapshots::create(&memory, "one", UNIX_EPOCH).expect("a snapshot");
    assert_eq!(Header::read(&memory).expect("a header").autoclear, 0);
}
