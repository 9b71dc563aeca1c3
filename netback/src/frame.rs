//! An Ethernet frame on its way between a guest and what its vif connects to.
// Frames lie in memory that grant copies reach by address.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use hypervisor::Buffer;

use crate::hash::Hash;

/// Bytes kept free before each frame, for a header of the endpoint's own (virtio-net's has 12) and
/// a VLAN tag.
pub const HEADROOM: usize = 64;
/// Longest frame: an unsegmented packet of 65535 bytes with its Ethernet header and a VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 18;
/// So many bytes of a long frame are looked at before the rest is copied: more than any headers have
/// that Linux makes.
pub(crate) const HEAD: usize = 256;
/// Distance of two frames' memory: whole pages, an odd number of them, so that the headers of short
/// frames do not all meet in the same lines of the second cache.
///
/// A frame begins with a page, and what is copied to a guest's page lies in one of ours: Linux's
/// gntdev cuts each copy where a local page ends, and hands sixteen pieces to Xen at a time.
const STRIDE: usize = 17 * rings::PAGE_SIZE;
const _: () =
    assert!(STRIDE >= HEADROOM + MAX_FRAME && !(STRIDE / rings::PAGE_SIZE).is_multiple_of(2));
/// Where the memory of the first frame begins in the buffer.
const FIRST: usize = rings::PAGE_SIZE - HEADROOM;

/// What is known of a frame's TCP or UDP checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing is: it is in the frame and must be checked by whoever uses it.
    #[default]
    Unknown,
    /// It is right (`NETTXF_data_validated`, VIRTIO_NET_HDR_F_DATA_VALID).
    Valid,
    /// It holds the pseudo-header's sum only (`NETTXF_csum_blank`, VIRTIO_NET_HDR_F_NEEDS_CSUM):
    /// the sum of all bytes from `start` on belongs at `start + offset`.
    Blank {
        /// First byte of the TCP or UDP header in the frame.
        start: u16,
        /// Where in that header the checksum is.
        offset: u16,
    },
}

/// Kind of an unsegmented packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// `XEN_NETIF_GSO_TYPE_TCPV4`
    TcpV4,
    /// `XEN_NETIF_GSO_TYPE_TCPV6`
    TcpV6,
}

/// A packet that somebody further on cuts into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// Of what kind.
    pub kind: GsoKind,
    /// Payload bytes of each segment, above 0.
    pub size: u16,
}

/// What a frame leaves to others to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Its checksum.
    pub checksum: Checksum,
    /// Its segmentation; such a frame's checksum is always blank.
    pub gso: Option<Gso>,
}

struct Arena {
    buffer: Buffer,
}

/// One frame with its memory, which belongs to a [`Pool`] and goes back there by [`Pool::give`].
pub struct Frame {
    arena: Arc<Arena>,
    slot: usize,
    start: usize,
    len: usize,
    /// What is left to do with it.
    pub offload: Offload,
    /// Its hash, where one was asked for or told.
    pub hash: Option<Hash>,
    /// Of a frame whose bytes but for the first [`HEAD`] are still in a guest's pages: its packet in
    /// the batch. No endpoint is handed such a frame.
    pub(crate) beyond: Option<usize>,
}

impl Frame {
    /// Bytes before the frame that an endpoint may use.
    pub fn headroom(&self) -> usize {
        self.start
    }
    /// Bytes after the frame's end.
    pub fn tailroom(&self) -> usize {
        STRIDE - self.start - self.len
    }
    /// First byte as an offset in the pool's buffer, for grant copies.
    pub fn at(&self) -> usize {
        FIRST + self.slot * STRIDE + self.start
    }
    /// Makes the frame's length `len`; its bytes are what its memory held before. The length is cut
    /// to what there is room for.
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(STRIDE - self.start);
    }
    /// Leaves `bytes` more free before an empty frame, if `len` bytes fit behind them nonetheless.
    pub fn begin_later(&mut self, bytes: usize, len: usize) {
        if self.len == 0 && self.start + bytes + len <= STRIDE {
            self.start += bytes;
        }
    }
    /// Moves the start `bytes` forward: they become headroom. At most the frame's length.
    pub fn trim_front(&mut self, bytes: usize) {
        let bytes = bytes.min(self.len);
        (self.start, self.len) = (self.start + bytes, self.len - bytes);
    }
    /// Moves the start `bytes` back into the headroom; whether there was room.
    #[must_use]
    pub fn grow_front(&mut self, bytes: usize) -> bool {
        let fits = bytes <= self.start;
        if fits {
            (self.start, self.len) = (self.start - bytes, self.len + bytes);
        }
        fits
    }
    /// Address of the first byte: for calls of the system that take addresses.
    pub fn address(&self) -> *mut u8 {
        // SAFETY: `at` is within the buffer: `slot` is below the pool's number of frames and
        // `start` not above the stride.
        unsafe { self.arena.buffer.base().add(self.at()) }
    }
}

impl Deref for Frame {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the arena lives as long as this frame; each slot's memory belongs to the one
        // frame with its number; no guest can reach it, and grant copies into it are made by the
        // thread that owns the frame, before it reads.
        unsafe { std::slice::from_raw_parts(self.address(), self.len) }
    }
}

impl DerefMut for Frame {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` is the only way to it.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.len) }
    }
}

/// The frames of one queue that are not in use.
pub struct Pool {
    arena: Arc<Arena>,
    free: Vec<Frame>,
}

impl Pool {
    /// Bytes of a buffer for `frames` frames. Memory that no frame has used yet is none.
    pub const fn bytes(frames: usize) -> usize {
        (FIRST + frames * STRIDE).next_multiple_of(rings::PAGE_SIZE)
    }

    /// As many frames as `buffer` has room for.
    pub fn new(buffer: Buffer) -> Pool {
        let arena = Arc::new(Arena { buffer });
        let frame = |slot| Frame {
            arena: Arc::clone(&arena),
            slot,
            start: HEADROOM,
            len: 0,
            offload: Offload::default(),
            hash: None,
            beyond: None,
        };
        // The one given back last is taken first: its memory is in the cache.
        let frames = arena.buffer.len().saturating_sub(FIRST) / STRIDE;
        let free = (0..frames).rev().map(frame).collect();
        Pool { arena, free }
    }

    /// `frames` frames in memory of this process alone, which no grant copy reaches.
    pub fn private(frames: usize) -> Pool {
        struct Owned(*mut u8, Layout);
        // SAFETY: plain memory that nobody else frees.
        unsafe impl Send for Owned {}
        // SAFETY: as above; it is not reached through this.
        unsafe impl Sync for Owned {}
        impl Drop for Owned {
            fn drop(&mut self) {
                // SAFETY: allocated below with this layout, and freed once.
                unsafe { dealloc(self.0, self.1) }
            }
        }
        let len = Self::bytes(frames.max(1));
        let Ok(layout) = Layout::from_size_align(len, rings::PAGE_SIZE) else {
            handle_alloc_error(Layout::new::<Frame>())
        };
        // SAFETY: `len` is above 0.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout)
        }
        // SAFETY: `len` bytes, aligned to pages, which live until the owner is dropped.
        Self::new(unsafe { Buffer::new(base, len, 0, Box::new(Owned(base, layout))) })
    }

    /// The memory of all frames, for grant copies by [`Frame::at`].
    pub fn buffer(&self) -> &Buffer {
        &self.arena.buffer
    }

    /// Frames that can be taken.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// An empty frame with [`HEADROOM`]; none when all are in use.
    pub fn take(&mut self) -> Option<Frame> {
        let mut frame = self.free.pop()?;
        (frame.start, frame.len) = (HEADROOM, 0);
        (frame.offload, frame.hash, frame.beyond) = (Offload::default(), None, None);
        Some(frame)
    }

    /// Takes a frame back. One of another pool is dropped: its memory is lost to that pool.
    pub fn give(&mut self, frame: Frame) {
        if Arc::ptr_eq(&self.arena, &frame.arena) {
            self.free.push(frame);
        }
    }
}

#[cfg(test)]
impl Pool {
    /// A pool of memory of its own.
    pub(crate) fn on_heap(frames: usize) -> Pool {
        use rings::mem::{HeapPages, SharedMem};
        let pages = HeapPages::new(Pool::bytes(frames) / rings::PAGE_SIZE);
        let (base, len) = (pages.base(), pages.len());
        // SAFETY: aligned memory that lives as long as its owner and that nobody else uses.
        Pool::new(unsafe { Buffer::new(base, len, 0, Box::new(pages)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_begin_with_a_page_and_none_leaves_its_memory() {
        let mut pool = Pool::on_heap(3);
        assert_eq!(pool.free(), 3);
        let mut ends = Vec::new();
        while let Some(mut frame) = pool.take() {
            assert!(frame.at().is_multiple_of(rings::PAGE_SIZE));
            frame.set_len(usize::MAX);
            assert!(frame.len() >= MAX_FRAME);
            let end = frame.at() + frame.len();
            frame.set_len(0);
            frame.begin_later(3000, 60);
            assert_eq!(frame.at() % rings::PAGE_SIZE, 3000);
            // Where that leaves too little room, it stays where it is.
            frame.begin_later(4000, MAX_FRAME);
            assert_eq!(frame.at() % rings::PAGE_SIZE, 3000);
            assert!(frame.grow_front(3000 + HEADROOM) && !frame.grow_front(1));
            ends.push((frame.at(), end));
        }
        ends.sort_unstable();
        assert!(ends.windows(2).all(|two| two[0].1 <= two[1].0), "{ends:?}");
        assert!(ends[2].1 <= pool.buffer().len());
    }
}
