//! The in-flight table: what was taken from the ring and is not answered yet.
//!
//! Responses reuse the slots of requests, so once answers leave out of order the ring alone
//! cannot say which requests are unanswered. The table can: a request is copied into it before
//! the ring's consumer index moves on, and its entry is cleared after the response has been
//! published. In memory that outlives the process, it lets a successor go on where the process
//! was killed.

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::PAGE_SIZE;
use crate::mem::{HeapPages, Region, SharedMem, Unit};

/// State of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Holds no request.
    Free,
    /// Holds a request that has no response yet.
    Taken {
        /// Number in the order of taking, never 0.
        sequence: u64,
    },
    /// Holds a request whose response was put at the ring index `position`; whether it was
    /// published, the ring's producer index says.
    Answered {
        /// Number in the order of taking, never 0.
        sequence: u64,
        /// Index (not masked) of the response.
        position: u32,
    },
}

/// Where a back ring keeps what it took. Slots are below `slots()`. A kill between any two
/// calls, or within one, must leave each entry in one of the states before or after.
pub trait InFlight<R> {
    /// Number of entries, at least the ring's slots.
    fn slots(&self) -> u32;
    /// Fills a free entry: first the request, then the mark that it is taken.
    fn put(&mut self, slot: u32, sequence: u64, req: &R);
    /// Notes where the response of a taken entry is.
    fn answer(&mut self, slot: u32, position: u32);
    /// Takes the note back: the response was never published.
    fn retract(&mut self, slot: u32);
    /// Makes the entry free.
    fn clear(&mut self, slot: u32);
    /// The entry's state.
    fn entry(&self, slot: u32) -> Entry;
    /// The request of an entry that is not free.
    fn request(&self, slot: u32) -> R;
}

const MAGIC: u64 = u64::from_le_bytes(*b"RBFLIGHT");
const VERSION: u32 = 1;
const HEADER: usize = 64;
/// Header offsets: magic, version, slots, bytes of a request.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 8;
const AT_SLOTS: usize = 12;
const AT_REQUEST: usize = 16;
/// Behind the header each entry has its two marks, 16 bytes: sequence (0: free) and answer (bit 32
/// set: the low half is a position). The requests lie behind all marks, so that what is touched
/// at every step stays in the first-level cache.
const MARKS: usize = 16;
const SEQUENCE: usize = 0;
const ANSWER: usize = 8;
const ANSWERED: u64 = 1 << 32;

/// Where the requests start: half a page from where the ring's own slots start (modulo the page).
/// A processor takes a load for dependent on an earlier store whose address has the same low 12
/// bits, so that copying from slot n + 1 would wait for the copy to entry n + 1.
const fn requests(slots: u32) -> usize {
    let marks = HEADER + slots as usize * MARKS;
    let offset = (PAGE_SIZE / 2 + HEADER) % PAGE_SIZE;
    marks + (PAGE_SIZE + offset - marks % PAGE_SIZE) % PAGE_SIZE
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
    request: PhantomData<fn() -> R>,
}

impl<R: FromBytes + IntoBytes + Immutable> Table<R, HeapPages> {
    /// An empty table on the heap, for a process whose death ends the device.
    pub fn on_heap(slots: u32) -> Self {
        let region = Region::new(HeapPages::new(Self::bytes(slots).div_ceil(PAGE_SIZE)));
        let table = Table { region, slots, request: PhantomData };
        table.write_header();
        table
    }
}

impl<R, S> Table<R, S> {
    const STRIDE: usize = size_of::<R>().next_multiple_of(16);
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
        let table = Table { region: Region::new(memory), slots, request: PhantomData };
        table.region.word64(AT_MAGIC).store(0, Relaxed);
        for slot in 0..slots {
            table.region.set64(table.at(slot) + SEQUENCE, 0);
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
        Ok(Table { region, slots, request: PhantomData })
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
    fn at(&self, slot: u32) -> usize {
        HEADER + slot as usize * MARKS
    }
    #[inline(always)]
    fn request_at(&self, slot: u32) -> usize {
        requests(self.slots) + slot as usize * Self::STRIDE
    }
}

impl<R: FromBytes + IntoBytes + Immutable, S: SharedMem> InFlight<R> for Table<R, S> {
    fn slots(&self) -> u32 {
        self.slots
    }
    #[inline(always)]
    fn put(&mut self, slot: u32, sequence: u64, req: &R) {
        let at = self.at(slot);
        self.region.store(self.request_at(slot), req);
        self.region.set64(at + ANSWER, 0);
        self.region.set64(at + SEQUENCE, sequence);
    }
    #[inline(always)]
    fn answer(&mut self, slot: u32, position: u32) {
        let note = ANSWERED | u64::from(position);
        self.region.set64(self.at(slot) + ANSWER, note);
    }
    fn retract(&mut self, slot: u32) {
        self.region.set64(self.at(slot) + ANSWER, 0);
    }
    #[inline(always)]
    fn clear(&mut self, slot: u32) {
        self.region.set64(self.at(slot) + SEQUENCE, 0);
    }
    fn entry(&self, slot: u32) -> Entry {
        let at = self.at(slot);
        let sequence = self.region.word64(at + SEQUENCE).load(Acquire);
        let answer = self.region.word64(at + ANSWER).load(Acquire);
        match (sequence, answer & ANSWERED) {
            (0, _) => Entry::Free,
            (_, 0) => Entry::Taken { sequence },
            _ => Entry::Answered { sequence, position: answer as u32 },
        }
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
    fn put(&mut self, _: u32, _: u64, _: &R) {}
    #[inline(always)]
    fn answer(&mut self, _: u32, _: u32) {}
    fn retract(&mut self, _: u32) {}
    #[inline(always)]
    fn clear(&mut self, _: u32) {}
    fn entry(&self, _: u32) -> Entry {
        Entry::Free
    }
    fn request(&self, _: u32) -> R {
        R::new_zeroed()
    }
}
