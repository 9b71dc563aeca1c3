//! The rings between this process and the kernel (linux/if_xdp.h): one producer and one consumer each,
//! indices that count up freely and wrap at 2^32, and entries between them that are one side's alone.
//!
//! Each side writes its own index and keeps a copy, so that only the other's is read from the shared
//! memory. The kernel is trusted; still an index of its that cannot be is an error and nothing is
//! touched outside the ring: entries are found by the index's lower bits.

use std::io;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use rustix::net::xdp::XdpRingFlags;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::memory::Memory;

/// `struct xdp_desc`: a packet in the frames' memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Packet {
    /// Its first byte.
    pub at: u64,
    /// Its bytes.
    pub len: u32,
    /// None is used.
    pub options: u32,
}

/// Where a ring's parts are in its mapping (`struct xdp_ring_offset`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    pub producer: usize,
    pub consumer: usize,
    pub flags: usize,
    pub entries: usize,
}

/// A ring's memory. Its number of entries is a power of 2, as the kernel wants it.
pub(super) struct Mapped {
    pub memory: Memory,
    pub places: Places,
    pub size: u32,
}

/// What both sides of a ring share.
struct Ring<T> {
    name: &'static str,
    memory: Memory,
    places: Places,
    size: u32,
    /// This side's index, which the other may not have been shown yet.
    own: u32,
    /// The other side's index, as it was when last looked at.
    other: u32,
    entries: PhantomData<fn() -> T>,
}

impl<T> Ring<T> {
    fn new(name: &'static str, mapped: Mapped) -> io::Result<Ring<T>> {
        let Mapped { memory, places, size } = mapped;
        let Places { producer, consumer, flags, entries } = places;
        let has_words = [producer, consumer, flags].iter().all(|at| memory.word(*at).is_some());
        let end = entries.checked_add(size as usize * size_of::<T>());
        if !size.is_power_of_two() || !has_words || end.is_none_or(|end| end > memory.len()) {
            return Err(io::Error::other(format!("the {name} ring does not lie in its mapping")));
        }
        Ok(Ring { name, memory, places, size, own: 0, other: 0, entries: PhantomData })
    }

    fn word(&self, at: usize) -> io::Result<&AtomicU32> {
        self.memory.word(at).ok_or_else(|| self.corrupt(at as u32))
    }

    /// Where the entry with an index is.
    fn at(&self, index: u32) -> usize {
        self.places.entries + (index & (self.size - 1)) as usize * size_of::<T>()
    }

    fn corrupt(&self, index: u32) -> io::Error {
        let (name, own, size) = (self.name, self.own, self.size);
        io::Error::other(format!(
            "the kernel's index of the {name} ring is {index} where ours is {own}; it has {size} entries"
        ))
    }
}

/// The side that fills a ring: the fill and the send ring.
pub(super) struct Producer<T>(Ring<T>);

impl<T: IntoBytes + Immutable> Producer<T> {
    pub(super) fn new(name: &'static str, mapped: Mapped) -> io::Result<Producer<T>> {
        Ring::new(name, mapped).map(Producer)
    }

    /// Entries of the ring.
    pub(super) fn size(&self) -> u32 {
        self.0.size
    }

    /// Entries that the kernel has not taken yet, with those that it has not been shown.
    pub(super) fn pending(&self) -> io::Result<u32> {
        // What the kernel has taken may be overwritten afterwards.
        let consumer = self.0.word(self.0.places.consumer)?.load(Ordering::Acquire);
        let pending = self.0.own.wrapping_sub(consumer);
        if pending > self.0.size { Err(self.0.corrupt(consumer)) } else { Ok(pending) }
    }

    /// Appends an entry, for the kernel to see after [`publish`](Self::publish); whether there was
    /// room.
    pub(super) fn push(&mut self, entry: &T) -> io::Result<bool> {
        if self.0.own.wrapping_sub(self.0.other) >= self.0.size {
            self.0.other = self.0.own.wrapping_sub(self.pending()?);
            if self.0.own.wrapping_sub(self.0.other) == self.0.size {
                return Ok(false);
            }
        }
        let put = self.0.memory.put(self.0.at(self.0.own), entry);
        self.0.own = self.0.own.wrapping_add(u32::from(put));
        Ok(put)
    }

    /// Shows the kernel all entries; whether it wants to be told (`XDP_RING_NEED_WAKEUP`).
    pub(super) fn publish(&mut self) -> io::Result<bool> {
        // The entries are there before the index says so.
        self.0.word(self.0.places.producer)?.store(self.0.own, Ordering::Release);
        self.wants_wakeup()
    }

    /// Whether the kernel wants to be told of entries.
    pub(super) fn wants_wakeup(&self) -> io::Result<bool> {
        // It says so, looks a last time and sleeps; here the index comes first and the look second.
        fence(Ordering::SeqCst);
        let flags = self.0.word(self.0.places.flags)?.load(Ordering::Relaxed);
        Ok(flags & XdpRingFlags::XDP_RING_NEED_WAKEUP.bits() != 0)
    }
}

/// The side that empties a ring: the receive and the completion ring.
pub(super) struct Consumer<T>(Ring<T>);

impl<T: FromBytes> Consumer<T> {
    pub(super) fn new(name: &'static str, mapped: Mapped) -> io::Result<Consumer<T>> {
        Ring::new(name, mapped).map(Consumer)
    }

    /// The next entry, if there is one. Its place is the kernel's again after
    /// [`release`](Self::release).
    pub(super) fn pop(&mut self) -> io::Result<Option<T>> {
        if self.0.own == self.0.other {
            // The entries are read after the index that says that they are there.
            let producer = self.0.word(self.0.places.producer)?.load(Ordering::Acquire);
            if producer.wrapping_sub(self.0.own) > self.0.size {
                return Err(self.0.corrupt(producer));
            }
            self.0.other = producer;
            if self.0.own == producer {
                return Ok(None);
            }
        }
        let entry = self.0.memory.get(self.0.at(self.0.own));
        self.0.own = self.0.own.wrapping_add(1);
        Ok(entry)
    }

    /// Gives the kernel back the places of the entries that were taken.
    pub(super) fn release(&mut self) -> io::Result<()> {
        // They have been read before the index says so.
        self.0.word(self.0.places.consumer)?.store(self.0.own, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
