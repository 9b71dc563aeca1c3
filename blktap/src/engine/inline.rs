//! Small writes into the page cache, made by the queue's own thread.
//!
//! Such a write is a copy. But io_uring hands it to a worker thread where the file system does
//! not promise to say EAGAIN instead of waiting (ext4; XFS and btrfs do promise), and then two
//! switches between threads cost several times what the copy does. A file is asked with its first
//! write; where it cannot promise, the thread that owns the queue writes.
//!
//! It may have to wait, where too much is dirty or a block is to be read first; meanwhile nothing
//! else moves in this queue. So what took long is left to the workers for a while.
// Payload is named by address.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use libc::iovec;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};

/// A larger one costs more than a worker does, and holds up the others.
const LARGEST: u64 = 64 << 10;
/// On average a write of a batch that takes longer has waited; a worker costs up to a fifth.
const LONG: Duration = Duration::from_micros(100);
/// So many writes go to workers then; twice as many each time, up to the last.
const PAUSES: std::ops::RangeInclusive<u32> = 64..=4096;
/// RWF_NOWAIT of linux/fs.h.
const RWF_NOWAIT: i32 = 8;

/// Who writes to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    /// To be asked.
    Unknown,
    /// io_uring, without a worker.
    Ring,
    /// The queue's thread.
    Thread,
}

/// Which writes are made at once, and those that are to be made.
pub(super) struct Inline {
    writers: Vec<Writer>,
    queue: Vec<u32>,
    /// Writes that still go to workers, and how many will the next time.
    pause: u32,
    next_pause: u32,
}

fn is_cached(file: &File) -> bool {
    let regular = fstat(file).is_ok_and(|s| FileType::from_raw_mode(s.st_mode).is_file());
    regular && fcntl_getfl(file).is_ok_and(|flags| !flags.contains(OFlags::DIRECT))
}

/// pwritev2(2): bytes, or a negative errno.
///
/// # Safety
/// The segments' memory is valid for reads.
unsafe fn pwritev2(file: &File, segments: &[iovec], offset: u64, flags: i32) -> i32 {
    let (list, count) = (segments.as_ptr(), segments.len() as i32);
    // SAFETY: as promised; the list is a slice.
    let n = unsafe { libc::pwritev2(file.as_raw_fd(), list, count, offset as i64, flags) };
    if n >= 0 { n as i32 } else { -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) }
}

impl Inline {
    /// For `depth` requests on these files.
    pub(super) fn new<'a>(depth: usize, files: impl Iterator<Item = &'a File>) -> Inline {
        let writer = |f| if is_cached(f) { Writer::Unknown } else { Writer::Ring };
        Inline {
            writers: files.map(writer).collect(),
            queue: Vec::with_capacity(depth),
            pause: 0,
            next_pause: *PAUSES.start(),
        }
    }

    /// Whether a write is to be made here; then it is in the queue.
    #[inline]
    pub(super) fn takes(&mut self, index: u32, file: u16, len: u64) -> bool {
        if self.writers.get(usize::from(file)).is_none_or(|w| *w == Writer::Ring) || len > LARGEST {
            return false;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        self.queue.push(index);
        true
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn next(&mut self) -> Option<u32> {
        self.queue.pop()
    }

    /// Writes: bytes, or a negative errno (EAGAIN: io_uring's turn).
    ///
    /// # Safety
    /// The segments' memory is valid for reads.
    pub(super) unsafe fn write(
        &mut self,
        (number, file): (u16, &File),
        segments: &[iovec],
        offset: u64,
    ) -> i32 {
        let Some(writer) = self.writers.get_mut(usize::from(number)) else { return -libc::EBADF };
        if *writer == Writer::Unknown {
            // SAFETY: as promised.
            let answer = unsafe { pwritev2(file, segments, offset, RWF_NOWAIT) };
            let promises = answer != -libc::EOPNOTSUPP;
            *writer = if promises { Writer::Ring } else { Writer::Thread };
        }
        match *writer {
            Writer::Ring => -libc::EAGAIN,
            // SAFETY: as promised.
            _ => unsafe { pwritev2(file, segments, offset, 0) },
        }
    }

    /// So many writes took so long.
    pub(super) fn took(&mut self, writes: u32, time: Duration) {
        if time < LONG * writes {
            self.next_pause = *PAUSES.start();
        } else {
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(*PAUSES.end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_left_to_workers_for_a_while() {
        let file = tempfile::tempfile().unwrap();
        let mut inline = Inline::new(4, std::iter::once(&file));
        let takes = |inline: &mut Inline| inline.takes(1, 0, 4096) && inline.next() == Some(1);
        assert!(takes(&mut inline));
        for pause in [64, 128, 256] {
            inline.took(2, LONG * 3);
            assert_eq!((0..1000).take_while(|_| !takes(&mut inline)).count(), pause);
        }
        inline.took(2, LONG);
        assert!(takes(&mut inline));
        inline.took(1, LONG);
        assert_eq!((0..1000).take_while(|_| !takes(&mut inline)).count(), 64);
        assert!(!inline.takes(1, 0, LARGEST + 1) && !inline.takes(1, 1, 1));
    }

    #[test]
    fn only_cached_files_are_written_to_here() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(reader));
        let mut inline = Inline::new(1, std::iter::once(&pipe));
        assert!(!inline.takes(0, 0, 512) && inline.is_empty());
    }
}
