//! /dev/xen/gntdev: mapping and copying what other domains granted.
// Mapped pages and the kernel's copy segments are named by address.
#![allow(unsafe_code)]

use std::cell::{RefCell, RefMut};
use std::fs::File;
use std::io;
use std::ptr;
use std::sync::Arc;

use rings::PAGE_SIZE;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::ioctl::{self, CopyPtr, CopySegment, Foreign, GrantRefOf, IndexCount, MapHead};
use crate::{
    Access, Buffer, CopyOp, Direction, DomId, GrantRef, Grants, Mapping, Source, Transfer,
};

/// Segments that a new handle has room for, so that a queue does not grow it under load.
const SEGMENTS: usize = 512;

/// One descriptor of gntdev. Its list of mappings is searched under one lock in the kernel, so
/// each queue has its own.
pub(super) struct Gntdev {
    device: Arc<File>,
    /// Room for the kernel's form of a batch of copies, used again and again.
    segments: RefCell<Vec<CopySegment>>,
}

// SAFETY: the segments hold addresses only while a copy runs.
unsafe impl Send for Gntdev {}

impl Gntdev {
    pub(super) fn new(device: File) -> Gntdev {
        Gntdev { device: Arc::new(device), segments: RefCell::new(Vec::with_capacity(SEGMENTS)) }
    }
}

impl Gntdev {
    /// Makes a batch of copies; each has its status then.
    fn copy_all(
        &self,
        list: impl Iterator<Item = io::Result<CopySegment>>,
    ) -> io::Result<RefMut<'_, Vec<CopySegment>>> {
        let mut segments = self.segments.borrow_mut();
        segments.clear();
        for segment in list {
            segments.push(segment?);
        }
        if segments.is_empty() {
            return Ok(segments);
        }
        let mut copy =
            ioctl::Copy { count: segments.len() as u32, segments: segments.as_mut_ptr() };
        // SAFETY: `segments` has `count` entries, and each names memory of the buffer.
        unsafe { ioctl::call(&*self.device, ioctl::GNTDEV_COPY, &raw mut copy)? };
        Ok(segments)
    }
}

/// Asks for a range of the device's offsets that stands for the references.
fn reserve(device: &File, domid: DomId, refs: &[GrantRef]) -> io::Result<u64> {
    // The structure's variable tail makes it a run of words: a head of two, then one a reference.
    let mut words = vec![0u64; 2 + refs.len()];
    let head: *mut MapHead = words.as_mut_ptr().cast();
    // SAFETY: the vector is aligned to 8 and has room for the head and `refs.len()` references.
    unsafe {
        head.write(MapHead { count: refs.len() as u32, pad: 0, index: 0 });
        let tail: *mut GrantRefOf = head.add(1).cast();
        for (i, gref) in refs.iter().enumerate() {
            tail.add(i).write(GrantRefOf { domid: domid.into(), gref: *gref });
        }
        ioctl::call(device, ioctl::GNTDEV_MAP, head)?;
        Ok((*head).index)
    }
}

fn release(device: &File, index: u64, count: usize) -> io::Result<()> {
    ioctl::gntdev_unmap(device, IndexCount { index, count: count as u32, pad: 0 }).map(drop)
}

impl Grants for Gntdev {
    fn map(&self, domid: DomId, refs: &[GrantRef], access: Access) -> io::Result<Mapping> {
        if refs.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (count, bytes) = (refs.len(), refs.len() * PAGE_SIZE);
        let index = reserve(&self.device, domid, refs)?;
        let protection = match access {
            Access::ReadOnly => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice. The hypervisor checks the
        // references now; if it refuses one, nothing is mapped.
        let base = unsafe {
            mmap(ptr::null_mut(), bytes, protection, MapFlags::SHARED, &self.device, index)
        };
        let base = match base {
            Ok(base) => base,
            Err(e) => {
                release(&self.device, index, count)?;
                return Err(e.into());
            }
        };
        let (device, address) = (self.device.clone(), base as usize);
        let unmap = move || {
            // SAFETY: the mapping made above; whoever calls this gives up its last use.
            let unmapped = unsafe { munmap(address as *mut _, bytes) };
            // Even if that failed: the references must not stay in the device's list.
            release(&device, index, count)?;
            Ok(unmapped?)
        };
        // SAFETY: just mapped, for `access`, and unmapped by nobody else.
        Ok(unsafe { Mapping::new(base.cast(), count, access, Box::new(unmap)) })
    }

    fn copy(&self, domid: DomId, buffer: &Buffer, ops: &mut [CopyOp]) -> io::Result<()> {
        let done = self.copy_all(ops.iter().map(|op| segment(domid, buffer, op)))?;
        ops.iter_mut().zip(&*done).for_each(|(op, segment)| op.status = segment.status);
        Ok(())
    }

    fn transfer(&self, domid: DomId, buffer: &Buffer, ops: &mut [Transfer]) -> io::Result<()> {
        let done = self.copy_all(ops.iter().map(|op| transfer_segment(domid, buffer, op)))?;
        ops.iter_mut().zip(&*done).for_each(|(op, segment)| op.status = segment.status);
        Ok(())
    }

    fn buffer(&self, len: usize) -> io::Result<Buffer> {
        let len = len.next_multiple_of(PAGE_SIZE);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE)? };
        let owner = Anonymous { base: base as usize, len };
        // SAFETY: the mapping made above, unmapped by its owner alone.
        Ok(unsafe { Buffer::new(base.cast(), len, 0, Box::new(owner)) })
    }
}

/// An address of the buffer as one end of a copy.
fn local(buffer: &Buffer, at: usize, len: u16) -> io::Result<CopyPtr> {
    if at.checked_add(len.into()).is_none_or(|end| end > buffer.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: within the buffer, as was just checked.
    Ok(CopyPtr { virt: unsafe { buffer.base().add(at) } })
}

/// A part of a granted page as one end of a copy.
fn granted(domid: DomId, gref: GrantRef, offset: u16, len: u16) -> io::Result<CopyPtr> {
    if usize::from(offset) + usize::from(len) > PAGE_SIZE {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(CopyPtr { foreign: Foreign { gref, offset, domid } })
}

fn segment(domid: DomId, buffer: &Buffer, op: &CopyOp) -> io::Result<CopySegment> {
    let foreign = granted(domid, op.gref, op.offset, op.len)?;
    let local = local(buffer, op.at, op.len)?;
    let (source, dest, flags) = match op.direction {
        Direction::FromGrant => (foreign, local, ioctl::COPY_SOURCE_GREF),
        Direction::ToGrant => (local, foreign, ioctl::COPY_DEST_GREF),
    };
    Ok(CopySegment { source, dest, len: op.len, flags, status: 0 })
}

fn transfer_segment(domid: DomId, buffer: &Buffer, op: &Transfer) -> io::Result<CopySegment> {
    let dest = granted(domid, op.gref, op.offset, op.len)?;
    let (source, flags) = match op.source {
        Source::Buffer(at) => (local(buffer, at, op.len)?, ioctl::COPY_DEST_GREF),
        Source::Page { domid, gref, offset } => {
            (granted(domid, gref, offset, op.len)?, ioctl::COPY_DEST_GREF | ioctl::COPY_SOURCE_GREF)
        }
    };
    Ok(CopySegment { source, dest, len: op.len, flags, status: 0 })
}

struct Anonymous {
    base: usize,
    len: usize,
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: the owner of the mapping, and the last use of it.
        if let Err(e) = unsafe { munmap(self.base as *mut _, self.len) } {
            tracing::error!("cannot unmap a copy buffer: {e}");
        }
    }
}

#[cfg(test)]
#[path = "gntdev_tests.rs"]
mod tests;
