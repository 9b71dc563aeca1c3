//! The front-end's memory: regions of files, found by guest address or by the front-end's own.
//!
//! Nobody makes a slice of it: the other side writes to it at any time. Words are atomics, bytes
//! are copied, and payload is named to the kernel by address.
// Memory by address; each place knows its bounds and keeps its mapping alive.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::fs::{FileType, fstat};

use super::torn::Mapping;

/// Most regions of one front-end: as many as one message can bring descriptors.
pub const MAX_REGIONS: usize = 32;

/// A region as the front-end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Described {
    /// First address as the guest has it.
    pub guest: u64,
    /// First address as the front-end has it.
    pub user: u64,
    /// Bytes.
    pub len: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

/// Why a region is none.
#[derive(Debug, thiserror::Error)]
pub enum NoRegion {
    /// Its numbers make no sense.
    #[error("a region of {len:#x} bytes at guest address {guest:#x}: {why}")]
    Range { guest: u64, len: u64, why: &'static str },
    /// Its descriptor is no memory.
    #[error("the descriptor of the region at guest address {guest:#x}: {why}")]
    File { guest: u64, why: String },
    /// There are too many.
    #[error("more than {MAX_REGIONS} regions")]
    Many,
    /// None such is mapped.
    #[error("no region is at guest address {guest:#x} with {len:#x} bytes")]
    Unknown { guest: u64, len: u64 },
}

/// A region that is mapped.
#[derive(Clone, Debug)]
pub struct Region {
    what: Described,
    map: Arc<Mapping>,
    /// Address here of its first byte.
    host: usize,
}

impl Region {
    /// Maps it, if its file is as long as it says.
    pub fn map(what: Described, file: &File) -> Result<Region, NoRegion> {
        let Described { guest, user, len, offset } = what;
        let wrong = |why| NoRegion::Range { guest, len, why };
        let no_file = |why: String| NoRegion::File { guest, why };
        let failed = |e: io::Error| no_file(e.to_string());
        if len == 0 {
            return Err(wrong("it is empty"));
        }
        let end = offset.checked_add(len);
        let (Some(end), Some(_), Some(_)) = (end, guest.checked_add(len), user.checked_add(len))
        else {
            return Err(wrong("it passes the end of all addresses"));
        };
        let stat = fstat(file.as_fd()).map_err(|e| failed(e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(no_file("it is no file".into()));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if end > size {
            return Err(no_file(format!("it has {size:#x} bytes, and {end:#x} are needed")));
        }
        // Of hugetlbfs the block is the page.
        let page = u64::try_from(stat.st_blksize).unwrap_or(0).max(page_size());
        if !page.is_power_of_two() {
            return Err(no_file("its pages have an odd size".into()));
        }
        let from = offset & !(page - 1);
        let bytes = end.checked_next_multiple_of(page).map_or(end - from, |end| end - from);
        let bytes = usize::try_from(bytes).map_err(|_| wrong("it does not fit this host"))?;
        let map = Arc::new(Mapping::new(file.as_fd(), from, bytes).map_err(failed)?);
        let host = map.start() as usize + (offset - from) as usize;
        Ok(Region { what, map, host })
    }
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// All regions.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// By guest address.
    regions: Vec<Region>,
}

fn overlap(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    a < b + b_len && b < a + a_len
}

impl Memory {
    /// With one more.
    pub fn add(&mut self, region: Region) -> Result<(), NoRegion> {
        let Described { guest, user, len, .. } = region.what;
        if self.regions.len() >= MAX_REGIONS {
            return Err(NoRegion::Many);
        }
        let other = |r: &Region| {
            overlap(r.what.guest, r.what.len, guest, len)
                || overlap(r.what.user, r.what.len, user, len)
        };
        if self.regions.iter().any(other) {
            return Err(NoRegion::Range { guest, len, why: "it overlaps another one" });
        }
        let at = self.regions.partition_point(|r| r.what.guest < guest);
        self.regions.insert(at, region);
        Ok(())
    }

    /// Without this one; its file does not matter.
    pub fn remove(&mut self, what: Described) -> Result<(), NoRegion> {
        let Described { guest, user, len, .. } = what;
        let is = |r: &Region| (r.what.guest, r.what.user, r.what.len) == (guest, user, len);
        let at = self.regions.iter().position(is).ok_or(NoRegion::Unknown { guest, len })?;
        self.regions.remove(at);
        Ok(())
    }

    /// Whether a part of it was taken away.
    #[inline]
    pub fn is_torn(&self) -> bool {
        self.regions.iter().any(|r| r.map.is_torn())
    }

    /// What follows a guest address in its region: address here and bytes.
    #[inline]
    fn find(&self, guest: u64) -> Option<(&Region, usize, u64)> {
        // Few, and most of the time the last one is it (what lies above a PC's hole).
        self.regions.iter().rev().find_map(|r| {
            let from = guest.wrapping_sub(r.what.guest);
            (from < r.what.len).then(|| (r, r.host + from as usize, r.what.len - from))
        })
    }

    /// `len` bytes at a guest address, in one region.
    #[inline]
    pub fn place(&self, guest: u64, len: usize) -> Option<Place<'_>> {
        let (_, host, left) = self.find(guest)?;
        (len as u64 <= left).then_some(Place { start: host as *mut u8, len, memory: PhantomData })
    }

    /// Names `len` bytes at a guest address, which may lie in regions that follow each other,
    /// to `each`: addresses here, and bytes. `None`, perhaps after some: not all are there.
    #[inline]
    pub fn pieces(
        &self,
        mut guest: u64,
        mut len: u64,
        mut each: impl FnMut(*mut u8, usize),
    ) -> Option<()> {
        while len > 0 {
            let (_, host, left) = self.find(guest)?;
            let here = left.min(len);
            each(host as *mut u8, here as usize);
            guest = guest.checked_add(here)?;
            len -= here;
        }
        Some(())
    }

    /// `len` bytes at an address of the front-end's own, in one region, to keep.
    pub fn window(&self, user: u64, len: usize) -> Option<Window> {
        self.regions.iter().find_map(|r| {
            let from = user.wrapping_sub(r.what.user);
            let fits = from < r.what.len && len as u64 <= r.what.len - from;
            fits.then(|| Window::new(&r.map, r.host + from as usize, len))
        })
    }
}

/// Some memory that stays mapped as long as this is there.
#[derive(Clone, Debug)]
pub struct Window {
    map: Arc<Mapping>,
    start: usize,
    len: usize,
}

impl Window {
    fn new(map: &Arc<Mapping>, start: usize, len: usize) -> Window {
        Window { map: Arc::clone(map), start, len }
    }

    /// Of a whole file, or a part of it.
    pub fn of_file(file: &File, offset: u64, len: u64) -> Result<Window, NoRegion> {
        let region = Region::map(Described { guest: 0, user: 0, len, offset }, file)?;
        let len = usize::try_from(len).unwrap_or(0);
        Ok(Window::new(&region.map, region.host, len))
    }

    /// A part of it.
    pub fn part(&self, offset: usize, len: usize) -> Option<Window> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        fits.then(|| Window::new(&self.map, self.start + offset, len))
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether a part of it was taken away.
    pub fn is_torn(&self) -> bool {
        self.map.is_torn()
    }

    /// To read and write.
    #[inline]
    pub fn place(&self) -> Place<'_> {
        Place { start: self.start as *mut u8, len: self.len, memory: PhantomData }
    }

    /// Whether its words of so many bytes may be used.
    pub fn is_aligned(&self, to: usize) -> bool {
        self.start.is_multiple_of(to)
    }
}

/// Some memory that the other side writes to as well.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    start: *mut u8,
    len: usize,
    memory: PhantomData<&'a Mapping>,
}

/// A word at an offset: inside, and aligned.
macro_rules! word {
    ($name:ident, $atomic:ty, $bytes:literal) => {
        #[doc = concat!("The ", $bytes, " bytes at an aligned offset.")]
        #[inline]
        pub fn $name(&self, offset: usize) -> &'a $atomic {
            assert!(offset.checked_add($bytes).is_some_and(|end| end <= self.len));
            let word = self.start.wrapping_add(offset);
            assert!((word as usize).is_multiple_of($bytes));
            // SAFETY: inside the place, whose mapping lives as long as 'a; aligned; and every
            // access by this process is atomic.
            unsafe { &*word.cast::<$atomic>() }
        }
    };
}

impl<'a> Place<'a> {
    word!(u8, AtomicU8, 1);
    word!(u16, AtomicU16, 2);
    word!(u32, AtomicU32, 4);
    word!(u64, AtomicU64, 8);

    /// Begins to bring the line at an offset here: the other side's processor has it, and that
    /// takes as long as some hundred instructions.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a hint: no address is wrong.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.start.wrapping_add(offset).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = offset;
    }

    /// Copies `into.len()` bytes out, from `offset` on: one word at a time where that goes.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let aligned = (self.start as usize).wrapping_add(offset).is_multiple_of(8);
        let mut at = offset;
        let (words, rest) = match aligned {
            true => into.as_chunks_mut::<8>(),
            false => (&mut [][..], into),
        };
        for word in words {
            *word = self.u64(at).load(Ordering::Relaxed).to_ne_bytes();
            at += 8;
        }
        for byte in rest {
            *byte = self.u8(at).load(Ordering::Relaxed);
            at += 1;
        }
    }

    /// Copies bytes in.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) {
        for (n, byte) in from.iter().enumerate() {
            self.u8(offset + n).store(*byte, Ordering::Relaxed);
        }
    }
}
