//! Compressed clusters that we write are what QEMU reads.
use std::sync::Arc;

use blktap::formats::Format;
use blktap::formats::qcow2::{Qcow2, Qcow2Options};
use blktap::storage::{Cache, OpenOptions, open};

use crate::qemu::{Folder, assert_same, noise};

const SIZE: usize = (6 << 20) + 512;

/// Data of which some clusters cannot be made smaller.
fn data() -> Vec<u8> {
    let mut data: Vec<u8> = (0..SIZE).map(|i| (i / 3000) as u8).collect();
    let hard = noise(3, 1 << 20);
    data[1 << 20..2 << 20].copy_from_slice(&hard);
    data
}

#[test]
fn clusters_that_we_compress_are_read_by_qemu() {
    let folder = Folder::new();
    let data = data();
    for (number, options) in [
        "compat=1.1",
        "compression_type=zstd",
        "compat=0.10,cluster_size=4k",
        "cluster_size=2M",
        "refcount_bits=1,cluster_size=16k",
        "extended_l2=on,compression_type=zstd",
        "cluster_size=512",
    ]
    .into_iter()
    .enumerate()
    {
        let image = format!("{number}.qcow2");
        folder.img(&format!("create -q -f qcow2 -o {options} {image} {SIZE}"));
        let file = open(&OpenOptions::new(folder.path(&image)).cache(Cache::Unsafe)).expect("open");
        let qcow2 = Qcow2::open(Arc::new(file), None, &Qcow2Options::default()).expect("open");
        let cluster = qcow2.cluster() as usize;
        let half = SIZE / 2 / cluster * cluster;
        let write = |from: usize, part: &[u8]| {
            for (i, bytes) in part.chunks(cluster).enumerate() {
                qcow2.write_compressed((from + i * cluster) as u64, bytes).expect("write");
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| write(0, &data[..half]));
            scope.spawn(|| write(half, &data[half..]));
        });
        qcow2.close().expect("close");
        drop(qcow2);
        folder.check(&image);
        assert_same(&folder.bytes(&image), &data, options);
        let size = std::fs::metadata(folder.path(&image)).expect("metadata").len();
        let usual = !options.contains("cluster_size");
        assert!(!usual || size < 4 << 20, "{options}: {size} bytes");
    }
}
