//! The seams: every platform implements these, every backend is written against them.
// Memory that crosses the seam is named by address; the promises are in the constructors.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use rings::grants::{Access, GrantRef};
use rings::mem::{SharedMem, SharedRead};

/// A domain's number (`domid_t` in xen.h).
pub type DomId = u16;
/// An event channel port (`evtchn_port_t` in event_channel.h).
pub type Port = u32;

/// Granted pages of one domain, mapped as one contiguous run; unmapped when dropped.
pub struct Mapping {
    base: *mut u8,
    pages: usize,
    access: Access,
    unmap: Option<Box<dyn FnOnce() -> io::Result<()> + Send>>,
}

// SAFETY: the mapping is plain memory owned by this value; all access goes through SharedMem's
// atomics and copies or through the kernel by address.
unsafe impl Send for Mapping {}
// SAFETY: as above; SharedMem's methods are safe to call from several threads.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Wraps a mapping that a platform made.
    ///
    /// # Safety
    /// `base` is a page-aligned mapping of `pages` pages that stays valid until `unmap` is
    /// called, writable if `access` says so, and that nothing else unmaps.
    pub unsafe fn new(
        base: *mut u8,
        pages: usize,
        access: Access,
        unmap: Box<dyn FnOnce() -> io::Result<()> + Send>,
    ) -> Self {
        Mapping { base, pages, access, unmap: Some(unmap) }
    }
    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.base
    }
    /// Number of granted pages.
    pub fn pages(&self) -> usize {
        self.pages
    }
    /// What it was mapped for.
    pub fn access(&self) -> Access {
        self.access
    }
    /// Unmaps now and reports a failure, which `Drop` could only log.
    pub fn unmap(mut self) -> io::Result<()> {
        self.unmap.take().map_or(Ok(()), |f| f())
    }
}

/// A writable mapping, usable as the memory of a ring.
pub struct SharedMapping(Mapping);

impl Mapping {
    /// The mapping as shared memory; `None` if it is read-only.
    pub fn into_shared(self) -> Option<SharedMapping> {
        (self.access == Access::ReadWrite).then_some(SharedMapping(self))
    }
}

// SAFETY: by the promise of `Mapping::new` the pages are aligned, writable (`into_shared` checks),
// and stay in place until the mapping is dropped.
unsafe impl SharedMem for SharedMapping {
    fn base(&self) -> *mut u8 {
        self.0.base
    }
    fn len(&self) -> usize {
        self.0.pages * rings::PAGE_SIZE
    }
}

// SAFETY: by the promise of `Mapping::new` the pages are aligned, may be read whatever else they were
// mapped for, and stay in place until the mapping is dropped.
unsafe impl SharedRead for Mapping {
    fn start(&self) -> *const u8 {
        self.base
    }
    fn length(&self) -> usize {
        self.pages * rings::PAGE_SIZE
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Some(f) = self.unmap.take()
            && let Err(e) = f()
        {
            tracing::error!("cannot unmap {} granted pages: {e}", self.pages);
        }
    }
}

/// Memory of this process that [`Grants::copy`] can reach; freed when dropped. On Xen any
/// anonymous memory, on the bundled hypervisor memory shared with it alone.
pub struct Buffer {
    base: *mut u8,
    len: usize,
    /// Platform's own mark of the buffer (0 where it needs none).
    pub id: u64,
    _owner: Box<dyn Send + Sync>,
}

// SAFETY: plain memory kept alive by the owner; users reach it by address or copy.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Wraps memory that a platform made.
    ///
    /// # Safety
    /// `base..base+len` is page-aligned readable and writable memory that stays valid and
    /// in place until `owner` is dropped.
    pub unsafe fn new(base: *mut u8, len: usize, id: u64, owner: Box<dyn Send + Sync>) -> Self {
        Buffer { base, len, id, _owner: owner }
    }
    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.base
    }
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Direction of one grant copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the granted page into the buffer.
    FromGrant,
    /// From the buffer into the granted page.
    ToGrant,
}

impl Direction {
    /// What the granted page must allow.
    pub fn access(self) -> Access {
        match self {
            Direction::FromGrant => Access::ReadOnly,
            Direction::ToGrant => Access::ReadWrite,
        }
    }
}

/// One segment of a grant copy between a granted page and a [`Buffer`]
/// (`gntdev_grant_copy_segment`, GNTTABOP_copy).
#[derive(Clone, Copy, Debug)]
pub struct CopyOp {
    /// The granted page.
    pub gref: GrantRef,
    /// First byte within the page; `offset + len` is at most 4096.
    pub offset: u16,
    /// Bytes.
    pub len: u16,
    /// First byte within the buffer.
    pub at: usize,
    /// Which way.
    pub direction: Direction,
    /// Set by the copy: GNTST_okay (0) or a negative GNTST_* of grant_table.h.
    pub status: i16,
}

/// Where the bytes of a [`Transfer`] come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A [`Buffer`], from this byte on.
    Buffer(usize),
    /// A page that a domain, mostly another one than the target's, has granted.
    Page {
        /// Whose.
        domid: DomId,
        /// The granted page.
        gref: GrantRef,
        /// First byte within the page; `offset + len` is at most 4096.
        offset: u16,
    },
}

/// One copy into a granted page from wherever this domain may read: GNTTABOP_copy with
/// `GNTCOPY_dest_gref`, and with `GNTCOPY_source_gref` or without. The pages may be the same one.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// From here.
    pub source: Source,
    /// The granted page that is written.
    pub gref: GrantRef,
    /// First byte within the page; `offset + len` is at most 4096.
    pub offset: u16,
    /// Bytes.
    pub len: u16,
    /// Set by the copy: GNTST_okay (0) or a negative GNTST_* of grant_table.h, which does not say
    /// of which page.
    pub status: i16,
}

/// Using what other domains granted. Every call takes a batch.
pub trait Grants: Send {
    /// Maps a batch as one contiguous run, all or nothing, as gntdev is: on an error nothing is
    /// mapped, and the caller retries in smaller batches to find the bad reference.
    fn map(&self, domid: DomId, refs: &[GrantRef], access: Access) -> io::Result<Mapping>;
    /// Copies a batch. `Err` means that nothing can be said of any of them; otherwise each
    /// operation has its own `status`. A range outside `buffer` or the page is an `Err`.
    fn copy(&self, domid: DomId, buffer: &Buffer, ops: &mut [CopyOp]) -> io::Result<()>;
    /// Copies a batch into pages of `domid`, from `buffer` and from other domains' pages in one step;
    /// otherwise as [`copy`](Self::copy).
    fn transfer(&self, domid: DomId, buffer: &Buffer, ops: &mut [Transfer]) -> io::Result<()>;
    /// Memory for the local end of copies, page-aligned, zeroed.
    fn buffer(&self, len: usize) -> io::Result<Buffer>;
}

/// One end of an event channel.
pub trait EventChannel: Send + Sync {
    /// Raises the event at the other end. Never blocks.
    fn notify(&self) -> io::Result<()>;
    /// Readable when the other end has notified since the last [`acknowledge`](Self::acknowledge).
    fn as_fd(&self) -> BorrowedFd<'_>;
    /// Takes the pending event, if any, and allows the next one. Says whether there was one.
    /// Never blocks. `Err(BrokenPipe)`: the other end is gone for good.
    fn acknowledge(&self) -> io::Result<bool>;
    /// The local port.
    fn port(&self) -> Port;
}

/// The backend's view of a hypervisor. Each queue asks for descriptors of its own, so that no
/// two queues meet in one kernel lock.
pub trait Hypervisor: Send + Sync {
    /// The domain that this process runs in.
    fn domid(&self) -> DomId;
    /// A new connection to xenstore.
    fn store(&self) -> io::Result<crate::store::Client>;
    /// A new handle for grants.
    fn grants(&self) -> io::Result<Box<dyn Grants>>;
    /// Binds to a port that `domid` allocated for this domain (EVTCHNOP_bind_interdomain).
    fn bind(&self, domid: DomId, port: Port) -> io::Result<Box<dyn EventChannel>>;
}

/// Pages that this domain grants to a peer; access ends when dropped.
pub trait GrantedPages: SharedMem + Send + Sync {
    /// One reference a page.
    fn refs(&self) -> &[GrantRef];
}

/// The frontend's view: granting memory and allocating ports.
pub trait Guest: Send + Sync {
    /// The domain that this process runs in.
    fn domid(&self) -> DomId;
    /// A new connection to xenstore.
    fn store(&self) -> io::Result<crate::store::Client>;
    /// Grants `pages` fresh zeroed pages to `peer` (gntalloc's IOCTL_GNTALLOC_ALLOC_GREF).
    fn grant(&self, peer: DomId, pages: usize, access: Access)
    -> io::Result<Arc<dyn GrantedPages>>;
    /// Allocates a port that `peer` may bind (EVTCHNOP_alloc_unbound).
    fn alloc_unbound(&self, peer: DomId) -> io::Result<Box<dyn EventChannel>>;
}
