//! An image whose every byte is known.

use std::ops::Range;
use std::path::{Path, PathBuf};

/// A raw image and what it must hold.
pub struct Image {
    path: PathBuf,
    model: Vec<u8>,
}

/// The byte at `at` of a pattern.
pub fn pattern(seed: u64, at: u64) -> u8 {
    let mixed = (at / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0x2545_f491);
    (mixed.rotate_left((at % 8) as u32 * 8) >> 24) as u8
}

/// `len` bytes of a pattern.
pub fn patterned(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| pattern(seed, at)).collect()
}

impl Image {
    /// Makes a file of `len` bytes of a pattern.
    pub fn new(path: &Path, len: usize) -> Image {
        let model = patterned(7, len);
        std::fs::write(path, &model).unwrap();
        Image { path: path.to_owned(), model }
    }
    pub fn path(&self) -> &Path {
        &self.path
    }
    pub fn model(&self) -> &[u8] {
        &self.model
    }
    /// What was written and answered as done.
    pub fn wrote(&mut self, at: usize, data: &[u8]) {
        self.model[at..at + data.len()].copy_from_slice(data);
    }
    /// Compares all but `free`, which may hold anything; says where it differs first.
    pub fn verify_except(&self, free: &[Range<usize>]) -> Result<(), String> {
        let found = std::fs::read(&self.path).map_err(|e| e.to_string())?;
        if found.len() != self.model.len() {
            return Err(format!("{} bytes instead of {}", found.len(), self.model.len()));
        }
        let differs =
            |i: &usize| found[*i] != self.model[*i] && !free.iter().any(|f| f.contains(i));
        match (0..found.len()).find(differs) {
            Some(i) => Err(format!("byte {i} is {} instead of {}", found[i], self.model[i])),
            None => Ok(()),
        }
    }
    pub fn verify(&self) -> Result<(), String> {
        self.verify_except(&[])
    }
    pub fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()[range].to_vec()
    }
}
