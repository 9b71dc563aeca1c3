//! Good images, and named ways to break them.
use std::process::Command;
use std::sync::{Arc, LazyLock};

use blktap::formats::Format;
use blktap::formats::qcow2::check::{CHECK_MEMORY, Repair, check, repair, unwatched};
use blktap::storage::Access;

use crate::bytes::Bytes;
use crate::disk::Disk;
use crate::judge::judge;
use crate::model::{Model, Verdict, be};

/// A good image: what it is made with, and its bytes.
pub struct Good {
    pub kind: &'static str,
    pub bytes: Vec<u8>,
}

fn tool(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output();
    let out = out.unwrap_or_else(|e| panic!("cannot run {program} (Debian: qemu-utils): {e}"));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {said}");
}

fn make(kind: &'static str) -> Good {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = dir.path().join("a.qcow2");
    let name = path.to_str().expect("UTF-8");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", kind, name, "2M"]);
    let io = |commands: &[&str]| {
        let mut args = vec!["-t", "unsafe", "-f", "qcow2"];
        commands.iter().for_each(|c| args.extend(["-c", c]));
        args.push(name);
        tool("qemu-io", &args);
    };
    io(&["write -P 1 0 20k", "write -P 2 100k 3k", "write -P 3 1M 70k", "write -c -P 4 512k 64k"]);
    if !kind.contains("refcount_bits=1") {
        tool("qemu-img", &["snapshot", "-c", "one", name]);
        io(&["write -P 5 8k 16k", "write -P 6 2096640 512"]);
    }
    if !kind.contains("0.10") {
        tool("qemu-img", &["bitmap", "--add", "-g", "512", name, "b"]);
        io(&["write -z 64k 32k", "write -P 7 1500k 5k"]);
    }
    Good { kind, bytes: std::fs::read(&path).expect("the image") }
}

/// Good images of several kinds.
pub static GOOD: LazyLock<Vec<Good>> = LazyLock::new(|| {
    [
        "cluster_size=512,compat=0.10",
        "cluster_size=4k",
        "cluster_size=1k,refcount_bits=1",
        "cluster_size=16k,extended_l2=on,refcount_bits=64",
        "cluster_size=512,refcount_bits=8,lazy_refcounts=on",
    ]
    .into_iter()
    .map(make)
    .collect()
});

/// Where things of an image are.
struct Places {
    l1: u64,
    /// The first L2 table.
    l2: u64,
    table: u64,
    block: u64,
    snapshots: u64,
    directory: u64,
    bitmap: u64,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Places {
    fn of(bytes: &[u8]) -> Places {
        let (l1, table) = (be(bytes, 40, 8), be(bytes, 48, 8));
        let mut at = be(bytes, 100, 4);
        while at > 0 && be(bytes, at, 4) != 0 && be(bytes, at, 4) != 0x2385_2875 {
            at += (8 + be(bytes, at + 4, 4)).next_multiple_of(8);
        }
        let found = at > 0 && be(bytes, at, 4) != 0;
        let directory = if found { be(bytes, at + 24, 8) } else { 0 };
        Places {
            l1,
            l2: be(bytes, l1, 8) & OFFSET,
            table,
            block: be(bytes, table, 8),
            snapshots: be(bytes, 64, 8),
            directory,
            bitmap: if found { be(bytes, directory, 8) } else { 0 },
        }
    }
}

/// A number of so many bytes written over the image. Place 0 stands for what it has not.
type Patch = (&'static str, fn(&Places) -> u64, u64, u64);

/// Header fields and what they must not be, or may.
const HEADER: &[(&str, u64, u64, &[u64])] = &[
    ("magic", 0, 4, &[0]),
    ("version", 4, 4, &[0, 1, 2, 3, 4, u32::MAX as u64]),
    ("backing offset", 8, 8, &[1, 72, 511, 1 << 20, u64::MAX]),
    ("backing length", 16, 4, &[1, 1023, 1024, u32::MAX as u64]),
    ("cluster bits", 20, 4, &[0, 8, 9, 10, 21, 22, 63, 64, u32::MAX as u64]),
    ("size", 24, 8, &[0, 1, 511, 1 << 40, 1 << 62, 1 << 63, u64::MAX]),
    ("encryption", 32, 4, &[1, 2, 3]),
    ("L1 entries", 36, 4, &[0, 1, 1 << 22, 1 << 23, u32::MAX as u64]),
    ("L1 offset", 40, 8, &[0, 1, 512, 1 << 40, 1 << 62, u64::MAX - 511, u64::MAX]),
    ("refcount table offset", 48, 8, &[0, 1, 512, 1 << 40, u64::MAX - 511]),
    ("refcount table clusters", 56, 4, &[0, 2, 1000, 1 << 22, u32::MAX as u64]),
    ("snapshots", 60, 4, &[0, 1, 2, 65_536, 65_537, u32::MAX as u64]),
    ("snapshot table offset", 64, 8, &[0, 1, 512, 1 << 40, u64::MAX - 511]),
    ("incompatible features", 72, 8, &[1, 2, 3, 4, 8, 16, 32, 1 << 63]),
    ("compatible features", 80, 8, &[1, 2, u64::MAX]),
    ("autoclear features", 88, 8, &[0, 1, 2, 3, u64::MAX]),
    ("refcount order", 96, 4, &[0, 1, 3, 5, 6, 7, u32::MAX as u64]),
    ("header length", 100, 4, &[0, 72, 103, 104, 112, 1 << 20, u32::MAX as u64]),
    ("compression type", 104, 1, &[1, 2, 255]),
    ("first extension", 112, 4, &[0, 0x0537_be77, 0x4441_5441, 0x2385_2875, 0xe279_2aca]),
    ("its length", 116, 4, &[0, 1, 1 << 16, u32::MAX as u64]),
];

/// Entries of tables.
const TABLES: &[Patch] = &[
    ("L1 entry unaligned", |p| p.l1, 8, 0x8000_0000_0000_0e00 | 1 << 17),
    ("L1 entry beyond the end", |p| p.l1, 8, 1 << 50),
    ("L1 entry all ones", |p| p.l1, 8, u64::MAX),
    ("L1 entry to the header", |p| p.l1, 8, 1 << 63),
    ("L2 entry all ones", |p| p.l2 + 16, 8, u64::MAX),
    ("L2 entry unaligned", |p| p.l2 + 16, 8, 1 << 63 | 0x1200),
    ("L2 entry beyond the end", |p| p.l2 + 16, 8, 1 << 63 | 1 << 45),
    ("L2 entry reserved bits", |p| p.l2 + 16, 8, 0x3f00_0000_0000_01fe),
    ("L2 entry zero and unaligned", |p| p.l2 + 16, 8, 0x1201),
    ("compressed beyond the end", |p| p.l2 + 16, 8, 1 << 62 | 1 << 40),
    ("compressed rubbish", |p| p.l2 + 16, 8, 1 << 62 | 3),
    ("compressed and copied", |p| p.l2 + 16, 8, 3 << 62 | 1000),
    ("refcount block 0", |p| p.table, 8, 0),
    ("refcount block unaligned", |p| p.table, 8, 0x1400 | 0x100),
    ("refcount block far away", |p| p.table, 8, 1 << 54),
    ("refcount block at the header's end", |p| p.table + 8, 8, u64::MAX),
    ("refcounts 0", |p| p.block, 8, 0),
    ("refcounts all ones", |p| p.block, 8, u64::MAX),
    ("snapshot's L1 offset", |p| p.snapshots, 8, 1 << 60),
    ("snapshot's L1 unaligned", |p| p.snapshots, 8, 513),
    ("snapshot's L1 entries", |p| p.snapshots + 8, 4, 0xffff_ffff),
    ("snapshot's name", |p| p.snapshots + 12, 4, 0xffff_ffff),
    ("snapshot's extra data", |p| p.snapshots + 36, 4, 0xffff_ffff),
    ("snapshot without extra data", |p| p.snapshots + 36, 4, 0),
    ("bitmap table offset", |p| p.directory, 8, 1 << 50),
    ("bitmap table entries", |p| p.directory + 8, 4, 0xffff_ffff),
    ("bitmap flags", |p| p.directory + 12, 4, 0xffff_ffff),
    ("bitmap granularity", |p| p.directory + 17, 1, 200),
    ("bitmap name", |p| p.directory + 18, 2, 0xffff),
    ("bitmap bits", |p| p.bitmap, 8, u64::MAX),
    ("bitmap bits beyond the end", |p| p.bitmap, 8, 1 << 50),
    ("bitmap bits in the header", |p| p.bitmap, 8, 512),
];

fn put(bytes: &mut [u8], at: u64, len: u64, value: u64) {
    for i in 0..len {
        if let Some(byte) = bytes.get_mut((at + i) as usize) {
            *byte = (value >> (8 * (len - 1 - i))) as u8;
        }
    }
}

/// Copies the entries of one place to others: shared tables, loops, overlaps.
fn tangled(good: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let p = Places::of(good);
    let with = |patches: &[(u64, u64)]| {
        let mut bytes = good.to_vec();
        patches.iter().for_each(|(at, value)| put(&mut bytes, *at, 8, *value));
        bytes
    };
    let copied = 1 << 63;
    vec![
        ("all L1 entries share an L2 table", {
            let n = be(good, 36, 4).min(64);
            with(&(0..n).map(|i| (p.l1 + i * 8, p.l2 | copied)).collect::<Vec<_>>())
        }),
        ("the L2 table is its own data", with(&[(p.l2, p.l2 | copied)])),
        ("the L1 table is an L2 table", with(&[(p.l1, p.l1 | copied)])),
        ("data in the L1 table", with(&[(p.l2 + 32, p.l1 | copied)])),
        ("data in the refcount table", with(&[(p.l2 + 32, p.table | copied)])),
        ("data in a refcount block", with(&[(p.l2 + 32, p.block | copied)])),
        ("two clusters in one place", with(&[(p.l2 + 16, be(good, p.l2, 8))])),
        ("the refcount table is its own block", with(&[(p.table, p.table)])),
        ("two refcount blocks in one", with(&[(p.table + 8, p.block)])),
        ("L1 and refcount table in one", with(&[(48, p.l1)])),
        ("nothing behind the first sector", good[..512].to_vec()),
        ("half of the file", good[..good.len() / 2].to_vec()),
        ("a few bytes short", good[..good.len() - 7].to_vec()),
        ("only the header", good[..100].to_vec()),
        ("empty", Vec::new()),
    ]
}

#[test]
fn good_images_are_read_and_stay_clean() {
    for good in GOOD.iter() {
        let outcome = judge(&good.bytes, good.kind);
        assert!(outcome.opened && outcome.clean && outcome.faults == 0, "{}", good.kind);
    }
}

#[test]
fn broken_headers() {
    let mut refused = 0;
    for good in GOOD.iter() {
        for (name, at, len, values) in HEADER {
            for value in *values {
                let mut bytes = good.bytes.clone();
                put(&mut bytes, *at, *len, *value);
                let outcome = judge(&bytes, &format!("{}: {name} {value:#x}", good.kind));
                refused += u32::from(!outcome.opened);
            }
        }
    }
    assert!(refused > 150, "hardly any was refused: {refused}");
}

#[test]
fn broken_tables() {
    let (mut unclean, mut repaired) = (0, 0);
    for good in GOOD.iter() {
        let places = Places::of(&good.bytes);
        for (name, place, len, value) in TABLES {
            let at = place(&places);
            if at < 512 {
                continue;
            }
            let mut bytes = good.bytes.clone();
            put(&mut bytes, at, *len, *value);
            let outcome = judge(&bytes, &format!("{}: {name}", good.kind));
            unclean += u32::from(!outcome.clean);
            repaired += u32::from(!outcome.clean && outcome.repaired);
        }
    }
    assert!(unclean > 80 && repaired > 30, "{unclean} are not clean, {repaired} were repaired");
}

/// No program makes them, and nothing forbids them: L1 entries that share a table, with refcounts
/// that know of it. Writing through one of them does not show through the others.
#[test]
fn a_table_of_several_l1_entries_is_copied_before_it_is_written() {
    let mut tried = 0;
    for good in GOOD.iter().filter(|g| !g.kind.contains("refcount_bits=1")) {
        let (l1, entries) = (be(&good.bytes, 40, 8), be(&good.bytes, 36, 4));
        let span = be(&good.bytes, 24, 8) / entries;
        if entries < 4 {
            continue;
        }
        let mut bytes = good.bytes.clone();
        let shared = be(&bytes, l1, 8) & OFFSET;
        [0, 2, 3].into_iter().for_each(|n| put(&mut bytes, l1 + n * 8, 8, shared));
        let memory = Arc::new(Bytes::new(&bytes, Access::ReadWrite));
        let repaired = repair(&*memory, Repair::All, CHECK_MEMORY, &unwatched).expect("a repair");
        assert!(repaired.is_clean(), "{}: {repaired:?}", good.kind);
        let disk = Disk::open(&memory).expect("open");
        let before = disk.read(0, span).expect("read");
        assert!(disk.read(2 * span, span).expect("read") == before, "{}", good.kind);
        for (n, at) in [2, 0, 3].into_iter().enumerate() {
            disk.write(at * span + 1024, &[n as u8 + 70; 1024]).expect("write");
        }
        disk.format.flush().expect("flush");
        for (n, at) in [2, 0, 3].into_iter().enumerate() {
            let mut right = before.clone();
            right[1024..2048].fill(n as u8 + 70);
            assert!(disk.read(at * span, span).expect("read") == right, "{}: {at}", good.kind);
        }
        disk.format.close().expect("close");
        let after = check(&*memory, CHECK_MEMORY, &unwatched).expect("a check");
        assert!(after.is_clean(), "{}: {after:?}", good.kind);
        tried += 1;
    }
    assert!(tried > 1, "{tried}");
}

#[test]
fn tangled_tables_and_files_that_were_cut() {
    for good in GOOD.iter() {
        // Small tables cannot be tangled in each way.
        for (name, bytes) in tangled(&good.bytes).into_iter().filter(|(_, b)| *b != good.bytes) {
            let outcome = judge(&bytes, &format!("{}: {name}", good.kind));
            assert!(!outcome.clean || name == "a few bytes short", "{}: {name}", good.kind);
        }
    }
}

/// The verdicts of the model are no free pass: it accepts nothing that QEMU refuses. (QEMU reads
/// snapshots and bitmaps as well when it opens an image.)
#[test]
fn the_model_agrees_with_qemu_on_headers() {
    let mut agreed = 0;
    for good in GOOD.iter().take(1) {
        for (name, at, len, values) in HEADER.iter().filter(|h| h.1 < 60) {
            for value in *values {
                let mut bytes = good.bytes.clone();
                put(&mut bytes, *at, *len, *value);
                let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
                let path = dir.path().join("a.qcow2");
                std::fs::write(&path, &bytes).expect("write");
                let args = ["info", "-U", "-f", "qcow2", path.to_str().expect("UTF-8")];
                let out = Command::new("qemu-img").args(args).output().expect("qemu-img");
                match Model::of(&bytes).0 {
                    Verdict::Accept => {
                        let said = String::from_utf8_lossy(&out.stderr);
                        assert!(out.status.success(), "{}: {name} {value:#x}: {said}", good.kind);
                        agreed += 1;
                    }
                    Verdict::Refuse => agreed += u32::from(!out.status.success()),
                    Verdict::Either => {}
                }
            }
        }
    }
    assert!(agreed > 25, "{agreed}");
}
