//! Disks that become larger and smaller.
use blktap::formats::ImageError;
use blktap::formats::qcow2::bitmaps;
use blktap::formats::qcow2::header::Header;
use blktap::formats::qcow2::resize::{Around, Below, Shrink, resize};

use crate::check::{KINDS, busy, same_as_qemu};
use crate::qemu::{Image, run_well};

fn to(image: &Image, size: u64, shrink: Shrink) -> Result<(), ImageError> {
    let memory = image.memory();
    let result = resize(&memory, Around::default(), size, shrink);
    image.put(&memory);
    result
}

#[test]
fn a_resized_disk_keeps_its_data_and_grows_by_zeroes() {
    for options in KINDS {
        let image = busy(options);
        let mut disk = image.disk();
        let snapshot = image.snapshot("one");
        let snapshots = Header::read(&image.memory()).expect("a header").snapshot_count;
        if options.contains("0.10") && snapshots > 0 {
            assert!(to(&image, 48 << 20, Shrink::Refuse).is_err(), "{options}");
            continue;
        }
        for size in [48 << 20, 3 << 20, 20 << 20, (5 << 20) + 512, 5 << 20, 9 << 20, 600 << 20] {
            let size: u64 = size;
            if size < disk.len() as u64 {
                assert!(to(&image, size, Shrink::Refuse).is_err());
            }
            to(&image, size, Shrink::Allow).expect(options);
            disk.resize(size as usize, 0);
            let report = same_as_qemu(&image, &format!("{options} at {size}"));
            assert!(report.is_clean(), "{options} at {size}: {report:#?}");
            if size < 100 << 20 {
                assert!(image.disk() == disk, "{options} at {size}: the data have changed");
                // QEMU shows a snapshot in the size of the disk.
                let now = image.snapshot("one");
                let both = now.iter().flatten().zip(snapshot.iter().flatten());
                assert_eq!(now.is_some(), snapshots > 0);
                assert!(both.into_iter().all(|(a, b)| a == b), "{options} at {size}: snapshot");
            }
        }
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_and_change_nothing() {
    let image = Image::create("cluster_size=512", "1M");
    let before = image.bytes();
    for size in [1000, u64::MAX - 511, 1 << 50] {
        assert!(to(&image, size, Shrink::Allow).is_err(), "{size}");
        assert!(image.bytes() == before, "{size}");
    }
}

/// A backing file as its raw bytes.
struct Base(Vec<u8>);

impl Below for Base {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let start = (offset as usize).min(self.0.len());
        let n = into.len().min(self.0.len() - start);
        into[..n].copy_from_slice(&self.0[start..start + n]);
        into[n..].fill(0);
        Ok(())
    }
}

#[test]
fn what_is_added_hides_a_longer_backing_file() {
    for options in ["", "extended_l2=on", "cluster_size=512"] {
        let base = Image::create("", "8M");
        base.io(&["write -P 77 0 8M"]);
        let comma = if options.is_empty() { "" } else { "," };
        let backing = format!("backing_file={},backing_fmt=qcow2{comma}{options}", base.name());
        for odd in [0, 512, 33_280] {
            let image = Image::create(&backing, &format!("{}", (1 << 20) + odd));
            let mut disk = image.disk();
            let memory = image.memory();
            let none = resize(&memory, Around::default(), 6 << 20, Shrink::Refuse);
            assert!(none.is_err(), "the backing file is needed");
            let below = Base(base.disk());
            let around = Around { below: Some(&below), data_file: None };
            resize(&memory, around, 9 << 20, Shrink::Refuse).expect("grow");
            image.put(&memory);
            disk.resize(9 << 20, 0);
            assert!(same_as_qemu(&image, options).is_clean());
            assert!(image.disk() == disk, "{options}, {odd}");
        }
    }
}

#[test]
fn bitmaps_are_fitted_to_the_disk() {
    let image = Image::create("cluster_size=4k", "64M");
    run_well("qemu-img", &["bitmap", "--add", "-g", "512", image.name(), "b"]);
    image.io(&["write 1M 64k", "write 50M 1M"]);
    for size in [900 << 20, 40 << 20, 64 << 20] {
        to(&image, size, Shrink::Allow).expect("resize");
        assert!(same_as_qemu(&image, "resized").is_clean());
        let memory = image.memory();
        let header = Header::read(&memory).expect("a header");
        let bits = bitmaps::read(&memory, &header, "b").expect("a bitmap");
        assert!(bits.get((1 << 20) / 512) && !bits.get(0));
        assert_eq!(bits.disk_size(), size);
        let old = (50 << 20) / 512;
        assert_eq!(old < bits.len() && bits.get(old), size == 900 << 20);
    }
}

#[test]
fn data_files_are_resized_with_their_image() {
    for raw in ["off", "on"] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let data = dir.path().join("data");
        let data_name = data.to_str().expect("UTF-8");
        let options = format!("data_file={data_name},data_file_raw={raw}");
        let image = Image::create(&options, "1049088");
        image.io(&["write -P 5 0 1049088"]);
        let mut disk = image.disk();
        let memory = image.memory();
        let storage = blktap::storage::MemStorage::new(std::fs::read(&data).expect("the data"));
        let around = Around { data_file: Some(&storage), below: None };
        for size in [1 << 20, 4 << 20] {
            resize(&memory, around, size, Shrink::Allow).expect("resize");
            image.put(&memory);
            std::fs::write(&data, storage.bytes()).expect("write the data");
            disk.resize(size as usize, 0);
            assert!(same_as_qemu(&image, "with a data file").is_clean());
            assert!(image.disk() == disk, "raw {raw}, {size}");
        }
    }
}
