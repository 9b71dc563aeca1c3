//! Snapshots and bitmaps inside images, and their repair.

use serde_json::Value;

use super::Place;

fn image(place: &Place) {
    place.sample("a.raw");
    place.qemu_img(&["convert", "-O", "qcow2", "a.raw", "a.qcow2"]);
}

/// The snapshots as qemu-img sees them, without their dates.
fn snapshots(place: &Place) -> Vec<(String, String)> {
    let info = place.qemu_img(&["info", "--output=json", "a.qcow2"]).json();
    let all = info["snapshots"].as_array().cloned().unwrap_or_default();
    let text = |v: &Value| v.as_str().expect("a text").to_owned();
    all.iter().map(|s| (text(&s["id"]), text(&s["name"]))).collect()
}

#[test]
fn snapshots_are_those_of_qemu_img() {
    let place = Place::new();
    image(&place);
    place.ok(&["snapshot", "create", "a.qcow2", "ours"]);
    place.qemu_io("qcow2", "a.qcow2", &["write -P 1 1M 1M"]);
    place.qemu_img(&["convert", "-O", "raw", "a.qcow2", "b.raw"]);
    place.qemu_img(&["snapshot", "-c", "theirs", "a.qcow2"]);
    place.qemu_io("qcow2", "a.qcow2", &["write -P 2 5M 1M"]);
    place.assert_checked("a.qcow2", "qcow2");
    let named = |id: &str, name: &str| (id.to_owned(), name.to_owned());
    assert_eq!(snapshots(&place), [named("1", "ours"), named("2", "theirs")]);
    let list = place.ok(&["snapshot", "list", "--json", "a.qcow2"]).json();
    let info = place.qemu_img(&["info", "--output=json", "a.qcow2"]).json();
    for (ours, theirs) in [0, 1].map(|n| (&list["snapshots"][n], &info["snapshots"][n])) {
        for key in theirs.as_object().expect("a snapshot").keys() {
            assert_eq!(ours[key], theirs[key], "{key}");
        }
    }
    let text = place.ok(&["snapshot", "list", "a.qcow2"]).out;
    assert!(text.contains("ours") && text.contains("theirs"), "{text}");
    // Each is read without being applied, by its name and by its id.
    for (name, file) in [("ours", "a.raw"), ("2", "b.raw")] {
        place.ok(&["convert", "-l", name, "-O", "raw", "a.qcow2", "t.raw"]);
        place.assert_same((file, "raw"), ("t.raw", "raw"));
    }
    place.ok(&["snapshot", "apply", "a.qcow2", "theirs"]);
    place.assert_checked("a.qcow2", "qcow2");
    place.assert_same(("b.raw", "raw"), ("a.qcow2", "qcow2"));
    place.ok(&["snapshot", "delete", "a.qcow2", "theirs"]);
    place.qemu_img(&["snapshot", "-a", "ours", "a.qcow2"]);
    place.assert_same(("a.raw", "raw"), ("a.qcow2", "qcow2"));
    place.ok(&["snapshot", "delete", "a.qcow2", "1"]);
    place.assert_checked("a.qcow2", "qcow2");
    assert!(snapshots(&place).is_empty());
    let said = place.disk(&["snapshot", "apply", "a.qcow2", "nothing"]);
    assert!(said.code == 1 && said.err.contains("no snapshot"), "{said:?}");
    let said = place.disk(&["convert", "-l", "nothing", "a.qcow2", "u.raw"]);
    assert!(said.code == 1 && said.err.contains("no snapshot"), "{said:?}");
}

#[test]
fn bitmaps_are_those_of_qemu_img() {
    let place = Place::new();
    image(&place);
    place.ok(&["bitmap", "add", "a.qcow2", "one"]);
    place.ok(&["bitmap", "add", "-g", "4k", "--disabled", "a.qcow2", "two"]);
    place.qemu_img(&["bitmap", "--add", "a.qcow2", "three"]);
    place.ok(&["bitmap", "disable", "a.qcow2", "three"]);
    place.ok(&["bitmap", "enable", "a.qcow2", "two"]);
    place.ok(&["bitmap", "clear", "a.qcow2", "one"]);
    place.assert_checked("a.qcow2", "qcow2");
    let theirs = || {
        let info = place.qemu_img(&["info", "--output=json", "a.qcow2"]).json();
        info["format-specific"]["data"]["bitmaps"].clone()
    };
    let ours = place.ok(&["bitmap", "list", "--json", "a.qcow2"]).json();
    assert_eq!(ours["bitmaps"], theirs());
    assert_eq!(theirs().as_array().map(Vec::len), Some(3));
    for name in ["one", "two", "three"] {
        place.ok(&["bitmap", "remove", "a.qcow2", name]);
    }
    assert_eq!(theirs(), Value::Null);
    place.assert_checked("a.qcow2", "qcow2");
    assert_eq!(place.disk(&["bitmap", "clear", "a.qcow2", "one"]).code, 1);
    assert_eq!(place.disk(&["bitmap", "add", "-g", "5k", "a.qcow2", "odd"]).code, 1);
}

#[test]
fn damage_is_found_and_repaired_as_qemu_img_does() {
    let place = Place::new();
    image(&place);
    // A cluster that nobody uses gets a refcount, and later one that is in use loses its own.
    let mut bytes = place.bytes("a.qcow2");
    bytes.resize(bytes.len().next_multiple_of(65_536) + 65_536, 0);
    let big = |bytes: &[u8], at: usize| {
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) as usize
    };
    let table = big(&bytes, 48);
    let block = big(&bytes, table);
    let last = bytes.len() / 65_536 - 1;
    bytes[block + 2 * last + 1] = 1;
    std::fs::write(place.path("a.qcow2"), &bytes).expect("a file");
    for (repair, code, after) in [("leaks", 3, 0), ("all", 3, 0)] {
        std::fs::write(place.path("a.qcow2"), &bytes).expect("a file");
        assert_eq!(place.tool("qemu-img", &["check", "a.qcow2"]).code, code);
        let said = place.disk(&["check", "--json", "a.qcow2"]);
        assert_eq!((said.code, said.json()["leaks"].as_u64()), (code, Some(1)), "{said:?}");
        assert_eq!(place.disk(&["check", "-r", repair, "a.qcow2"]).code, after);
        place.assert_checked("a.qcow2", "qcow2");
        place.assert_same(("a.raw", "raw"), ("a.qcow2", "qcow2"));
    }
    bytes[block + 2 * 5 + 1] = 0;
    std::fs::write(place.path("a.qcow2"), &bytes).expect("a file");
    assert_eq!(place.tool("qemu-img", &["check", "a.qcow2"]).code, 2);
    assert_eq!(place.disk(&["check", "a.qcow2"]).code, 2);
    let said = place.ok(&["check", "--json", "--repair", "a.qcow2"]);
    assert!(said.json()["corruptions-fixed"].as_u64() > Some(0), "{said:?}");
    place.assert_checked("a.qcow2", "qcow2");
    place.assert_same(("a.raw", "raw"), ("a.qcow2", "qcow2"));
}

#[test]
fn check_has_qemu_imgs_numbers() {
    let place = Place::new();
    image(&place);
    place.qemu_img(&["convert", "-c", "-O", "qcow2", "a.raw", "c.qcow2"]);
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "o.qcow2"]);
    for file in ["a.qcow2", "c.qcow2", "o.qcow2"] {
        let theirs = place.qemu_img(&["check", "--output=json", file]).json();
        let ours = place.ok(&["check", "--json", file]).json();
        for (key, value) in theirs.as_object().expect("an object") {
            assert_eq!(&ours[key], value, "{file}: {key}");
        }
    }
}
