//! Image formats: **formats resolve, the engine moves data**. A [`Format`] says where guest bytes
//! are and keeps its metadata; payload goes between guest memory and the file without it.
//!
//! # The resolve contract
//! *Resolving never blocks.* What needs metadata that is not in memory answers
//! [`Outcome::Miss`]; the caller has [`Format::load`] called on a thread that may block, and
//! resolves again. Neither does committing: whatever a guard needs stays in memory with it.
//!
//! *Reads* hold a [lease](Leases) from before they resolve until their data has arrived: what
//! was freed meanwhile is not used anew.
//!
//! *Writes* into what is allocated and not shared go in place, under a lease as well. Others get
//! a [`Guard`] over whole clusters: new ones, which nobody sees until [`Format::commit`] publishes
//! them after the data (and what of the old clusters stays) was written. Another write that
//! needs one of these clusters is told [`Outcome::Busy`] and woken when the guard is gone.
//! [`Format::abort`] gives a guard's clusters back; nothing may be on its way to them any more.
//!
//! *Flush* ([`Format::flush`]) makes data durable before the metadata that names it, allocations
//! before their use, and frees only what no durable metadata names: each crash point leaves an
//! image in which all that was flushed is there and at worst clusters that nobody uses.

mod error;
mod guards;
mod leases;
pub mod qcow;
pub mod qcow2;
mod raw;
pub mod vhd;
mod wait;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

pub use error::ImageError;
pub use guards::{ClusterGuards, GuardedRange};
pub use leases::{Lease, LeaseHolder, Leases};
pub use raw::RawFormat;
pub use wait::{Mailbox, Waiter};

use crate::disk::Region;
use crate::storage::Storage;

/// Where a stretch of guest bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file of the image.
    Data {
        /// Which of [`Format::files`].
        file: u16,
        /// First byte in it.
        offset: u64,
    },
    /// Nowhere: reads as zeroes.
    Zero,
    /// Not in this image: the parent has it; zeroes where there is none.
    Absent,
    /// Inside a compressed cluster.
    Compressed {
        /// The format's own name of the cluster, for [`Format::decompress`].
        cluster: u64,
        /// First byte in it, once unpacked.
        skip: u32,
    },
}

/// A stretch of guest bytes. Extents of one answer follow each other without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, at least 1.
    pub len: u64,
    /// Where they are.
    pub place: Place,
}

/// What is to happen to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// New data.
    Write,
    /// It is to read as zeroes.
    Zero,
    /// It is no longer needed; it reads as zeroes or as it did. Never needs data to be written.
    Discard,
}

/// Whether the bytes of a new cluster are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// They read as zeroes.
    Zeroes,
    /// They may be anything.
    Unknown,
}

/// Where the data of a change go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nowhere: the metadata says it all.
    Nothing,
    /// Into clusters that are in use.
    InPlace {
        /// Which of [`Format::files`].
        file: u16,
        /// First byte in it.
        offset: u64,
    },
    /// Into new clusters, which the guard publishes. `head` bytes before and `tail` bytes after
    /// the change lie in the same clusters and keep what they read as: the caller brings it from
    /// where a read of the guest's bytes finds it before the commit.
    New {
        /// Which of [`Format::files`].
        file: u16,
        /// Where the change's first byte goes; the head lies before it.
        offset: u64,
        /// Bytes before the change.
        head: u32,
        /// Bytes after it.
        tail: u32,
        /// What the new clusters hold now.
        fresh: Fresh,
    },
}

/// A stretch of a change. Pieces of one answer follow each other without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Guest bytes of the change, at least 1 (without head and tail).
    pub len: u64,
    /// Where their data go.
    pub target: Target,
}

/// Clusters that a change owns until [`Format::commit`] or [`Format::abort`].
#[must_use = "a guard that is neither committed nor aborted blocks its clusters for good"]
#[derive(Debug)]
pub struct Guard(
    /// The format's own number.
    pub u64,
);

/// What the format needs loaded, in its own terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss(
    /// The format's own number.
    pub u64,
);

/// The answer of resolving.
#[derive(Debug)]
pub enum Outcome<T> {
    /// Resolved.
    Ready(T),
    /// Metadata must be loaded first.
    Miss(Miss),
    /// Somebody owns these clusters; the waiter is woken when that ends.
    Busy,
}

/// The image that an image builds on, as its header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// The name as it is written: a path, absolute or relative to the image's folder, or a URI.
    pub name: String,
    /// Its format as written, where the header says one.
    pub format: Option<String>,
}

/// A dirty bitmap of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Whether writes are recorded in it.
    pub recording: bool,
    /// Whether its content is unknown: the image was not closed properly.
    pub in_use: bool,
}

/// An open image of some format. See the module for the contract.
///
/// Ranges are guest bytes within [`size`](Format::size) and not empty. An answer covers its
/// range from the start on, the whole of it or a shorter part of at least one byte; the caller
/// asks again for the rest. What is appended to `out` counts only with [`Outcome::Ready`].
///
/// Errors are about the image ([`ImageError`]); the guest gets [`ImageError::errno`].
pub trait Format: Send + Sync {
    /// The format's name as qemu-img has it: raw, qcow, qcow2, vpc.
    fn name(&self) -> &'static str;
    /// Guest bytes, a multiple of 512.
    fn size(&self) -> u64;
    /// Bytes that are allocated and freed together.
    fn cluster(&self) -> u64;
    /// The files that [`Place::Data`] and [`Target`] name; the image itself is the first.
    fn files(&self) -> &[Arc<dyn Storage>];
    /// What readers and writers hold while they use what was resolved.
    fn leases(&self) -> &Arc<Leases>;
    /// The image that [`Place::Absent`] refers to.
    fn backing(&self) -> Option<BackingName> {
        None
    }
    /// Other names of that image, to be tried in this order where the first leads to no file.
    fn other_backing_names(&self) -> Vec<String> {
        Vec::new()
    }
    /// Whether an image is the one that this one was made on: `backing` was opened by one of the
    /// names, its file was last modified at that time.
    fn check_backing(&self, backing: &dyn Format, modified: SystemTime) -> Result<(), ImageError> {
        let _ = (backing, modified);
        Ok(())
    }
    /// The unique id by which images know that they are built on this one.
    fn unique_id(&self) -> Option<[u8; 16]> {
        None
    }

    /// Where the bytes of `range` are.
    fn resolve_read(
        &self,
        range: Range<u64>,
        out: &mut Vec<Extent>,
    ) -> Result<Outcome<()>, ImageError>;

    /// Where the bytes of a change of `range` go. With a guard: nothing of the change is seen
    /// until it is committed. Without: all pieces are in place, or nothing is to be done.
    fn resolve_write(
        &self,
        range: Range<u64>,
        change: Change,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Outcome<Option<Guard>>, ImageError>;

    /// Publishes a guard's change; its data were written. Does not block.
    fn commit(&self, guard: Guard);

    /// Gives up a guard's change; nothing is on its way to its clusters. Does not block.
    fn abort(&self, guard: Guard);

    /// Loads what was missing. May block.
    fn load(&self, miss: Miss) -> Result<(), ImageError>;

    /// Reads and unpacks a compressed cluster into `out` (which it clears). May block.
    fn decompress(&self, cluster: u64, out: &mut Vec<u8>) -> Result<(), ImageError>;

    /// Whether a flush has more to do than to sync the files. True until a flush that covers the
    /// last commit has ended, not only begun.
    fn has_unflushed(&self) -> bool;

    /// Makes durable what was written and committed before. May block. Those who come together
    /// share one; after an error that may have lost writes, all later ones fail.
    fn flush(&self) -> Result<(), ImageError>;

    /// Flushes and leaves the image as one that was closed properly. No request is in flight.
    fn close(&self) -> Result<(), ImageError>;

    /// Grows the disk to what the file became, where the file's size is the disk's.
    fn refresh(&self) -> io::Result<()> {
        Ok(())
    }

    /// Appends how the file keeps `range` of [`Place::Data`], where that says more than the
    /// format does. May block.
    fn map_data(&self, file: u16, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        let _ = file;
        out.push(Region { len: range.end - range.start, kept: crate::disk::Kept::Data });
        Ok(())
    }

    /// The image's dirty bitmaps.
    fn bitmaps(&self) -> Vec<BitmapInfo> {
        Vec::new()
    }

    /// Appends `range` in stretches of (bytes, whether dirty) by bitmap `name`. May block.
    fn bitmap(
        &self,
        name: &str,
        range: Range<u64>,
        out: &mut Vec<(u64, bool)>,
    ) -> Result<(), ImageError> {
        let _ = (range, out);
        Err(ImageError::Invalid(format!("no bitmap {name:?}")))
    }
}
