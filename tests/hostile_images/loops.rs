//! Images that build on themselves, straight or by way of others.
use std::fs;
use std::path::Path;

use super::places::{rich_vhd, seal};
use super::{qemu_img, ringback};

/// `a` on `b` and `b` on `a`, in that format.
fn qemu_loop(folder: &Path, format: &str) {
    for (name, backing) in [("a", "b"), ("b", "a"), ("self", "self")] {
        // QEMU does not make an image on itself.
        let new = folder.join("new");
        let backing = format!("{backing}.{format}");
        let image = new.to_str().expect("a path");
        qemu_img(&["create", "-q", "-u", "-f", format, "-b", &backing, "-F", format, image, "1M"]);
        fs::rename(&new, folder.join(format!("{name}.{format}"))).expect("rename");
    }
}

/// The text in UTF-16, with the byte that counts first or last.
fn utf16(text: &str, big: bool) -> Vec<u8> {
    let pair = |b: u8| if big { [0, b] } else { [b, 0] };
    text.bytes().flat_map(pair).collect()
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    let at: Vec<_> =
        (0..bytes.len() - from.len()).filter(|at| bytes[*at..].starts_with(from)).collect();
    at.into_iter().for_each(|at| bytes[at..at + to.len()].copy_from_slice(to));
}

/// A differencing image that names `parent`, whose id all of them share.
fn vhd_on(good: &[u8], parent: &str) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let id = bytes[68..84].to_vec();
    bytes[552..568].copy_from_slice(&id);
    for big in [false, true] {
        replace(&mut bytes, &utf16("base.vhd", big), &utf16(parent, big));
    }
    seal(&mut bytes);
    bytes
}

#[test]
fn images_that_build_on_themselves_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let folder = dir.path();
    qemu_loop(folder, "qcow2");
    qemu_loop(folder, "qcow");
    let good = rich_vhd(folder);
    for (name, parent) in [("aaaa", "bbbb"), ("bbbb", "aaaa"), ("self", "self")] {
        let bytes = vhd_on(&good, &format!("{parent}.vhd"));
        fs::write(folder.join(format!("{name}.vhd")), bytes).expect("the image");
    }
    let names = ["a.qcow2", "b.qcow2", "self.qcow2", "a.qcow", "self.qcow", "aaaa.vhd", "self.vhd"];
    for name in names {
        let format = name.rsplit('.').next().expect("a format");
        let allow = folder.to_str().expect("a path");
        let image = folder.join(name);
        let itself = image.to_str().expect("a path");
        let all: [&[&str]; 3] = [
            &["disk", "map", "-f", format, "--allow-backing", allow],
            &["disk", "compare", "-f", format, "-F", format, "--allow-backing", allow, itself],
            &["disk", "resize", "-f", format, "--allow-backing", allow],
        ];
        for arguments in all {
            let resize = arguments[1] == "resize";
            if resize && format == "qcow" {
                continue;
            }
            let rest: &[&str] = if resize { &["+1M"] } else { &[] };
            let out = ringback(&image, &folder.join("log"), arguments, rest);
            let said = String::from_utf8_lossy(&out.stderr);
            let code = out.status.code();
            let refused = matches!(code, Some(1 | 2)) && said.contains("builds on itself");
            assert!(refused, "{name}: {arguments:?}: {code:?} {said}");
        }
    }
}
