//! Writes that are kept until it is known whether they count: what a checkpoint of a guest needs
//! of its disks.
//!
//! Writes belong to an epoch, are answered when they are in memory, and are seen by reads of the
//! same disk. [`HoldDisk::next`] begins a new epoch, [`HoldDisk::release`] writes epochs to the
//! disk below and flushes it, [`HoldDisk::forget`] drops them. A flush is answered at once: what
//! it promises holds from the release on, and until then nobody outside may know of the writes.
//! Memory is limited; beyond it writes wait for a release. A discard does nothing.
// Copies payload by address.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::around::{Around, Wrapped};
use super::bells::{Bells, Flag};
use super::forward_to_below;
use super::held::{Held, Line};
use crate::blocking;
use crate::disk::{
    Discarded, Disk, DiskQueue, Done, Full, IoBuf, Kept, Op, Region, Request, check_range,
};

/// Most bytes that a release writes in one request.
const PIECE: usize = 1 << 20;

/// Logical blocks by their numbers.
type Blocks = BTreeMap<u64, Arc<[u8]>>;

struct Epochs {
    /// The number of the first one; the last one is being written.
    first: u64,
    all: VecDeque<Blocks>,
    /// Blocks in all of them.
    count: u64,
}

impl Epochs {
    fn now(&self) -> u64 {
        self.first + self.all.len() as u64 - 1
    }

    /// The newest of each block of a range.
    fn newest(&self, blocks: std::ops::Range<u64>) -> Blocks {
        let mut found = Blocks::new();
        for epoch in &self.all {
            found.extend(epoch.range(blocks.clone()).map(|(n, bytes)| (*n, Arc::clone(bytes))));
        }
        found
    }

    fn put(&mut self, first: u64, block: usize, bytes: &[u8]) {
        let Some(now) = self.all.back_mut() else { return };
        for (n, part) in bytes.chunks(block).enumerate() {
            self.count += u64::from(now.insert(first + n as u64, part.into()).is_none());
        }
    }
}

struct Shared {
    epochs: Mutex<Epochs>,
    /// Most blocks in memory.
    room: u64,
    /// Bytes of a block.
    block: u64,
    bells: Arc<Bells>,
    /// Held by whoever releases or forgets.
    ending: Mutex<()>,
}

/// A disk that holds writes. See the module.
pub struct HoldDisk {
    below: Arc<dyn Disk>,
    shared: Arc<Shared>,
}

impl HoldDisk {
    /// `below`, holding up to `memory` bytes of writes. The first epoch is 0.
    pub fn new(below: Arc<dyn Disk>, memory: u64) -> Arc<HoldDisk> {
        let block = u64::from(below.geometry().logical_block);
        let epochs = Epochs { first: 0, all: VecDeque::from([Blocks::new()]), count: 0 };
        let shared = Shared {
            epochs: Mutex::new(epochs),
            room: memory / block,
            block,
            bells: Arc::default(),
            ending: Mutex::new(()),
        };
        Arc::new(HoldDisk { below, shared: Arc::new(shared) })
    }

    /// Begins the next epoch: the number of the one that ends. Writes that were answered before
    /// are in it or in earlier ones.
    pub fn next(&self) -> u64 {
        let mut epochs = self.shared.epochs.lock();
        epochs.all.push_back(Blocks::new());
        epochs.now() - 1
    }

    /// Bytes that are held.
    pub fn held(&self) -> u64 {
        self.shared.epochs.lock().count * self.shared.block
    }

    /// Writes all epochs up to `epoch` to the disk, in order, and flushes it. After an error they
    /// are still held, and perhaps written in part.
    pub fn release(&self, epoch: u64) -> io::Result<()> {
        let _one = self.shared.ending.lock();
        let mut queue = self.below.queue(1)?;
        loop {
            // Reads see it until it is on the disk.
            let blocks = {
                let epochs = self.shared.epochs.lock();
                if epochs.first > epoch || epochs.all.len() < 2 {
                    break;
                }
                epochs.all.front().cloned().unwrap_or_default()
            };
            write_out(&mut *queue, &blocks, self.shared.block)?;
            let mut epochs = self.shared.epochs.lock();
            epochs.all.pop_front();
            epochs.first += 1;
            epochs.count -= blocks.len() as u64;
            drop(epochs);
            self.shared.bells.ring();
        }
        blocking::flush(&mut *queue)
    }

    /// Forgets `epoch` and all later ones: the disk is as it was when `epoch` began. Requests in
    /// flight may be forgotten or not.
    pub fn forget(&self, epoch: u64) {
        let _one = self.shared.ending.lock();
        let mut epochs = self.shared.epochs.lock();
        let keep = epoch.saturating_sub(epochs.first) as usize;
        epochs.all.truncate(keep);
        epochs.all.push_back(Blocks::new());
        epochs.count = epochs.all.iter().map(|blocks| blocks.len() as u64).sum();
        drop(epochs);
        self.shared.bells.ring();
    }
}

/// Writes blocks, neighbours together.
fn write_out(queue: &mut dyn DiskQueue, blocks: &Blocks, block: u64) -> io::Result<()> {
    let (mut start, mut bytes) = (0, Vec::new());
    for (number, part) in blocks {
        let at = number * block;
        if !bytes.is_empty() && (start + bytes.len() as u64 != at || bytes.len() >= PIECE) {
            blocking::write_at(queue, start, &bytes)?;
            bytes.clear();
        }
        if bytes.is_empty() {
            start = at;
        }
        bytes.extend_from_slice(part);
    }
    if bytes.is_empty() { Ok(()) } else { blocking::write_at(queue, start, &bytes) }
}

impl Disk for HoldDisk {
    forward_to_below!(but map);

    /// What is held counts as data.
    fn map(&self, range: std::ops::Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        match self.held() {
            0 => self.below.map(range, out),
            _ => {
                out.push(Region { len: range.end.saturating_sub(range.start), kept: Kept::Data });
                Ok(())
            }
        }
    }
    fn discarded(&self) -> Discarded {
        Discarded::Unspecified
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let queue = Holding {
            below: self.below.queue(depth)?,
            disk: Arc::clone(&self.below),
            flag: self.shared.bells.join()?,
            shared: Arc::clone(&self.shared),
            line: Line::default(),
            mixed: HashMap::new(),
            ready: Vec::new(),
        };
        Ok(Box::new(Wrapped::new(queue, depth)))
    }
}

struct Holding {
    below: Box<dyn DiskQueue>,
    disk: Arc<dyn Disk>,
    shared: Arc<Shared>,
    flag: Arc<Flag>,
    /// Writes that wait for room.
    line: Line,
    /// Reads of what is partly held, with that.
    mixed: HashMap<u64, (Held, Blocks)>,
    ready: Vec<Done>,
}

/// Copies between a request's memory, from byte `at` of it on, and bytes.
fn copy_to(bufs: &[IoBuf], mut at: usize, mut bytes: &[u8]) {
    for buf in bufs {
        if at >= buf.len() {
            at -= buf.len();
            continue;
        }
        let n = bytes.len().min(buf.len() - at);
        // SAFETY: inside the buffer, which its maker promised to be valid until the request is
        // done; the bytes are this side's own.
        unsafe { std::ptr::copy(bytes.as_ptr(), buf.addr().add(at), n) };
        (bytes, at) = (&bytes[n..], 0);
    }
}

fn copy_from(bufs: &[IoBuf]) -> Vec<u8> {
    let mut bytes = vec![0; bufs.iter().map(IoBuf::len).sum()];
    let mut rest = &mut bytes[..];
    for buf in bufs {
        let (here, after) = rest.split_at_mut(buf.len());
        // SAFETY: as above; the other side may change its bytes, which are copied once.
        unsafe { std::ptr::copy(buf.addr(), here.as_mut_ptr(), here.len()) };
        rest = after;
    }
    bytes
}

impl Holding {
    fn answer(&mut self, token: u64, errno: i32) {
        self.ready.push(Done { token, errno });
    }

    fn blocks_of(&self, r: &Request<'_>) -> std::ops::Range<u64> {
        r.offset / self.shared.block..(r.offset + r.len) / self.shared.block
    }

    fn check(&self, r: &Request<'_>) -> Result<(), i32> {
        let geometry = self.disk.geometry();
        if r.op != Op::Read && geometry.read_only {
            return Err(libc::EROFS);
        }
        check_range(r, geometry.size, self.shared.block)?;
        let sum = r.bufs.iter().try_fold(0u64, |sum, b| sum.checked_add(b.len() as u64));
        let moves = matches!(r.op, Op::Read | Op::Write | Op::WriteFua);
        if moves && sum != Some(r.len) {
            return Err(libc::EINVAL);
        }
        let changes = matches!(r.op, Op::Write | Op::WriteFua | Op::WriteZeroes);
        match changes && r.len / self.shared.block > self.shared.room {
            true => Err(libc::ENOSPC),
            false => Ok(()),
        }
    }

    /// Takes a write into memory, if there is room.
    fn keep(&self, r: &Request<'_>) -> bool {
        let blocks = self.blocks_of(r);
        let mut epochs = self.shared.epochs.lock();
        if epochs.count + (blocks.end - blocks.start) > self.shared.room {
            return false;
        }
        let bytes = match r.op {
            Op::WriteZeroes => vec![0; r.len as usize],
            _ => copy_from(r.bufs),
        };
        epochs.put(blocks.start, self.shared.block as usize, &bytes);
        true
    }

    fn read(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let blocks = self.blocks_of(r);
        let held = self.shared.epochs.lock().newest(blocks.clone());
        if held.is_empty() {
            return self.below.submit(r);
        }
        if held.len() as u64 == blocks.end - blocks.start {
            self.lay_over(r, &held);
            self.answer(r.token, 0);
            return Ok(());
        }
        self.below.submit(r)?;
        self.mixed.insert(r.token, (Held::of(r), held));
        Ok(())
    }

    fn lay_over(&self, r: &Request<'_>, held: &Blocks) {
        for (number, bytes) in held {
            copy_to(r.bufs, (number * self.shared.block - r.offset) as usize, bytes);
        }
    }
}

impl Around for Holding {
    fn below(&self) -> &dyn DiskQueue {
        &*self.below
    }
    fn below_mut(&mut self) -> &mut dyn DiskQueue {
        &mut *self.below
    }
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if r.op == Op::Flush {
            self.answer(r.token, 0);
            return Ok(());
        }
        if let Err(errno) = self.check(r) {
            self.answer(r.token, errno);
            return Ok(());
        }
        match r.op {
            Op::Read => return self.read(r),
            Op::SecureDiscard => self.answer(r.token, libc::EOPNOTSUPP),
            Op::Discard => self.answer(r.token, 0),
            _ if self.line.is_empty() && self.keep(r) => self.answer(r.token, 0),
            _ => self.line.push(r),
        }
        Ok(())
    }
    fn held(&self) -> u32 {
        (self.line.len() + self.ready.len()) as u32
    }
    fn flow(&mut self) -> io::Result<()> {
        while let Some(first) = self.line.get(0) {
            if !self.keep(&first.request()) {
                break;
            }
            if let Some(token) = self.line.drop_first() {
                self.answer(token, 0);
            }
        }
        Ok(())
    }
    fn completed(&mut self, done: &mut Vec<Done>, from: usize) {
        for d in &done[from..] {
            if let Some((held, blocks)) = self.mixed.remove(&d.token)
                && d.errno == 0
            {
                self.lay_over(&held.request(), &blocks);
            }
        }
        done.append(&mut self.ready);
    }
    fn patience(&self) -> Option<Duration> {
        (!self.ready.is_empty()).then_some(Duration::ZERO)
    }
    fn bell(&self) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.flag.bell))
    }
    fn rung(&mut self) {
        self.flag.calm();
    }
    fn hurry(&mut self) {
        // Nobody is left who could make room.
        while let Some(token) = self.line.drop_first() {
            self.answer(token, libc::ENOSPC);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemDisk;

    const SIZE: usize = 64 << 10;

    fn byte(queue: &mut dyn DiskQueue, at: u64) -> u8 {
        let mut bytes = [0; 512];
        blocking::read_at(queue, at, &mut bytes).expect("read");
        assert!(bytes.iter().all(|b| *b == bytes[0]));
        bytes[0]
    }

    #[test]
    fn epochs_are_released_or_forgotten() {
        let memory = MemDisk::new(SIZE);
        let disk = HoldDisk::new(Arc::clone(&memory) as Arc<dyn Disk>, SIZE as u64);
        let below = |at: usize| memory.with_bytes(|bytes| bytes[at]);
        let mut queue = disk.queue(4).expect("a queue");
        let mut other = disk.queue(4).expect("a queue");
        blocking::write_at(&mut *queue, 0, &[1; 1024]).expect("write");
        assert_eq!(disk.next(), 0);
        blocking::write_at(&mut *other, 512, &[2; 1024]).expect("write");
        blocking::flush(&mut *other).expect("flush");
        assert_eq!(disk.next(), 1);
        blocking::range(&mut *queue, Op::WriteZeroes, 0, 512).expect("zeroes");
        let seen: Vec<u8> = [0, 512, 1024, 1536].map(|at| byte(&mut *other, at)).into();
        assert_eq!(seen, [0, 2, 2, 0]);
        let mut all = [9; 2048];
        blocking::read_at(&mut *queue, 0, &mut all).expect("partly held");
        assert_eq!([all[0], all[600], all[1100], all[2000]], [0, 2, 2, 0]);
        assert_eq!((below(0), disk.held()), (0, 5 * 512));
        disk.release(0).expect("released");
        assert_eq!((below(0), below(512), below(1024), disk.held()), (1, 1, 0, 3 * 512));
        disk.forget(1);
        assert_eq!((byte(&mut *queue, 0), byte(&mut *queue, 512), disk.held()), (1, 1, 0));
        blocking::write_at(&mut *queue, 0, &[3; 512]).expect("write");
        assert_eq!(disk.next(), 1);
        disk.release(1).expect("released");
        assert_eq!((below(0), below(512)), (3, 1));
    }

    #[test]
    fn beyond_the_memory_writes_wait_for_a_release() {
        let memory = MemDisk::new(SIZE);
        let disk = HoldDisk::new(Arc::clone(&memory) as Arc<dyn Disk>, 1024);
        let writer = {
            let disk = Arc::clone(&disk);
            std::thread::spawn(move || {
                let mut queue = disk.queue(1).expect("a queue");
                let large = blocking::write_at(&mut *queue, 0, &[1; 1536]).expect_err("too large");
                assert_eq!(large.raw_os_error(), Some(libc::ENOSPC));
                for n in 0..6 {
                    blocking::write_at(&mut *queue, n * 512, &[1 + n as u8; 512]).expect("write");
                }
            })
        };
        let begin = std::time::Instant::now();
        while !writer.is_finished() {
            std::thread::sleep(Duration::from_millis(20));
            assert!(disk.held() <= 1024);
            let epoch = disk.next();
            disk.release(epoch).expect("released");
            assert!(begin.elapsed() < Duration::from_secs(10));
        }
        writer.join().expect("all written");
        let last = disk.next();
        disk.release(last).expect("released");
        let written = memory.with_bytes(|b| (0..6).map(|n| b[n * 512]).collect::<Vec<_>>());
        assert_eq!(written, [1, 2, 3, 4, 5, 6]);
    }
}
