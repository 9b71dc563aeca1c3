//! Mappings of files that somebody else can shorten.
//!
//! A front-end keeps the files of the memory that it shares, and nothing hinders it from cutting
//! one short (only a memfd can be sealed, and neither hugetlbfs nor every front-end's memfd is).
//! Payload then fails with EFAULT, for it is the kernel that moves it; but the words of rings
//! and the heads of requests are read by the processor, and a page that is gone is SIGBUS. As a
//! Wayland compositor does with its clients' buffers, the whole mapping is replaced by zeroes of
//! its own at the first such fault, and marked: its queue sees the mark and ends the
//! connection. Nothing is paid for that on the way of a request. (Copying each word by
//! process_vm_readv, which would give EFAULT, is a system call a word; asking for seals would
//! refuse those front-ends.)
//!
//! Who gets SIGBUS elsewhere gets what they would have got before.
// A signal's handler, and memory by address.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Mappings at once, of all connections of the process.
const PLACES: usize = 1024;

struct Place {
    /// Address, 0 if free; 1 while it is being filled or emptied.
    start: AtomicUsize,
    len: AtomicUsize,
    torn: AtomicBool,
}

impl Place {
    const fn free() -> Place {
        let (start, len) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Place { start, len, torn: AtomicBool::new(false) }
    }
}

static MAPPINGS: [Place; PLACES] = [const { Place::free() }; PLACES];

/// What SIGBUS did before.
struct Before(UnsafeCell<MaybeUninit<libc::sigaction>>);
// SAFETY: written once, before the handler that reads it is installed.
unsafe impl Sync for Before {}
static BEFORE: Before = Before(UnsafeCell::new(MaybeUninit::zeroed()));

/// Memory that is shared with another process, which may take it away.
#[derive(Debug)]
pub struct Mapping {
    place: usize,
    start: *mut u8,
    len: usize,
}

// SAFETY: the memory is there as long as the value; what is done with it is the callers' business.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a file from `offset` on, both multiples of its page size.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Mapping> {
        install()?;
        let free = |p: &Place| p.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed);
        let place = MAPPINGS.iter().position(|p| free(p).is_ok()).ok_or_else(|| {
            io::Error::other(format!("more than {PLACES} regions of shared memory"))
        })?;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping, where the kernel likes it.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                offset,
            )
        };
        let entry = &MAPPINGS[place];
        if start == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            entry.start.store(0, Ordering::Release);
            return Err(error);
        }
        // A guest's memory is no part of a core dump; it is as well if that fails.
        // SAFETY: the mapping of above.
        unsafe { libc::madvise(start, len, libc::MADV_DONTDUMP) };
        entry.len.store(len, Ordering::Relaxed);
        entry.torn.store(false, Ordering::Relaxed);
        entry.start.store(start as usize, Ordering::Release);
        Ok(Mapping { place, start: start.cast(), len })
    }

    /// Its first byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Whether a part of it was taken away, and all of it is zeroes of this process now.
    #[inline]
    pub fn is_torn(&self) -> bool {
        MAPPINGS[self.place].torn.load(Ordering::Relaxed)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let entry = &MAPPINGS[self.place];
        // Nobody touches the memory any more, so nobody looks for it here.
        entry.start.store(1, Ordering::Release);
        // SAFETY: the mapping that `new` made; whoever had an address in it had this value.
        unsafe { libc::munmap(self.start.cast(), self.len) };
        entry.start.store(0, Ordering::Release);
    }
}

/// Installs the handler, once for the process.
fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    static DONE: AtomicBool = AtomicBool::new(false);
    ONCE.call_once(|| {
        // SAFETY: all zeroes is a valid sigaction, and the handler has SA_SIGINFO's signature.
        // What was there before is kept before ours can run.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigaction(libc::SIGBUS, std::ptr::null(), BEFORE.0.get().cast()) == 0
                && libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) == 0
        };
        DONE.store(done, Ordering::Release);
    });
    match DONE.load(Ordering::Acquire) {
        true => Ok(()),
        false => Err(io::Error::other("no handler for SIGBUS")),
    }
}

/// Only what a signal's handler may do: atomics, and mmap.
extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel's, for this call.
    let address = unsafe { (*info).si_addr() } as usize;
    // SAFETY: the thread's own.
    let errno = unsafe { *libc::__errno_location() };
    if replace(address) {
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        return;
    }
    // SAFETY: it was written before this handler was installed.
    let before = unsafe { (*BEFORE.0.get()).assume_init_ref() };
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The instruction runs again, and this time it ends the process.
            // SAFETY: all zeroes is the default action.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &default, std::ptr::null_mut());
            }
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: with this flag it has this signature.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without the flag it has this one.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

/// Puts zeroes in the place of the mapping that has this address. All of it: one of huge pages
/// cannot be replaced in part.
fn replace(address: usize) -> bool {
    for entry in &MAPPINGS {
        let start = entry.start.load(Ordering::Acquire);
        let len = entry.len.load(Ordering::Relaxed);
        if start < 2 || !(start..start.saturating_add(len)).contains(&address) {
            continue;
        }
        // SAFETY: the range is the mapping's, whole; its owner is alive, for it is being used.
        let zeroes = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        entry.torn.store(true, Ordering::Relaxed);
        return zeroes != libc::MAP_FAILED;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_was_cut_off_reads_as_zeroes_and_is_marked() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let cut = Mapping::new(file.as_fd(), 0, 8192).unwrap();
        let other = tempfile::tempfile().unwrap();
        other.set_len(4096).unwrap();
        let whole = Mapping::new(other.as_fd(), 0, 4096).unwrap();
        let byte = |m: &Mapping, at: usize| {
            // SAFETY: inside the mapping.
            unsafe { m.start().add(at).read_volatile() }
        };
        assert_eq!((byte(&cut, 5000), cut.is_torn()), (0, false));
        file.set_len(4096).unwrap();
        assert_eq!((byte(&cut, 100), cut.is_torn()), (0, false), "this page is still there");
        assert_eq!((byte(&cut, 5000), cut.is_torn()), (0, true));
        assert_eq!((byte(&whole, 0), whole.is_torn()), (0, false));
    }
}
