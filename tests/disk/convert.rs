//! Conversions, compared byte for byte by qemu-img.

use std::os::unix::fs::MetadataExt;

use super::Place;

/// Formats as we and QEMU call them, with options, that can be written.
const TARGETS: [(&str, &str, &[&str]); 12] = [
    ("raw", "raw", &[]),
    ("vhd", "vpc", &[]),
    ("vhd", "vpc", &["-o", "subformat=fixed"]),
    ("qcow2", "qcow2", &[]),
    ("qcow2", "qcow2", &["-c"]),
    ("qcow2", "qcow2", &["-c", "-o", "compression_type=zstd"]),
    ("qcow2", "qcow2", &["-o", "compat=0.10,cluster_size=512"]),
    ("qcow2", "qcow2", &["-o", "extended_l2=on,refcount_bits=1,lazy_refcounts=on"]),
    ("qcow2", "qcow2", &["-o", "cluster_size=2M,refcount_bits=64,preallocation=metadata"]),
    ("qcow2", "qcow2", &["-W", "-m", "16", "-S", "0"]),
    ("qcow", "qcow", &[]),
    ("qcow", "qcow", &["-c"]),
];

/// The sample in each format that QEMU writes.
fn sources(place: &Place) -> Vec<(&'static str, &'static str)> {
    place.sample("s.raw");
    let from_raw = |args: &[&str]| {
        place.qemu_img(&[&["convert", "-f", "raw", "-O"], args].concat());
    };
    from_raw(&["qcow2", "s.raw", "s.qcow2"]);
    from_raw(&["qcow2", "-c", "s.raw", "c.qcow2"]);
    from_raw(&["qcow2", "-c", "-o", "compression_type=zstd", "s.raw", "z.qcow2"]);
    from_raw(&["qcow2", "-o", "extended_l2=on", "s.raw", "x.qcow2"]);
    from_raw(&["qcow2", "-o", "cluster_size=512,compat=0.10", "s.raw", "o.qcow2"]);
    from_raw(&["qcow", "s.raw", "s.qcow"]);
    from_raw(&["vpc", "-o", "force_size=on", "s.raw", "s.vhd"]);
    from_raw(&["vpc", "-o", "subformat=fixed,force_size=on", "s.raw", "f.vhd"]);
    vec![
        ("s.raw", "raw"),
        ("s.qcow2", "qcow2"),
        ("c.qcow2", "qcow2"),
        ("z.qcow2", "qcow2"),
        ("x.qcow2", "qcow2"),
        ("o.qcow2", "qcow2"),
        ("s.qcow", "qcow"),
        ("s.vhd", "vpc"),
        ("f.vhd", "vpc"),
    ]
}

#[test]
fn from_each_format_to_each() {
    let place = Place::new();
    for (source, format) in sources(&place) {
        // Each to the plain ones, and a few to all.
        let all = ["s.raw", "x.qcow2", "s.vhd"].contains(&source);
        for (ours, theirs, options) in TARGETS.into_iter().filter(|t| all || t.2.is_empty()) {
            let args = [&["convert", "-f", format, "-O", ours], options, &[source, "t"]].concat();
            place.ok(&args);
            place.assert_same(("s.raw", "raw"), ("t", theirs));
            let same = place.disk(&["compare", "-f", "raw", "-F", ours, "s.raw", "t"]);
            assert_eq!(same.code, 0, "{source} {ours}: {same:?}");
            if ours == "qcow2" {
                place.assert_checked("t", "qcow2");
                assert_eq!(place.disk(&["check", "t"]).code, 0, "{options:?}");
            }
        }
    }
}

#[test]
fn holes_stay_holes_and_zeroes_become_holes() {
    let place = Place::new();
    let bytes = place.sample("s.raw");
    let taken = |name: &str| std::fs::metadata(place.path(name)).expect(name).blocks() * 512;
    place.ok(&["convert", "-O", "raw", "s.raw", "t.raw"]);
    assert_eq!(taken("t.raw"), taken("s.raw"));
    // All of it is data, most of it zeroes.
    std::fs::write(place.path("d.raw"), &bytes).expect("a file");
    assert!(taken("d.raw") > taken("s.raw"));
    place.ok(&["convert", "-O", "raw", "d.raw", "t.raw"]);
    assert_eq!(taken("t.raw"), taken("s.raw"));
    // And none where nothing is looked for.
    let said = place.ok(&["convert", "--json", "-S", "0", "-O", "raw", "s.raw", "full.raw"]);
    assert_eq!(said.json()["written"], bytes.len());
    assert!(taken("full.raw") >= bytes.len() as u64);
    assert!(place.bytes("full.raw") == bytes);
}

#[test]
fn in_any_way_of_working() {
    let place = Place::new();
    let bytes = place.sample("s.raw");
    for args in [
        &["-m", "1"][..],
        &["-m", "16", "-W"],
        &["-t", "none", "-T", "none"],
        &["-t", "unsafe", "-T", "writeback"],
        &["-S", "64k"],
        &["-S", "512"],
        &["-p"],
    ] {
        let said = place.ok(&[&["convert", "-O", "raw"], args, &["s.raw", "t.raw"]].concat());
        assert!(place.bytes("t.raw") == bytes, "{args:?}");
        assert_eq!(said.err.contains("(100.00/100%)"), args == ["-p"], "{said:?}");
    }
}

#[test]
fn into_a_target_that_is_there() {
    let place = Place::new();
    let bytes = place.sample("s.raw");
    let dirty = vec![0xee; bytes.len() + 4096];
    std::fs::write(place.path("t.raw"), &dirty).expect("a file");
    // It might be anything.
    assert_eq!(place.disk(&["convert", "-n", "s.raw", "t.raw"]).code, 2);
    assert!(place.bytes("t.raw") == dirty);
    place.ok(&["convert", "-n", "-O", "raw", "s.raw", "t.raw"]);
    let now = place.bytes("t.raw");
    assert!(now[..bytes.len()] == bytes[..] && now[bytes.len()..].iter().all(|b| *b == 0));
    std::fs::write(place.path("small.raw"), [1; 4096]).expect("a file");
    let said = place.disk(&["convert", "-n", "-O", "raw", "s.raw", "small.raw"]);
    assert!(said.code == 1 && said.err.contains("too small"), "{said:?}");
    assert!(place.bytes("small.raw") == [1; 4096]);
    let said = place.disk(&["convert", "-O", "raw", "s.raw", "s.raw"]);
    assert!(said.code == 1 && said.err.contains("one file"), "{said:?}");
    assert!(place.bytes("s.raw") == bytes);
}

#[test]
fn a_source_that_breaks_leaves_no_target() {
    let place = Place::new();
    place.sample("s.raw");
    place.qemu_img(&["convert", "-O", "qcow2", "-c", "s.raw", "c.qcow2"]);
    let mut broken = place.bytes("c.qcow2");
    let len = broken.len();
    broken[len / 2..].fill(0xff);
    std::fs::write(place.path("c.qcow2"), broken).expect("a file");
    let said = place.disk(&["convert", "-O", "raw", "c.qcow2", "t.raw"]);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("t.raw was removed"), "{said:?}");
    assert!(!place.path("t.raw").exists());
    // What was there before is not removed.
    std::fs::write(place.path("t.raw"), b"x").expect("a file");
    let said = place.disk(&["convert", "-O", "raw", "c.qcow2", "t.raw"]);
    assert!(said.err.contains("t.raw is left unfinished"), "{said:?}");
    assert!(place.path("t.raw").exists());
}

#[test]
fn only_what_is_allowed_is_opened() {
    let place = Place::new();
    std::fs::create_dir(place.path("other")).expect("a folder");
    place.sample("other/base.raw");
    place.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "other/base.raw",
        "-F",
        "raw",
        "a.qcow2",
    ]);
    for command in [&["convert", "-O", "raw", "a.qcow2", "t.raw"][..], &["map", "a.qcow2"]] {
        let said = place.disk(command);
        assert!(said.code == 1 && said.err.contains("--allow-backing"), "{said:?}");
        let (name, rest) = command.split_first().expect("a command");
        place.ok(&[&[*name, "--allow-backing", "other"], rest].concat());
    }
    place.assert_same(("other/base.raw", "raw"), ("t.raw", "raw"));
}

#[test]
fn compressed_targets_are_small() {
    let place = Place::new();
    place.sample("s.raw");
    place.ok(&["convert", "-c", "-O", "qcow2", "s.raw", "ours.qcow2"]);
    place.qemu_img(&["convert", "-c", "-O", "qcow2", "s.raw", "theirs.qcow2"]);
    let size = |name: &str| std::fs::metadata(place.path(name)).expect(name).len();
    assert!(size("ours.qcow2") <= size("theirs.qcow2") * 21 / 20);
    let ours = place.qemu_img(&["check", "--output=json", "ours.qcow2"]).json();
    let theirs = place.qemu_img(&["check", "--output=json", "theirs.qcow2"]).json();
    assert_eq!(ours["compressed-clusters"], theirs["compressed-clusters"]);
}

#[test]
fn over_a_backing_file_only_the_difference_is_copied() {
    let place = Place::new();
    place.sample("base.raw");
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    let writes = ["write -P 7 128k 64k", "write -z 5M 128k", "write -P 9 8M 4k", "write -z 0 64k"];
    place.qemu_io("qcow2", "top.qcow2", &writes);
    for target in [&["-O", "qcow2"][..], &["-O", "qcow2", "-c"], &["-O", "vhd"]] {
        let args = [&["convert", "-B", "base.raw", "-F", "raw"], target, &["top.qcow2", "t"]];
        place.ok(&args.concat());
        place.ok(&["compare", "-F", target[1], "top.qcow2", "t"]);
        if target[1] != "vhd" {
            place.assert_same(("top.qcow2", "qcow2"), ("t", target[1]));
        }
        let map = place.ok(&["map", "-f", target[1], "--json", "t"]).json();
        let lines = map["map"].as_array().expect("a map");
        assert!(lines.iter().any(|l| l["depth"] == 1 && l["data"] == true), "{target:?}: {map}");
    }
}

#[test]
fn from_and_to_a_server() {
    let place = Place::new();
    let bytes = place.sample("s.raw");
    std::fs::write(place.path("t.raw"), vec![0x55; bytes.len()]).expect("a file");
    let serve = |file: &str, socket: &str| {
        let mut qemu = std::process::Command::new("qemu-nbd");
        qemu.current_dir(place.path("")).args(["-t", "-f", "raw", "-x", "d"]);
        let server = qemu.arg("-k").arg(place.path(socket)).arg(file).spawn();
        let server = server.expect("qemu-nbd (package qemu-utils)");
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !place.path(socket).exists() {
            assert!(std::time::Instant::now() < limit, "qemu-nbd does not serve");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        server
    };
    let mut servers = [serve("s.raw", "s.sock"), serve("t.raw", "t.sock")];
    let uri = |socket: &str| format!("nbd+unix:///d?socket={}", place.path(socket).display());
    let (source, target) = (uri("s.sock"), uri("t.sock"));
    place.ok(&["convert", "-O", "qcow2", &source, "copy.qcow2"]);
    place.ok(&["convert", "-n", "-O", "raw", "copy.qcow2", &target]);
    place.ok(&["compare", &source, &target]);
    let info = place.ok(&["info", "--json", &source]).json();
    assert_eq!(info["virtual-size"], bytes.len());
    assert_eq!(place.disk(&["convert", "-O", "raw", "copy.qcow2", &target]).code, 2);
    for server in &mut servers {
        server.kill().expect("kill");
        server.wait().expect("its end");
    }
    assert!(place.bytes("t.raw") == bytes);
}
