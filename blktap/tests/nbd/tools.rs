//! Other people's clients on our server.

use std::sync::Arc;

use blktap::export::nbd::{Clients, Export, Limits, Server};
use blktap::storage::Access;
use blktap::{Disk, DiskQueue, Geometry, MemDisk, blocking};

use super::rig::{Ours, patchy, raw, run, well};
use super::support::{allocated, folder, image, pattern};

const SIZE: u64 = 32 << 20;

#[test]
fn fio_verifies_what_it_writes() {
    let folder = folder();
    let ours = Ours::disk(folder.path(), raw(&image(&folder, "disk", SIZE)));
    for (depth, bs) in [("1", "--bs=4k"), ("32", "--bsrange=512-128k")] {
        let text = well(
            "fio",
            &[
                "--name=v",
                "--ioengine=nbd",
                &format!("--uri={}", ours.uri()),
                "--rw=randrw",
                "--size=32M",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--fsync=64",
                bs,
                &format!("--iodepth={depth}"),
            ],
        );
        assert!(text.contains("err= 0"), "{text}");
    }
    ours.end();
}

#[test]
fn nbdcopy_brings_all_bytes_both_ways() {
    let folder = folder();
    let (source, target) = (folder.path().join("source"), image(&folder, "target", SIZE));
    let bytes = patchy(&source, SIZE);
    let copy = folder.path().join("copy");
    let from = Ours::disk(folder.path(), raw(&source));
    well("nbdcopy", &[&from.uri(), copy.to_str().expect("UTF-8")]);
    assert!(std::fs::read(&copy).expect("a copy") == bytes);
    from.end();
    let to = Ours::disk(folder.path(), raw(&target));
    well("nbdcopy", &["--flush", copy.to_str().expect("UTF-8"), &to.uri()]);
    to.end();
    assert!(std::fs::read(&target).expect("the target") == bytes);
}

#[test]
fn holes_are_told_and_made() {
    let folder = folder();
    let path = folder.path().join("disk");
    patchy(&path, SIZE);
    let ours = Ours::disk(folder.path(), raw(&path));
    let map = well("nbdinfo", &["--map", &ours.uri()]);
    let rows: Vec<Vec<&str>> = map.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(rows[0][..3], ["0", "4096", "0"], "{map}");
    assert_eq!(rows[1][2], "3", "{map}");
    let total: u64 = rows.iter().map(|r| r[1].parse::<u64>().expect("a length")).sum();
    assert_eq!(total, SIZE, "{map}");
    let before = allocated(&path);
    well("qemu-io", &["-f", "raw", "-c", "write -z -u 1M 1M", "-c", "flush", &ours.uri()]);
    assert!(allocated(&path) < before, "zeroing with unmap leaves everything allocated");
    well("qemu-io", &["-f", "raw", "-c", "write -z 1M 1M", "-c", "read -P 0 1M 1M", &ours.uri()]);
    assert!(allocated(&path) >= (1 << 20) / 512, "zeroing without unmap leaves a hole");
    well("qemu-io", &["-f", "raw", "-c", "discard 0 4M", "-c", "read -P 0 1M 1M", &ours.uri()]);
    ours.end();
}

#[test]
fn qemu_converts_from_it_and_to_it() {
    let folder = folder();
    let (source, target) = (folder.path().join("source"), image(&folder, "target", SIZE));
    let bytes = patchy(&source, SIZE);
    let middle = folder.path().join("middle.qcow2");
    let middle = middle.to_str().expect("UTF-8");
    let from = Ours::disk(folder.path(), raw(&source));
    well("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &from.uri(), middle]);
    from.end();
    let to = Ours::disk(folder.path(), raw(&target));
    well("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", middle, &to.uri()]);
    well("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", middle, &to.uri()]);
    to.end();
    assert!(std::fs::read(&target).expect("the target") == bytes);
}

#[test]
fn clients_without_block_sizes_may_write_any_bytes() {
    let folder = folder();
    let path = image(&folder, "disk", 1 << 20);
    let ours = Ours::disk(folder.path(), raw(&path));
    let session = super::hostile::Session::go(&ours.socket, "", &[]);
    let mut client = session;
    assert_eq!(client.minimum, Some(1));
    let mut wanted = vec![0u8; 1 << 20];
    for (at, len) in [(3, 1), (511, 2), (1000, 5000), (4096, 512), (1 << 19, 1)] {
        let data = pattern(at + 9, len);
        client.write(at, &data);
        wanted[at as usize..at as usize + len].copy_from_slice(&data);
    }
    client.zero(1500, 3000);
    wanted[1500..4500].fill(0);
    assert_eq!(client.read(7, 9000), wanted[7..9007]);
    drop(client);
    ours.end();
    assert!(std::fs::read(&path).expect("the image") == wanted);
    // Those who have asked must keep to what they were told.
    let ours = Ours::disk(folder.path(), raw(&path));
    let mut client = super::hostile::Session::go(&ours.socket, "", &[3]);
    assert_eq!(client.minimum, Some(512));
    assert_eq!(client.try_read(7, 512), Err(22));
    assert_eq!(client.try_read(512, 7), Err(22));
    assert_eq!(client.read(512, 512), wanted[512..1024]);
    drop(client);
    ours.end();
}

#[test]
fn two_connections_see_each_others_flushed_writes() {
    let folder = folder();
    let ours = Ours::disk(folder.path(), raw(&image(&folder, "disk", 1 << 20)));
    let mut clients = [0, 1].map(|_| super::hostile::Session::go(&ours.socket, "", &[3]));
    for round in 0..50u64 {
        let (writer, reader) = (round as usize % 2, 1 - round as usize % 2);
        let data = pattern(round, 4096);
        clients[writer].write(round * 4096, &data);
        clients[writer].flush();
        assert_eq!(clients[reader].read(round * 4096, 4096), data);
    }
    drop(clients);
    ours.end();
}

#[test]
fn several_exports_each_with_its_own_rules() {
    let folder = folder();
    let disks = ["a", "b"].map(|n| raw(&image(&folder, n, 1 << 20)));
    let mut a = Export::new("", disks[0].clone());
    a.description = "the first".into();
    let mut b = Export::new("the/b", disks[1].clone());
    b.access = Access::ReadOnly;
    b.clients = Clients::One;
    let ours = Ours::start(folder.path(), vec![a, b]);
    let list: serde_json::Value =
        serde_json::from_str(&well("nbdinfo", &["--list", "--json", &ours.uri()])).expect("JSON");
    let names: Vec<_> = list["exports"].as_array().expect("a list").iter().collect();
    assert_eq!(names.len(), 2);
    assert_eq!(names[0]["description"], "the first");
    assert_eq!(names[0]["can_multi_conn"], true);
    assert_eq!(
        (&names[1]["is_read_only"], &names[1]["can_multi_conn"]),
        (&true.into(), &false.into())
    );
    well("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", &ours.named("")]);
    let refused = run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", &ours.named("the/b")]);
    assert!(!refused.status.success());
    well("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 64k", &ours.named("the/b")]);
    let unknown = run("nbdinfo", &[&ours.named("c")]);
    assert!(!unknown.status.success());
    ours.end();
}

/// A disk with a dirty bitmap: every other 64 KiB.
struct Dirty(Arc<MemDisk>);

impl Disk for Dirty {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn refresh(&self) -> std::io::Result<Geometry> {
        self.0.refresh()
    }
    fn queue(&self, depth: u32) -> std::io::Result<Box<dyn DiskQueue>> {
        self.0.queue(depth)
    }
    fn bitmaps(&self) -> Vec<String> {
        vec!["b0".into()]
    }
    fn bitmap(
        &self,
        name: &str,
        range: std::ops::Range<u64>,
        out: &mut Vec<(u64, bool)>,
    ) -> std::io::Result<()> {
        assert_eq!(name, "b0");
        let mut at = range.start;
        while at < range.end {
            let end = (at + 65536) / 65536 * 65536;
            out.push((end.min(range.end) - at, at / 65536 % 2 == 1));
            at = end;
        }
        Ok(())
    }
}

#[test]
fn dirty_bitmaps_are_told() {
    let folder = folder();
    let ours = Ours::disk(folder.path(), Arc::new(Dirty(MemDisk::new(256 << 10))));
    let map = well("nbdinfo", &["--map=qemu:dirty-bitmap:b0", &ours.uri()]);
    let states: Vec<_> = map.lines().filter_map(|l| l.split_whitespace().nth(2)).collect();
    assert_eq!(states, ["0", "1", "0", "1"], "{map}");
    ours.end();
}

#[test]
fn a_dead_servers_socket_is_taken_over_and_a_live_ones_is_not() {
    let folder = folder();
    let path = folder.path().join("ours.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    let ours = Ours::disk(folder.path(), MemDisk::new(4096));
    let exports = vec![Export::new("", MemDisk::new(4096) as Arc<dyn Disk>)];
    let mut second = Server::new(exports, None, Limits::default()).expect("a server");
    let error = second.listen_unix(&path).expect_err("it is in use");
    assert!(error.to_string().contains("listening there"), "{error}");
    ours.end();
    std::fs::write(&path, "mine").expect("a file");
    let error = second.listen_unix(&path).expect_err("it is a file");
    assert!(error.to_string().contains("no socket"), "{error}");
}

#[test]
fn the_end_of_the_server_carries_out_what_it_took() {
    let folder = folder();
    let disk = MemDisk::with(1 << 20, blktap::Volatility::Cached);
    let ours = Ours::disk(folder.path(), disk.clone());
    let mut client = super::hostile::Session::go(&ours.socket, "", &[3]);
    client.write(0, &[7; 4096]);
    ours.end();
    disk.power_cut();
    let mut queue = disk.queue(1).expect("a queue");
    let mut bytes = [0; 4096];
    blocking::read_at(&mut *queue, 0, &mut bytes).expect("a read");
    assert_eq!(bytes, [7; 4096], "the last flush did not cover it");
}
