//! Memory that two processes share: sealed memfds and mappings of them.
// Mapping memory is this module's whole purpose.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;

use rings::PAGE_SIZE;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::Access;

/// A memfd of a fixed size. `sealed_later` leaves room for one more seal.
pub(super) fn memfd(name: &str, len: usize, later: SealLater) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, len as u64)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::fcntl_add_seals(
        &fd,
        match later {
            SealLater::Nothing => seals | SealFlags::SEAL,
            SealLater::Writing => seals,
        },
    )?;
    Ok(fd)
}

/// What is still to be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SealLater {
    /// All is done.
    Nothing,
    /// Writing, once its owner has mapped it.
    Writing,
}

/// Forbids new writable mappings, writes and holes, for every descriptor of the file. Fails
/// where its owner has sealed it otherwise meanwhile.
pub(super) fn seal_writing(fd: &OwnedFd) -> io::Result<()> {
    Ok(rustix::fs::fcntl_add_seals(fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)?)
}

/// A new open file description of the same file or pipe: flags set on one do not reach the
/// other.
pub(super) fn reopen(fd: &OwnedFd, flags: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?)
}

fn protection(access: Access) -> ProtFlags {
    match access {
        Access::ReadOnly => ProtFlags::READ,
        Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
    }
}

/// A mapping, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Region {
    base: *mut u8,
    len: usize,
}

// SAFETY: plain memory of this value, reached only by address.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps a whole file.
    pub(super) fn map(fd: &OwnedFd, len: usize, access: Access) -> io::Result<Region> {
        // SAFETY: a new mapping where the kernel likes; it collides with nothing.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, protection(access), MapFlags::SHARED, fd, 0)?
        };
        Ok(Region { base: base.cast(), len })
    }

    /// Address space for `pages` pages, nothing in it.
    pub(super) fn reserve(pages: usize) -> io::Result<Region> {
        let len = pages * PAGE_SIZE;
        // SAFETY: as in `map`.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        Ok(Region { base: base.cast(), len })
    }

    /// Puts `pages` pages of a file, from page `from` on, at page `at` of this region.
    pub(super) fn place(
        &mut self,
        at: usize,
        fd: &OwnedFd,
        from: usize,
        pages: usize,
        access: Access,
    ) -> io::Result<()> {
        assert!(at + pages <= self.len / PAGE_SIZE, "run of pages outside its region");
        // SAFETY: the range lies in this region, which nobody else uses yet (&mut self).
        unsafe {
            rustix::mm::mmap(
                self.base.add(at * PAGE_SIZE).cast(),
                pages * PAGE_SIZE,
                protection(access),
                MapFlags::SHARED | MapFlags::FIXED,
                fd.as_fd(),
                (from * PAGE_SIZE) as u64,
            )?
        };
        Ok(())
    }

    pub(super) fn base(&self) -> *mut u8 {
        self.base
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Copies between two regions. Both ranges must lie within; says whether they do.
    pub(super) fn copy_to(&self, from: usize, to: &Region, at: usize, len: usize) -> bool {
        let inside = |start: usize, size| start.checked_add(len).is_some_and(|end| end <= size);
        if !inside(from, self.len) || !inside(at, to.len) {
            return false;
        }
        // SAFETY: both ranges were checked; a guest may name one page as both. Other processes may
        // write meanwhile: then the bytes are whatever was there, and nobody here interprets
        // them.
        unsafe { ptr::copy(self.base.add(from), to.base.add(at), len) };
        true
    }

    /// Makes pages read as zeroes.
    pub(super) fn zero(&self, first: usize, pages: usize) {
        assert!(first + pages <= self.len / PAGE_SIZE, "run of pages outside its region");
        // SAFETY: the range was checked; the region is writable where this is called (arenas
        // of the granting side), and no reference to its bytes exists.
        unsafe { ptr::write_bytes(self.base.add(first * PAGE_SIZE), 0, pages * PAGE_SIZE) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and whoever was given its address was
        // promised it only for this value's life.
        if let Err(e) = unsafe { rustix::mm::munmap(self.base.cast(), self.len) } {
            tracing::error!("cannot unmap {} bytes: {e}", self.len);
        }
    }
}
