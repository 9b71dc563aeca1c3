//! The images that are put to the test.
mod qcow2;
mod vhd;

use std::sync::Arc;

use blktap::formats::{Format, ImageError, RawFormat};
use blktap::storage::Storage;

use crate::case::{Case, Layers};
use crate::own_format::Sparse;

/// Runs of each case.
pub const ROUNDS: usize = 3;
/// Cuts at least.
pub const CUTS: u64 = 100_000;

/// All of them, or those whose names contain `RINGBACK_TEST_CASE`.
pub fn all() -> Vec<Box<dyn Case>> {
    let mut cases = every();
    if let Ok(part) = std::env::var("RINGBACK_TEST_CASE") {
        cases.retain(|case| case.name().contains(&part));
    }
    cases
}

/// Whether none was left out.
pub fn are_all() -> bool {
    std::env::var("RINGBACK_TEST_CASE").is_err()
}

fn every() -> Vec<Box<dyn Case>> {
    use qcow2::Content::{Backing, Empty};
    use vhd::Kind::{Differencing, Dynamic, Fixed};
    vec![
        Box::new(Raw),
        Box::new(Own),
        vhd(Fixed, 512, 136),
        vhd(Dynamic, 4096, 136),
        vhd(Differencing, 4096, 136),
        vhd(Dynamic, 2 << 20, 8160),
        qcow2("", 512, 300, Empty),
        qcow2("", 4096, 300, Backing(200)),
        qcow2("", 65536, 1500, Empty),
        qcow2("compat=0.10", 1024, 300, Backing(170)),
        qcow2("refcount_bits=1", 512, 300, Empty),
        qcow2("refcount_bits=64", 512, 300, Backing(300)),
        qcow2("extended_l2=on", 16384, 512, Backing(300)),
        qcow2("lazy_refcounts=on", 1024, 300, Empty),
        qcow2("data_file_raw=on", 4096, 300, Empty),
    ]
}

/// Images that get bitmaps.
pub fn with_bitmaps() -> Vec<Box<dyn Case>> {
    use qcow2::Content::{Backing, Empty};
    vec![
        qcow2("", 1024, 20_000, Empty),
        qcow2("", 4096, 300, Backing(200)),
        qcow2("lazy_refcounts=on", 65536, 1500, Empty),
    ]
}

/// One image for each option of QEMU's, and what else is to be compared with a model.
pub fn matrix() -> Vec<Box<dyn Case>> {
    use qcow2::Content::{Backing, Compressed, Converted, Empty};
    let mut rows = all();
    rows.push(qcow2("", 2 << 20, 10_000, Empty));
    for cluster in [512, 1024, 4096, 65536] {
        let sectors = (cluster / 512 * 5 / 2).max(400);
        for content in [Empty, Backing(300), Converted(300), Compressed(300)] {
            rows.push(qcow2("", cluster, sectors, content));
            rows.push(qcow2("compat=0.10", cluster, sectors, content));
        }
    }
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        rows.push(qcow2(&format!("refcount_bits={bits}"), 1024, 500, Empty));
        rows.push(qcow2(&format!("refcount_bits={bits}"), 4096, 500, Compressed(400)));
    }
    let others = [
        "extended_l2=on",
        "extended_l2=on,preallocation=metadata",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
    ];
    for options in others {
        rows.push(qcow2(options, 16384, 700, Empty));
        rows.push(qcow2(options, 65536, 700, Converted(500)));
    }
    for content in [Backing(300), Compressed(300)] {
        rows.push(qcow2("extended_l2=on", 32768, 700, content));
        rows.push(qcow2("compression_type=zstd", 16384, 700, content));
    }
    for content in [Empty, Converted(300)] {
        rows.push(qcow2("data_file_raw=off", 4096, 400, content));
        rows.push(qcow2("data_file_raw=on", 65536, 400, content));
    }
    rows
}

fn vhd(kind: vhd::Kind, block: u32, sectors: u64) -> Box<dyn Case> {
    Box::new(vhd::VhdCase { kind, block, sectors })
}

fn qcow2(options: &str, cluster: u64, sectors: u64, content: qcow2::Content) -> Box<dyn Case> {
    Box::new(qcow2::Qcow2Case::new(options, cluster, sectors, content))
}

/// Plain bytes.
struct Raw;

impl Case for Raw {
    fn name(&self) -> String {
        "raw".into()
    }
    fn sectors(&self) -> u64 {
        64
    }
    fn cluster(&self) -> u64 {
        1
    }
    fn create(&self, files: &[Arc<dyn Storage>]) -> Result<(), ImageError> {
        files[0].set_size(self.sectors() * 512).map_err(ImageError::io("make the file"))
    }
    fn open(&self, files: &[Arc<dyn Storage>]) -> Result<Layers, ImageError> {
        let raw = RawFormat::new(Arc::clone(&files[0])).map_err(ImageError::io("open"))?;
        Ok(vec![Arc::new(raw)])
    }
}

/// The format of the example.
struct Own;

impl Case for Own {
    fn name(&self) -> String {
        "own format".into()
    }
    fn sectors(&self) -> u64 {
        1024
    }
    fn cluster(&self) -> u64 {
        128
    }
    fn create(&self, files: &[Arc<dyn Storage>]) -> Result<(), ImageError> {
        Sparse::create(&*files[0], self.sectors() * 512)
    }
    fn open(&self, files: &[Arc<dyn Storage>]) -> Result<Layers, ImageError> {
        let sparse: Arc<dyn Format> = Sparse::open(Arc::clone(&files[0]))?;
        Ok(vec![sparse])
    }
}
