//! Requests on their way: what each has still to move, and what a completion means for it.
// Payload is named by address.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Instant;

use io_uring::squeue::{Entry, Flags, SubmissionQueue};
use io_uring::{opcode, types};
use libc::iovec;

use super::bounce::{self, BOUNCE_LEN, BouncePool, Way};
use super::inline::Inline;
use super::ioctl::{Call, IoctlThread};
use super::{Durability, EngineCounters, EngineFile, EngineOp, FileKind, PastEnd, Transfer};
use crate::disk::{Done, MAX_SEGMENTS};

/// How often a request is sent again after EAGAIN or EINTR before the error is its answer.
const MAX_TRIES: u8 = 100;
/// Most bytes of one entry (the kernel's own limit is a page less than 2 GiB).
const MAX_PIECE: usize = 1 << 30;
/// RWF_DSYNC of linux/fs.h.
const RWF_DSYNC: i32 = 2;
/// Bytes of zeroes written at once where the file cannot be told to read as zeroes.
const ZEROES_LEN: usize = 64 << 10;

#[repr(align(4096))]
struct Zeroes([u8; ZEROES_LEN]);
static ZEROES: Zeroes = Zeroes([0; ZEROES_LEN]);

/// How a range is made to read as zeroes; each is tried when the one before is not supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroMethod {
    ZeroRange,
    PunchHole,
    Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write(Durability),
    Sync,
    Punch,
    Zero(ZeroMethod),
    Ioctl(Call),
}

/// Through which memory a request's bytes pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Direct,
    /// Needs a bounce buffer and has none yet.
    Waiting,
    Bounce(u16),
}

#[derive(Clone, Copy)]
struct OpState {
    token: u64,
    kind: Kind,
    path: Path,
    file: u16,
    next: u16,
    end: u16,
    tries: u8,
    moved: bool,
    offset: u64,
    left: u64,
}

/// All requests of an engine: a fixed number of slots with room for their segments.
pub(super) struct Ops {
    slots: Vec<OpState>,
    iovs: Box<[iovec]>,
    free: Vec<u32>,
    /// Slots that could not be sent: no bounce buffer, or no room in the submission queue.
    backlog: VecDeque<u32>,
    pub(super) ready: Vec<Done>,
    bounce: Option<BouncePool>,
    pub(super) files: Vec<(EngineFile, ZeroMethod)>,
    pub(super) helper: Option<IoctlThread>,
    inline: Inline,
    /// Of reads and writes.
    pub(super) ioprio: u16,
}

impl Ops {
    pub(super) fn new(depth: u32, files: Vec<EngineFile>) -> Self {
        let n = depth as usize;
        let idle = OpState {
            token: 0,
            kind: Kind::Sync,
            path: Path::Direct,
            file: 0,
            next: 0,
            end: 0,
            tries: 0,
            moved: false,
            offset: 0,
            left: 0,
        };
        let bounce = files
            .iter()
            .any(|f| f.memory_align > 1 || f.length_align > 1)
            .then(|| BouncePool::new(depth.min(4) as u16));
        // SAFETY: all-zero bytes are a null pointer and no length. Zeroed pages cost no memory
        // until a request with many segments uses them.
        let iovs = unsafe { Box::<[iovec]>::new_zeroed_slice(n * MAX_SEGMENTS).assume_init() };
        Ops {
            slots: vec![idle; n],
            iovs,
            free: (0..depth).rev().collect(),
            inline: Inline::new(n, files.iter().map(|f| &*f.file)),
            backlog: VecDeque::with_capacity(n),
            ready: Vec::with_capacity(n),
            bounce,
            files: files.into_iter().map(|f| (f, ZeroMethod::ZeroRange)).collect(),
            helper: None,
            ioprio: 0,
        }
    }

    pub(super) fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Requests that the kernel or the helper thread may still work on.
    pub(super) fn busy(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Takes a request into a slot and sends it. The caller has seen that a slot is free.
    pub(super) fn start(&mut self, t: &Transfer<'_>, sq: &mut Sq<'_>, c: &EngineCounters) {
        let Some(index) = self.free.pop() else {
            self.ready.push(Done { token: t.token, errno: libc::EBUSY });
            return;
        };
        let Some((file, zero)) = self.files.get(usize::from(t.file)) else {
            return self.refuse(index, t.token, libc::EBADF);
        };
        let kind = match t.op {
            EngineOp::Read => Kind::Read,
            EngineOp::Write(durability) => Kind::Write(durability),
            EngineOp::Sync => Kind::Sync,
            EngineOp::Zero => Kind::Zero(*zero),
            EngineOp::Discard if file.kind == FileKind::Regular => Kind::Punch,
            EngineOp::Discard => Kind::Ioctl(Call::Discard),
            EngineOp::SecureDiscard => Kind::Ioctl(Call::SecureDiscard),
        };
        let transfers = matches!(kind, Kind::Read | Kind::Write(_));
        let (memory, length) = (file.memory_align as usize, file.length_align as usize);
        let (mut segments, mut path) = (0, Path::Direct);
        if transfers {
            segments = match self.gather(index, t, c) {
                Ok(n) => n,
                Err(errno) => return self.refuse(index, t.token, errno),
            };
            let base = index as usize * MAX_SEGMENTS;
            let fits = |v: &iovec| {
                (v.iov_base as usize).is_multiple_of(memory) && v.iov_len.is_multiple_of(length)
            };
            if (memory > 1 || length > 1) && !self.iovs[base..base + segments].iter().all(fits) {
                path = Path::Waiting;
            }
        }
        self.slots[index as usize] = OpState {
            token: t.token,
            kind,
            path,
            file: t.file,
            next: 0,
            end: segments as u16,
            tries: 0,
            moved: false,
            offset: t.offset,
            left: t.len,
        };
        if t.len == 0 && kind != Kind::Sync {
            return self.finish(index, 0);
        }
        self.send(index, sq, c);
    }

    fn refuse(&mut self, index: u32, token: u64, errno: i32) {
        self.free.push(index);
        self.ready.push(Done { token, errno });
    }

    /// Copies the buffers' addresses, joining neighbours. The number of segments.
    fn gather(&mut self, index: u32, t: &Transfer<'_>, c: &EngineCounters) -> Result<usize, i32> {
        let base = index as usize * MAX_SEGMENTS;
        let iovs = &mut self.iovs[base..base + MAX_SEGMENTS];
        let (mut n, mut sum, mut merged) = (0usize, 0u64, 0);
        for buf in t.bufs {
            if buf.is_empty() {
                continue;
            }
            sum = sum.checked_add(buf.len() as u64).ok_or(libc::EINVAL)?;
            if n > 0 {
                let last = &mut iovs[n - 1];
                if (last.iov_base as usize).wrapping_add(last.iov_len) == buf.addr() as usize {
                    last.iov_len += buf.len();
                    merged += 1;
                    continue;
                }
            }
            let iov = iovs.get_mut(n).ok_or(libc::EINVAL)?;
            *iov = iovec { iov_base: buf.addr().cast(), iov_len: buf.len() };
            n += 1;
        }
        if merged > 0 {
            c.merged.add(merged);
        }
        if sum == t.len { Ok(n) } else { Err(libc::EINVAL) }
    }

    /// Sends what had to stay behind, as far as there is room now.
    pub(super) fn send_backlog(&mut self, sq: &mut Sq<'_>, c: &EngineCounters) {
        for _ in 0..self.backlog.len() {
            if let Some(index) = self.backlog.pop_front() {
                self.send(index, sq, c);
            }
        }
    }

    fn send(&mut self, index: u32, sq: &mut Sq<'_>, c: &EngineCounters) {
        let op = &mut self.slots[index as usize];
        if let Kind::Ioctl(call) = op.kind {
            let file = &self.files[usize::from(op.file)].0.file;
            c.ioctls.add(1);
            let range = [op.offset, op.left];
            if !self.helper.as_mut().is_some_and(|h| h.send(index, file, call, range)) {
                self.finish(index, libc::EIO);
            }
            return;
        }
        if op.path == Path::Waiting {
            match self.bounce.as_mut().and_then(BouncePool::take) {
                Some(buffer) => op.path = Path::Bounce(buffer),
                None => return self.backlog.push_back(index),
            }
        }
        let plain = op.kind == Kind::Write(Durability::Volatile) && op.path == Path::Direct;
        if plain && op.tries == 0 && self.inline.takes(index, op.file, op.left) {
            return;
        }
        let entry = self.entry(index, c);
        // SAFETY: the slot's segments and bounce buffer stay in place until the completion, and
        // whoever made the request's buffers promised the same for theirs.
        if unsafe { sq.push(&entry) }.is_err() {
            self.backlog.push_back(index);
        }
    }

    fn entry(&mut self, index: u32, c: &EngineCounters) -> Entry {
        let op = self.slots[index as usize];
        let fd = types::Fixed(u32::from(op.file));
        let entry = match op.kind {
            Kind::Read => self.read(index, fd, c),
            Kind::Write(durability) => {
                let flags = if durability == Durability::Through { RWF_DSYNC } else { 0 };
                self.write(index, fd, flags, c)
            }
            Kind::Zero(ZeroMethod::Write) => {
                c.writes.add(1);
                let len = op.left.min(ZEROES_LEN as u64) as u32;
                opcode::Write::new(fd, ZEROES.0.as_ptr(), len)
                    .offset(op.offset)
                    .ioprio(self.ioprio)
                    .build()
            }
            Kind::Punch | Kind::Zero(_) => {
                c.fallocates.add(1);
                let how = if op.kind == Kind::Zero(ZeroMethod::ZeroRange) {
                    libc::FALLOC_FL_ZERO_RANGE
                } else {
                    libc::FALLOC_FL_PUNCH_HOLE
                };
                opcode::Fallocate::new(fd, op.left)
                    .offset(op.offset)
                    .mode(how | libc::FALLOC_FL_KEEP_SIZE)
                    .build()
            }
            Kind::Sync | Kind::Ioctl(_) => {
                c.syncs.add(1);
                opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
            }
        };
        // A second try goes to a kernel worker, which waits instead of answering EAGAIN.
        let flags = if op.tries > 0 { Flags::ASYNC } else { Flags::empty() };
        entry.flags(flags).user_data(u64::from(index))
    }

    fn read(&self, index: u32, fd: types::Fixed, c: &EngineCounters) -> Entry {
        c.reads.add(1);
        let op = &self.slots[index as usize];
        if let (Path::Bounce(buffer), Some(pool)) = (op.path, &self.bounce) {
            c.bounced.add(1);
            let len = op.left.min(BOUNCE_LEN as u64) as u32;
            return opcode::Read::new(fd, pool.address(buffer), len)
                .offset(op.offset)
                .ioprio(self.ioprio)
                .build();
        }
        match self.segments(index) {
            [one] => {
                let len = one.iov_len.min(MAX_PIECE) as u32;
                opcode::Read::new(fd, one.iov_base.cast(), len)
                    .offset(op.offset)
                    .ioprio(self.ioprio)
                    .build()
            }
            many => opcode::Readv::new(fd, many.as_ptr(), many.len() as u32)
                .offset(op.offset)
                .ioprio(self.ioprio)
                .build(),
        }
    }

    fn write(&self, index: u32, fd: types::Fixed, flags: i32, c: &EngineCounters) -> Entry {
        c.writes.add(1);
        let op = &self.slots[index as usize];
        if let (Path::Bounce(buffer), Some(pool)) = (op.path, &self.bounce) {
            c.bounced.add(1);
            let len = op.left.min(BOUNCE_LEN as u64) as usize;
            let to = pool.address(buffer);
            // SAFETY: the buffer has BOUNCE_LEN bytes and is this request's alone; the segments
            // are valid by the promise of whoever made them.
            unsafe { bounce::copy(self.segments(index), to, len, Way::In) };
            return opcode::Write::new(fd, to, len as u32)
                .offset(op.offset)
                .rw_flags(flags)
                .ioprio(self.ioprio)
                .build();
        }
        match self.segments(index) {
            [one] => {
                let len = one.iov_len.min(MAX_PIECE) as u32;
                let from = one.iov_base.cast::<u8>();
                opcode::Write::new(fd, from, len)
                    .offset(op.offset)
                    .rw_flags(flags)
                    .ioprio(self.ioprio)
                    .build()
            }
            many => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32)
                .offset(op.offset)
                .rw_flags(flags)
                .ioprio(self.ioprio)
                .build(),
        }
    }

    pub(super) fn has_inline(&self) -> bool {
        !self.inline.is_empty()
    }

    /// Makes the writes that this thread makes itself.
    pub(super) fn write_inline(&mut self, sq: &mut Sq<'_>, c: &EngineCounters) {
        let (start, mut count) = (Instant::now(), 0);
        while let Some(index) = self.inline.next() {
            count += 1;
            let op = self.slots[index as usize];
            let base = index as usize * MAX_SEGMENTS;
            let segments = &self.iovs[base + usize::from(op.next)..base + usize::from(op.end)];
            let file = (op.file, &*self.files[usize::from(op.file)].0.file);
            // SAFETY: valid by the promise of whoever made the request's buffers.
            let written = unsafe { self.inline.write(file, segments, op.offset) };
            self.complete(index, written, sq, c);
        }
        c.inline_writes.add(u64::from(count));
        self.inline.took(count, start.elapsed());
    }

    fn segments(&self, index: u32) -> &[iovec] {
        let op = &self.slots[index as usize];
        let base = index as usize * MAX_SEGMENTS;
        &self.iovs[base + usize::from(op.next)..base + usize::from(op.end)]
    }

    /// A completion from the kernel (`res`: bytes or a negative errno).
    pub(super) fn complete(&mut self, index: u32, res: i32, sq: &mut Sq<'_>, c: &EngineCounters) {
        let Some(op) = self.slots.get(index as usize).copied() else { return };
        if res < 0 {
            return self.failed(index, -res, sq, c);
        }
        match op.kind {
            Kind::Sync | Kind::Punch | Kind::Ioctl(_) => self.finish(index, 0),
            Kind::Zero(ZeroMethod::ZeroRange | ZeroMethod::PunchHole) => self.finish(index, 0),
            Kind::Read if res == 0 && self.zeroes_past_end(index) => self.fill_rest(index),
            // Nothing read: the file has shrunk. Nothing written: no sensible device does that.
            _ if res == 0 => self.finish(index, libc::EIO),
            _ => {
                self.moved(index, u64::from(res.unsigned_abs()));
                let op = &mut self.slots[index as usize];
                if op.left == 0 {
                    return self.finish(index, 0);
                }
                (op.tries, op.moved) = (0, true);
                c.resumed.add(1);
                self.send(index, sq, c);
            }
        }
    }

    /// Accounts for `n` bytes moved: copies them out of the bounce buffer, drops what is done
    /// from the segments.
    fn moved(&mut self, index: u32, n: u64) {
        let op = self.slots[index as usize];
        let n = n.min(op.left);
        if let (Path::Bounce(buffer), Kind::Read, Some(pool)) = (op.path, op.kind, &self.bounce) {
            let from = pool.address(buffer);
            // SAFETY: as in `write`; `n` is at most what was asked for.
            unsafe { bounce::copy(self.segments(index), from, n as usize, Way::Out) };
        }
        let base = index as usize * MAX_SEGMENTS;
        let op = &mut self.slots[index as usize];
        op.offset += n;
        op.left -= n;
        let mut rest = n as usize;
        while rest > 0 && op.next < op.end {
            let iov = &mut self.iovs[base + usize::from(op.next)];
            if rest < iov.iov_len {
                // SAFETY: still inside the segment.
                iov.iov_base = unsafe { iov.iov_base.cast::<u8>().add(rest) }.cast();
                iov.iov_len -= rest;
                return;
            }
            rest -= iov.iov_len;
            op.next += 1;
        }
    }

    /// An errno from the kernel or the helper thread.
    pub(super) fn failed(&mut self, index: u32, errno: i32, sq: &mut Sq<'_>, c: &EngineCounters) {
        let op = &mut self.slots[index as usize];
        let again = matches!(errno, libc::EAGAIN | libc::EINTR);
        if again && op.tries < MAX_TRIES && !matches!(op.kind, Kind::Ioctl(_)) {
            op.tries += 1;
            c.retried.add(1);
            return self.send(index, sq, c);
        }
        if let (Kind::Zero(method), libc::EOPNOTSUPP | libc::ENOSYS) = (op.kind, errno)
            && method != ZeroMethod::Write
        {
            let next = match method {
                ZeroMethod::ZeroRange => ZeroMethod::PunchHole,
                ZeroMethod::PunchHole | ZeroMethod::Write => ZeroMethod::Write,
            };
            op.kind = Kind::Zero(next);
            self.files[usize::from(op.file)].1 = next;
            return self.send(index, sq, c);
        }
        if op.kind == Kind::Sync {
            let failed = &self.files[usize::from(op.file)].0.sync_failed;
            let _ = failed.compare_exchange(0, errno, Ordering::Relaxed, Ordering::Relaxed);
        }
        // Direct I/O after the odd tail of a file.
        if op.moved && errno == libc::EINVAL && op.kind == Kind::Read && self.zeroes_past_end(index)
        {
            return self.fill_rest(index);
        }
        let op = &mut self.slots[index as usize];
        // The same where the file is the disk and has shrunk.
        let errno = if op.moved && errno == libc::EINVAL { libc::EIO } else { errno };
        self.finish(index, errno);
    }

    fn zeroes_past_end(&self, index: u32) -> bool {
        let file = self.slots[index as usize].file;
        self.files[usize::from(file)].0.past_end == PastEnd::Zeroes
    }

    /// A read has come to the end of its file: the rest is zeroes.
    fn fill_rest(&mut self, index: u32) {
        for segment in self.segments(index) {
            // SAFETY: as in `write`: valid by the promise of whoever made the request's buffers.
            unsafe { segment.iov_base.cast::<u8>().write_bytes(0, segment.iov_len) };
        }
        self.finish(index, 0);
    }

    pub(super) fn finish(&mut self, index: u32, errno: i32) {
        let op = self.slots[index as usize];
        if let (Path::Bounce(buffer), Some(pool)) = (op.path, &mut self.bounce) {
            pool.give_back(buffer);
        }
        self.free.push(index);
        self.ready.push(Done { token: op.token, errno });
    }
}

/// The submission side of a ring.
pub(super) type Sq<'a> = SubmissionQueue<'a, Entry>;
