//! The memory that is shared with a switch: a memfd of this process's own, with the rings and the
//! packets' buffers of one connection, and nothing else.
// Mapping memory is this module's whole purpose.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use rings::mem::SharedMem;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vhost::VhostUserMemoryRegionInfo;

use super::ring::{self, Place, SIZE};
use crate::endpoint::vnet::Size;
use crate::frame::MAX_FRAME;

/// What each frame has before it.
pub(super) const HEADER: Size = Size::Long;
/// Most bytes of a frame with its header: what a buffer is lent with.
pub(super) const LONGEST: usize = HEADER.bytes() + MAX_FRAME;
/// Distance of two buffers: whole cache lines, and no power of two, so that the headers do not all
/// meet in the same lines of the cache.
const STRIDE: usize = 65_600;
const _: () = assert!(STRIDE >= LONGEST && STRIDE.is_multiple_of(64));
const BUFFERS: usize = STRIDE * SIZE as usize;
/// Two rings with their buffers.
const PAIR: usize = 2 * (ring::BYTES + BUFFERS);
const _: () = assert!(PAIR.is_multiple_of(rings::PAGE_SIZE));
/// What the switch calls the first byte, as an address of the guest's and of this process's. It is
/// made up: where the memory is mapped here concerns nobody.
const ADDRESS: u64 = 1 << 32;

/// Which of a pair's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// From the switch: virtio-net's receiveq.
    Receive,
    /// To the switch: its transmitq.
    Transmit,
}

impl Way {
    /// The number of the ring in vhost-user's messages.
    pub(super) fn number(self, pair: usize) -> usize {
        2 * pair + usize::from(self == Way::Transmit)
    }
}

/// Where a ring lies.
pub(super) fn place(pair: usize, way: Way) -> Place {
    let half = PAIR / 2;
    let ring = Way::number(way, pair) * half;
    Place { ring, buffers: ring + ring::BYTES, stride: STRIDE, address: ADDRESS }
}

/// See the module. The file cannot shrink, so that no access ends in SIGBUS; what the switch does to
/// the bytes is its own affair.
pub(super) struct Memory {
    file: OwnedFd,
    base: *mut u8,
    len: usize,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("len", &self.len).finish_non_exhaustive()
    }
}

// SAFETY: reached only through SharedMem's atomics and copies.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

// SAFETY: a mapping of whole pages, which stays where it is until it is dropped and to whose bytes no
// reference is made.
unsafe impl SharedMem for Memory {
    fn base(&self) -> *mut u8 {
        self.base
    }
    fn len(&self) -> usize {
        self.len
    }
}

impl Memory {
    /// For so many pairs of rings. Pages that no packet has used are none.
    pub(super) fn new(pairs: usize) -> io::Result<Memory> {
        let len = pairs.max(1) * PAIR;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("ringback-vhost-user", flags)?;
        ftruncate(&file, len as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { mmap(ptr::null_mut(), len, access, MapFlags::SHARED, &file, 0) }?;
        Ok(Memory { file, base: base.cast(), len })
    }

    /// What the switch is told of it.
    pub(super) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: ADDRESS,
            memory_size: self.len as u64,
            userspace_addr: ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; whoever uses it keeps the value.
        if let Err(e) = unsafe { munmap(self.base.cast(), self.len) } {
            tracing::debug!("unmapping {} bytes: {e}", self.len);
        }
    }
}
