//! Memory that another domain can write at any time.
// Address arithmetic on shared memory is this module's whole purpose.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::Release};

use zerocopy::FromBytes;

use crate::PAGE_SIZE;

/// A run of bytes shared with another domain.
///
/// No reference to the bytes is ever made: header words are atomics, everything else is copied
/// in or out by offset, each byte once: word by word with relaxed atomics, long runs by the processor's
/// string instruction. A copy that the other side changes meanwhile holds a mixture of old and new bytes,
/// and nothing worse.
///
/// # Safety
/// `base()` is valid for reads and writes of `len()` bytes for as long as the value lives, is
/// aligned to 4096 bytes, does not move (also when the value itself does), and is never the
/// target of a Rust reference other than to atomics. `base` and `len` give the same answer each
/// time. The other side may change the bytes at any time.
pub unsafe trait SharedMem {
    /// First byte; aligned to [`PAGE_SIZE`].
    fn base(&self) -> *mut u8;
    /// Length in bytes, a multiple of the page size.
    fn len(&self) -> usize;
    /// Whether there is no memory at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The header word at `offset`. Panics if it is out of range or not aligned to 4: offsets are
    /// the program's own and never come from the other side.
    fn word(&self, offset: usize) -> &AtomicU32 {
        check(offset, 4, self.len());
        assert!(offset.is_multiple_of(4), "word at {offset}");
        // SAFETY: in range and aligned by the checks and the trait's contract.
        unsafe { AtomicU32::from_ptr(self.base().add(offset).cast()) }
    }
    /// Copies bytes out. Panics if the range is out of bounds.
    fn read(&self, offset: usize, into: &mut [u8]) {
        check(offset, into.len(), self.len());
        // SAFETY: in range by the check; the slice is private memory.
        unsafe { copy_out(self.base().add(offset), into.as_mut_ptr(), into.len()) }
    }
    /// Copies bytes in. Panics if the range is out of bounds.
    fn write(&self, offset: usize, from: &[u8]) {
        check(offset, from.len(), self.len());
        // SAFETY: in range by the check; the slice is private memory.
        unsafe { copy_in(self.base().add(offset), from.as_ptr(), from.len()) }
    }
}

/// Shared bytes that may only be read: a page granted read-only, say. All [`SharedMem`] is.
///
/// # Safety
/// As for [`SharedMem`], but for reads alone.
pub unsafe trait SharedRead {
    /// First byte; aligned to [`PAGE_SIZE`].
    fn start(&self) -> *const u8;
    /// Length in bytes, a multiple of the page size.
    fn length(&self) -> usize;
    /// Copies bytes out. Panics if the range is out of bounds.
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        check(offset, into.len(), self.length());
        // SAFETY: in range by the check; the slice is private memory.
        unsafe { copy_out(self.start().add(offset), into.as_mut_ptr(), into.len()) }
    }
}

// SAFETY: what may be read and written may be read.
unsafe impl<M: SharedMem + ?Sized> SharedRead for M {
    fn start(&self) -> *const u8 {
        self.base()
    }
    fn length(&self) -> usize {
        self.len()
    }
}

// SAFETY: the same memory, kept alive by the reference count.
unsafe impl<M: SharedMem + ?Sized> SharedMem for Arc<M> {
    fn base(&self) -> *mut u8 {
        (**self).base()
    }
    fn len(&self) -> usize {
        (**self).len()
    }
}

// SAFETY: the same memory, which does not move with the box's content.
unsafe impl<M: SharedMem + ?Sized> SharedMem for Box<M> {
    fn base(&self) -> *mut u8 {
        (**self).base()
    }
    fn len(&self) -> usize {
        (**self).len()
    }
}

#[inline(always)]
fn check(offset: usize, len: usize, of: usize) {
    if of < len || offset > of - len {
        out_of_range(offset, len, of);
    }
}

#[cold]
#[inline(never)]
fn out_of_range(offset: usize, len: usize, of: usize) -> ! {
    panic!("{len} bytes at {offset} of {of}")
}

/// From so many bytes on the string instruction is faster than a loop of words.
const STRING: usize = 256;

/// Copies bytes by `rep movsb`, if this machine has it; whether it has. To the compiler it is opaque, so
/// that a race with the other side is the processor's affair alone, as with volatile accesses: any byte is
/// the old or the new one, and the copy in private memory is what counts.
///
/// # Safety
/// Both are valid for `len` bytes, and they don't overlap.
#[inline(always)]
unsafe fn copy_string(from: *const u8, to: *mut u8, len: usize) -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: as promised; the direction flag is clear, as the ABI has it.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
    cfg!(all(target_arch = "x86_64", not(miri)))
}

/// Copies `len` bytes out of shared memory with the widest atomics that the address allows.
///
/// # Safety
/// `from` is valid for atomic reads of `len` bytes, `to` for plain writes, and they don't overlap.
unsafe fn copy_out(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: as promised.
    if len >= STRING && unsafe { copy_string(from, to, len) } {
        return;
    }
    let from = from.cast_mut();
    let mut at = 0;
    // SAFETY: every access is within `len` bytes; atomics are aligned by the conditions.
    unsafe {
        if from.addr().is_multiple_of(8) {
            while at + 8 <= len {
                let word = AtomicU64::from_ptr(from.add(at).cast()).load(Relaxed);
                to.add(at).cast::<u64>().write_unaligned(word);
                at += 8;
            }
        }
        if from.addr().is_multiple_of(4) {
            while at + 4 <= len {
                let word = AtomicU32::from_ptr(from.add(at).cast()).load(Relaxed);
                to.add(at).cast::<u32>().write_unaligned(word);
                at += 4;
            }
        }
        while at < len {
            to.add(at).write(AtomicU8::from_ptr(from.add(at)).load(Relaxed));
            at += 1;
        }
    }
}

/// Copies `len` bytes into shared memory with the widest atomics that the address allows.
///
/// # Safety
/// `to` is valid for atomic writes of `len` bytes, `from` for plain reads, and they don't overlap.
unsafe fn copy_in(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: as promised.
    if len >= STRING && unsafe { copy_string(from, to, len) } {
        return;
    }
    let mut at = 0;
    // SAFETY: every access is within `len` bytes; atomics are aligned by the conditions.
    unsafe {
        if to.addr().is_multiple_of(8) {
            while at + 8 <= len {
                let word = from.add(at).cast::<u64>().read_unaligned();
                AtomicU64::from_ptr(to.add(at).cast()).store(word, Relaxed);
                at += 8;
            }
        }
        if to.addr().is_multiple_of(4) {
            while at + 4 <= len {
                let word = from.add(at).cast::<u32>().read_unaligned();
                AtomicU32::from_ptr(to.add(at).cast()).store(word, Relaxed);
                at += 4;
            }
        }
        while at < len {
            AtomicU8::from_ptr(to.add(at)).store(from.add(at).read(), Relaxed);
            at += 1;
        }
    }
}

/// The widest word that one instruction moves. Its accesses are volatile, not atomic: a word may
/// be torn into halves, never into less than what atomics of 8 bytes would give.
#[cfg(target_arch = "x86_64")]
type Wide = core::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Wide = [u64; 2];

/// How many bytes are copied at once. Known where the code is made, so that a copy is unrolled
/// and, where its user looks at a few fields only, never goes through memory.
#[derive(Clone, Copy)]
pub(crate) enum Unit {
    /// Only for large values, where it halves the work.
    Sixteen,
    Eight,
    Four,
    One,
}

impl Unit {
    /// The largest for values of `size` bytes, `stride` apart from a multiple of 16.
    pub(crate) const fn of(stride: usize, size: usize) -> Unit {
        match (stride | size) % 16 {
            0 if cfg!(target_arch = "x86_64") && size >= 64 => Unit::Sixteen,
            0 | 8 => Unit::Eight,
            4 | 12 => Unit::Four,
            _ => Unit::One,
        }
    }
    const fn bytes(self) -> usize {
        match self {
            Unit::Sixteen => 16,
            Unit::Eight => 8,
            Unit::Four => 4,
            Unit::One => 1,
        }
    }
}

/// Where the process could be killed and the difference would show in shared memory: before
/// every store to it. Tests end an operation here.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn kill_point() {}
#[cfg(test)]
pub(crate) use crate::kill_tests::kill_point;

/// Shared memory whose address was asked for once: the hot path makes no dynamic call.
pub(crate) struct Region<M> {
    base: *mut u8,
    len: usize,
    owner: M,
}

// SAFETY: access goes through atomics; the owner itself may be sent.
unsafe impl<M: Send> Send for Region<M> {}
// SAFETY: as above.
unsafe impl<M: Sync> Sync for Region<M> {}

impl<M: SharedMem> Region<M> {
    /// Panics where there is not even a page, so that no range of less needs a check for that.
    pub(crate) fn new(owner: M) -> Self {
        assert!(owner.len() >= PAGE_SIZE);
        Region { base: owner.base(), len: owner.len(), owner }
    }
}

impl<M> Region<M> {
    /// The same memory on loan: in a loop its address stays in a register, which it does not
    /// where a store through it might change the region itself, for all that the compiler knows.
    #[inline(always)]
    pub(crate) fn on_loan(&self) -> Region<&M> {
        Region { base: self.base, len: self.len, owner: &self.owner }
    }
    /// Whether `len` bytes at `offset` are in range: one comparison, for there is a page at least.
    #[inline(always)]
    fn check(&self, offset: usize, len: usize) {
        if (len > PAGE_SIZE && len > self.len) || offset > self.len - len {
            out_of_range(offset, len, self.len);
        }
    }
    /// The same for a word: none where the offset is known and in the first page.
    #[inline(always)]
    fn check_word(&self, offset: usize, len: usize) {
        assert!(offset.is_multiple_of(len));
        if offset >= PAGE_SIZE {
            self.check(offset, len);
        }
    }
    pub(crate) fn owner(&self) -> &M {
        &self.owner
    }
    /// The word at `offset`, which is in range and a multiple of 4.
    #[inline(always)]
    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        self.check_word(offset, 4);
        // SAFETY: in range and aligned; the memory lives as long as the owner.
        unsafe { AtomicU32::from_ptr(self.base.add(offset).cast()) }
    }
    /// The double word at `offset`, which is in range and a multiple of 8.
    #[inline(always)]
    pub(crate) fn word64(&self, offset: usize) -> &AtomicU64 {
        self.check_word(offset, 8);
        // SAFETY: in range and aligned; the memory lives as long as the owner.
        unsafe { AtomicU64::from_ptr(self.base.add(offset).cast()) }
    }
    /// Stores the double word at `offset` after everything stored before it.
    #[inline(always)]
    pub(crate) fn set64(&self, offset: usize, value: u64) {
        kill_point();
        self.word64(offset).store(value, Release);
    }
    #[inline(always)]
    fn check_unit(&self, offset: usize, len: usize, unit: Unit) {
        self.check(offset, len);
        assert!(offset.is_multiple_of(unit.bytes()) && len.is_multiple_of(unit.bytes()));
    }
    /// Copies a value out of the range at `offset`; `unit` divides its size and offset.
    #[inline(always)]
    pub(crate) fn load<T: FromBytes>(&self, offset: usize, unit: Unit) -> T {
        self.arriving(offset, unit).take()
    }
    /// The value in the range at `offset`, still to be copied; `unit` divides its size and offset.
    #[inline(always)]
    pub(crate) fn arriving<T: FromBytes>(&self, offset: usize, unit: Unit) -> Arriving<'_, T> {
        self.check_unit(offset, size_of::<T>(), unit);
        // SAFETY: in range by the check.
        Arriving { from: unsafe { self.base.add(offset) }, unit, of: PhantomData }
    }
    /// Copies a value that arrives in other memory into the range at `offset`, and returns it:
    /// read once, and written from the same registers.
    #[inline(always)]
    pub(crate) fn keep<T: FromBytes>(&self, offset: usize, value: Arriving<'_, T>) -> T {
        kill_point();
        self.check(offset, size_of::<T>());
        // SAFETY: in range by the check; the value lies in other memory.
        value.copy(Some(unsafe { self.base.add(offset) }))
    }
}

/// A value in shared memory, in range and aligned for its unit, that is read once at most.
pub struct Arriving<'a, T> {
    from: *mut u8,
    unit: Unit,
    of: PhantomData<&'a T>,
}

impl<T: FromBytes> Arriving<'_, T> {
    /// Copies the value out.
    #[inline(always)]
    pub fn take(self) -> T {
        self.copy(None)
    }
    /// Copies it out, and to private or own memory at `also`, which is valid for its size.
    #[inline(always)]
    fn copy(self, also: Option<*mut u8>) -> T {
        let mut value = MaybeUninit::<T>::uninit();
        let to = value.as_mut_ptr().cast::<u8>();
        // SAFETY: `from` is in range and aligned (see the type), `also` as said; every byte of
        // the value is written, and FromBytes says that any bytes are a valid T.
        unsafe {
            for at in (0..size_of::<T>()).step_by(self.unit.bytes()) {
                let from = self.from.add(at);
                match self.unit {
                    Unit::Sixteen => put(from.cast::<Wide>().read_volatile(), to, also, at),
                    Unit::Eight => {
                        put(AtomicU64::from_ptr(from.cast()).load(Relaxed), to, also, at);
                    }
                    Unit::Four => {
                        put(AtomicU32::from_ptr(from.cast()).load(Relaxed), to, also, at);
                    }
                    Unit::One => put(AtomicU8::from_ptr(from).load(Relaxed), to, also, at),
                }
            }
            value.assume_init()
        }
    }
}

/// Writes a word to one place or two, `at` bytes from where they begin.
///
/// # Safety
/// Both places are valid for writes of a word there.
#[inline(always)]
unsafe fn put<W: Copy>(word: W, to: *mut u8, also: Option<*mut u8>, at: usize) {
    // SAFETY: as promised.
    unsafe {
        to.add(at).cast::<W>().write_unaligned(word);
        if let Some(also) = also {
            also.add(at).cast::<W>().write_unaligned(word);
        }
    }
}

#[repr(C, align(4096))]
struct Page(UnsafeCell<[u8; PAGE_SIZE]>);

/// Zeroed pages on the heap, for both ends of a ring in one process (put them in an [`Arc`]) and
/// for tables that need not outlive it.
pub struct HeapPages(Box<[Page]>);

// SAFETY: reached only through SharedMem's atomics and copies.
unsafe impl Send for HeapPages {}
// SAFETY: as above.
unsafe impl Sync for HeapPages {}

impl HeapPages {
    /// `pages` zeroed pages of 4096 bytes.
    pub fn new(pages: usize) -> Self {
        let zeroed = |_| Page(UnsafeCell::new([0; PAGE_SIZE]));
        HeapPages((0..pages).map(zeroed).collect::<Vec<_>>().into())
    }
}

// SAFETY: page-aligned heap memory inside UnsafeCell, which stays in place when the box moves
// and to whose bytes no reference is made.
unsafe impl SharedMem for HeapPages {
    fn base(&self) -> *mut u8 {
        self.0.as_ptr().cast_mut().cast()
    }
    fn len(&self) -> usize {
        self.0.len() * PAGE_SIZE
    }
}

mod row;
pub(crate) use row::{Entry, Row};

#[cfg(test)]
#[path = "mem_tests.rs"]
mod tests;
