//! Equal entries side by side in shared memory.

use core::marker::PhantomData;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::Release;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{Arriving, Region, SharedMem, Unit, kill_point};

/// What a row is made of.
pub(crate) trait Entry {
    /// Bytes from one entry to the next.
    const STRIDE: usize;
}

/// Memory in which a power of two of entries lie, named by indices that count up freely. The
/// range is checked once, when the row is made: an index, whatever its value, names an entry.
pub(crate) struct Row<M, E> {
    /// The first entry; a multiple of 16.
    first: *mut u8,
    /// One less than the entries.
    mask: u32,
    region: Region<M>,
    entry: PhantomData<fn() -> E>,
}

// SAFETY: a part of the region, which may be sent.
unsafe impl<M: Send, E> Send for Row<M, E> {}
// SAFETY: access goes through the region's atomics and copies.
unsafe impl<M: Sync, E> Sync for Row<M, E> {}

impl<M, E> Row<M, E> {
    /// The memory that the row lies in.
    #[inline(always)]
    pub(crate) fn region(&self) -> &Region<M> {
        &self.region
    }
    /// The same row on loan, for a loop: see [`Region::on_loan`].
    #[inline(always)]
    pub(crate) fn on_loan(&self) -> Row<&M, E> {
        let region = self.region.on_loan();
        Row { first: self.first, mask: self.mask, region, entry: PhantomData }
    }
    /// Number of entries.
    pub(crate) fn count(&self) -> u32 {
        self.mask + 1
    }
}

impl<M: SharedMem, E: Entry> Row<M, E> {
    /// Panics unless `count` is a power of two, `first` a multiple of 16, and all of it in range.
    pub(crate) fn new(region: Region<M>, first: usize, count: u32) -> Self {
        assert!(count.is_power_of_two() && first.is_multiple_of(16));
        let bytes = (count as usize).checked_mul(E::STRIDE).expect("a row in memory");
        region.check(first, bytes);
        // SAFETY: in range by the check; the memory does not move while the region is there.
        let first = unsafe { region.base.add(first) };
        Row { region, first, mask: count - 1, entry: PhantomData }
    }
}

impl<M, E: Entry> Row<M, E> {
    /// The entry at `index`, all of whose bytes are in range.
    #[inline(always)]
    fn at(&self, index: u32) -> *mut u8 {
        // SAFETY: below `count` strides from `first`, which `new` has found in range.
        unsafe { self.first.add((index & self.mask) as usize * E::STRIDE) }
    }

    /// The value in the entry at `index`, still to be copied.
    #[inline(always)]
    pub(crate) fn arriving<T: FromBytes>(&self, index: u32) -> Arriving<'_, T> {
        const { assert!(size_of::<T>() <= E::STRIDE) };
        // The entry is aligned for the unit: pages are, `first` is, and the unit divides the stride.
        let unit = const { Unit::of(E::STRIDE, size_of::<T>()) };
        Arriving { from: self.at(index), unit, of: PhantomData }
    }

    /// Copies the value in the entry at `index` out.
    #[inline(always)]
    pub(crate) fn load<T: FromBytes>(&self, index: u32) -> T {
        self.arriving(index).take()
    }

    /// Copies a value into the entry at `index`.
    ///
    /// A plain copy, so that a value is made in place where it can be: an honest peer reads it
    /// only after the release store that publishes it, and what a dishonest one reads or writes
    /// before is its own affair, since nothing is read back.
    #[inline(always)]
    pub(crate) fn store<T: IntoBytes + Immutable>(&self, index: u32, value: &T) {
        const { assert!(size_of::<T>() <= E::STRIDE) };
        kill_point();
        let from = core::ptr::from_ref(value).cast::<u8>();
        // SAFETY: a whole entry is in range; private and shared memory do not overlap.
        unsafe { core::ptr::copy_nonoverlapping(from, self.at(index), size_of::<T>()) }
    }
}

impl Entry for AtomicU32 {
    const STRIDE: usize = 4;
}

impl<M> Row<M, AtomicU32> {
    /// The word at `index`.
    #[inline(always)]
    pub(crate) fn word_at(&self, index: u32) -> &AtomicU32 {
        // SAFETY: in range, and aligned: `first` and the stride are multiples of 4. The memory
        // lives as long as the region's owner.
        unsafe { AtomicU32::from_ptr(self.at(index).cast()) }
    }
    /// Stores the word at `index` after everything stored before it.
    #[inline(always)]
    pub(crate) fn set_at(&self, index: u32, value: u32) {
        kill_point();
        self.word_at(index).store(value, Release);
    }
}

#[cfg(test)]
#[path = "row_tests.rs"]
mod tests;
