//! Dirty bitmaps: made, recorded, read and judged by us and by QEMU in turn.
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use blktap::formats::qcow2::bitmaps::{self, Recording, directory::IN_USE};
use blktap::formats::qcow2::header::Header;
use blktap::formats::qcow2::offline::Offline;
use blktap::formats::qcow2::{Qcow2, Qcow2Options};
use blktap::formats::{Change, Format, Mailbox, Outcome, Waiter};
use blktap::storage::{MemStorage, Storage};
use serde_json::Value;

use crate::check::same_as_qemu;
use crate::qemu::{Image, run, run_well};

/// A bitmap as (offset, bytes) that are dirty.
type Dirty = Vec<(u64, u64)>;

/// By us.
fn ours(storage: &MemStorage, name: &str) -> Dirty {
    let header = Header::read(storage).expect("a header");
    let bits = bitmaps::read(storage, &header, name).expect("a bitmap");
    let mut out = Vec::new();
    bits.stretches(0..header.disk_size(), &mut out);
    let mut at = 0;
    let place = |(len, dirty): (u64, bool)| {
        at += len;
        dirty.then_some((at - len, len))
    };
    out.into_iter().filter_map(place).collect()
}

/// A server that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// By QEMU: what `qemu-nbd -B` exports, as nbdinfo (Debian: libnbd-bin) reads it.
fn theirs(image: &Image, name: &str) -> Dirty {
    let socket = image.dir.path().join("nbd.sock");
    let socket = socket.to_str().expect("UTF-8");
    let child = Command::new("qemu-nbd")
        .args(["-r", "-f", "qcow2", "-B", name, "-k", socket, image.name()])
        .stderr(Stdio::null())
        .spawn()
        .expect("qemu-nbd (Debian: qemu-utils)");
    let _server = Server(child);
    let uri = format!("nbd+unix:///?socket={socket}");
    let map = format!("--map=qemu:dirty-bitmap:{name}");
    for _ in 0..400 {
        let out = run("nbdinfo", &["--json", &map, &uri]);
        if !out.status.success() {
            std::thread::sleep(std::time::Duration::from_millis(25));
            continue;
        }
        let json: Vec<Value> = serde_json::from_slice(&out.stdout).expect("JSON");
        let number = |v: &Value, key: &str| v[key].as_u64().expect("a number");
        let dirty = json.iter().filter(|v| number(v, "type") == 1);
        return dirty.map(|v| (number(v, "offset"), number(v, "length"))).collect();
    }
    panic!("qemu-nbd did not serve {}", image.name());
}

/// Names and flags of the bitmaps by `qemu-img info`.
fn listed(image: &Image) -> Vec<(String, Vec<String>)> {
    let json = run_well("qemu-img", &["info", "-f", "qcow2", "--output=json", image.name()]);
    let json: Value = serde_json::from_str(&json).expect("JSON");
    let text = |v: &Value| v.as_str().expect("a text").to_owned();
    let list = json["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    list.iter()
        .map(|b| {
            let flags = b["flags"].as_array().expect("flags");
            (text(&b["name"]), flags.iter().map(text).collect())
        })
        .collect()
}

fn edit(image: &Image, change: impl FnOnce(&mut Offline<'_>)) {
    let memory = image.memory();
    change(&mut Offline::open(&memory).expect("open"));
    image.put(&memory);
    assert!(same_as_qemu(image, "after a change of bitmaps").is_clean());
}

const KINDS: [&str; 4] = ["", "cluster_size=1k", "extended_l2=on", "cluster_size=2M"];

#[test]
fn bitmaps_that_we_make_are_recorded_by_qemu() {
    for options in KINDS {
        let image = Image::create(options, "40M");
        edit(&image, |offline| {
            bitmaps::create(offline, "one", 65536, Recording::On).expect("create");
            bitmaps::create(offline, "two", 512, Recording::Off).expect("create");
            assert!(bitmaps::create(offline, "two", 512, Recording::Off).is_err());
            assert!(bitmaps::create(offline, "odd", 1000, Recording::Off).is_err());
        });
        image.io(&["write 1M 100k", "write 39M 64k"]);
        let memory = image.memory();
        assert_eq!(ours(&memory, "one"), [(1 << 20, 131_072), (39 << 20, 65536)], "{options}");
        assert_eq!(ours(&memory, "two"), []);
        let names: Vec<_> = listed(&image).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["one", "two"]);
        edit(&image, |offline| {
            bitmaps::merge(offline, "two", "one").expect("merge");
            bitmaps::clear(offline, "one").expect("clear");
            bitmaps::set_recording(offline, "one", Recording::Off).expect("switch off");
        });
        image.io(&["write 5M 100k"]);
        assert_eq!(theirs(&image, "one"), []);
        assert_eq!(theirs(&image, "two"), [(1 << 20, 131_072), (39 << 20, 65536)]);
        edit(&image, |offline| bitmaps::remove(offline, "one").expect("remove"));
        edit(&image, |offline| bitmaps::remove(offline, "two").expect("remove"));
        assert_eq!(listed(&image), []);
    }
}

#[test]
fn the_name_of_a_backing_file_survives_bitmaps() {
    let base = Image::create("", "4M");
    let options = format!("backing_file={},backing_fmt=qcow2", base.name());
    let image = Image::create(&options, "4M");
    edit(&image, |o| bitmaps::create(o, "b", 65536, Recording::On).expect("create"));
    let header = Header::read(&image.memory()).expect("a header");
    assert_eq!(header.backing_file.as_deref(), Some(base.name()));
    assert_eq!(listed(&image).len(), 1);
    edit(&image, |o| bitmaps::remove(o, "b").expect("remove"));
    let header = Header::read(&image.memory()).expect("a header");
    assert_eq!(header.backing_file.as_deref(), Some(base.name()));
}

fn open(memory: &Arc<MemStorage>) -> Qcow2 {
    let storage = Arc::clone(memory) as Arc<dyn Storage>;
    Qcow2::open(storage, None, &Qcow2Options::default()).expect("open")
}

/// Carries a change out, without its data.
pub fn change(disk: &Qcow2, range: Range<u64>, what: Change) {
    let waiter = Waiter::new(Arc::new(Mailbox::new().expect("eventfd")), 0);
    let mut at = range.start;
    while at < range.end {
        let mut pieces = Vec::new();
        match disk.resolve_write(at..range.end, what, &waiter, &mut pieces).expect("resolve") {
            Outcome::Ready(guard) => {
                at += pieces.iter().map(|piece| piece.len).sum::<u64>();
                guard.into_iter().for_each(|guard| disk.commit(guard));
            }
            Outcome::Miss(miss) => disk.load(miss).expect("load"),
            Outcome::Busy => panic!("nobody else writes"),
        }
    }
}

#[test]
fn an_open_image_records_and_stores_when_it_is_closed() {
    for options in KINDS {
        let image = Image::create(options, "40M");
        image.io(&["write 30M 64k"]);
        for (name, more) in [("on", "--enable"), ("off", "--disable")] {
            let args = ["bitmap", "--add", more, "-g", "65536", image.name(), name];
            run_well("qemu-img", &args);
        }
        image.io(&["write 31M 64k"]);
        let memory = Arc::new(image.memory());
        let disk = open(&memory);
        change(&disk, 0..4096, Change::Write);
        change(&disk, 10 << 20..12 << 20, Change::Zero);
        change(&disk, 31 << 20..32 << 20, Change::Discard);
        let mut live = Vec::new();
        disk.bitmap("on", 0..131_072, &mut live).expect("a bitmap");
        assert_eq!(live, [(65536, true), (65536, false)]);
        disk.flush().expect("flush");
        // As if it ended here: nobody trusts what was recording.
        let crashed = MemStorage::new(memory.bytes());
        let header = Header::read(&crashed).expect("a header");
        let list = bitmaps::list(&crashed, &header).expect("a directory");
        let in_use: Vec<_> = list.iter().map(|b| b.flags & IN_USE != 0).collect();
        assert_eq!(in_use, [true, false], "{options}");
        disk.close().expect("close");
        image.put(&memory);
        assert!(same_as_qemu(&image, options).is_clean());
        let dirty = [(0, 65536), (10 << 20, 2 << 20), (31 << 20, 1 << 20)];
        assert_eq!(ours(&memory, "on"), dirty, "{options}");
        assert_eq!(theirs(&image, "on"), dirty, "{options}");
        assert_eq!(theirs(&image, "off"), []);
    }
}

#[test]
fn after_a_crash_a_bitmap_can_be_cleared_and_used_again() {
    let image = Image::create("", "4M");
    run_well("qemu-img", &["bitmap", "--add", image.name(), "b"]);
    let memory = Arc::new(image.memory());
    drop(open(&memory));
    let header = Header::read(&*memory).expect("a header");
    assert!(bitmaps::read(&*memory, &header, "b").is_err(), "it was not stored");
    bitmaps::clear(&mut Offline::open(&*memory).expect("open"), "b").expect("clear");
    assert_eq!(ours(&memory, "b"), []);
    image.put(&memory);
    assert!(same_as_qemu(&image, "cleared").is_clean());
    image.io(&["write 1M 64k"]);
    assert_eq!(ours(&image.memory(), "b"), [(1 << 20, 65536)]);
}
