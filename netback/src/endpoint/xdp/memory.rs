//! Memory that is shared with the kernel: the rings of a socket, and the frames that they name.
// It is reached by address: the kernel writes it behind the compiler's back.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, copy_nonoverlapping, null_mut};
use std::sync::atomic::AtomicU32;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A mapping. No reference to its bytes is ever made, but for words that are atomics: bytes are copied
/// in and out, and what does not lie in it is refused.
pub(super) struct Memory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that belongs to this value; `&self` gives out atomics and copies alone.
unsafe impl Send for Memory {}

impl Memory {
    /// Whole pages of zeros.
    pub(super) fn zeroed(len: usize) -> io::Result<Memory> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: the kernel chooses where.
        let base = unsafe { mmap_anonymous(null_mut(), len, access, flags)? };
        Memory::at(base, len)
    }

    /// What a descriptor has at `offset`.
    pub(super) fn of(fd: BorrowedFd<'_>, len: usize, offset: u64) -> io::Result<Memory> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: the kernel chooses where.
        let base = unsafe { mmap(null_mut(), len, access, flags, fd, offset)? };
        Memory::at(base, len)
    }

    fn at(base: *mut c_void, len: usize) -> io::Result<Memory> {
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Memory { base, len })
    }

    /// Its address, for the kernel.
    pub(super) fn address(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    /// Its length in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The address of `len` bytes from `at` on, if they lie in it.
    fn place(&self, at: usize, len: usize) -> Option<*mut u8> {
        let fits = at.checked_add(len)? <= self.len;
        // SAFETY: within the mapping.
        fits.then(|| unsafe { self.base.as_ptr().add(at) })
    }

    /// The word at `at`.
    pub(super) fn word(&self, at: usize) -> Option<&AtomicU32> {
        let word: *mut u32 = self.place(at, size_of::<u32>())?.cast();
        // SAFETY: aligned and within the mapping, which lives as long as `self`; the kernel and this
        // process use such words as atomics alone.
        word.is_aligned().then(|| unsafe { AtomicU32::from_ptr(word) })
    }

    /// The value at `at`.
    pub(super) fn get<T: FromBytes>(&self, at: usize) -> Option<T> {
        let from: *mut T = self.place(at, size_of::<T>())?.cast();
        // SAFETY: within the mapping; any bytes are a `T`. Nobody writes what a ring's indices say is
        // this side's.
        Some(unsafe { from.read_unaligned() })
    }

    /// Puts a value to `at`; whether it lies in the memory.
    #[must_use]
    pub(super) fn put<T: IntoBytes + Immutable>(&self, at: usize, value: &T) -> bool {
        self.write(at, value.as_bytes())
    }

    /// Copies bytes to `at`; whether they lie in the memory.
    #[must_use]
    pub(super) fn write(&self, at: usize, from: &[u8]) -> bool {
        let Some(to) = self.place(at, from.len()) else { return false };
        // SAFETY: both are as long as `from`; a slice never lies in this memory.
        unsafe { copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        true
    }

    /// Copies bytes from `at`; whether they lie in the memory.
    #[must_use]
    pub(super) fn read(&self, at: usize, into: &mut [u8]) -> bool {
        let Some(from) = self.place(at, into.len()) else { return false };
        // SAFETY: both are as long as `into`; a slice never lies in this memory.
        unsafe { copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        true
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by this value, and nothing that it gave out outlives it. The kernel has its own
        // hold on a socket's memory.
        let done = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(done.is_ok());
    }
}
