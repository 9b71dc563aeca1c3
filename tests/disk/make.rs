//! Making images and changing their size.

use std::os::unix::fs::MetadataExt;

use super::Place;

fn allocated(place: &Place, name: &str) -> u64 {
    std::fs::metadata(place.path(name)).expect(name).blocks() * 512
}

#[test]
fn raw_images_with_each_preallocation() {
    let place = Place::new();
    for (how, takes) in [("off", 0), ("falloc", 3 << 20), ("full", 3 << 20)] {
        let option = format!("preallocation={how}");
        place.ok(&["create", "-f", "raw", "-o", &option, "a.raw", "3M"]);
        assert_eq!(place.bytes("a.raw"), vec![0; 3 << 20], "{how}");
        assert_eq!(allocated(&place, "a.raw"), takes, "{how}");
    }
    // As qemu-img: whole sectors.
    place.ok(&["create", "b.raw", "1000"]);
    assert_eq!(place.bytes("b.raw").len(), 1024);
}

#[test]
fn what_makes_no_sense_is_wrong_usage_and_changes_nothing() {
    let place = Place::new();
    std::fs::write(place.path("a.raw"), b"precious").expect("a file");
    for (args, told) in [
        (&["create", "a.raw"][..], "its size is missing"),
        (&["create", "a.raw", "1X"], "not a size"),
        (&["create", "-f", "floppy", "a.raw", "1M"], "floppy"),
        (&["create", "-o", "colour=red", "a.raw", "1M"], "colour"),
        (&["create", "-o", "preallocation=some", "a.raw", "1M"], "preallocation=some"),
        (&["create", "-o", "preallocation=metadata", "a.raw", "1M"], "raw has no metadata"),
        (&["create", "-b", "b", "-F", "raw", "a.raw", "1M"], "no backing file"),
        (&["create", "-f", "qcow", "-b", "b", "-F", "raw", "a.raw", "1M"], "qcow2 has"),
        (&["create", "-f", "vhd", "-o", "subformat=odd", "a.raw", "1M"], "subformat=odd"),
        (&["resize", "a.raw", "1M"], "-f"),
        (&["resize", "-f", "raw", "a.raw", "x"], "not a size"),
        (&["convert", "-S", "5", "a.raw", "b.raw"], "-S 5"),
        (&["convert", "-c", "-O", "raw", "a.raw", "b.raw"], "no compression"),
        (&["snapshot", "create", "-f", "raw", "a.raw", "x"], "no snapshots"),
        (&["bitmap", "list", "a.raw"], "no bitmaps"),
        (&["frobnicate"], "frobnicate"),
    ] {
        let said = place.disk(args);
        assert_eq!(said.code, 2, "{args:?}: {said:?}");
        assert!(said.err.contains(told), "{args:?}: {said:?}");
        assert!(place.bytes("a.raw") == b"precious", "{args:?}");
        assert!(!place.path("b.raw").exists(), "{args:?}");
    }
    let said = place.disk(&["create", "/nowhere/a.raw", "1M"]);
    assert_eq!(said.code, 1);
    assert!(said.err.starts_with("ringback: /nowhere/a.raw: cannot create"), "{said:?}");
}

#[test]
fn vhds_are_read_by_qemu() {
    let place = Place::new();
    place.sample("a.raw");
    for (subformat, size) in [("dynamic", "100M"), ("fixed", "9M")] {
        let option = format!("subformat={subformat}");
        place.ok(&["create", "-f", "vhd", "-o", &option, "a.vhd", size]);
        let info = place.qemu_img(&["info", "-f", "vpc", "--output=json", "a.vhd"]).json();
        let ours = place.ok(&["info", "-f", "vhd", "--json", "a.vhd"]).json();
        assert_eq!(info["virtual-size"], ours["virtual-size"], "{subformat}");
    }
}

/// Options of a new image, that both programs take.
const OPTIONS: [&str; 8] = [
    "compat=1.1",
    "compat=0.10",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=2M,refcount_bits=64",
    "extended_l2=on,compression_type=zstd",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=full",
];

#[test]
fn qcow2_images_are_those_of_qemu_img() {
    let place = Place::new();
    for options in OPTIONS {
        place.ok(&["create", "-f", "qcow2", "-o", options, "ours.qcow2", "10000k"]);
        place.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "theirs.qcow2", "10000k"]);
        let info = |file: &str| place.qemu_img(&["info", "--output=json", file]).json();
        let (ours, theirs) = (info("ours.qcow2"), info("theirs.qcow2"));
        for key in ["virtual-size", "cluster-size", "format-specific"] {
            assert_eq!(ours[key], theirs[key], "{options}");
        }
        place.assert_checked("ours.qcow2", "qcow2");
        place.qemu_io("qcow2", "ours.qcow2", &["write -P 7 0 1M", "write -P 8 9M 512k"]);
        place.assert_checked("ours.qcow2", "qcow2");
        assert_eq!(place.disk(&["check", "ours.qcow2"]).code, 0, "{options}");
    }
    let option = "data_file=d.raw,data_file_raw=on";
    place.ok(&["create", "-f", "qcow2", "-o", option, "a.qcow2", "10M"]);
    place.qemu_io("qcow2", "a.qcow2", &["write -P 7 1M 1M"]);
    assert!(place.bytes("d.raw")[1 << 20..2 << 20].iter().all(|b| *b == 7));
    place.ok(&["compare", "-F", "raw", "a.qcow2", "d.raw"]);
}

#[test]
fn overlays_know_their_size() {
    let place = Place::new();
    let bytes = place.sample("base.raw");
    for format in ["qcow2", "vhd"] {
        let args = ["create", "--json", "-f", format, "-b", "base.raw", "-F", "raw", "a"];
        assert_eq!(place.ok(&args).json()["virtual-size"], bytes.len(), "{format}");
        place.ok(&["compare", "-f", format, "-F", "raw", "a", "base.raw"]);
    }
    let args = ["create", "-f", "qcow2", "-b", "nothing", "-F", "raw", "b.qcow2"];
    assert_eq!(place.disk(&args).code, 1);
    assert!(!place.path("b.qcow2").exists());
    place.ok(&[&args[..], &["-u", "1M"]].concat());
    let said = place.disk(&["create", "-f", "qcow2", "-b", "base.raw", "b.qcow2"]);
    assert!(said.code == 2 && said.err.contains("-F"), "{said:?}");
}

#[test]
fn qcow2_images_grow_and_shrink() {
    let place = Place::new();
    place.sample("base.raw");
    place.qemu_img(&["convert", "-O", "qcow2", "base.raw", "a.qcow2"]);
    place.ok(&["resize", "a.qcow2", "+100M"]);
    place.assert_same(("base.raw", "raw"), ("a.qcow2", "qcow2"));
    place.assert_checked("a.qcow2", "qcow2");
    assert_eq!(place.disk(&["resize", "a.qcow2", "6M"]).code, 1);
    place.ok(&["resize", "--shrink", "a.qcow2", "6M"]);
    place.assert_checked("a.qcow2", "qcow2");
    place.qemu_img(&["resize", "-q", "-f", "raw", "--shrink", "base.raw", "6M"]);
    place.assert_same(("base.raw", "raw"), ("a.qcow2", "qcow2"));
    // Over a longer base what is new reads as zeroes.
    place
        .qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "o.qcow2", "1M"]);
    place.ok(&["resize", "o.qcow2", "6M"]);
    place.assert_checked("o.qcow2", "qcow2");
    place.qemu_io("qcow2", "o.qcow2", &["read -P 0 1M 5M"]);
}

#[test]
fn raw_images_grow_and_shrink() {
    let place = Place::new();
    let bytes = place.sample("a.raw");
    let resize = |args: &[&str]| place.disk(&[&["resize", "-f", "raw"], args].concat());
    assert_eq!(resize(&["a.raw", "+1M"]).code, 0);
    let grown = place.bytes("a.raw");
    assert!(grown[..bytes.len()] == bytes[..] && grown.len() == bytes.len() + (1 << 20));
    assert!(grown[bytes.len()..].iter().all(|b| *b == 0));
    let refused = resize(&["a.raw", "1M"]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("--shrink"), "{refused:?}");
    assert_eq!(place.bytes("a.raw").len(), grown.len());
    assert_eq!(resize(&["--shrink", "a.raw", "-2M"]).code, 0);
    assert_eq!(place.bytes("a.raw").len(), grown.len() - (2 << 20));
    assert_eq!(resize(&["--preallocation=falloc", "a.raw", "12M"]).code, 0);
    assert!(allocated(&place, "a.raw") >= 3 << 20);
    let said = place.ok(&["resize", "-f", "raw", "--json", "a.raw", "13M"]).json();
    assert_eq!(
        (&said["virtual-size"], &said["old-virtual-size"]),
        (&(13 << 20).into(), &(12 << 20).into())
    );
}

#[test]
fn vhds_grow() {
    let place = Place::new();
    place.sample("a.raw");
    place.ok(&["convert", "-O", "vhd", "a.raw", "a.vhd"]);
    place.ok(&["resize", "a.vhd", "+100M"]);
    place.assert_same(("a.raw", "raw"), ("a.vhd", "vpc"));
    assert_eq!(place.disk(&["check", "a.vhd"]).code, 0);
    let said = place.disk(&["resize", "--shrink", "a.vhd", "1M"]);
    assert!(said.code == 1 && said.err.contains("cannot be made smaller"), "{said:?}");
}
