//! The ioctls: numbers, structures, and the one place where they are called. All of Xen's have no
//! direction in their number (`_IOC_NONE`), whatever they read or write.
// A system call takes a pointer that the compiler cannot follow.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

/// `struct ioctl_gntdev_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct GrantRefOf {
    pub domid: u32,
    pub gref: u32,
}

/// Head of `struct ioctl_gntdev_map_grant_ref`; the references follow it.
#[repr(C)]
pub(super) struct MapHead {
    pub count: u32,
    pub pad: u32,
    pub index: u64,
}

/// `struct ioctl_gntdev_unmap_grant_ref`, and with the same layout
/// `struct ioctl_gntalloc_dealloc_gref` (whose count is followed by padding).
#[repr(C)]
pub(super) struct IndexCount {
    pub index: u64,
    pub count: u32,
    pub pad: u32,
}

/// `struct gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CopySegment {
    pub source: CopyPtr,
    pub dest: CopyPtr,
    pub len: u16,
    pub flags: u16,
    pub status: i16,
}

/// One end of a copy: an address of ours, or a granted page.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) union CopyPtr {
    pub virt: *mut u8,
    pub foreign: Foreign,
}

/// A place in a granted page.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Foreign {
    pub gref: u32,
    pub offset: u16,
    pub domid: u16,
}

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
pub(super) struct Copy {
    pub count: u32,
    pub segments: *mut CopySegment,
}

/// `GNTCOPY_source_gref` and `GNTCOPY_dest_gref` of grant_table.h.
pub(super) const COPY_SOURCE_GREF: u16 = 1;
/// See [`COPY_SOURCE_GREF`].
pub(super) const COPY_DEST_GREF: u16 = 2;

/// Head of `struct ioctl_gntalloc_alloc_gref`; the references follow it.
#[repr(C)]
pub(super) struct AllocHead {
    pub domid: u16,
    pub flags: u16,
    pub count: u32,
    pub index: u64,
}

/// `GNTALLOC_FLAG_WRITABLE`.
pub(super) const ALLOC_WRITABLE: u16 = 1;

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
pub(super) struct BindInterdomain {
    pub remote_domain: u32,
    pub remote_port: u32,
}

/// The structures that hold one number: `bind_unbound_port`, `unbind`, `notify`.
#[repr(C)]
pub(super) struct One {
    pub value: u32,
}

/// `struct ioctl_evtchn_restrict_domid`.
#[repr(C)]
pub(super) struct Restrict {
    pub domid: u16,
}

const fn number(group: u8, number: u32, size: usize) -> Opcode {
    (size as u32) << 16 | (group as u32) << 8 | number
}

const MAP_SIZE: usize = size_of::<MapHead>() + size_of::<GrantRefOf>();
pub(super) const GNTDEV_MAP: Opcode = number(b'G', 0, MAP_SIZE);
pub(super) const GNTDEV_UNMAP: Opcode = number(b'G', 1, size_of::<IndexCount>());
pub(super) const GNTDEV_COPY: Opcode = number(b'G', 8, size_of::<Copy>());
/// Head, one reference, and the padding that C adds to 8 bytes.
pub(super) const GNTALLOC_ALLOC: Opcode = number(b'G', 5, size_of::<AllocHead>() + 8);
pub(super) const GNTALLOC_DEALLOC: Opcode = number(b'G', 6, size_of::<IndexCount>());
pub(super) const EVTCHN_BIND_INTERDOMAIN: Opcode = number(b'E', 1, size_of::<BindInterdomain>());
pub(super) const EVTCHN_BIND_UNBOUND: Opcode = number(b'E', 2, size_of::<One>());
pub(super) const EVTCHN_NOTIFY: Opcode = number(b'E', 4, size_of::<One>());
pub(super) const EVTCHN_RESET: Opcode = number(b'E', 5, 0);
pub(super) const EVTCHN_RESTRICT: Opcode = number(b'E', 6, size_of::<Restrict>());

struct Call {
    opcode: Opcode,
    data: *mut c_void,
}

// SAFETY: `opcode` and `data` belong together, as `call`'s callers promise.
unsafe impl Ioctl for Call {
    type Output = i32;
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> Opcode {
        self.opcode
    }
    fn as_ptr(&mut self) -> *mut c_void {
        self.data
    }
    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// Calls ioctl `opcode` and gives what it returns.
///
/// # Safety
/// `data` is what `opcode` takes, valid for what the kernel reads and writes there.
pub(super) unsafe fn call<T>(fd: impl AsFd, opcode: Opcode, data: *mut T) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    Ok(unsafe { rustix::ioctl::ioctl(fd, Call { opcode, data: data.cast() })? })
}

/// As [`call`], for structures of a fixed size that hold no pointer.
macro_rules! plain {
    ($($name:ident: $structure:ty = $opcode:expr;)*) => {$(
        pub(super) fn $name(fd: impl AsFd, mut data: $structure) -> io::Result<i32> {
            // SAFETY: the structure is the one of the opcode and holds no pointer.
            unsafe { call(fd, $opcode, &raw mut data) }
        }
    )*};
}

plain! {
    gntdev_unmap: IndexCount = GNTDEV_UNMAP;
    gntalloc_dealloc: IndexCount = GNTALLOC_DEALLOC;
    evtchn_bind_interdomain: BindInterdomain = EVTCHN_BIND_INTERDOMAIN;
    evtchn_bind_unbound: One = EVTCHN_BIND_UNBOUND;
    evtchn_notify: One = EVTCHN_NOTIFY;
    evtchn_reset: () = EVTCHN_RESET;
    evtchn_restrict: Restrict = EVTCHN_RESTRICT;
}

#[cfg(test)]
#[path = "ioctl_tests.rs"]
mod tests;
