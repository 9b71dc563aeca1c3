//! The images that are put to the test.
mod vhd;

use std::sync::Arc;

use blktap::formats::{Format, ImageError, RawFormat};
use blktap::storage::Storage;

use crate::case::{Case, Image, Plain};
use crate::own_format::Sparse;

/// Runs of each case.
pub const ROUNDS: usize = 4;
/// Cuts at least.
pub const CUTS: u64 = 10_000;

/// All of them.
pub fn all() -> Vec<Box<dyn Case>> {
    use vhd::Kind::{Differencing, Dynamic, Fixed};
    let vhd =
        |kind, block, sectors| -> Box<dyn Case> { Box::new(vhd::VhdCase { kind, block, sectors }) };
    vec![
        Box::new(Raw),
        Box::new(Own),
        vhd(Fixed, 512, 136),
        vhd(Dynamic, 4096, 136),
        vhd(Differencing, 4096, 136),
        vhd(Dynamic, 2 << 20, 8160),
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
    fn open(&self, files: &[Arc<dyn Storage>]) -> Result<Box<dyn Image>, ImageError> {
        let raw = RawFormat::new(Arc::clone(&files[0])).map_err(ImageError::io("open"))?;
        Ok(Box::new(Plain(vec![Arc::new(raw)])))
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
    fn open(&self, files: &[Arc<dyn Storage>]) -> Result<Box<dyn Image>, ImageError> {
        let sparse: Arc<dyn Format> = Sparse::open(Arc::clone(&files[0]))?;
        Ok(Box::new(Plain(vec![sparse])))
    }
}
