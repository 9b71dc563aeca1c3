//! Another parent, or none, with the power cut everywhere.

use std::time::{Duration, SystemTime};

use blktap::formats::vhd::{Kind, NewParent, Repair, Shape, Vhd};
use blktap::storage::Access;
use blktap::storage::record::{Effort, Journal, SparseBytes};

use super::{create, drive, folder, open_vhd, pattern, qemu, storage};

const SIZE: u64 = 4 << 20;
const AT: usize = 12288;

fn parent(name: &str, id: u8) -> NewParent {
    NewParent {
        id: Some([id; 16]),
        modified: SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30),
        relative: name.into(),
        absolute: format!("/images/{name}"),
    }
}

/// Whether the image at `path` names the new parent; it has what was written in either case.
fn is_new(path: &std::path::Path, access: Access, new: Option<&NewParent>, what: &[u8]) -> bool {
    let image = open_vhd(path, access);
    let named = image.parent().map(|parent| (parent.id, parent.names[0].1.clone()));
    let old = Some((Some([1; 16]), "./old.vhd".to_owned()));
    let wanted = new.map(|parent| (parent.id, format!("./{}", parent.relative)));
    assert!(named == old || named == wanted, "{named:?}");
    assert_eq!(named.is_some(), image.kind() == Kind::Differencing);
    drop(image);
    let read = drive(path, access).read(0, SIZE as usize).expect("read");
    assert!(read == what, "it reads otherwise");
    named == wanted
}

#[test]
fn a_parent_is_the_old_or_the_new_one_wherever_power_fails() {
    let folder = folder();
    let [path, raw] = ["a.vhd", "a.raw"].map(|name| folder.path().join(name));
    create(&path, SIZE, Shape::Differencing(parent("old.vhd", 1)));
    let mut disk = drive(&path, Access::ReadWrite);
    let text = pattern(1, 8192);
    disk.write(AT as u64, &text).expect("write");
    disk.flush().expect("flush");
    disk.close().expect("close");
    let mut expected = vec![0; SIZE as usize];
    expected[AT..AT + text.len()].copy_from_slice(&text);
    // What a discard may leave in a sector that is the parent's.
    let mut bytes = std::fs::read(&path).expect("the image");
    let found = bytes.windows(text.len()).position(|window| window == text).expect("the data");
    bytes[found - AT..found - AT + 512].fill(0x55);
    for new in [Some(parent("other.vhd", 2)), Some(parent("a much longer name.vhd", 3)), None] {
        let journal = Journal::new(vec![SparseBytes::of(&bytes)]);
        Vhd::set_parent(&*journal.storages()[0], new.as_ref()).expect("another parent");
        let recording = journal.recording();
        let (mut cuts, mut seen) = (recording.cuts(), [0, 0]);
        while cuts.step() {
            for choice in cuts.choices(Effort { all: 64, sample: 0 }, 1) {
                std::fs::write(&path, cuts.state(&choice)[0].to_vec()).expect("the cut image");
                let first = is_new(&path, Access::ReadOnly, new.as_ref(), &expected);
                let then = is_new(&path, Access::ReadWrite, new.as_ref(), &expected);
                assert_eq!(first, then, "read otherwise when it is written");
                seen[usize::from(first)] += 1;
                let file = storage(&path, Access::ReadWrite);
                let report = Vhd::check(&*file, Repair::All).expect("a check");
                assert_eq!(report.corruptions, report.corruptions_fixed, "{:?}", report.findings);
            }
        }
        assert!(seen[0] > 2 && seen[1] > 2, "{seen:?}");
        let file = storage(&path, Access::ReadWrite);
        let report = Vhd::check(&*file, Repair::Nothing).expect("a check");
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    }
    // Others do not look at bitmaps.
    let [from, to] = [&path, &raw].map(|p| p.to_str().expect("a path"));
    qemu("qemu-img", &["convert", "-f", "vpc", "-O", "raw", from, to]);
    assert!(std::fs::read(&raw).expect("the disk") == expected);
    // And what is written afterwards stays.
    let mut disk = drive(&path, Access::ReadWrite);
    disk.write(SIZE - 4096, &pattern(2, 4096)).expect("write");
    disk.close().expect("close");
    let mut disk = drive(&path, Access::ReadOnly);
    assert!(disk.read(AT as u64, text.len()).expect("read") == text);
    assert!(disk.read(SIZE - 4096, 4096).expect("read") == pattern(2, 4096));
}
