//! /dev/xen/gntalloc: granting pages of this domain.
// Granted pages are named by address.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ptr;

use rings::PAGE_SIZE;
use rings::mem::SharedMem;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::ioctl::{self, AllocHead, IndexCount};
use crate::{Access, DomId, GrantRef, GrantedPages};

/// Pages granted to one peer. The kernel ends the access when the last mapping at either end is
/// gone.
pub(super) struct Granted {
    device: File,
    index: u64,
    base: *mut u8,
    refs: Vec<GrantRef>,
}

// SAFETY: plain memory, reached through SharedMem's atomics and copies.
unsafe impl Send for Granted {}
// SAFETY: as above.
unsafe impl Sync for Granted {}

impl Granted {
    pub(super) fn alloc(
        device: File,
        peer: DomId,
        pages: usize,
        access: Access,
    ) -> io::Result<Granted> {
        if pages == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Two words of head, then half a word a reference, at least what C's structure has.
        let mut words = vec![0u64; 2 + pages.div_ceil(2)];
        let head: *mut AllocHead = words.as_mut_ptr().cast();
        let flags = if access == Access::ReadWrite { ioctl::ALLOC_WRITABLE } else { 0 };
        // SAFETY: the vector is aligned to 8 and has room for the head and `pages` references.
        let (index, refs) = unsafe {
            head.write(AllocHead { domid: peer, flags, count: pages as u32, index: 0 });
            ioctl::call(&device, ioctl::GNTALLOC_ALLOC, head)?;
            let tail: *const GrantRef = head.add(1).cast();
            ((*head).index, (0..pages).map(|i| tail.add(i).read()).collect())
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(ptr::null_mut(), pages * PAGE_SIZE, protection, MapFlags::SHARED, &device, index)
        };
        match base {
            Ok(base) => Ok(Granted { device, index, base: base.cast(), refs }),
            Err(e) => {
                let range = IndexCount { index, count: pages as u32, pad: 0 };
                ioctl::gntalloc_dealloc(&device, range)?;
                Err(e.into())
            }
        }
    }
}

// SAFETY: the mapping lives as long as the value, does not move, and is aligned to pages.
unsafe impl SharedMem for Granted {
    fn base(&self) -> *mut u8 {
        self.base
    }
    fn len(&self) -> usize {
        self.refs.len() * PAGE_SIZE
    }
}

impl GrantedPages for Granted {
    fn refs(&self) -> &[GrantRef] {
        &self.refs
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        let count = self.refs.len();
        // SAFETY: the owner of the mapping, and the last use of it.
        let unmapped = unsafe { munmap(self.base.cast(), count * PAGE_SIZE) };
        let range = IndexCount { index: self.index, count: count as u32, pad: 0 };
        let ended = ioctl::gntalloc_dealloc(&self.device, range);
        if let Err(e) = unmapped.map_err(io::Error::from).and(ended) {
            tracing::error!("cannot end {count} grants: {e}");
        }
    }
}

#[cfg(test)]
#[path = "gntalloc_tests.rs"]
mod tests;
