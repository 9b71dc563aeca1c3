//! Copying and comparing disks: a reader on its own thread keeps many requests in flight, what is
//! known to be zeroes is not read, and zeroes that were read need not be written.
mod compare;
mod packed;
mod pipe;
mod reader;
mod runs;
mod writer;

use std::io;
use std::ops::{ControlFlow, Range};

pub use compare::{Compared, compare};
pub use packed::{Pack, copy_packed};

use crate::disk::{Disk, Kept, Region};
use pipe::Buffer;
use reader::{Mode, Reader};
use runs::Examine;
pub(crate) use runs::find_zeroes;
use writer::Writer;

/// What is done with a stretch of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Its bytes are read and copied.
    Data,
    /// It reads as zeroes: the target is made to.
    Zero,
    /// The target stays as it is.
    Skip,
}

/// A stretch of a plan; parts follow each other without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Bytes, a multiple of both disks' logical blocks.
    pub len: u64,
    /// What is done with them.
    pub what: What,
}

/// Says what is to be done with a range of the source: appends parts, which may end early, but
/// not before the first. May block.
pub type Plan<'a> = &'a mut (dyn FnMut(Range<u64>, &mut Vec<Part>) -> io::Result<()> + Send);

/// Looks at bytes that were read, at an offset, and says which of them are to be written.
pub type Look<'a> = &'a mut (dyn FnMut(u64, &[u8], &mut Vec<Part>) -> io::Result<()> + Send);

/// Called now and then with the bytes that are done; `Break` ends the work.
pub type Tick<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// What the target holds before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// It reads as zeroes.
    Zeroes,
    /// It may hold anything.
    Unknown,
}

/// In which order the target is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From its beginning to its end, so that new clusters lie in a row.
    Ascending,
    /// As the source's answers come.
    Any,
}

/// How to copy.
#[derive(Clone, Copy, Debug)]
pub struct CopyOptions {
    /// Bytes from 0 on that are copied; both disks have them.
    pub len: u64,
    /// Pieces in flight on each side, 1 to 64.
    pub depth: u32,
    /// Largest piece in bytes, a multiple of 4096. Pieces start at multiples of it.
    pub piece: usize,
    /// So many zero bytes in a row, at a multiple of themselves, are not written as data: a
    /// multiple of both logical blocks. `None`: nothing is searched for zeroes.
    pub sparse: Option<usize>,
    /// What the target holds before.
    pub before: Before,
    /// Whether the target is written in order.
    pub order: Order,
}

impl CopyOptions {
    /// For `len` bytes to a target that may hold anything: 8 pieces of 1 MiB in flight, runs of
    /// 4 KiB of zeroes found, in order.
    pub fn new(len: u64) -> Self {
        CopyOptions {
            len,
            depth: 8,
            piece: 1 << 20,
            sparse: Some(4096),
            before: Before::Unknown,
            order: Order::Ascending,
        }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes written as data.
    pub written: u64,
    /// Bytes that are zeroes, or stayed as they were.
    pub sparse: u64,
}

/// Why a copy or a comparison ended early. What was done so far stays done.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A disk could not be read.
    #[error("cannot read {len} bytes at {offset}: {source}")]
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The answer.
        source: io::Error,
    },
    /// The target could not be written.
    #[error("cannot write {len} bytes at {offset}: {source}")]
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The answer.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {what}: {source}")]
    Other {
        /// What was tried.
        what: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// The caller ended it.
    #[error("interrupted")]
    Stopped,
}

impl CopyError {
    fn other(what: &'static str) -> impl FnOnce(io::Error) -> CopyError {
        move |source| CopyError::Other { what, source }
    }
}

/// A plan that copies what `disk` has and knows its holes.
pub fn plan_of(
    disk: &dyn Disk,
) -> impl FnMut(Range<u64>, &mut Vec<Part>) -> io::Result<()> + Send + '_ {
    let mut regions: Vec<Region> = Vec::new();
    move |range, out| {
        regions.clear();
        disk.map(range, &mut regions)?;
        out.extend(regions.iter().map(|r| {
            let what = if r.kept == Kept::Data { What::Data } else { What::Zero };
            Part { len: r.len, what }
        }));
        Ok(())
    }
}

/// Copies `source` to `target` as `plan` says, and flushes. `look`, where given, decides about
/// the bytes that were read instead of [`CopyOptions::sparse`].
pub fn copy(
    source: &dyn Disk,
    target: &dyn Disk,
    options: &CopyOptions,
    plan: Plan<'_>,
    look: Option<Look<'_>>,
    tick: Tick<'_>,
) -> Result<Copied, CopyError> {
    let examine = match look {
        Some(look) => Examine::Look(look),
        None => options.sparse.map_or(Examine::Nothing, Examine::Zeroes),
    };
    // As many on their way in as on their way out.
    let (buffers, ends) = pipe::ends(2 * options.depth.clamp(1, 64), options.piece)
        .map_err(CopyError::other("make an eventfd"))?;
    let reader = Reader::new(source, options.len, options.piece, plan, Mode::new(examine))?;
    let writer = Writer::new(target, options)?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("copy".into());
        let reading = thread.spawn_scoped(scope, move || reader.run(buffers));
        reading.map_err(CopyError::other("start a thread"))?;
        // Ends the reader too, by dropping the ends.
        writer.run(ends, tick)
    })
}

/// A piece of the source on its way.
struct Piece {
    /// Pieces are numbered in order.
    number: u64,
    offset: u64,
    len: u64,
    /// What is done with it, of `len` in all.
    runs: Vec<Part>,
    /// Its bytes, where any are data.
    buffer: Buffer,
}
