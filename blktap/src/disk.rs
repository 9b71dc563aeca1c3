//! The contract between a disk and whoever uses it.
// Memory that crosses the seam is named by address; the promises are in the constructors.
#![allow(unsafe_code)]

mod mem;
mod nbd;
mod null;
mod raw;

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use perf::Handle;

use crate::engine::EngineCounters;
use crate::filters::priority::Priority;
use crate::image::ImageDisk;
pub use mem::{MemDisk, Volatility};
pub use nbd::{Encryption, Handover, NbdDisk, NbdOptions, NbdTarget, NotATarget, Place};
pub use null::NullDisk;
pub(crate) use null::wait_for;
pub use raw::{RawDisk, RawQueue};

/// Most pieces of memory in one request, after neighbours were joined; more is EINVAL.
pub const MAX_SEGMENTS: usize = 512;

/// One piece of memory of a request.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct IoBuf {
    addr: *mut u8,
    len: usize,
}

// SAFETY: an address and a length; whoever made it promised that the memory outlives the request.
unsafe impl Send for IoBuf {}

impl IoBuf {
    /// Names memory for the kernel to read or write by address.
    ///
    /// # Safety
    /// The memory stays mapped (readable, and writable for a read request) until the request's
    /// [`Done`] has been polled or its queue has been dropped. Its bytes may change meanwhile.
    pub unsafe fn new(addr: *mut u8, len: usize) -> Self {
        IoBuf { addr, len }
    }
    /// First byte.
    pub fn addr(&self) -> *mut u8 {
        self.addr
    }
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether it names no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// What to do. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the buffers from the disk.
    Read,
    /// Write the buffers to the disk.
    Write,
    /// Write, and be on stable storage when done.
    WriteFua,
    /// All writes that were done before this was submitted are on stable storage when it is done.
    Flush,
    /// The range's content is no longer needed (it reads as old data or as zeroes).
    Discard,
    /// As discard, and no copy of the data survives anywhere on the device.
    SecureDiscard,
    /// The range reads as zeroes afterwards.
    WriteZeroes,
}

/// One request. Its token comes back in its [`Done`].
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What to do.
    pub op: Op,
    /// First byte on the disk, a multiple of the logical block size.
    pub offset: u64,
    /// Bytes, a multiple of the logical block size; for reads and writes the sum of `bufs`.
    pub len: u64,
    /// Memory for reads and writes, copied by `submit` (the memory it names is not).
    pub bufs: &'a [IoBuf],
    /// The caller's own mark.
    pub token: u64,
}

/// An answered request: `result` is 0 or a positive errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// As given in the request.
    pub token: u64,
    /// 0, or the errno.
    pub errno: i32,
}

/// The queue has no room: poll first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// What a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes, a multiple of `logical_block`.
    pub size: u64,
    /// Smallest unit of a request, 512 to 4096.
    pub logical_block: u32,
    /// Unit that the device writes without read-modify-write.
    pub physical_block: u32,
    /// Alignment of each buffer's address and length with which nothing is copied.
    pub memory_align: u32,
    /// Granularity and alignment of discard in bytes; `None` where discard does nothing.
    pub discard: Option<u32>,
    /// Whether [`Op::SecureDiscard`] works.
    pub secure_discard: bool,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// How a stretch of a disk is kept, as `map` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Allocated; its bytes are whatever was written.
    Data,
    /// Allocated, and known to read as zeroes.
    Zero,
    /// Not allocated anywhere; reads as zeroes.
    Hole,
}

/// One stretch of a map; stretches follow each other without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Bytes.
    pub len: u64,
    /// How they are kept.
    pub kept: Kept,
}

/// What a range reads as after [`Op::Discard`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarded {
    /// As old data or as zeroes.
    Unspecified,
    /// As zeroes, if the discard was answered with 0.
    Zeroes,
}

/// A disk. Opened once, shared by all queues; they keep what they need of it, so it may be
/// dropped before them.
pub trait Disk: Send + Sync {
    /// Present geometry; `size` may grow while the disk is open.
    fn geometry(&self) -> Geometry;
    /// Looks again how large the disk is (a file may have grown). All queues see the new size.
    fn refresh(&self) -> io::Result<Geometry>;
    /// A queue for one thread. `depth` is how many requests it holds at once, from 1 to
    /// [`MAX_DEPTH`](crate::engine::MAX_DEPTH).
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>>;
    /// Leaves what is kept there as something that was closed properly, durably. All queues are
    /// gone; afterwards the disk is only good for being dropped.
    fn close(&self) -> io::Result<()> {
        Ok(())
    }
    /// This disk as an image with its layers, if it is one.
    fn image(&self) -> Option<&ImageDisk> {
        None
    }
    /// What a discarded range reads as.
    fn discarded(&self) -> Discarded {
        Discarded::Unspecified
    }
    /// Appends how `range` (bytes, inside the disk) is kept, neighbours of one kind joined. May
    /// stop early, but not before the first stretch. May block: not for the data path. What is
    /// not known is `Data`.
    fn map(&self, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        out.push(Region { len: range.end.saturating_sub(range.start), kept: Kept::Data });
        Ok(())
    }
    /// Names of the dirty bitmaps that can be read.
    fn bitmaps(&self) -> Vec<String> {
        Vec::new()
    }
    /// Appends `range` in stretches of (bytes, whether dirty) by the bitmap `name`, as `map`.
    fn bitmap(&self, name: &str, range: Range<u64>, out: &mut Vec<(u64, bool)>) -> io::Result<()> {
        let _ = (range, out);
        Err(io::Error::new(io::ErrorKind::NotFound, format!("no bitmap {name:?}")))
    }
}

/// One thread's way to a disk.
///
/// **Ranges.** `offset` and `len` are multiples of [`Geometry::logical_block`] and lie within
/// [`Geometry::size`]; for reads and writes the buffers' lengths sum up to `len`, in at most
/// [`MAX_SEGMENTS`] pieces. What misses that completes with EINVAL and touches nothing; a write
/// to a read-only disk completes with EROFS; `len` 0 completes with 0. A flush has no range.
///
/// **Alignment.** Buffers may lie anywhere. What misses [`Geometry::memory_align`], in address
/// or length, may be copied once more on its way.
///
/// **Concurrent requests** complete in any order. Two that overlap and are in flight together,
/// on whatever queues, have no defined order, and one may see a part of the other; only a
/// request submitted after another is *done* comes after it. A write that fails may have
/// changed any part of its range.
///
/// **Flush.** Every write, discard and zeroing that was done (polled as [`Done`], on any queue
/// of the disk) before the flush was submitted is on stable storage when the flush is done with
/// 0. Writes in flight are not covered: a barrier is the caller's, who holds back. Once a flush
/// has failed, all later ones of the disk fail: nobody knows which writes were lost.
///
/// **Cancellation** is ignoring the [`Done`]. Dropping a queue carries out what it took, except
/// for what waits for another queue's change of the same clusters, which is given up, and
/// returns when no buffer is in use any more. It is best dropped by the thread that used it;
/// elsewhere, what is in flight may be cut short.
///
/// **Threads.** A queue may move to another thread until its first `submit_all`, `poll` or
/// `wait`; from then on other threads may get an error from these.
pub trait DiskQueue: Send {
    /// Takes a request; it is sent to the kernel by the next `submit_all`, `poll` or `wait`.
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full>;
    /// Sends what was taken, in one system call.
    fn submit_all(&mut self) -> io::Result<()>;
    /// Appends what is done. Makes no system call when nothing was taken since the last one,
    /// unless the kernel has flagged that completions wait for one.
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()>;
    /// Sends what was taken and sleeps until a request is done, one of `fds` (at most 63) is
    /// readable, or `timeout` is over (`None`: no limit). Returns a bit for each readable fd.
    /// May return earlier (a signal). Errors and hang-ups of a descriptor count as readable.
    ///
    /// The kernel keeps watching, and so keeps open, the descriptors of earlier calls, which
    /// are known by their numbers. Before one of them is closed, call
    /// [`unwatch`](Self::unwatch): a new descriptor with an old one's number would not be
    /// watched.
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64>;
    /// Lets go of all descriptors of earlier `wait`s.
    fn unwatch(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// Whoever uses the queue waits for its last requests and then drops it: nothing is held
    /// back any more that could go (a throttled request, say).
    fn hurry(&mut self) {}
    /// Gives requests that are submitted from now on a priority, where files or devices lie
    /// below.
    fn prioritize(&mut self, priority: Priority) {
        let _ = priority;
    }
    /// Requests taken and not yet polled as done.
    fn in_flight(&self) -> u32;
    /// The counters of the engine below, where there is one.
    fn counters(&self) -> Option<Handle<EngineCounters>> {
        None
    }
    /// Makes the engine below, where there is one, count into `counters` (of a stats page).
    fn count_in(&mut self, counters: Handle<EngineCounters>) {
        drop(counters);
    }
}

/// Whether a request's range fits a disk of `size` bytes in blocks of `logical`, a power of two:
/// EINVAL if not.
pub fn check_range(r: &Request<'_>, size: u64, logical: u64) -> Result<(), i32> {
    let end = r.offset.checked_add(r.len).ok_or(libc::EINVAL)?;
    // No division: this is done for each request.
    let odd = (r.offset | r.len) & logical.wrapping_sub(1);
    if end <= size && odd == 0 { Ok(()) } else { Err(libc::EINVAL) }
}
