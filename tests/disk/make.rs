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
