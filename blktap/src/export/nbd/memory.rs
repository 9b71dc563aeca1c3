//! Memory for payload: whole pages at a page's address, so that direct I/O takes them as they
//! are.

use std::io;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes and alignment of a page.
pub const PAGE: usize = 4096;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// A run of pages.
#[derive(Default)]
pub struct Memory {
    pages: Box<[Page]>,
}

impl Memory {
    /// At least `len` zeroed bytes.
    pub fn new(len: usize) -> io::Result<Self> {
        let pages = <[Page]>::new_box_zeroed_with_elems(len.div_ceil(PAGE));
        Ok(Memory { pages: pages.map_err(|_| io::ErrorKind::OutOfMemory)? })
    }
    /// Bytes.
    pub fn len(&self) -> usize {
        self.pages.len() * PAGE
    }
    /// The bytes; nobody else may be writing them.
    pub fn bytes(&self) -> &[u8] {
        self.pages.as_bytes()
    }
    /// As [`bytes`](Self::bytes).
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.pages.as_mut_bytes()
    }
}
