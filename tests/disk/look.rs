//! What the commands say that only read.

use serde_json::{Value, json};

use super::Place;

/// A chain of three: a raw base, an overlay, and a larger overlay over that.
fn chain(place: &Place) {
    place.sample("base.raw");
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2"]);
    let writes = ["write -P 7 128k 64k", "write -z 5M 128k", "write -P 9 8M 4k"];
    place.qemu_io("qcow2", "mid.qcow2", &writes);
    let args =
        ["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "12M"];
    place.qemu_img(&args);
    place.qemu_io("qcow2", "top.qcow2", &["write -P 3 11M 64k", "write -z 64k 64k"]);
}

/// Our document without what only ours has.
fn keys(ours: &Value, theirs: &Value) -> Value {
    let of = |key: &String| (key.clone(), ours.get(key).cloned().unwrap_or(Value::Null));
    Value::Object(theirs.as_object().expect("an object").keys().map(of).collect())
}

#[test]
fn info_has_qemu_imgs_numbers() {
    let place = Place::new();
    chain(&place);
    place.qemu_img(&["create", "-q", "-f", "vpc", "-o", "force_size=on", "a.vhd", "10M"]);
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "3M"]);
    let options = "extended_l2=on,lazy_refcounts=on,compression_type=zstd,refcount_bits=1";
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "new.qcow2", "3M"]);
    for file in ["base.raw", "mid.qcow2", "top.qcow2", "a.vhd", "old.qcow2", "new.qcow2"] {
        let theirs = place.qemu_img(&["info", "--output=json", file]).json();
        let ours = place.ok(&["info", "--json", file]).json();
        assert_eq!(ours["schema"], 1);
        let mut ours = keys(&ours, &theirs);
        if file.ends_with(".vhd") {
            // QEMU counts a small file's blocks otherwise.
            ours["cluster-size"] = theirs["cluster-size"].clone();
        }
        assert_eq!(ours, theirs, "{file}");
        let text = place.ok(&["info", file]).out;
        let size = format!("({} bytes)", theirs["virtual-size"]);
        assert!(text.contains(&size), "{text}");
    }
    let theirs = place.qemu_img(&["info", "--backing-chain", "--output=json", "top.qcow2"]).json();
    let ours = place.ok(&["info", "--backing-chain", "--json", "top.qcow2"]).json();
    let (ours, theirs) = (ours["chain"].as_array(), theirs.as_array());
    let (ours, theirs) = (ours.expect("a chain"), theirs.expect("a chain"));
    assert_eq!((ours.len(), theirs.len()), (3, 3));
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours["virtual-size"], theirs["virtual-size"]);
        assert_eq!(ours["format"], theirs["format"]);
    }
}

/// A map as bytes: for each stretch of 4 KiB what is there.
fn painted(map: &Value) -> Vec<String> {
    let mut all = Vec::new();
    for line in map.as_array().expect("a map") {
        let number = |key: &str| line[key].as_u64().unwrap_or(u64::MAX);
        let (start, length) = (number("start"), number("length"));
        for at in (start..start + length).step_by(512) {
            // Where zeroes are is the format's own matter.
            let offset = match &line["data"] {
                Value::Bool(true) => line["offset"].as_u64().map(|o| o + at - start),
                _ => None,
            };
            let seen = json!([line["depth"], line["present"], line["zero"], line["data"], offset]);
            all.push(seen.to_string());
        }
    }
    all
}

#[test]
fn map_shows_what_qemu_img_shows() {
    let place = Place::new();
    chain(&place);
    place.qemu_img(&["convert", "-O", "vpc", "-o", "force_size=on", "base.raw", "a.vhd"]);
    for file in ["base.raw", "mid.qcow2", "top.qcow2"] {
        let theirs = place.qemu_img(&["map", "--output=json", file]).json();
        let ours = place.ok(&["map", "--json", file]).json();
        let (ours, theirs) = (painted(&ours["map"]), painted(&theirs));
        assert_eq!(ours.len(), theirs.len(), "{file}");
        for (n, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert_eq!(ours, theirs, "{file} at {}", n * 512);
        }
    }
    let (from, to) = ("--start-offset=8k", "--max-length=1M");
    let theirs = place.qemu_img(&["map", "--output=json", from, to, "top.qcow2"]).json();
    let ours = place.ok(&["map", "--json", from, to, "top.qcow2"]).json();
    assert_eq!(painted(&ours["map"]), painted(&theirs));
    let ours = place.ok(&["map", "mid.qcow2"]).out;
    let theirs = place.qemu_img(&["map", "mid.qcow2"]).out;
    assert_eq!(ours.lines().next(), theirs.lines().next());
    assert!(ours.contains("base.raw") && ours.contains("mid.qcow2"), "{ours}");
}

#[test]
fn compare_agrees() {
    let place = Place::new();
    chain(&place);
    place.qemu_img(&["convert", "-O", "raw", "top.qcow2", "same.raw"]);
    place.qemu_img(&["convert", "-O", "raw", "top.qcow2", "other.raw"]);
    place.qemu_io("raw", "other.raw", &["write -P 1 7654321 1"]);
    place.qemu_img(&["convert", "-O", "qcow2", "top.qcow2", "longer.qcow2"]);
    place.qemu_img(&["resize", "-q", "longer.qcow2", "20M"]);
    place.qemu_img(&["convert", "-O", "qcow2", "longer.qcow2", "tail.qcow2"]);
    place.qemu_io("qcow2", "tail.qcow2", &["write -P 1 19M 512"]);
    for (other, strict) in [
        ("same.raw", false),
        ("same.raw", true),
        ("other.raw", false),
        ("longer.qcow2", false),
        ("longer.qcow2", true),
        ("tail.qcow2", false),
        ("base.raw", false),
    ] {
        let args = ["compare", "-s", "top.qcow2", other];
        let args: Vec<&str> = args.into_iter().filter(|a| strict || *a != "-s").collect();
        let (ours, theirs) = (place.disk(&args), place.tool("qemu-img", &args));
        assert_eq!(ours.code, theirs.code, "{other}: {ours:?} {theirs:?}");
        if !strict {
            let last = |said: &super::Said| said.out.lines().last().map(str::to_owned);
            assert_eq!(last(&ours), last(&theirs), "{other}");
        }
    }
    assert_eq!(place.disk(&["compare", "top.qcow2", "nothing"]).code, 2);
    let said = place.disk(&["compare", "--json", "top.qcow2", "other.raw"]);
    assert_eq!(said.json()["offset"], 7_653_888);
    assert_eq!(said.code, 1);
}

#[test]
fn what_cannot_be_checked_says_so_as_qemu_img_does() {
    let place = Place::new();
    place.sample("base.raw");
    let said = place.disk(&["check", "base.raw"]);
    assert_eq!(said.code, 63, "{said:?}");
    assert_eq!(place.tool("qemu-img", &["check", "base.raw"]).code, 63);
    let said = place.disk(&["check", "nothing"]);
    assert_eq!(said.code, 1, "{said:?}");
    place.ok(&["create", "-f", "vhd", "a.vhd", "10M"]);
    assert_eq!(place.disk(&["check", "a.vhd"]).code, 0);
    // The footer at the end goes away; its copy at the start is there.
    let size = std::fs::metadata(place.path("a.vhd")).expect("a.vhd").len();
    let file = std::fs::OpenOptions::new().write(true).open(place.path("a.vhd"));
    file.and_then(|f| f.set_len(size - 512)).expect("cut");
    let said = place.disk(&["check", "--json", "a.vhd"]);
    assert_eq!((said.code, said.json()["corruptions"].as_u64()), (2, Some(1)), "{said:?}");
    let said = place.ok(&["check", "--json", "--repair", "a.vhd"]);
    assert_eq!(said.json()["corruptions-fixed"], 1);
    assert_eq!(place.disk(&["check", "a.vhd"]).code, 0);
    place.qemu_img(&["info", "-f", "vpc", "a.vhd"]);
}

#[test]
fn measure_agrees() {
    let place = Place::new();
    chain(&place);
    place.qemu_img(&["convert", "-O", "qcow2", "base.raw", "marked.qcow2"]);
    place.qemu_img(&["bitmap", "--add", "marked.qcow2", "b"]);
    let small = "cluster_size=512,refcount_bits=1";
    for args in [
        &["--size", "1000"][..],
        &["--size", "3G"],
        &["--size", "3G", "-O", "qcow2"],
        &["--size", "3G", "-O", "qcow2", "-o", small],
        &["--size", "3G", "-O", "qcow2", "-o", "preallocation=full,extended_l2=on"],
        &["-O", "raw", "top.qcow2"],
        &["-O", "qcow2", "base.raw"],
        &["-O", "qcow2", "-o", small, "base.raw"],
        &["-O", "qcow2", "top.qcow2"],
        &["-O", "qcow2", "-o", "cluster_size=2M", "top.qcow2"],
        &["-O", "qcow2", "marked.qcow2"],
    ] {
        let ours = place.ok(&[&["measure", "--json"], args].concat()).json();
        let theirs = place.qemu_img(&[&["measure", "--output=json"], args].concat()).json();
        assert_eq!(keys(&ours, &theirs), theirs, "{args:?}");
    }
}

#[test]
fn an_image_in_use_is_left_alone() {
    let place = Place::new();
    place.sample("a.raw");
    let mut qemu = std::process::Command::new("qemu-io");
    qemu.current_dir(place.path("")).args(["-f", "raw", "a.raw"]);
    qemu.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut qemu = qemu.spawn().expect("qemu-io (package qemu-utils)");
    // Its prompt: the image is open.
    let mut out = qemu.stdout.take().expect("stdout");
    std::io::Read::read_exact(&mut out, &mut [0; 1]).expect("a prompt");
    for args in [&["info", "a.raw"][..], &["resize", "-f", "raw", "a.raw", "20M"]] {
        let said = place.disk(args);
        assert_eq!(said.code, 1, "{args:?}");
        assert!(said.err.contains("in use by another process"), "{said:?}");
    }
    place.ok(&["info", "-U", "a.raw"]);
    drop(qemu.stdin.take());
    drop(out);
    qemu.wait().expect("qemu-io");
    place.ok(&["info", "a.raw"]);
}
