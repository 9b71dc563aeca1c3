//! The in-flight table: what was taken from the ring and is not answered yet.
//!
//! Responses reuse the slots of requests, so once answers leave out of order the ring alone
//! cannot say which requests are unanswered. The table can: a request is copied into it before
//! the ring's consumer index moves on, and where its response lies is noted before the response
//! is published. In memory that outlives the process, it lets a successor go on where the process
//! was killed.

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::PAGE_SIZE;
use crate::mem::{Arriving, HeapPages, Region, SharedMem, Unit};

/// Where a back ring keeps what it took. Slots are below `slots()`. A kill between any two
/// calls, or within one, must leave each word as it was before or after.
///
/// Each entry has a mark: the number of the request it holds, in the order of taking from 1 on,
/// never given twice; 0 for none. And there is a log: for each ring index, the number of the
/// request that was answered there. A request is answered if the log says so below the ring's
/// producer index; so nothing needs to be undone when answers are published, and an entry's mark
/// stays until the next request is put there (see [`BackRing`](crate::BackRing) for why its
/// answer is still in the log by then).
pub trait InFlight<R> {
    /// Number of entries, at least the ring's slots.
    fn slots(&self) -> u32;
    /// Fills an entry: first the request, then its mark.
    fn put(&mut self, slot: u32, sequence: u64, req: Arriving<'_, R>) -> R;
    /// Logs that the entry's request is answered at the ring index `position`.
    fn answer(&mut self, slot: u32, position: u32);
    /// Takes an entry's mark away.
    fn clear(&mut self, slot: u32);
    /// The entry's mark.
    fn mark(&self, slot: u32) -> u64;
    /// The number of the request that was answered at the ring index `position`, 0 for none.
    /// Kept for twice as many positions as there are entries: those that a published answer of a
    /// marked entry can have, and those of answers not published.
    fn answered(&self, position: u32) -> u64;
    /// The request of an entry that has a mark.
    fn request(&self, slot: u32) -> R;
}

const MAGIC: u64 = u64::from_le_bytes(*b"RBFLIGHT");
const VERSION: u32 = 2;
const HEADER: usize = 64;
/// Header offsets: magic, version, slots, bytes of a request.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 8;
const AT_SLOTS: usize = 12;
const AT_REQUEST: usize = 16;
/// Behind the header lie the marks, then the log, then the requests: what is touched at every
/// step stays in the first-level cache.
const WORD: usize = 8;

/// Positions of the log.
const fn log_len(slots: u32) -> usize {
    2 * (slots as usize).next_power_of_two()
}

/// Where the log starts.
const fn log(slots: u32) -> usize {
    HEADER + slots as usize * WORD
}

/// Where the requests start: half a page from where the ring's own slots start (modulo the page).
/// A processor takes a load for dependent on an earlier store whose address has the same low 12
/// bits, so that copying from slot n + 1 would wait for the copy to entry n + 1.
const fn requests(slots: u32) -> usize {
    let end = log(slots) + log_len(slots) * WORD;
    let offset = (PAGE_SIZE / 2 + HEADER) % PAGE_SIZE;
    end + (PAGE_SIZE + offset - end % PAGE_SIZE) % PAGE_SIZE
}

/// Why memory cannot be used as a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// It is too small for that many entries.
    TooSmall {
        /// Bytes needed.
        needed: usize,
    },
    /// It holds no table, or one of another version, ring size or request type.
    Foreign,
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TableError::TooSmall { needed } => write!(f, "an in-flight table needs {needed} bytes"),
            TableError::Foreign => f.write_str("no in-flight table of this ring"),
        }
    }
}
impl core::error::Error for TableError {}

/// An in-flight table of plain bytes in shared memory, or on the heap.
pub struct Table<R, S = HeapPages> {
    region: Region<S>,
    slots: u32,
    /// Where the log and the requests start.
    log: usize,
    log_mask: usize,
    requests: usize,
    request: PhantomData<fn() -> R>,
}

impl<R: FromBytes + IntoBytes + Immutable> Table<R, HeapPages> {
    /// An empty table on the heap, for a process whose death ends the device.
    pub fn on_heap(slots: u32) -> Self {
        let memory = HeapPages::new(Self::bytes(slots).div_ceil(PAGE_SIZE));
        let table = Table::over(Region::new(memory), slots);
        table.write_header();
        table
    }
}

impl<R, S> Table<R, S> {
    const STRIDE: usize = size_of::<R>().next_multiple_of(16);
    fn over(region: Region<S>, slots: u32) -> Self {
        let (log, log_mask) = (log(slots), log_len(slots) - 1);
        Table { region, slots, log, log_mask, requests: requests(slots), request: PhantomData }
    }
    /// Bytes that a table of `slots` entries takes.
    pub const fn bytes(slots: u32) -> usize {
        requests(slots) + slots as usize * Self::STRIDE
    }
}

impl<R: FromBytes + IntoBytes + Immutable, S: SharedMem> Table<R, S> {
    /// Makes an empty table, whatever the memory held.
    pub fn format(memory: S, slots: u32) -> Result<Self, TableError> {
        let needed = Self::bytes(slots);
        if memory.len() < needed {
            return Err(TableError::TooSmall { needed });
        }
        let table = Table::over(Region::new(memory), slots);
        table.region.word64(AT_MAGIC).store(0, Relaxed);
        for word in (HEADER..log(slots) + log_len(slots) * WORD).step_by(WORD) {
            table.region.set64(word, 0);
        }
        table.write_header();
        Ok(table)
    }

    /// Takes over the table that a predecessor left.
    pub fn open(memory: S, slots: u32) -> Result<Self, TableError> {
        let needed = Self::bytes(slots);
        if memory.len() < needed {
            return Err(TableError::TooSmall { needed });
        }
        let region = Region::new(memory);
        let ours = region.word64(AT_MAGIC).load(Acquire) == MAGIC
            && region.word(AT_VERSION).load(Relaxed) == VERSION
            && region.word(AT_SLOTS).load(Relaxed) == slots
            && region.word(AT_REQUEST).load(Relaxed) as usize == size_of::<R>();
        if !ours {
            return Err(TableError::Foreign);
        }
        Ok(Table::over(region, slots))
    }

    /// The memory.
    pub fn memory(&self) -> &S {
        self.region.owner()
    }

    fn write_header(&self) {
        self.region.word(AT_VERSION).store(VERSION, Relaxed);
        self.region.word(AT_SLOTS).store(self.slots, Relaxed);
        self.region.word(AT_REQUEST).store(size_of::<R>() as u32, Relaxed);
        self.region.word64(AT_MAGIC).store(MAGIC, Release);
    }

    #[inline(always)]
    fn mark_at(&self, slot: u32) -> usize {
        HEADER + slot as usize * WORD
    }
    #[inline(always)]
    fn log_at(&self, position: u32) -> usize {
        self.log + (position as usize & self.log_mask) * WORD
    }
    #[inline(always)]
    fn request_at(&self, slot: u32) -> usize {
        self.requests + slot as usize * Self::STRIDE
    }
}

impl<R: FromBytes + IntoBytes + Immutable, S: SharedMem> InFlight<R> for Table<R, S> {
    fn slots(&self) -> u32 {
        self.slots
    }
    #[inline(always)]
    fn put(&mut self, slot: u32, sequence: u64, req: Arriving<'_, R>) -> R {
        let req = self.region.keep(self.request_at(slot), req);
        self.region.set64(self.mark_at(slot), sequence);
        req
    }
    #[inline(always)]
    fn answer(&mut self, slot: u32, position: u32) {
        let sequence = self.region.word64(self.mark_at(slot)).load(Relaxed);
        self.region.set64(self.log_at(position), sequence);
    }
    fn clear(&mut self, slot: u32) {
        self.region.set64(self.mark_at(slot), 0);
    }
    fn mark(&self, slot: u32) -> u64 {
        self.region.word64(self.mark_at(slot)).load(Acquire)
    }
    fn answered(&self, position: u32) -> u64 {
        self.region.word64(self.log_at(position)).load(Acquire)
    }
    fn request(&self, slot: u32) -> R {
        self.region.load(self.request_at(slot), const { Unit::of(16, size_of::<R>()) })
    }
}

/// No table: for a protocol whose requests need not survive the process, such as received
/// packets. Costs nothing, and a successor finds everything answered.
#[derive(Clone, Copy, Debug)]
pub struct Forget {
    slots: u32,
}

impl Forget {
    /// For rings of up to `slots` slots.
    pub fn new(slots: u32) -> Self {
        Forget { slots }
    }
}

impl<R: FromBytes> InFlight<R> for Forget {
    fn slots(&self) -> u32 {
        self.slots
    }
    #[inline(always)]
    fn put(&mut self, _: u32, _: u64, req: Arriving<'_, R>) -> R {
        req.take()
    }
    #[inline(always)]
    fn answer(&mut self, _: u32, _: u32) {}
    fn clear(&mut self, _: u32) {}
    fn mark(&self, _: u32) -> u64 {
        0
    }
    fn answered(&self, _: u32) -> u64 {
        0
    }
    fn request(&self, _: u32) -> R {
        R::new_zeroed()
    }
}
