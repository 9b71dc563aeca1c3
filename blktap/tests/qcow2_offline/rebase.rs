//! The header's cluster: another backing file's name, and fields that change in use.
use std::sync::Arc;

use blktap::formats::qcow2::bitmaps::{self, Recording};
use blktap::formats::qcow2::header::Header;
use blktap::formats::qcow2::offline::Offline;
use blktap::formats::qcow2::rebase::set_backing;
use blktap::formats::qcow2::{Qcow2, Qcow2Options};
use blktap::formats::{BackingName, Change, Format};
use blktap::storage::record::{Effort, Journal, SparseBytes};
use blktap::storage::{MemStorage, Storage};

use crate::bitmaps::change;
use crate::qemu::{Image, run_well};

fn named(len: usize, format: &str) -> BackingName {
    let name = (0..len).map(|n| char::from(b'a' + (n % 26) as u8)).collect();
    BackingName { name, format: Some(format.to_owned()) }
}

/// Goes from one name to the next, with the power cut everywhere: it is the one or the other.
fn rename(memory: &MemStorage, new: Option<&BackingName>, what: &str) -> usize {
    let backing = |s: &dyn Storage| Header::read(s).map(|h| (h.backing(), h.bitmaps));
    let (before, bitmaps) = backing(memory).expect("a header");
    let journal = Journal::new(vec![SparseBytes::of(&memory.bytes())]);
    set_backing(&*journal.storages()[0], new).unwrap_or_else(|e| panic!("{what}: {e}"));
    let recording = journal.recording();
    let (mut cuts, mut seen) = (recording.cuts(), [false; 2]);
    while cuts.step() {
        for choice in cuts.choices(Effort { all: 4096, sample: 20 }, 1) {
            let state = MemStorage::new(cuts.state(&choice)[0].to_vec());
            let (now, kept) = backing(&state).unwrap_or_else(|e| panic!("{what}: {e}"));
            let is_new = now.as_ref() == new;
            assert!(is_new || now == before, "{what}: {now:?}");
            assert_eq!(kept, bitmaps, "{what}");
            seen[usize::from(is_new)] = true;
        }
    }
    memory.write_at(0, &journal.now()[0].to_vec()).expect("write");
    assert!(seen[1], "{what}");
    seen.into_iter().filter(|s| *s).count()
}

#[test]
fn another_backing_file_is_named_at_once() {
    let mut both = 0;
    for options in ["", "cluster_size=4k", "cluster_size=2k,compat=0.10", "cluster_size=1k"] {
        let image = Image::create(options, "4M");
        if !options.contains("0.10") {
            let memory = image.memory();
            let mut offline = Offline::open(&memory).expect("open");
            bitmaps::create(&mut offline, "b", 65536, Recording::On).expect("create");
            image.put(&memory);
        }
        // Both names have room behind the first sector, or one has in it.
        let most = match options {
            _ if options.contains("1k") => 340,
            _ if options.contains("2k") => 760,
            _ => 1023,
        };
        let lengths = [5, most, most, 30, 300, most, 0, most, 200];
        for (n, len) in lengths.into_iter().enumerate() {
            let memory = image.memory();
            let new = (len > 0).then(|| named(len - n % 2, ["raw", "qcow2"][n % 2]));
            both += rename(&memory, new.as_ref(), &format!("{options}: step {n}, {len} bytes"));
            image.put(&memory);
            let info = ["info", "-f", "qcow2", "--output=json", image.name()];
            let info: serde_json::Value =
                serde_json::from_str(&run_well("qemu-img", &info)).expect("JSON");
            let theirs = info["backing-filename"].as_str();
            assert_eq!(theirs, new.as_ref().map(|b| b.name.as_str()), "{options}: step {n}");
        }
    }
    assert!(both > 60, "hardly any cut left the old name: {both}");
}

#[test]
fn a_name_that_has_no_room_is_refused() {
    let image = Image::create("cluster_size=512", "1M");
    let memory = image.memory();
    let refused = set_backing(&memory, Some(&named(500, "raw"))).expect_err("no room");
    assert!(refused.to_string().contains("fit"), "{refused}");
    assert!(memory.bytes() == image.memory().bytes());
    set_backing(&memory, Some(&named(300, "raw"))).expect("it fits");
}

/// Feature bits that are set, cleared and not known; the name lies where QEMU would not put it.
#[test]
fn nothing_but_its_fields_is_written_while_an_image_is_in_use() {
    let image = Image::create("lazy_refcounts=on", "4M");
    let memory = image.memory();
    set_backing(&memory, Some(&named(1000, "raw"))).expect("a name");
    memory.write_at(88, &(1u64 << 40).to_be_bytes()).expect("an unknown autoclear bit");
    let before = memory.bytes()[..65536].to_vec();
    let journal = Journal::new(vec![SparseBytes::of(&memory.bytes())]);
    let file = journal.storages().swap_remove(0);
    let disk = Qcow2::open(Arc::clone(&file), None, &Qcow2Options::default()).expect("open");
    change(&disk, 0..65536, Change::Write);
    let dirty = Header::read(&*file).expect("a header").is_dirty();
    assert!(dirty, "nothing was written to the header");
    disk.close().expect("close");
    let after = journal.now()[0].to_vec();
    assert!(after[96..65536] == before[96..] && after[..72] == before[..72]);
    assert_eq!(Header::read(&*file).expect("a header").autoclear, 0);
}
