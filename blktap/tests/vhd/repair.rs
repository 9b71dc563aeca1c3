//! Checks, repairs and growing; with power cuts at each step of growing.
use std::path::Path;
use std::sync::Arc;

use blktap::formats::vhd::{CheckReport, CreateOptions, NewParent, Repair, Shape, Vhd};
use blktap::formats::{Format, ImageError};
use blktap::storage::record::{Effort, Journal, SparseBytes};
use blktap::storage::{Access, MemStorage, Storage};

use super::driver::Driver;
use super::{create, drive, folder, open_vhd, pattern, qemu, storage};

const BLOCK: u64 = 2 << 20;

fn check(path: &Path, repair: Repair) -> CheckReport {
    Vhd::check(&*storage(path, Access::ReadWrite), repair).unwrap_or_else(|e| panic!("{e}"))
}

fn assert_clean(path: &Path) {
    let report = check(path, Repair::Nothing);
    assert!(report.corruptions == 0 && report.leaks == 0, "{report:?}");
}

/// An image with three blocks of data; the data.
fn three_blocks(path: &Path) -> Vec<u8> {
    create(path, 4 * BLOCK, Shape::Dynamic);
    let mut model = vec![0; 4 * BLOCK as usize];
    let mut disk = drive(path, Access::ReadWrite);
    for block in [2, 0, 1] {
        let at = block * BLOCK + 4096;
        disk.write(at, &pattern(block, 9000 / 512 * 512)).expect("write");
        model[at as usize..][..9000 / 512 * 512].copy_from_slice(&pattern(block, 9000 / 512 * 512));
    }
    disk.close().expect("close");
    assert_clean(path);
    model
}

/// After damage: found, put right, and the same data, for us and for QEMU.
fn is_repaired(path: &Path, damage: &str, model: &[u8]) {
    let found = check(path, Repair::Nothing);
    assert!(found.corruptions > 0 && found.corruptions_fixed == 0, "{damage}: {found:?}");
    let repaired = check(path, Repair::All);
    assert_eq!(repaired.corruptions, repaired.corruptions_fixed, "{damage}: {repaired:?}");
    assert_clean(path);
    assert!(drive(path, Access::ReadOnly).read(0, model.len()).expect("read") == model, "{damage}");
    let raw = path.with_extension("raw");
    let [from, to] = [path, &raw].map(|p| p.to_str().expect("a path"));
    qemu("qemu-img", &["convert", "-f", "vpc", "-O", "raw", from, to]);
    assert!(std::fs::read(raw).expect("the disk") == model, "{damage}");
}

#[test]
fn damage_that_loses_nothing_is_repaired() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    let model = three_blocks(&path);
    let good = std::fs::read(&path).expect("the image");
    let end = good.len();
    type Damage<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>));
    let damages: [Damage<'_>; 8] = [
        ("no footer", &|b| b.truncate(end - 512)),
        ("a damaged footer", &|b| b[end - 100] ^= 1),
        ("no footer and something behind", &|b| {
            b.truncate(end - 512);
            b.resize(end + 5000, 7);
        }),
        ("a damaged copy", &|b| b[100] ^= 1),
        ("another footer than its copy", &|b| {
            // tapdisk's mark "hidden", with its checksum.
            b[end - 427] = 1;
            let sum = u32::from_be_bytes([b[64], b[65], b[66], b[67]]) - 1;
            b[end - 448..end - 444].copy_from_slice(&sum.to_be_bytes());
        }),
        ("a batmap with another checksum", &|b| b[2560] ^= 0x10),
        ("an entry behind the end", &|b| b[1536 + 12..1536 + 16].fill(0x7f)),
        ("a file that ends in a block's zeroes", &|b| b.truncate(end - 600_000)),
    ];
    for (name, damage) in damages {
        let mut bytes = good.clone();
        damage(&mut bytes);
        assert!(bytes != good, "{name}");
        std::fs::write(&path, &bytes).expect("the damaged image");
        is_repaired(&path, name, &model);
    }
}

#[test]
fn opening_for_writing_puts_footers_back() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    let model = three_blocks(&path);
    let good = std::fs::read(&path).expect("the image");
    for (name, at) in [("copy", 0), ("footer", good.len() - 512)] {
        let mut bytes = good.clone();
        bytes[at + 80] ^= 0xff;
        std::fs::write(&path, &bytes).expect("the damaged image");
        let mut disk = drive(&path, Access::ReadOnly);
        assert!(disk.read(0, model.len()).expect("read") == model, "{name}");
        assert!(std::fs::read(&path).expect("the image") == bytes, "{name}: only read");
        drive(&path, Access::ReadWrite).close().expect("close");
        assert!(std::fs::read(&path).expect("the image") == good, "{name}");
    }
}

#[test]
fn a_batmap_that_says_too_much_is_found() {
    let folder = folder();
    let [base, child] = ["base.vhd", "child.vhd"].map(|n| folder.path().join(n));
    create(&base, 4 * BLOCK, Shape::Dynamic);
    let parent = NewParent {
        id: open_vhd(&base, Access::ReadOnly).unique_id(),
        modified: std::time::SystemTime::now(),
        relative: "base.vhd".into(),
        absolute: "/base.vhd".into(),
    };
    create(&child, 4 * BLOCK, Shape::Differencing(parent));
    let mut disk = drive(&child, Access::ReadWrite);
    disk.write(BLOCK, &[1; 512]).expect("write");
    disk.close().expect("close");
    let mut bytes = std::fs::read(&child).expect("the image");
    bytes[2560] |= 0x40;
    let sum = u32::from_be_bytes([bytes[2072], bytes[2073], bytes[2074], bytes[2075]]);
    bytes[2072..2076].copy_from_slice(&(sum - 0x40).to_be_bytes());
    std::fs::write(&child, bytes).expect("the image");
    let found = check(&child, Repair::All);
    assert_eq!((found.corruptions, found.corruptions_fixed), (1, 1), "{found:?}");
    assert_clean(&child);
}

#[test]
fn what_nobody_uses_is_a_leak_until_it_is_given_back() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    three_blocks(&path);
    let mut bytes = std::fs::read(&path).expect("the image");
    bytes[1536..1540].fill(0xff);
    std::fs::write(&path, bytes).expect("the image");
    assert_eq!(check(&path, Repair::Nothing).leaks, 1);
    let report = check(&path, Repair::Leaks);
    assert_eq!((report.leaks, report.leaks_fixed), (1, 1));
    assert_clean(&path);
    // And its place is used anew.
    let before = std::fs::metadata(&path).expect("stat").len();
    let mut disk = drive(&path, Access::ReadWrite);
    disk.write(3 * BLOCK, &[5; 512]).expect("write");
    assert!(disk.read(3 * BLOCK + 512, 512).expect("read") == [0; 512]);
    disk.close().expect("close");
    assert_eq!(std::fs::metadata(&path).expect("stat").len(), before);
}

#[test]
fn discarded_blocks_are_given_back_and_used_anew() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    create(&path, 8 * BLOCK, Shape::Dynamic);
    let mut disk = drive(&path, Access::ReadWrite);
    for round in 0..5u64 {
        for block in 0..3 {
            let at = (block + round) % 8 * BLOCK;
            disk.write(at, &pattern(round, BLOCK as usize)).expect("write");
        }
        disk.flush().expect("flush");
        for block in 0..3 {
            disk.discard((block + round) % 8 * BLOCK, BLOCK).expect("discard");
        }
        disk.flush().expect("flush");
    }
    assert!(disk.read(0, 8 * BLOCK as usize).expect("read").iter().all(|b| *b == 0));
    disk.close().expect("close");
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(&path).expect("stat");
    assert!(meta.len() < 4 * BLOCK, "places were not used anew: {}", meta.len());
    assert!(meta.blocks() * 512 < 100_000, "nothing was given back");
    assert_clean(&path);
}

/// Grows an image so far that its block table needs room where blocks are.
#[test]
fn growing_beyond_the_block_table() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    let mut model = three_blocks(&path);
    for size in [5 * BLOCK + 512, 600 * BLOCK, 1 << 40, 2040 << 30] {
        Vhd::grow(&*storage(&path, Access::ReadWrite), None, size)
            .unwrap_or_else(|e| panic!("{e}"));
        assert_clean(&path);
        assert_eq!(open_vhd(&path, Access::ReadOnly).size(), size);
        let info = qemu("qemu-img", &["info", "-f", "vpc", path.to_str().expect("a path")]);
        assert!(info.contains(&format!("({size} bytes)")), "{info}");
        let mut disk = drive(&path, Access::ReadWrite);
        let last = size - 512;
        assert!(disk.read(0, model.len()).expect("read") == model);
        assert!(disk.read(last, 512).expect("read") == [0; 512]);
        disk.write(last, &pattern(size, 512)).expect("write");
        disk.write(100, &pattern(size, 100)).expect("write");
        model[100..200].copy_from_slice(&pattern(size, 100));
        disk.close().expect("close");
        assert!(
            drive(&path, Access::ReadOnly).read(last, 512).expect("read") == pattern(size, 512)
        );
    }
    let storage = storage(&path, Access::ReadWrite);
    for size in [BLOCK, (2040 << 30) + 512, (2040 << 30) + 1] {
        let refused = Vhd::grow(&*storage, None, size).expect_err("not a size to grow to");
        assert!(refused.to_string().contains(&size.to_string()), "{refused}");
    }
}

#[test]
fn a_differencing_image_keeps_its_parent_when_it_grows() {
    let folder = folder();
    let [base, child] = ["base.vhd", "child.vhd"].map(|n| folder.path().join(n));
    create(&base, BLOCK, Shape::Dynamic);
    let parent = NewParent {
        id: open_vhd(&base, Access::ReadOnly).unique_id(),
        modified: std::time::SystemTime::now(),
        relative: "base.vhd".into(),
        absolute: "/somewhere/base.vhd".into(),
    };
    create(&child, BLOCK, Shape::Differencing(parent));
    let mut disk = drive(&child, Access::ReadWrite);
    disk.write(512, &[3; 512]).expect("write");
    disk.close().expect("close");
    let before = open_vhd(&child, Access::ReadOnly).parent().cloned();
    let grow = |parent| Vhd::grow(&*storage(&child, Access::ReadWrite), parent, 1 << 40);
    // What the parent has beyond the image must not come to light.
    for parent in [None, Some(BLOCK + 512)] {
        let refused = grow(parent).expect_err("refused").to_string();
        assert!(refused.contains("parent"), "{refused}");
    }
    grow(Some(BLOCK)).unwrap_or_else(|e| panic!("{e}"));
    assert_clean(&child);
    let after = open_vhd(&child, Access::ReadOnly);
    assert_eq!(after.parent(), before.as_ref());
    let mut disk = Driver::new(vec![after, open_vhd(&base, Access::ReadOnly)]);
    assert!(disk.read(0, 1536).expect("read") == [[0; 512], [3; 512], [0; 512]].concat());
}

#[test]
fn a_fixed_image_grows() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    create(&path, BLOCK, Shape::Fixed);
    let mut disk = drive(&path, Access::ReadWrite);
    disk.write(0, &pattern(1, BLOCK as usize)).expect("write");
    disk.close().expect("close");
    Vhd::grow(&*storage(&path, Access::ReadWrite), None, BLOCK + 512)
        .unwrap_or_else(|e| panic!("{e}"));
    Vhd::grow(&*storage(&path, Access::ReadWrite), None, 3 * BLOCK)
        .unwrap_or_else(|e| panic!("{e}"));
    let mut disk = drive(&path, Access::ReadOnly);
    assert!(disk.read(0, BLOCK as usize).expect("read") == pattern(1, BLOCK as usize));
    let rest = disk.read(BLOCK, 2 * BLOCK as usize).expect("read");
    assert!(rest.iter().all(|b| *b == 0));
    // The new footer was lost and the file's new size was not.
    let bytes = std::fs::read(&path).expect("the image");
    let mut cut = bytes[..bytes.len() - 512].to_vec();
    let (old, footer) = (BLOCK as usize, bytes[bytes.len() - 512..].to_vec());
    assert!(footer.starts_with(b"conectix"));
    let small = MemStorage::default();
    let options = CreateOptions::new(BLOCK, Shape::Fixed).expect("options");
    Vhd::create(&small, &options).expect("create");
    cut[old..old + 512].copy_from_slice(&small.bytes()[old..]);
    std::fs::write(&path, &cut).expect("the cut image");
    let refused = Vhd::open(storage(&path, Access::ReadOnly)).err();
    assert!(matches!(refused, Some(ImageError::NotThis(_))));
    let report = check(&path, Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed), (1, 1));
    let mut disk = drive(&path, Access::ReadOnly);
    assert_eq!(disk.size(), BLOCK);
    assert!(disk.read(0, BLOCK as usize).expect("read") == pattern(1, BLOCK as usize));
}

/// Cuts the power everywhere while a fixed image grows: read-only, opened for writing and by
/// QEMU it is the disk of the old or the new size, and nothing of a footer is in it.
#[test]
fn a_fixed_image_whose_growing_was_cut_off() {
    let (old, new) = (40 * 512, 100 * 512);
    let memory = MemStorage::default();
    let options = CreateOptions::new(old as u64, Shape::Fixed).expect("options");
    Vhd::create(&memory, &options).expect("create");
    memory.write_at(0, &pattern(3, old)).expect("write");
    let journal = Journal::new(vec![SparseBytes::of(&memory.bytes())]);
    Vhd::grow(&*journal.storages()[0], None, new as u64).expect("grow");
    let folder = folder();
    let [path, raw] = ["a.vhd", "a.raw"].map(|n| folder.path().join(n));
    let [from, to] = [&path, &raw].map(|p| p.to_str().expect("a path"));
    let is_whole = |bytes: &[u8]| {
        assert!(bytes.len() == old || bytes.len() == new, "{} bytes", bytes.len());
        assert!(bytes[..old] == pattern(3, old) && bytes[old..].iter().all(|b| *b == 0));
    };
    let recording = journal.recording();
    let (mut cuts, mut sizes) = (recording.cuts(), [0, 0]);
    while cuts.step() {
        for choice in cuts.choices(Effort { all: 64, sample: 0 }, 1) {
            std::fs::write(&path, cuts.state(&choice)[0].to_vec()).expect("the cut image");
            for access in [Access::ReadOnly, Access::ReadWrite] {
                let mut disk = drive(&path, access);
                let size = disk.size() as usize;
                is_whole(&disk.read(0, size).expect("read"));
                sizes[usize::from(size == new)] += 1;
            }
            let mended = check(&path, Repair::All);
            assert_eq!(mended.corruptions, mended.corruptions_fixed);
            assert_clean(&path);
            qemu("qemu-img", &["convert", "-f", "vpc", "-O", "raw", from, to]);
            is_whole(&std::fs::read(&raw).expect("the disk"));
        }
    }
    assert!(sizes[0] > 4 && sizes[1] > 4, "{sizes:?}");
}

#[test]
fn overlapping_blocks_are_only_read() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    three_blocks(&path);
    let mut bytes = std::fs::read(&path).expect("the image");
    bytes.copy_within(1536..1540, 1540);
    std::fs::write(&path, bytes).expect("the image");
    let report = check(&path, Repair::All);
    assert!(report.corruptions > report.corruptions_fixed, "{report:?}");
    let refused = Vhd::open(storage(&path, Access::ReadWrite)).err().expect("refused");
    assert!(refused.to_string().contains("overlaps"), "{refused}");
    let mut disk = drive(&path, Access::ReadOnly);
    assert!(disk.read(BLOCK, 8192).expect("read") == disk.read(0, 8192).expect("read"));
    let top = open_vhd(&path, Access::ReadOnly) as Arc<dyn Format>;
    let refused = Driver::new(vec![top]).write(0, &[0; 512]).expect_err("read-only");
    assert!(matches!(refused, ImageError::ReadOnly));
    let storage: Arc<dyn Storage> = storage(&path, Access::ReadOnly);
    assert_eq!(storage.size().expect("a size") % 512, 0);
}
