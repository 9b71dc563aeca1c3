//! The blocking face of an open file: metadata of images, through the same open file as payload.
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use zerocopy::{FromBytes, IntoBytes};

use super::{Access, Cache, FileStorage, Storage, probe};
use crate::disk::{Kept, Region};
use crate::engine::{EngineFile, FileKind, PastEnd};

/// Largest piece that is read or written at once where memory or offsets must be aligned.
const PIECE: usize = 1 << 20;

#[repr(C, align(4096))]
#[derive(Clone, Copy, FromBytes, IntoBytes)]
struct Page([u8; 4096]);

/// Memory that O_DIRECT takes.
struct Aligned(Vec<Page>);

impl Aligned {
    fn new(len: usize) -> Self {
        Aligned(vec![Page([0; 4096]); len.div_ceil(4096)])
    }
    fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.0.as_mut_slice().as_mut_bytes()[..len]
    }
}

impl FileStorage {
    /// The unit of offsets and lengths of direct I/O, 1 if buffered.
    fn unit(&self) -> u64 {
        u64::from(self.probe.length_align.max(1))
    }

    /// Reads up to `into.len()` bytes; the rest lies beyond the end and becomes zeroes.
    fn read_whole(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut got = 0;
        while got < into.len() {
            match self.file.read_at(&mut into[got..], offset + got as u64) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Direct I/O after the odd tail of a file.
                Err(e) if got > 0 && e.raw_os_error() == Some(libc::EINVAL) => break,
                Err(e) => return Err(e),
            }
        }
        into[got..].fill(0);
        Ok(())
    }

    /// The aligned pieces that cover `offset..offset + len`.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = (u64, usize)> + use<> {
        let unit = self.unit().max(512);
        let end = (offset + len as u64).next_multiple_of(unit);
        let mut at = offset - offset % unit;
        std::iter::from_fn(move || {
            let n = (end - at).min(PIECE as u64);
            let piece = (at, n as usize);
            at += n;
            (n > 0).then_some(piece)
        })
    }

    fn is_direct(&self) -> bool {
        self.probe.length_align > 1 || self.probe.memory_align > 1
    }

    fn check_end(offset: u64, len: usize) -> io::Result<()> {
        // Files end below i64::MAX; rounding up must not overflow either.
        match offset.checked_add(len as u64) {
            Some(end) if end < i64::MAX as u64 - PIECE as u64 => Ok(()),
            _ => Err(io::ErrorKind::FileTooLarge.into()),
        }
    }
}

/// The part of a piece at `at` of `len` bytes that lies in `offset..offset + wanted`:
/// (range in the piece, range in what is wanted).
fn overlap(at: u64, len: usize, offset: u64, wanted: usize) -> (Range<usize>, Range<usize>) {
    let start = at.max(offset);
    let end = (at + len as u64).min(offset + wanted as u64);
    let in_piece = (start - at) as usize..(end - at) as usize;
    (in_piece, (start - offset) as usize..(end - offset) as usize)
}

impl Storage for FileStorage {
    fn size(&self) -> io::Result<u64> {
        probe::size(&self.file, self.probe.kind)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Self::check_end(offset, into.len())?;
        if !self.is_direct() {
            return self.read_whole(offset, into);
        }
        let wanted = into.len();
        let mut memory = Aligned::new(wanted.saturating_add(8192).min(PIECE));
        for (at, len) in self.pieces(offset, wanted) {
            let bytes = memory.bytes(len);
            self.read_whole(at, bytes)?;
            let (from, to) = overlap(at, len, offset, wanted);
            into[to].copy_from_slice(&bytes[from]);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        Self::check_end(offset, from.len())?;
        if !self.is_direct() {
            return self.file.write_all_at(from, offset);
        }
        let mut memory = Aligned::new(from.len().saturating_add(8192).min(PIECE));
        // Two that share a unit would undo each other.
        let _one = self.unaligned.lock();
        for (at, len) in self.pieces(offset, from.len()) {
            let bytes = memory.bytes(len);
            let (to, part) = overlap(at, len, offset, from.len());
            if to.len() < len {
                self.read_whole(at, bytes)?;
            }
            bytes[to].copy_from_slice(&from[part]);
            self.file.write_all_at(bytes, at)?;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if !self.needs_sync() {
            return Ok(());
        }
        let failed = self.sync_failed.load(Ordering::Relaxed);
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        self.file.sync_data().inspect_err(|e| {
            let errno = e.raw_os_error().unwrap_or(libc::EIO);
            self.sync_failed.store(errno, Ordering::Relaxed);
        })
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        match self.probe.kind {
            FileKind::Regular => self.file.set_len(size),
            FileKind::Block if size <= Storage::size(self)? => Ok(()),
            FileKind::Block => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if len == 0 {
            return Ok(());
        }
        match fallocate(&*self.file, flags, range.start, len) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NODEV) => {
                let end = range.end.min(Storage::size(self)?);
                let zeroes = vec![0; len.min(PIECE as u64) as usize];
                let mut at = range.start;
                while at < end {
                    let n = (end - at).min(zeroes.len() as u64);
                    self.write_at(at, &zeroes[..n as usize])?;
                    at += n;
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        if self.probe.kind == FileKind::Block {
            return self.set_size(range.end);
        }
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            return Ok(());
        }
        Ok(fallocate(&*self.file, FallocateFlags::empty(), range.start, len)?)
    }

    fn access(&self) -> Access {
        self.access
    }

    fn engine_file(&self) -> Option<EngineFile> {
        Some(EngineFile {
            file: Arc::clone(&self.file),
            kind: self.probe.kind,
            memory_align: self.probe.memory_align,
            length_align: self.probe.length_align,
            past_end: PastEnd::Error,
            sync_failed: Arc::clone(&self.sync_failed),
        })
    }

    fn needs_sync(&self) -> bool {
        self.cache != Cache::Unsafe && self.access == Access::ReadWrite
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn map(&self, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        if self.probe.kind == FileKind::Block {
            out.push(Region { len: range.end - range.start, kept: Kept::Data });
            return Ok(());
        }
        // A description of its own would not be locked, but a seek disturbs nobody: all I/O
        // names its offset.
        let _one = self.unaligned.lock();
        let mut at = range.start;
        while at < range.end {
            let data = match rustix::fs::seek(&*self.file, SeekFrom::Data(at)) {
                Ok(found) => found.min(range.end),
                Err(rustix::io::Errno::NXIO) => range.end,
                Err(_) => at,
            };
            if data > at {
                out.push(Region { len: data - at, kept: Kept::Hole });
                at = data;
                continue;
            }
            let hole = rustix::fs::seek(&*self.file, SeekFrom::Hole(at)).unwrap_or(range.end);
            let end = hole.clamp(at + 1, range.end);
            out.push(Region { len: end - at, kept: Kept::Data });
            at = end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{OpenOptions, open};
    use super::*;

    /// Odd places, past the end, through both caches: as plain memory would have it.
    #[test]
    fn reads_and_writes_at_odd_places() {
        for cache in [Cache::None, Cache::Writeback] {
            let dir = tempfile::tempdir_in(".").expect("a folder");
            let path = dir.path().join("a");
            std::fs::write(&path, []).expect("a file");
            let file = open(&OpenOptions::new(&path).cache(cache)).expect("open");
            let model = super::super::MemStorage::default();
            let both: [&dyn Storage; 2] = [&file, &model];
            for (at, len) in [(3, 10), (600, 2000), (1 << 20, 5), (100, 1 << 20)] {
                let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8 + 1).collect();
                both.iter().for_each(|s| s.write_at(at, &bytes).expect("write"));
            }
            both.iter().for_each(|s| s.punch(4096..9000).expect("punch"));
            file.sync().expect("sync");
            let mut read = [vec![1; 3 << 20], vec![2; 3 << 20]];
            for (s, into) in both.iter().zip(&mut read) {
                s.read_at(5, into).expect("read");
            }
            assert!(read[0] == read[1]);
            let mut map = Vec::new();
            file.map(0..1 << 20, &mut map).expect("map");
            assert_eq!(map.iter().map(|r| r.len).sum::<u64>(), 1 << 20);
        }
    }

    /// Not even where relatime would note a read: the file was written after it was last read.
    #[test]
    fn reads_leave_no_time() {
        let dir = tempfile::tempdir_in(".").expect("a folder");
        let path = dir.path().join("a");
        std::fs::write(&path, [1; 4096]).expect("a file");
        let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
        let plain = std::fs::File::options().write(true).open(&path).expect("open");
        plain.set_times(std::fs::FileTimes::new().set_accessed(long_ago)).expect("set");
        let file = open(&OpenOptions::new(&path).cache(Cache::Writeback)).expect("open");
        file.read_at(0, &mut [0; 4096]).expect("read");
        let times = std::fs::metadata(&path).expect("metadata");
        assert_eq!(times.accessed().expect("a time"), long_ago);
    }
}
