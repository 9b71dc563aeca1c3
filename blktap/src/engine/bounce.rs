//! Aligned memory for requests whose own memory direct I/O cannot take.
// Buffers are handed to the kernel and copied by address.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

/// Bytes of one bounce buffer; longer requests pass through it in pieces.
pub(super) const BOUNCE_LEN: usize = 256 << 10;

/// Alignment of every bounce buffer.
const ALIGN: usize = 4096;

/// A fixed number of buffers, allocated at once and touched only when used.
pub(super) struct BouncePool {
    base: *mut u8,
    layout: Layout,
    free: Vec<u16>,
}

impl BouncePool {
    pub(super) fn new(buffers: u16) -> Self {
        let layout = Layout::from_size_align(BOUNCE_LEN * usize::from(buffers.max(1)), ALIGN)
            .expect("a constant layout");
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        BouncePool { base, layout, free: (0..buffers).collect() }
    }

    pub(super) fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    pub(super) fn give_back(&mut self, buffer: u16) {
        self.free.push(buffer);
    }

    pub(super) fn address(&self, buffer: u16) -> *mut u8 {
        // SAFETY: the numbers given out are below the number of buffers.
        unsafe { self.base.add(usize::from(buffer) * BOUNCE_LEN) }
    }
}

impl Drop for BouncePool {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base, self.layout) };
    }
}

/// Which way [`copy`] goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the request's memory into the bounce buffer.
    In,
    /// From the bounce buffer into the request's memory.
    Out,
}

/// Copies up to `len` bytes between `iovs` (from their start) and `buffer`.
///
/// # Safety
/// `buffer` has `len` bytes, and the memory that `iovs` name is valid in the given direction.
pub(super) unsafe fn copy(iovs: &[libc::iovec], buffer: *mut u8, len: usize, way: Way) {
    let mut at = 0;
    for iov in iovs {
        let n = iov.iov_len.min(len - at);
        let theirs = iov.iov_base.cast::<u8>();
        // SAFETY: by the caller's promise; at + n <= len.
        unsafe {
            match way {
                Way::In => std::ptr::copy(theirs, buffer.add(at), n),
                Way::Out => std::ptr::copy(buffer.add(at), theirs, n),
            }
        }
        at += n;
        if at == len {
            return;
        }
    }
}
