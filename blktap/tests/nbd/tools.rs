//! Other people's clients on our server.

use std::path::Path;
use std::sync::Arc;

use blktap::export::nbd::{Clients, Export, Limits, Server};
use blktap::storage::Access;
use blktap::{Disk, DiskQueue, Geometry, MemDisk, blocking};

use super::images::{Image, Kind, text};
use super::rig::{Ours, patchy, raw, run, well};
use super::support::{allocated, folder, image, pattern};

const SIZE: u64 = 32 << 20;

/// The formats that are served. What builds on another image builds on a patchy one.
const SERVED: [Kind; 5] =
    [Kind::Raw, Kind::SmallClusters, Kind::Overlay, Kind::Dynamic, Kind::Differencing];

/// Calls `test` with an image of each kind, in a folder of its own, and what it reads as.
fn each(test: impl Fn(&Path, &Image, Vec<u8>)) {
    for kind in SERVED {
        let folder = folder();
        let below = patchy(&folder.path().join("patchy"), SIZE);
        let image = Image::new(kind, folder.path(), SIZE, &below);
        let reads_as = if image.base.is_some() { below } else { vec![0; SIZE as usize] };
        test(folder.path(), &image, reads_as);
    }
}

/// A server of the image alone.
fn serve(folder: &Path, image: &Image) -> Ours {
    match image.kind {
        Kind::Raw => Ours::disk(folder, raw(&image.path)),
        _ => Ours::disk(folder, image.open(None)),
    }
}

#[test]
fn fio_verifies_what_it_writes() {
    each(|folder, image, _| {
        let ours = serve(folder, image);
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
            assert!(text.contains("err= 0"), "{:?}: {text}", image.kind);
        }
        ours.end();
        image.assert_clean();
    });
}

#[test]
fn nbdcopy_brings_all_bytes_both_ways() {
    each(|folder, image, reads_as| {
        let copy = folder.join("copy");
        let ours = serve(folder, image);
        well("nbdcopy", &[&ours.uri(), text(&copy)]);
        assert!(std::fs::read(&copy).expect("a copy") == reads_as, "{:?}", image.kind);
        // Other bytes than those that are there, with data and holes in other places.
        let other = folder.join("other");
        let bytes = shifted(&other);
        well("nbdcopy", &["--flush", text(&other), &ours.uri()]);
        well("nbdcopy", &[&ours.uri(), text(&copy)]);
        ours.end();
        assert!(std::fs::read(&copy).expect("a copy") == bytes, "{:?}", image.kind);
        image.assert_clean();
        image.assert_holds(&bytes);
    });
}

/// A file with data where a patchy one has none, and holes where it has data.
fn shifted(path: &Path) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).expect("a file");
    file.set_len(SIZE).expect("its size");
    for (at, n) in [(512, 1024), ((1 << 20) + 100_000, 5_000_000), (SIZE - 4096, 4096)] {
        file.write_all_at(&pattern(at + 77, n), at).expect("data");
    }
    std::fs::read(path).expect("the bytes")
}

#[test]
fn holes_are_told_and_made() {
    let folder = folder();
    let path = folder.path().join("disk");
    patchy(&path, SIZE);
    let ours = Ours::disk(folder.path(), raw(&path));
    let rows = map(&ours);
    assert_eq!(rows[0], (4096, 0), "{rows:?}");
    assert_eq!(rows[1].1, 3, "{rows:?}");
    assert_eq!(rows.iter().map(|r| r.0).sum::<u64>(), SIZE, "{rows:?}");
    let before = allocated(&path);
    well("qemu-io", &["-f", "raw", "-c", "write -z -u 1M 1M", "-c", "flush", &ours.uri()]);
    assert!(allocated(&path) < before, "zeroing with unmap leaves everything allocated");
    well("qemu-io", &["-f", "raw", "-c", "write -z 1M 1M", "-c", "read -P 0 1M 1M", &ours.uri()]);
    assert!(allocated(&path) >= (1 << 20) / 512, "zeroing without unmap leaves a hole");
    well("qemu-io", &["-f", "raw", "-c", "discard 0 4M", "-c", "read -P 0 1M 1M", &ours.uri()]);
    ours.end();
}

/// Stretches of `nbdinfo --map`: bytes, and the flags (1 a hole, 2 reads as zeroes).
fn map(ours: &Ours) -> Vec<(u64, u32)> {
    let map = well("nbdinfo", &["--map", &ours.uri()]);
    let number = |text: Option<&str>| text.and_then(|t| t.parse().ok()).expect("a number");
    map.lines()
        .map(|line| {
            let mut words = line.split_whitespace().skip(1);
            (number(words.next()), number(words.next()) as u32)
        })
        .collect()
}

/// Images that QEMU filled, so that it is QEMU who says what is allocated: in the base's first
/// 8 MiB are data, and those and the next 8 MiB are written, zeroed and left in turn.
#[test]
fn what_an_image_does_not_hold_is_told() {
    let data = "write -P 7 0 8M";
    let above = ["write -P 8 0 2M", "write -z 2M 2M", "write -P 9 8M 2M", "write -z 10M 2M"];
    let (mib, none) = (1u64 << 20, 3);
    for (kind, expected) in [
        (Kind::SmallClusters, vec![(2, 0), (6, none), (2, 0), (22, none)]),
        // The base's data are data, and what hides them are zeroes.
        (Kind::Overlay, vec![(2, 0), (2, none), (6, 0), (22, none)]),
        // QEMU writes zeroes to VHD images as data.
        (Kind::Dynamic, vec![(4, 0), (4, none), (4, 0), (20, none)]),
    ] {
        let folder = folder();
        let image = Image::new(kind, folder.path(), SIZE, &vec![0; SIZE as usize]);
        let io = |path: &Path, commands: &[&str]| {
            let mut args = vec!["-f", kind.qemu()];
            commands.iter().for_each(|c| args.extend(["-c", *c]));
            well("qemu-io", &[&args[..], &[text(path)]].concat());
        };
        if let Some(base) = &image.base {
            io(base, &[data]);
        }
        io(&image.path, &above);
        let ours = serve(folder.path(), &image);
        let expected: Vec<_> = expected.into_iter().map(|(n, flags)| (n * mib, flags)).collect();
        assert_eq!(map(&ours), expected, "{kind:?}");
        // What is written and discarded through the server shows as well.
        let uri = ours.uri();
        well("qemu-io", &["-f", "raw", "-c", "discard 0 2M", "-c", "write 16M 2M", &uri]);
        let rows = map(&ours);
        assert_eq!(rows.iter().map(|r| r.0).sum::<u64>(), SIZE, "{kind:?}");
        assert_eq!(rows[0].1, none, "{kind:?}: {rows:?}");
        let (mut at, mut data) = (0, Vec::new());
        for (len, flags) in rows {
            data.extend((flags == 0).then_some(at..at + len));
            at += len;
        }
        assert!(data.contains(&(16 * mib..18 * mib)), "{kind:?}: {data:?}");
        ours.end();
        image.assert_clean();
    }
}

#[test]
fn qemu_converts_from_it_and_to_it() {
    each(|folder, image, reads_as| {
        let (middle, other) = (folder.join("middle.qcow2"), folder.join("other"));
        let ours = serve(folder, image);
        well("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &ours.uri(), text(&middle)]);
        let expected = folder.join("expected");
        std::fs::write(&expected, &reads_as).expect("a file");
        well("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&middle), text(&expected)]);
        let bytes = shifted(&other);
        let uri = ours.uri();
        well("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&other), &uri]);
        well("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&other), &uri]);
        ours.end();
        image.assert_clean();
        image.assert_holds(&bytes);
    });
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
