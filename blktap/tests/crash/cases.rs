//! The images that are put to the test.
mod qcow2;
mod vhd;

use std::sync::Arc;

use blktap::formats::{Format, ImageError, RawFormat};
use blktap::storage::Storage;

use crate::case::{Case, Layers};
use crate::own_format::Sparse;

/// Runs of each case.
pub const ROUNDS: usize = 4;
/// Cuts at least.
pub const CUTS: u64 = 10_000;

/// All of them, or those whose names contain `RINGBACK_TEST_CASE`.
pub fn all() -> Vec<Box<dyn Case>> {
    let mut cases = every();
    if let Ok(part) = std::env::var("RINGBACK_TEST_CASE") {
        cases.retain(|case| case.name().contains(&part));
    }
    cases
}

fn every() -> Vec<Box<dyn Case>> {
    use vhd::Kind::{Differencing, Dynamic, Fixed};
    let vhd =
        |kind, block, sectors| -> Box<dyn Case> { Box::new(vhd::VhdCase { kind, block, sectors }) };
    let qcow2 = |options, cluster, sectors, base| -> Box<dyn Case> {
        Box::new(qcow2::Qcow2Case::new(options, cluster, sectors, base))
    };
    vec![
        Box::new(Raw),
        Box::new(Own),
        vhd(Fixed, 512, 136),
        vhd(Dynamic, 4096, 136),
        vhd(Differencing, 4096, 136),
        vhd(Dynamic, 2 << 20, 8160),
        qcow2("", 512, 300, 0),
        qcow2("", 4096, 300, 200),
        qcow2("", 65536, 1500, 0),
        qcow2("compat=0.10", 1024, 300, 170),
        qcow2("refcount_bits=1", 512, 300, 0),
        qcow2("refcount_bits=64", 512, 300, 300),
        qcow2("extended_l2=on", 16384, 512, 300),
        qcow2("lazy_refcounts=on", 1024, 300, 0),
        qcow2("data_file_raw=on", 4096, 300, 0),
    ]
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
