//! Memory that another domain can write at any time.
// Address arithmetic on shared memory is this module's whole purpose.
#![allow(unsafe_code)]

use core::sync::atomic::AtomicU32;

/// A run of bytes shared with another domain.
///
/// No reference to the bytes is ever made: header words are atomics, everything else is copied
/// in or out by offset.
///
/// # Safety
/// `base()` is valid for reads and writes of `len()` bytes for as long as the value lives, is
/// aligned to 4096 bytes, does not move, and is never the target of a Rust reference other
/// than to atomics. The other side may change the bytes at any time.
pub unsafe trait SharedMem {
    /// First byte; aligned to [`PAGE_SIZE`](crate::PAGE_SIZE).
    fn base(&self) -> *mut u8;
    /// Length in bytes, a multiple of the page size.
    fn len(&self) -> usize;
    /// Whether there is no memory at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The header word at `offset`. Panics if it is out of range or not aligned to 4: offsets are
    /// the program's own and never come from the other side.
    fn word(&self, offset: usize) -> &AtomicU32;
    /// Copies bytes out. Panics if the range is out of bounds.
    fn read(&self, offset: usize, into: &mut [u8]);
    /// Copies bytes in. Panics if the range is out of bounds.
    fn write(&self, offset: usize, from: &[u8]);
}
