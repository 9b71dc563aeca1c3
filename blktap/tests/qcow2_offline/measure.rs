//! The sizes that `qemu-img measure` says.
use blktap::formats::qcow2::entry::Layout;
use blktap::formats::qcow2::header::{Header, Version};
use blktap::formats::qcow2::measure::{Preallocated, measure, measure_bitmaps, measure_raw};
use serde_json::Value;

use crate::qemu::{Image, run_well};

fn theirs(args: &[&str]) -> Value {
    let mut all = vec!["measure", "--output=json"];
    all.extend(args);
    serde_json::from_str(&run_well("qemu-img", &all)).expect("JSON")
}

#[test]
fn empty_disks_of_all_sizes_measure_as_by_qemu() {
    for size in [0, 512, 65536, (1 << 20) + 512, 10 << 30, (1 << 40) - 1024, 3 << 40] {
        let name = format!("{size}");
        let json = theirs(&["--size", &name, "-O", "raw"]);
        let raw = measure_raw(size);
        assert_eq!(json["required"], raw.required);
        assert_eq!(json["fully-allocated"], raw.fully_allocated);
        for (cluster_bits, refcount_order, extended, falloc) in [
            (16, 4, false, false),
            (16, 4, true, false),
            (9, 6, false, false),
            (12, 0, false, true),
            (21, 6, false, false),
            (21, 3, true, true),
        ] {
            let layout = Layout {
                cluster_bits,
                refcount_order,
                extended,
                data_file: false,
                version: Version::V3,
            };
            let (extended_l2, preallocation, kind) = (
                if extended { "on" } else { "off" },
                if falloc { "falloc" } else { "off" },
                if falloc { Preallocated::Data } else { Preallocated::Nothing },
            );
            let (cluster, refcounts) = (1u64 << cluster_bits, 1 << refcount_order);
            let options = format!(
                "cluster_size={cluster},refcount_bits={refcounts},extended_l2={extended_l2},\
                 preallocation={preallocation}"
            );
            let ours = measure(&layout, size, 0, kind);
            let args = ["measure", "--output=json", "--size", &name, "-O", "qcow2", "-o", &options];
            let out = crate::qemu::run("qemu-img", &args);
            assert_eq!(ours.is_ok(), out.status.success(), "{options}, {size}");
            let Ok(ours) = ours else { continue };
            let json: Value = serde_json::from_slice(&out.stdout).expect("JSON");
            assert_eq!(json["required"], ours.required, "{options}, {size}");
            assert_eq!(json["fully-allocated"], ours.fully_allocated, "{options}, {size}");
        }
    }
}

#[test]
fn data_and_bitmaps_count() {
    let image = Image::create("", "100M");
    image.io(&["write 0 1M", "write 5000k 100", "write 50M 3M"]);
    for (name, granularity) in [("b", "512"), ("another", "65536")] {
        run_well("qemu-img", &["bitmap", "--add", "-g", granularity, image.name(), name]);
    }
    let layout = Header::read(&image.memory()).expect("a header").layout();
    let data = (16 + 1 + 48) * 65536;
    let ours = measure(&layout, 100 << 20, data, Preallocated::Nothing).expect("a size");
    let json = theirs(&["-O", "qcow2", "-f", "qcow2", image.name()]);
    assert_eq!(json["required"], ours.required);
    assert_eq!(json["fully-allocated"], ours.fully_allocated);
    let bitmaps = measure_bitmaps(&layout, 100 << 20, [("b", 9), ("another", 16)]);
    assert_eq!(json["bitmaps"], bitmaps);
}
