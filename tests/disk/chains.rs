//! Images that build on others.

use super::Place;

/// A base, and an overlay in which a part of it is hidden.
fn overlay(place: &Place) {
    place.sample("base.raw");
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    let writes = ["write -P 7 128k 64k", "write -z 5M 128k", "write -P 9 8M 4k"];
    place.qemu_io("qcow2", "top.qcow2", &writes);
    place.qemu_img(&["convert", "-O", "raw", "top.qcow2", "seen.raw"]);
}

#[test]
fn rebase_keeps_what_is_read() {
    let place = Place::new();
    overlay(&place);
    // Of the same content, of another, shorter, longer, none.
    place.qemu_img(&["convert", "-O", "qcow2", "base.raw", "same.qcow2"]);
    place.qemu_img(&["create", "-q", "-f", "qcow2", "short.qcow2", "6M"]);
    place.qemu_io("qcow2", "short.qcow2", &["write -P 5 0 6M"]);
    place.qemu_img(&["create", "-q", "-f", "qcow2", "long.qcow2", "20M"]);
    place.qemu_io("qcow2", "long.qcow2", &["write -P 6 1M 19M"]);
    for (backing, format) in [
        ("same.qcow2", "qcow2"),
        ("short.qcow2", "qcow2"),
        ("long.qcow2", "qcow2"),
        ("base.raw", "raw"),
    ] {
        place.ok(&["rebase", "-b", backing, "-F", format, "top.qcow2"]);
        place.assert_same(("seen.raw", "raw"), ("top.qcow2", "qcow2"));
        place.assert_checked("top.qcow2", "qcow2");
        let info = place.qemu_img(&["info", "--output=json", "top.qcow2"]).json();
        assert_eq!(info["backing-filename"], backing);
        assert_eq!(info["backing-filename-format"], format);
    }
    place.ok(&["rebase", "-b", "", "top.qcow2"]);
    let info = place.qemu_img(&["info", "--output=json", "top.qcow2"]).json();
    assert_eq!(info.get("backing-filename"), None);
    place.assert_same(("seen.raw", "raw"), ("top.qcow2", "qcow2"));
    place.assert_checked("top.qcow2", "qcow2");
}

#[test]
fn rebase_to_the_same_content_copies_nothing() {
    let place = Place::new();
    overlay(&place);
    place.qemu_img(&["convert", "-O", "qcow2", "base.raw", "same.qcow2"]);
    let said = place.ok(&["rebase", "--json", "-b", "same.qcow2", "-F", "qcow2", "top.qcow2"]);
    assert_eq!(said.json()["written"], 0);
}

#[test]
fn an_unsafe_rebase_only_writes_the_name() {
    let place = Place::new();
    overlay(&place);
    place.ok(&["rebase", "-u", "-b", "nothing.qcow2", "-F", "qcow2", "top.qcow2"]);
    let info = place.qemu_img(&["info", "--output=json", "top.qcow2"]).json();
    assert_eq!(info["backing-filename"], "nothing.qcow2");
    assert_eq!(place.disk(&["map", "top.qcow2"]).code, 1);
    place.ok(&["rebase", "-u", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    place.assert_same(("seen.raw", "raw"), ("top.qcow2", "qcow2"));
    let said = place.disk(&["rebase", "-b", "base.raw", "top.qcow2"]);
    assert!(said.code == 2 && said.err.contains("-F"), "{said:?}");
}

#[test]
fn commit_writes_into_the_base() {
    let place = Place::new();
    overlay(&place);
    let said = place.ok(&["commit", "-d", "top.qcow2"]);
    assert!(said.out.contains("base.raw"), "{said:?}");
    place.assert_same(("seen.raw", "raw"), ("base.raw", "raw"));
    place.assert_same(("seen.raw", "raw"), ("top.qcow2", "qcow2"));
    let said = place.disk(&["commit", "-d", "-f", "raw", "base.raw"]);
    assert!(said.code == 1 && said.err.contains("no backing file"), "{said:?}");
}

#[test]
fn commit_to_an_image_further_down() {
    let place = Place::new();
    overlay(&place);
    let args = ["create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "up.qcow2", "12M"];
    place.qemu_img(&args);
    place.qemu_io("qcow2", "up.qcow2", &["write -P 3 11M 64k", "write -P 4 130k 1k"]);
    place.qemu_img(&["convert", "-O", "raw", "up.qcow2", "seen.raw"]);
    place.ok(&["commit", "-b", "base.raw", "up.qcow2"]);
    // It has grown to what was committed.
    place.assert_same(("seen.raw", "raw"), ("base.raw", "raw"));
    place.assert_same(("seen.raw", "raw"), ("up.qcow2", "qcow2"));
    let said = place.disk(&["commit", "-b", "seen.raw", "up.qcow2"]);
    assert!(said.code == 1 && said.err.contains("does not build on it"), "{said:?}");
}

/// Where an image in between ends, nothing below it shows through, before or after.
#[test]
fn a_short_image_in_between_hides_what_is_below() {
    for format in ["raw", "qcow2"] {
        let place = Place::new();
        place.qemu_img(&["create", "-q", "-f", format, "base", "4M"]);
        place.qemu_io(format, "base", &["write -P 1 0 4M"]);
        let overlay = |name: &str, (below, of): (&str, &str), size: &str| {
            place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", below, "-F", of, name, size]);
        };
        overlay("short", ("base", format), "1M");
        overlay("top", ("short", "qcow2"), "4M");
        place.qemu_io("qcow2", "top", &["write -P 2 2M 64k"]);
        place.qemu_img(&["convert", "-O", "raw", "top", "seen.raw"]);
        place.ok(&["commit", "-b", "base", "top"]);
        place.assert_same(("seen.raw", "raw"), ("base", format));
        place.assert_same(("seen.raw", "raw"), ("top", "qcow2"));
    }
}

#[test]
fn what_was_committed_is_given_back() {
    let place = Place::new();
    overlay(&place);
    place.ok(&["commit", "top.qcow2"]);
    place.assert_same(("seen.raw", "raw"), ("base.raw", "raw"));
    place.assert_same(("seen.raw", "raw"), ("top.qcow2", "qcow2"));
    place.assert_checked("top.qcow2", "qcow2");
    let map = place.qemu_img(&["map", "--output=json", "top.qcow2"]).json();
    assert!(map.as_array().expect("a map").iter().all(|l| l["depth"] == 1), "{map}");
    // VHDs build on VHDs too.
    place.ok(&["convert", "-O", "vhd", "base.raw", "base.vhd"]);
    place.ok(&["create", "-f", "vhd", "-b", "base.vhd", "-F", "vhd", "top.vhd"]);
    place.ok(&["compare", "-F", "raw", "top.vhd", "seen.raw"]);
}

/// QCOW of version 1 names no format for what it builds on.
#[test]
fn qcow_images_on_backing_files() {
    let place = Place::new();
    place.sample("base.raw");
    place.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"]);
    place.qemu_img(&["convert", "-f", "raw", "-O", "qcow", "base.raw", "base.qcow"]);
    for format in ["raw", "qcow2", "qcow"] {
        let base = format!("base.{format}");
        place.qemu_img(&["create", "-q", "-f", "qcow", "-b", &base, "-F", format, "top.qcow"]);
        place.qemu_io("qcow", "top.qcow", &["write -P 7 128k 64k", "write -P 9 8M 4k"]);
        place.qemu_img(&["convert", "-f", "qcow", "-O", "raw", "top.qcow", "seen.raw"]);
        place.ok(&["compare", "-f", "qcow", "-F", "raw", "top.qcow", "seen.raw"]);
        place.ok(&["convert", "-f", "qcow", "-O", "qcow2", "top.qcow", "whole.qcow2"]);
        place.assert_same(("seen.raw", "raw"), ("whole.qcow2", "qcow2"));
        let said = place.disk(&["map", "-f", "qcow", "top.qcow"]);
        assert_eq!(said.code, 0, "{said:?}");
    }
    // An image whose format was guessed names another: only if that is allowed.
    place.qemu_img(&["create", "-q", "-f", "qcow", "-b", "top.qcow", "-F", "qcow", "up.qcow"]);
    place.qemu_img(&["convert", "-f", "qcow", "-O", "raw", "up.qcow", "seen.raw"]);
    let compare = ["compare", "-f", "qcow", "-F", "raw", "up.qcow", "seen.raw"];
    let said = place.disk(&compare);
    assert!(said.code > 1 || said.code == 1 && said.err.contains("--allow-backing"), "{said:?}");
    assert!(said.err.contains("guessed"), "{said:?}");
    place.ok(&[&compare[..1], &["--allow-backing", "."], &compare[1..]].concat());
    // Round in a circle, and outside.
    let on = |backing, format, image| {
        let args = ["create", "-q", "-f", "qcow", "-u", "-b", backing, "-F", format, image, "1M"];
        place.qemu_img(&args);
    };
    on("self.qcow", "qcow", "new.qcow");
    std::fs::rename(place.path("new.qcow"), place.path("self.qcow")).expect("rename");
    let said = place.disk(&["map", "-f", "qcow", "--allow-backing", ".", "self.qcow"]);
    assert!(said.code == 1 && said.err.contains("builds on itself"), "{said:?}");
    on("/etc/passwd", "raw", "out.qcow");
    let said = place.disk(&["map", "-f", "qcow", "out.qcow"]);
    assert!(said.code == 1 && said.err.contains("--allow-backing"), "{said:?}");
}
