//! An image whose every byte is known.

use std::ops::Range;
use std::path::{Path, PathBuf};

/// A raw image and what it must hold.
pub struct Image {
    path: PathBuf,
    model: Vec<u8>,
}

/// `len` bytes of a pattern, in which no two words are alike.
pub fn patterned(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
    for word in 1..=len.div_ceil(8) as u64 {
        let mixed = (word ^ seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = mixed ^ mixed >> 32;
        bytes.extend_from_slice(&mixed.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
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
    /// Compares all but one range.
    pub fn verify_but(&self, free: Range<usize>) -> Result<(), String> {
        self.verify_except(std::slice::from_ref(&free))
    }
    pub fn verify(&self) -> Result<(), String> {
        self.verify_except(&[])
    }
    pub fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()[range].to_vec()
    }
}
