//! Raw images and block devices: the disk is the file, byte for byte.
mod holes;

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use perf::Handle;

use super::{Discarded, Disk, DiskQueue, Done, Full, Geometry, Kept, Op, Region, Request};
use crate::engine::{
    Durability, Engine, EngineConfig, EngineCounters, EngineOp, FileKind, RingMode, SetupError,
    Transfer,
};
use crate::filters::priority::Priority;
use crate::storage::{self, Access, Cache, FileStorage, Medium, OpenError, OpenOptions, Storage};

/// A raw image or a block device.
///
/// A tail that is not a whole logical block is not part of the disk (one log line says so at
/// open). Writes never change the size. See [`Cache`] for what a flush does.
pub struct RawDisk {
    storage: FileStorage,
    size: Arc<AtomicU64>,
}

impl RawDisk {
    /// Opens and locks; see [`storage::open`].
    pub fn open(options: &OpenOptions) -> Result<Arc<Self>, OpenError> {
        let storage = storage::open(options)?;
        let size = storage.warn_of_tail().and_then(|()| storage.whole_blocks());
        let size = size.map_err(|source| OpenError::Io {
            path: options.path.clone(),
            what: "find the size of",
            source,
        })?;
        Ok(Arc::new(RawDisk { storage, size: Arc::new(AtomicU64::new(size)) }))
    }

    /// What was opened: the path, the caching mode in force, what was found out.
    pub fn storage(&self) -> &FileStorage {
        &self.storage
    }

    /// Whether the medium can be taken out.
    pub fn medium(&self) -> Medium {
        self.storage.probe.medium
    }

    /// A queue with an engine in at most the given mode; [`Disk::queue`] takes the newest.
    pub fn queue_in_mode(&self, depth: u32, newest: RingMode) -> Result<RawQueue, SetupError> {
        let probe = &self.storage.probe;
        let engine = Engine::new(EngineConfig {
            depth,
            files: self.storage.engine_file().into_iter().collect(),
            newest,
        })?;
        Ok(RawQueue {
            engine,
            size: Arc::clone(&self.size),
            sync_failed: Arc::clone(&self.storage.sync_failed),
            logical: u64::from(probe.logical),
            cache: self.storage.cache,
            access: self.storage.access,
            kind: probe.kind,
            discards: probe.discard.is_some(),
            erases: probe.secure_discard,
        })
    }
}

impl Disk for RawDisk {
    fn geometry(&self) -> Geometry {
        let probe = &self.storage.probe;
        Geometry {
            size: self.size.load(Ordering::Relaxed),
            logical_block: probe.logical,
            physical_block: probe.physical,
            memory_align: probe.memory_align.max(probe.length_align),
            discard: probe.discard,
            secure_discard: probe.secure_discard,
            read_only: self.storage.access == Access::ReadOnly,
        }
    }

    fn refresh(&self) -> io::Result<Geometry> {
        self.size.store(self.storage.whole_blocks()?, Ordering::Relaxed);
        Ok(self.geometry())
    }

    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        Ok(Box::new(self.queue_in_mode(depth, RingMode::Deferred)?))
    }

    /// PUNCH_HOLE zeroes also the parts of blocks that it cannot give back.
    fn discarded(&self) -> Discarded {
        match self.storage.probe.kind {
            FileKind::Regular => Discarded::Zeroes,
            FileKind::Block => Discarded::Unspecified,
        }
    }

    fn map(&self, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        let logical = u64::from(self.storage.probe.logical);
        match self.storage.probe.kind {
            FileKind::Regular => holes::map(&self.storage.file, range, logical, out),
            FileKind::Block => {
                out.push(Region { len: range.end.saturating_sub(range.start), kept: Kept::Data });
                Ok(())
            }
        }
    }
}

/// A queue of a [`RawDisk`].
pub struct RawQueue {
    engine: Engine,
    size: Arc<AtomicU64>,
    sync_failed: Arc<AtomicI32>,
    logical: u64,
    cache: Cache,
    access: Access,
    kind: FileKind,
    discards: bool,
    erases: bool,
}

impl RawQueue {
    /// The mode of its ring.
    pub fn mode(&self) -> RingMode {
        self.engine.mode()
    }

    /// What becomes of a request: an engine's operation, or the answer.
    fn plan(&self, r: &Request<'_>) -> Result<EngineOp, i32> {
        if r.op == Op::Flush {
            return self.plan_flush().ok_or(0);
        }
        if self.access == Access::ReadOnly && r.op != Op::Read {
            return Err(libc::EROFS);
        }
        super::check_range(r, self.size.load(Ordering::Relaxed), self.logical)?;
        match r.op {
            Op::Read => Ok(EngineOp::Read),
            Op::WriteFua if self.cache != Cache::Unsafe => Ok(EngineOp::Write(Durability::Through)),
            Op::Write | Op::WriteFua => Ok(EngineOp::Write(Durability::Volatile)),
            Op::Discard if self.discards => Ok(EngineOp::Discard),
            Op::SecureDiscard if self.erases && self.kind == FileKind::Block => {
                Ok(EngineOp::SecureDiscard)
            }
            Op::WriteZeroes => Ok(EngineOp::Zero),
            Op::Flush => Err(0),
            Op::Discard | Op::SecureDiscard => Err(libc::EOPNOTSUPP),
        }
    }

    /// `None`: a flush has nothing to do.
    fn plan_flush(&self) -> Option<EngineOp> {
        (self.cache != Cache::Unsafe && self.access == Access::ReadWrite).then_some(EngineOp::Sync)
    }
}

impl DiskQueue for RawQueue {
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        let op = match self.plan(request) {
            Ok(op) => op,
            Err(errno) => return self.engine.answer(request.token, errno),
        };
        if op == EngineOp::Sync {
            let failed = self.sync_failed.load(Ordering::Relaxed);
            if failed != 0 {
                return self.engine.answer(request.token, failed);
            }
        }
        self.engine.start(&Transfer {
            file: 0,
            op,
            offset: request.offset,
            len: request.len,
            bufs: request.bufs,
            token: request.token,
        })
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.engine.submit()
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        self.engine.poll(done)
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        self.engine.wait(fds, timeout)
    }
    fn unwatch(&mut self) -> io::Result<()> {
        self.engine.unwatch()
    }
    fn prioritize(&mut self, priority: Priority) {
        self.engine.prioritize(priority.raw());
    }
    fn in_flight(&self) -> u32 {
        self.engine.in_flight()
    }
    fn counters(&self) -> Option<Handle<EngineCounters>> {
        Some(self.engine.counters().clone())
    }
    fn count_in(&mut self, counters: Handle<EngineCounters>) {
        self.engine.count_in(counters);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocking;

    #[test]
    fn after_a_failed_flush_all_flushes_fail() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("a.raw");
        std::fs::write(&path, [0; 4096]).expect("a file");
        let disk = RawDisk::open(&OpenOptions::new(&path)).expect("open");
        let mut queues = [disk.queue(1).expect("queue"), disk.queue(1).expect("queue")];
        for q in &mut queues {
            blocking::flush(&mut **q).expect("nothing lost yet");
        }
        // As the engine does when fsync reports an error.
        disk.storage.sync_failed.store(libc::EIO, Ordering::Relaxed);
        for q in &mut queues {
            let error = blocking::flush(&mut **q).expect_err("writes were lost");
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
            blocking::write_at(&mut **q, 0, &[1; 512]).expect("writes go on");
        }
    }
}
