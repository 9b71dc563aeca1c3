//! The in-flight table: what was taken from the ring and is not answered yet.
//!
//! Responses reuse the slots of requests, so once answers leave out of order the ring alone
//! cannot say which requests are unanswered. The table can: a request is copied into it before
//! the ring's consumer index moves on, and its entry becomes free by the very index that publishes
//! its response. In memory that outlives the process, it lets a successor go on where the process
//! was killed.

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::PAGE_SIZE;
use crate::mem::{Arriving, Entry, HeapPages, Region, Row, SharedMem, Unit};

/// Where a back ring keeps what it took: E entries, and in which order they are used.
///
/// The request at ring index i goes to the entry that the order names at i. An entry whose
/// request is answered at position p is named again at p + E: what was freed first is used first.
/// So with `taken` requests taken and `rsp_prod` responses published, the entries that the order
/// names from `taken` up to `rsp_prod + E` are free, each once, and all others hold requests
/// without a published response. Nothing is undone or marked when answers are published.
///
/// A kill between any two calls, or within one, must leave each word as it was before or after.
pub trait InFlight<R> {
    /// Number of entries (E), at least the ring's slots.
    fn slots(&self) -> u32;
    /// Index of the next request to take; `None` before [`begin`](Self::begin).
    fn taken(&self) -> Option<u32>;
    /// Makes all entries free, with the ring at `index`.
    fn begin(&mut self, index: u32);
    /// The entry that the order names at an index, from `taken - E` to below `rsp_prod + E`.
    fn order(&self, index: u32) -> u32;
    /// What copies the request at an index, which is `taken`, into its entry, and only then counts
    /// it as taken; it gives the entry and the request. For a loop: what it knows of the table is
    /// its own, and stays in registers.
    fn putting(&mut self) -> impl FnMut(u32, Arriving<'_, R>) -> (u32, R);
    /// What names an entry in the order, by ring index and entry: its request is answered E before
    /// that index. For a loop, too.
    fn freeing(&mut self) -> impl FnMut(u32, u32);
    /// The request of an entry that was used.
    fn request(&self, slot: u32) -> R;
}

const MAGIC: u64 = u64::from_le_bytes(*b"RBFLIGHT");
const VERSION: u32 = 2;
const HEADER: usize = 64;
/// Header offsets: magic, version, slots, bytes of a request; the index of the next request to
/// take, 64 bits of which the upper ones say that there is one.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 8;
const AT_SLOTS: usize = 12;
const AT_REQUEST: usize = 16;
const AT_TAKEN: usize = 24;
const BEGUN: u64 = 1 << 32;
// Behind the header lies the order, words of 4 bytes, then the requests.

/// Indices whose entries are kept: those of free entries and of the last E requests taken.
const fn order_len(slots: u32) -> u32 {
    2 * slots.next_power_of_two()
}

/// Where the requests start: half a page from where the ring's own slots start (modulo the page),
/// and there the two go round together as long as answers leave in order. A processor takes a
/// load for dependent on an earlier store whose address has the same low 12 bits, so that copying
/// from slot n + 1 would wait for the copy to entry n + 1.
const fn requests(slots: u32) -> usize {
    let end = HEADER + order_len(slots) as usize * AtomicU32::STRIDE;
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
    /// The order, which names a row of words by ring indices.
    order: Row<S, AtomicU32>,
    slots: u32,
    /// Where the requests start.
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
    /// Bytes that a table of `slots` entries takes.
    pub const fn bytes(slots: u32) -> usize {
        requests(slots) + slots as usize * Self::STRIDE
    }
}

impl<R: FromBytes + IntoBytes + Immutable, S: SharedMem> Table<R, S> {
    fn over(region: Region<S>, slots: u32) -> Self {
        let order = Row::new(region, HEADER, order_len(slots));
        Table { order, slots, requests: requests(slots), request: PhantomData }
    }

    /// Makes an empty table, whatever the memory held.
    pub fn format(memory: S, slots: u32) -> Result<Self, TableError> {
        let needed = Self::bytes(slots);
        if memory.len() < needed {
            return Err(TableError::TooSmall { needed });
        }
        let table = Table::over(Region::new(memory), slots);
        table.order.region().word64(AT_MAGIC).store(0, Relaxed);
        table.order.region().word64(AT_TAKEN).store(0, Relaxed);
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
        self.order.region().owner()
    }

    fn write_header(&self) {
        self.order.region().word(AT_VERSION).store(VERSION, Relaxed);
        self.order.region().word(AT_SLOTS).store(self.slots, Relaxed);
        self.order.region().word(AT_REQUEST).store(size_of::<R>() as u32, Relaxed);
        self.order.region().word64(AT_MAGIC).store(MAGIC, Release);
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
    fn taken(&self) -> Option<u32> {
        let taken = self.order.region().word64(AT_TAKEN).load(Relaxed);
        (taken & BEGUN != 0).then_some(taken as u32)
    }
    fn begin(&mut self, index: u32) {
        for slot in 0..self.slots {
            self.freeing()(index.wrapping_add(slot), slot);
        }
        self.order.region().set64(AT_TAKEN, BEGUN | u64::from(index));
    }
    #[inline(always)]
    fn order(&self, index: u32) -> u32 {
        self.order.word_at(index).load(Relaxed)
    }
    #[inline(always)]
    fn putting(&mut self) -> impl FnMut(u32, Arriving<'_, R>) -> (u32, R) {
        let (order, requests) = (self.order.on_loan(), self.requests);
        move |index, req| {
            let slot = order.word_at(index).load(Relaxed);
            let req = order.region().keep(requests + slot as usize * Self::STRIDE, req);
            order.region().set64(AT_TAKEN, BEGUN | u64::from(index.wrapping_add(1)));
            (slot, req)
        }
    }
    #[inline(always)]
    fn freeing(&mut self) -> impl FnMut(u32, u32) {
        let order = self.order.on_loan();
        move |index, slot| order.set_at(index, slot)
    }
    fn request(&self, slot: u32) -> R {
        self.order.region().load(self.request_at(slot), const { Unit::of(16, size_of::<R>()) })
    }
}

/// No table: for a protocol whose requests need not survive the process, such as received
/// packets. A successor finds everything answered.
pub struct Forget {
    order: Row<HeapPages, AtomicU32>,
    slots: u32,
    begun: bool,
    taken: u32,
}

impl Forget {
    /// For rings of up to `slots` slots.
    pub fn new(slots: u32) -> Self {
        let bytes = order_len(slots) as usize * AtomicU32::STRIDE;
        let region = Region::new(HeapPages::new(bytes.div_ceil(PAGE_SIZE)));
        let order = Row::new(region, 0, order_len(slots));
        Forget { order, slots, begun: false, taken: 0 }
    }
}

impl<R: FromBytes> InFlight<R> for Forget {
    fn slots(&self) -> u32 {
        self.slots
    }
    #[inline(always)]
    fn taken(&self) -> Option<u32> {
        self.begun.then_some(self.taken)
    }
    fn begin(&mut self, index: u32) {
        for slot in 0..self.slots {
            InFlight::<R>::freeing(self)(index.wrapping_add(slot), slot);
        }
        (self.begun, self.taken) = (true, index);
    }
    #[inline(always)]
    fn order(&self, index: u32) -> u32 {
        self.order.word_at(index).load(Relaxed)
    }
    #[inline(always)]
    fn putting(&mut self) -> impl FnMut(u32, Arriving<'_, R>) -> (u32, R) {
        let (order, taken) = (self.order.on_loan(), &mut self.taken);
        move |index, req| {
            *taken = index.wrapping_add(1);
            (order.word_at(index).load(Relaxed), req.take())
        }
    }
    #[inline(always)]
    fn freeing(&mut self) -> impl FnMut(u32, u32) {
        let order = self.order.on_loan();
        move |index, slot| order.word_at(index).store(slot, Relaxed)
    }
    fn request(&self, _: u32) -> R {
        R::new_zeroed()
    }
}
