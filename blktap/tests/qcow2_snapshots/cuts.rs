//! The power is cut at each point of each operation.
use std::collections::{BTreeMap, HashSet};
use std::time::UNIX_EPOCH;

use blktap::formats::ImageError;
use blktap::formats::qcow2::check::{CHECK_MEMORY, Fault, Repair, check, repair, unwatched};
use blktap::formats::qcow2::entry::{L2Entry, OFFSET};
use blktap::formats::qcow2::header::Header;
use blktap::formats::qcow2::snapshots::{self, Which};
use blktap::storage::record::{Effort, Journal, SparseBytes};
use blktap::storage::{MemStorage, Storage};

use crate::qemu::Image;

/// What a disk is: for each cluster whose bytes, or packed bytes, it has.
type Content = Vec<Vec<u8>>;

/// Reads a disk in the plainest way.
fn content(bytes: &[u8], l1: (u64, u32), size: u64) -> Content {
    let header = Header::parse(bytes).expect("a header");
    let layout = header.layout();
    let cluster = layout.cluster_size();
    let word = |at: u64| {
        let word = bytes.get(at as usize..at as usize + 8).map(|b| b.try_into().expect("8"));
        u64::from_be_bytes(word.unwrap_or_default())
    };
    let part = |from: u64, to: u64| {
        let end = (to as usize).min(bytes.len());
        let mut part = bytes.get(from as usize..end).unwrap_or_default().to_vec();
        part.resize((to - from) as usize, 0);
        part
    };
    let entry_bytes = 1u64 << layout.entry_bits();
    let one = |n: u64| {
        let index = n / layout.l2_entries();
        let table = if index < u64::from(l1.1) { word(l1.0 + index * 8) & OFFSET } else { 0 };
        if table == 0 {
            return vec![0];
        }
        let at = table + n % layout.l2_entries() * entry_bytes;
        let bitmap = if layout.extended { word(at + 8) } else { 0 };
        match layout.l2(word(at), bitmap) {
            L2Entry::Unallocated => vec![0],
            L2Entry::Zero { .. } => vec![1],
            L2Entry::Data { host, .. } => part(host, host + cluster),
            L2Entry::Compressed { descriptor } => {
                let range = layout.compressed(descriptor);
                [vec![2], part(range.start, range.end)].concat()
            }
            L2Entry::Subclusters { host, bits, .. } => {
                let data = host.map_or(Vec::new(), |host| part(host, host + cluster));
                [bits.0.to_be_bytes().to_vec(), data].concat()
            }
        }
    };
    (0..size.div_ceil(cluster)).map(one).collect()
}

/// The disk with its size, and each snapshot by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct World {
    disk: (u64, Content),
    snapshots: BTreeMap<String, Content>,
}

fn world(bytes: &[u8]) -> World {
    let memory = MemStorage::new(bytes.to_vec());
    let header = Header::read(&memory).expect("a header");
    let snapshots = snapshots::list(&memory).expect("a list").into_iter();
    let size = header.disk_size();
    World {
        disk: (size, content(bytes, (header.l1_offset, header.l1_size), size)),
        snapshots: snapshots
            .map(|s| (s.name, content(bytes, (s.l1_offset, s.l1_entries), s.disk_size)))
            .collect(),
    }
}

type Operation = fn(&dyn Storage) -> Result<(), ImageError>;

const OPERATIONS: [(&str, Operation); 4] = [
    ("create", |s| snapshots::create(s, "new", UNIX_EPOCH).map(|_| ())),
    ("apply", |s| snapshots::apply(s, Which::Name("one"))),
    ("delete the first", |s| snapshots::delete(s, Which::Name("one"))),
    ("delete the last", |s| snapshots::delete(s, Which::Name("two"))),
];

/// A small image with two snapshots and all kinds of clusters.
fn small(options: &str) -> Image {
    let image = Image::create(options, "640k");
    image.io(&["write -P 1 0 100k", "write -c -P 4 256k 128k", "write -P 2 500k 5k"]);
    image.img(&["snapshot", "-c", "one"]);
    image.io(&["write -P 3 50k 20k", "write -c -P 5 384k 64k", "write -P 6 300k 4k"]);
    if !options.contains("0.10") {
        image.io(&["write -z 64k 64k"]);
    }
    let name = image.name().to_owned();
    if !options.contains("0.10") {
        crate::qemu::run_well("qemu-img", &["resize", "-q", "-f", "qcow2", &name, "700k"]);
    }
    image.img(&["snapshot", "-c", "two"]);
    image.io(&["write -P 7 10k 64k"]);
    image
}

/// What is right at each cut.
struct Expected {
    what: String,
    before: World,
    after: World,
}

impl Expected {
    fn is_whole(&self, bytes: &[u8]) {
        let now = world(bytes);
        assert!(now == self.before || now == self.after, "{}: lost", self.what);
    }

    fn judge(&self, bytes: &[u8], qemu: bool) {
        self.is_whole(bytes);
        let memory = MemStorage::new(bytes.to_vec());
        let report = check(&memory, CHECK_MEMORY, &unwatched).expect("a check");
        // No refcount too low, nothing that cannot be followed: at worst copied flags.
        let wrong = report
            .findings
            .iter()
            .find(|f| f.fault != Fault::Leak && !f.text.contains("wrong copied flag"));
        assert!(wrong.is_none(), "{}: {wrong:?}", self.what);
        if qemu {
            self.use_by_qemu(bytes);
        }
        let report = repair(&memory, Repair::All, CHECK_MEMORY, &unwatched).expect("a repair");
        assert!(report.is_clean(), "{}: {report:#?}", self.what);
        self.is_whole(&memory.bytes());
    }

    /// QEMU writes to the disk as the cut left it: snapshots stay what they are; then it repairs
    /// the image.
    fn use_by_qemu(&self, bytes: &[u8]) {
        let image = Image::of(bytes);
        image.io(&["write -P 99 0 640k"]);
        let now = std::fs::read(&image.path).expect("the image");
        assert!(world(&now).snapshots == world(bytes).snapshots, "{}: overwritten", self.what);
        // A repair says by its status that there was something to do.
        crate::qemu::run("qemu-img", &["check", "-q", "-r", "all", image.name()]);
        image.assert_clean(&self.what);
        let repaired = std::fs::read(&image.path).expect("the image");
        assert!(world(&repaired).snapshots == world(bytes).snapshots, "{}: repair", self.what);
        assert!(image.disk().iter().take(640 << 10).all(|b| *b == 99), "{}: disk", self.what);
    }
}

/// Cuts everywhere. Gives how many different states there were.
fn cut(options: &str, name: &str, operation: Operation) -> usize {
    let image = small(options);
    let bytes = std::fs::read(&image.path).expect("the image");
    let journal = Journal::new(vec![SparseBytes::of(&bytes)]);
    operation(&*journal.storages()[0]).unwrap_or_else(|e| panic!("{name}: {e}"));
    let last = journal.now()[0].to_vec();
    let what = format!("{name} ({options})");
    let expected = Expected { what, before: world(&bytes), after: world(&last) };
    assert!(expected.before != expected.after, "{name}: nothing happened");
    let done = Image::of(&last);
    done.assert_clean(&expected.what);
    let recording = journal.recording();
    let mut cuts = recording.cuts();
    let mut seen = HashSet::new();
    loop {
        for choice in cuts.choices(Effort { all: 16, sample: 5 }, 7) {
            if seen.insert(cuts.fingerprint(&choice)) {
                let state = cuts.state(&choice).remove(0).to_vec();
                expected.judge(&state, seen.len() % 40 == 0);
            }
        }
        if !cuts.step() {
            return seen.len();
        }
    }
}

#[test]
fn no_cut_loses_the_disk_or_a_snapshot() {
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=512,compat=0.10",
        "cluster_size=16k,extended_l2=on",
    ] {
        for (name, operation) in OPERATIONS {
            let states = cut(options, name, operation);
            assert!(states > 5, "{name} ({options}): {states} states");
        }
    }
}
