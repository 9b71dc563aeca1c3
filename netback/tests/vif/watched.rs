//! A hypervisor that counts what a backend has mapped, and fails what a test says.
// It passes mappings on under its own guard.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hypervisor::store::Client;
use hypervisor::{
    Access, Buffer, CopyOp, DomId, EventChannel, GrantRef, Grants, Hypervisor, Mapping, Port,
    Transfer,
};

use crate::rig::Rig;

/// A reference that nobody has granted.
pub(crate) const NOT_GRANTED: GrantRef = u32::MAX - 1;

/// Fails once, at the so-many-th event from when it was wound up on.
#[derive(Default)]
struct Fuse(AtomicU64);

impl Fuse {
    fn burns(&self) -> bool {
        let less = |left: u64| left.checked_sub(1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) == Ok(1)
    }
}

/// What is known, and what is to come.
#[derive(Default)]
pub(crate) struct Watch {
    mapped: AtomicU64,
    maps: Fuse,
    copies: Fuse,
    calls: Fuse,
}

impl Watch {
    /// A rig whose backend is watched.
    pub(crate) fn rig(kind: &str, keys: &[(&str, &str)]) -> (Rig, Arc<Watch>) {
        let watch = Arc::new(Watch::default());
        let seen = watch.clone();
        let over = move |below| Arc::new(Watched { below, watch: seen.clone() }) as _;
        (Rig::with(netback::opener(), over, kind, keys), watch)
    }
    /// Pages that are mapped.
    pub(crate) fn mapped(&self) -> u64 {
        self.mapped.load(Ordering::Relaxed)
    }
    /// The k-th mapping from now on fails, from 1 on.
    pub(crate) fn fail_map(&self, k: u64) {
        self.maps.0.store(k, Ordering::Relaxed);
    }
    /// The k-th copied segment from now on names a page that is not granted.
    pub(crate) fn fail_copy(&self, k: u64) {
        self.copies.0.store(k, Ordering::Relaxed);
    }
    /// The next call that copies fails as a whole.
    pub(crate) fn fail_call(&self) {
        self.calls.0.store(1, Ordering::Relaxed);
    }
}

struct Watched {
    below: Arc<dyn Hypervisor>,
    watch: Arc<Watch>,
}

struct WatchedGrants {
    below: Box<dyn Grants>,
    watch: Arc<Watch>,
}

impl Hypervisor for Watched {
    fn domid(&self) -> DomId {
        self.below.domid()
    }
    fn store(&self) -> io::Result<Client> {
        self.below.store()
    }
    fn grants(&self) -> io::Result<Box<dyn Grants>> {
        Ok(Box::new(WatchedGrants { below: self.below.grants()?, watch: self.watch.clone() }))
    }
    fn bind(&self, domid: DomId, port: Port) -> io::Result<Box<dyn EventChannel>> {
        self.below.bind(domid, port)
    }
}

impl Grants for WatchedGrants {
    fn map(&self, domid: DomId, refs: &[GrantRef], access: Access) -> io::Result<Mapping> {
        let refs = if self.watch.maps.burns() { &[NOT_GRANTED] } else { refs };
        let mapping = self.below.map(domid, refs, access)?;
        let (base, pages, watch) = (mapping.base(), mapping.pages(), self.watch.clone());
        watch.mapped.fetch_add(pages as u64, Ordering::Relaxed);
        let unmap = move || {
            watch.mapped.fetch_sub(pages as u64, Ordering::Relaxed);
            mapping.unmap()
        };
        // SAFETY: the mapping lives in `unmap`, which alone ends it.
        Ok(unsafe { Mapping::new(base, pages, access, Box::new(unmap)) })
    }
    fn copy(&self, domid: DomId, buffer: &Buffer, ops: &mut [CopyOp]) -> io::Result<()> {
        if self.watch.calls.burns() {
            return Err(io::Error::other("a copy that was to fail"));
        }
        for op in ops.iter_mut() {
            if self.watch.copies.burns() {
                op.gref = NOT_GRANTED;
            }
        }
        self.below.copy(domid, buffer, ops)
    }
    fn transfer(&self, domid: DomId, buffer: &Buffer, ops: &mut [Transfer]) -> io::Result<()> {
        if self.watch.calls.burns() {
            return Err(io::Error::other("a copy that was to fail"));
        }
        for op in ops.iter_mut() {
            if self.watch.copies.burns() {
                op.gref = NOT_GRANTED;
            }
        }
        self.below.transfer(domid, buffer, ops)
    }
    fn buffer(&self, len: usize) -> io::Result<Buffer> {
        self.below.buffer(len)
    }
}
