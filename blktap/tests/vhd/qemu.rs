//! Images that we and QEMU make and write in turn.
use std::path::{Path, PathBuf};

use blktap::formats::Format;
use blktap::formats::vhd::{Kind, Shape};
use blktap::storage::Access;

use super::{Numbers, create, drive, folder, open_vhd, pattern, qemu};

const SIZE: u64 = 9 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// The size that QEMU sees, by its rule or by the one that is forced.
fn qemu_size(path: &Path, force: Option<&str>) -> u64 {
    let calc = force.map_or(String::new(), |f| format!(",force_size_calc={f}"));
    let options = format!("driver=vpc,file.filename={}{calc}", text(path));
    let info = qemu("qemu-img", &["info", "--output=json", "--image-opts", &options]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    info["virtual-size"].as_u64().expect("a size")
}

/// The disk as QEMU reads it.
fn qemu_bytes(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    qemu("qemu-img", &["convert", "-f", "vpc", "-O", "raw", text(path), text(&raw)]);
    std::fs::read(&raw).expect("the converted disk")
}

/// Random writes by QEMU, also to the model.
fn qemu_writes(path: &Path, numbers: &mut Numbers, model: &mut [u8]) {
    let mut commands = Vec::new();
    for _ in 0..12 {
        let at = numbers.below(model.len() as u64 / 512 - 300) * 512;
        let len = (1 + numbers.below(300)) * 512;
        let byte = 1 + numbers.below(255) as u8;
        commands.push("-c".to_owned());
        commands.push(format!("write -P {byte} {at} {len}"));
        model[at as usize..(at + len) as usize].fill(byte);
    }
    let mut args: Vec<&str> = vec!["-f", "vpc"];
    args.extend(commands.iter().map(String::as_str));
    args.push(text(path));
    qemu("qemu-io", &args);
}

/// Random changes by us, also to the model.
fn our_changes(path: &Path, numbers: &mut Numbers, model: &mut [u8]) {
    let mut disk = drive(path, Access::ReadWrite);
    for _ in 0..30 {
        let sectors = model.len() as u64 / 512;
        let at = numbers.below(sectors) * 512;
        let longest = if numbers.below(4) == 0 { 9000 } else { 300 };
        let len = ((1 + numbers.below(longest)) * 512).min(model.len() as u64 - at);
        let range = at as usize..(at + len) as usize;
        match numbers.below(8) {
            0 => {
                disk.discard(at, len).expect("discard");
                model[range].fill(0);
            }
            1 => {
                disk.zero(at, len).expect("zero");
                model[range].fill(0);
            }
            2 => disk.flush().expect("flush"),
            _ => {
                let data = pattern(numbers.below(1 << 30), len as usize);
                disk.write(at, &data).expect("write");
                model[range].copy_from_slice(&data);
            }
        }
    }
    assert!(disk.read(0, model.len()).expect("read") == model, "before it is closed");
    disk.close().expect("close");
}

fn in_turns(path: &Path, seed: u64) {
    let size = open_vhd(path, Access::ReadOnly).size();
    assert_eq!(qemu_size(path, None), size);
    let (mut model, mut numbers) = (vec![0; size as usize], Numbers(seed));
    for round in 0..3 {
        our_changes(path, &mut numbers, &mut model);
        assert!(qemu_bytes(path) == model, "round {round}: QEMU reads what we wrote");
        qemu_writes(path, &mut numbers, &mut model);
        let ours = drive(path, Access::ReadOnly).read(0, size as usize).expect("read");
        assert!(ours == model, "round {round}: we read what QEMU wrote");
    }
}

fn made_by_qemu(name: &str, subformat: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    let path = folder.path().join(name);
    let options = format!("subformat={subformat}");
    let size = SIZE.to_string();
    qemu("qemu-img", &["create", "-q", "-f", "vpc", "-o", &options, text(&path), &size]);
    (folder, path)
}

#[test]
fn our_dynamic_image_with_qemu() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    create(&path, SIZE, Shape::Dynamic);
    assert_eq!(open_vhd(&path, Access::ReadOnly).kind(), Kind::Dynamic);
    in_turns(&path, 1);
}

#[test]
fn our_fixed_image_with_qemu() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    create(&path, SIZE, Shape::Fixed);
    assert_eq!(open_vhd(&path, Access::ReadOnly).kind(), Kind::Fixed);
    in_turns(&path, 2);
}

#[test]
fn qemus_dynamic_image_with_us() {
    let (_folder, path) = made_by_qemu("a.vhd", "dynamic");
    in_turns(&path, 3);
}

#[test]
fn qemus_fixed_image_with_us() {
    let (_folder, path) = made_by_qemu("a.vhd", "fixed");
    in_turns(&path, 4);
}

#[test]
fn qemu_sees_our_size_by_each_of_its_rules() {
    let folder = folder();
    for shape in [Shape::Dynamic, Shape::Fixed] {
        for size in [512, 1 << 20, (1 << 30) + 512, 127 << 30, 137 << 30, 2040 << 30] {
            let path = folder.path().join("a.vhd");
            create(&path, size, shape.clone());
            assert_eq!(open_vhd(&path, Access::ReadOnly).size(), size);
            for force in [None, Some("current_size"), Some("chs")] {
                assert_eq!(qemu_size(&path, force), size, "{shape:?} {force:?}");
            }
        }
    }
}

#[test]
fn we_see_qemus_size_whoever_made_an_image() {
    let (_folder, path) = made_by_qemu("a.vhd", "dynamic");
    let bytes = std::fs::read(&path).expect("the image");
    let known = [b"vpc ", b"vs  ", b"qemu", b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"abcd"];
    for creator in known {
        let mut bytes = bytes.clone();
        let footers = [0, bytes.len() - 512];
        for at in footers {
            let footer = &mut bytes[at..at + 512];
            footer[28..32].copy_from_slice(creator);
            // A size that the geometry does not have.
            footer[48..56].copy_from_slice(&(8u64 << 20).to_be_bytes());
            footer[64..68].fill(0);
            let sum: u32 = footer.iter().map(|b| u32::from(*b)).sum();
            footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
        }
        std::fs::write(&path, &bytes).expect("the image");
        let ours = open_vhd(&path, Access::ReadOnly).size();
        assert_eq!(ours, qemu_size(&path, None), "{creator:?}");
    }
}
