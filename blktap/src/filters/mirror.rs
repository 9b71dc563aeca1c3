//! A second disk that gets every change too. Reads go to the first.
//!
//! A change is answered when both have it. The second disk is served by a thread for each queue,
//! so that the queue's own waits for one disk alone.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::queue::SegQueue;
use rustix::event::{EventfdFlags, eventfd};

use super::around::{Around, Wrapped};
use super::forward_to_below;
use super::held::Held;
use crate::disk::{Discarded, Disk, DiskQueue, Done, Full, Op, Request};

/// What becomes of an error of the second disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// It is the answer.
    Report,
    /// The second disk gets nothing any more, and one log line says so.
    Drop,
}

/// Why two disks are no mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// The second one is smaller, or can only be read.
    #[error("the second disk is smaller than the first, or read-only")]
    Small,
    /// The second one has larger blocks.
    #[error("the second disk has larger blocks than the first")]
    Blocks,
}

/// Two disks that are written alike. Their content is made alike before.
pub struct MirrorDisk {
    below: Arc<dyn Disk>,
    second: Arc<dyn Disk>,
    on_error: OnError,
    dropped: Arc<AtomicBool>,
}

impl MirrorDisk {
    /// `below`, whose changes go to `second` too.
    pub fn new(
        below: Arc<dyn Disk>,
        second: Arc<dyn Disk>,
        on_error: OnError,
    ) -> Result<Arc<MirrorDisk>, Unfit> {
        let (one, two) = (below.geometry(), second.geometry());
        if two.size < one.size || two.read_only {
            return Err(Unfit::Small);
        }
        if two.logical_block > one.logical_block {
            return Err(Unfit::Blocks);
        }
        Ok(Arc::new(MirrorDisk { below, second, on_error, dropped: Arc::default() }))
    }

    /// Whether the second disk was given up.
    pub fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Disk for MirrorDisk {
    forward_to_below!(but map);

    fn map(
        &self,
        range: std::ops::Range<u64>,
        out: &mut Vec<crate::disk::Region>,
    ) -> io::Result<()> {
        self.below.map(range, out)
    }
    /// The second disk may do less.
    fn discarded(&self) -> Discarded {
        Discarded::Unspecified
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let below = self.below.queue(depth)?;
        let queue = Mirrored {
            below,
            second: Second::start(&*self.second, depth)?,
            on_error: self.on_error,
            dropped: Arc::clone(&self.dropped),
            slots: Vec::new(),
            free: Vec::new(),
            only_second: 0,
        };
        Ok(Box::new(Wrapped::new(queue, depth)))
    }
}

/// What a queue and its second disk's thread share.
struct Shared {
    jobs: SegQueue<Held>,
    answers: SegQueue<Done>,
    /// Rings for the thread, and for the queue.
    wake: OwnedFd,
    bell: Arc<OwnedFd>,
    ending: AtomicBool,
}

fn ring(fd: &OwnedFd) {
    // It fails where the count is full, and then it is readable anyway.
    if let Err(e) = rustix::io::write(fd, &1u64.to_ne_bytes()) {
        tracing::debug!("mirror: {e}");
    }
}

fn calm(fd: &OwnedFd) {
    if let Err(e) = rustix::io::read(fd, &mut [0; 8]) {
        tracing::debug!("mirror: {e}");
    }
}

/// The second disk's thread, for one queue. It ends when this is dropped, with what it has.
struct Second {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// There are jobs of which the thread was not told.
    fresh: bool,
}

impl Second {
    fn start(disk: &dyn Disk, depth: u32) -> io::Result<Second> {
        let queue = disk.queue(depth)?;
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            jobs: SegQueue::new(),
            answers: SegQueue::new(),
            wake: event()?,
            bell: Arc::new(event()?),
            ending: AtomicBool::new(false),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("mirror".into());
        let thread = thread.spawn(move || theirs.serve(queue))?;
        Ok(Second { shared, thread: Some(thread), fresh: false })
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        ring(&self.shared.wake);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a mirror's thread panicked");
        }
    }
}

impl Shared {
    fn serve(&self, mut queue: Box<dyn DiskQueue>) {
        let mut done = Vec::new();
        if let Err(e) = self.work(&mut *queue, &mut done) {
            tracing::error!("the second disk of a mirror: {e}");
            // Whatever it has is in use until it is gone; who waits for it is told then.
            drop(queue);
            self.fail();
        }
    }

    /// Carries out jobs until there are none and the queue ends.
    fn work(&self, queue: &mut dyn DiskQueue, done: &mut Vec<Done>) -> io::Result<()> {
        loop {
            // Read before the jobs are looked for: what comes later rings again.
            let ending = self.ending.load(Ordering::Acquire);
            while let Some(job) = self.jobs.pop() {
                let passed = queue.submit(&job.request());
                passed.map_err(|_| io::Error::other("no room in the queue"))?;
            }
            queue.poll(done)?;
            if !done.is_empty() {
                done.drain(..).for_each(|d| self.answers.push(d));
                ring(&self.bell);
            }
            if ending && queue.in_flight() == 0 && self.jobs.is_empty() {
                return Ok(());
            }
            if queue.wait(&[self.wake.as_fd()], None)? & 1 != 0 {
                calm(&self.wake);
            }
        }
    }

    /// After the disk's queue has failed: the token of this answer stands for all.
    fn fail(&self) {
        self.answers.push(Done { token: u64::MAX, errno: libc::EIO });
        ring(&self.bell);
    }
}

/// A request on its way to one or both.
#[derive(Clone, Copy)]
struct Slot {
    token: u64,
    first: Part,
    second: Part,
    op: Op,
}

/// One of its halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Going,
    Done(i32),
}

/// Which of the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    First,
    Second,
}

struct Mirrored {
    /// Both have requests' memory in use until they are dropped.
    below: Box<dyn DiskQueue>,
    second: Second,
    on_error: OnError,
    dropped: Arc<AtomicBool>,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Requests that the first disk has done and the second has not.
    only_second: u32,
}

impl Mirrored {
    fn drop_second(&self, why: i32) {
        if !self.dropped.swap(true, Ordering::Relaxed) {
            let why = io::Error::from_raw_os_error(why);
            tracing::error!("mirror: the second disk is given up: {why}");
        }
    }

    /// Takes note of a half; the answer if it was the last one.
    fn note(&mut self, at: usize, side: Side, errno: i32) -> Option<Done> {
        let slot = self.slots.get_mut(at)?.as_mut()?;
        match side {
            Side::First => slot.first = Part::Done(errno),
            Side::Second => slot.second = Part::Done(errno),
        }
        let Slot { token, first, second, op } = *slot;
        let (Part::Done(first), Part::Done(mut second)) = (first, second) else {
            self.only_second += u32::from(side == Side::First);
            return None;
        };
        self.only_second -= u32::from(side == Side::Second);
        self.slots[at] = None;
        self.free.push(at);
        // What is discarded reads as anything; the second disk need not know how.
        if op == Op::Discard && second == libc::EOPNOTSUPP {
            second = 0;
        }
        if second != 0 && first == 0 && self.on_error == OnError::Drop {
            self.drop_second(second);
            second = 0;
        }
        Some(Done { token, errno: if first != 0 { first } else { second } })
    }

    fn second_answers(&mut self, done: &mut Vec<Done>) {
        while let Some(d) = self.second.shared.answers.pop() {
            if d.token != u64::MAX {
                done.extend(self.note(d.token as usize, Side::Second, d.errno));
                continue;
            }
            // Its queue has failed, for good.
            self.dropped.store(self.on_error == OnError::Drop, Ordering::Relaxed);
            for at in 0..self.slots.len() {
                if self.slots[at].is_some_and(|slot| slot.second == Part::Going) {
                    let failed = self.note(at, Side::Second, d.errno);
                    done.extend(failed);
                }
            }
            self.second.shared.ending.store(true, Ordering::Release);
        }
    }
}

impl Around for Mirrored {
    fn below(&self) -> &dyn DiskQueue {
        &*self.below
    }
    fn below_mut(&mut self) -> &mut dyn DiskQueue {
        &mut *self.below
    }
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let mine = Request { token: at as u64, ..*r };
        if let Err(full) = self.below.submit(&mine) {
            self.free.push(at);
            return Err(full);
        }
        let both = r.op != Op::Read && !self.dropped.load(Ordering::Relaxed);
        // Its thread is gone after its queue has failed.
        let ended = self.second.shared.ending.load(Ordering::Relaxed);
        let second = match (both, ended) {
            (true, false) => Part::Going,
            (true, true) => Part::Done(libc::EIO),
            (false, _) => Part::Done(0),
        };
        self.slots[at] = Some(Slot { token: r.token, first: Part::Going, second, op: r.op });
        if second == Part::Going {
            self.second.shared.jobs.push(Held::of(&mine));
            self.second.fresh = true;
        }
        Ok(())
    }
    fn held(&self) -> u32 {
        self.only_second
    }
    fn flow(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.second.fresh) {
            ring(&self.second.shared.wake);
        }
        Ok(())
    }
    fn completed(&mut self, done: &mut Vec<Done>, from: usize) {
        let first: Vec<Done> = done.drain(from..).collect();
        for d in first {
            done.extend(self.note(d.token as usize, Side::First, d.errno));
        }
        self.second_answers(done);
    }
    fn patience(&self) -> Option<Duration> {
        (!self.second.shared.answers.is_empty()).then_some(Duration::ZERO)
    }
    fn bell(&self) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.second.shared.bell))
    }
    fn rung(&mut self) {
        calm(&self.second.shared.bell);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fault::FaultyDisk;
    use super::*;
    use crate::{MemDisk, blocking};

    const SIZE: usize = 64 << 10;

    fn pair(faults: &str, on_error: OnError) -> (Arc<MemDisk>, Arc<MemDisk>, Arc<MirrorDisk>) {
        let (one, two) = (MemDisk::new(SIZE), MemDisk::new(SIZE));
        let second = FaultyDisk::new(Arc::clone(&two) as Arc<dyn Disk>, faults.parse().expect("f"));
        let mirror = MirrorDisk::new(Arc::clone(&one) as Arc<dyn Disk>, second, on_error);
        (one, two, mirror.expect("a mirror"))
    }

    #[test]
    fn both_get_every_change() {
        let (one, two, mirror) = pair("", OnError::Report);
        let mut queue = mirror.queue(8).expect("a queue");
        for n in 0..50u64 {
            blocking::write_at(&mut *queue, n * 512, &[n as u8 + 1; 512]).expect("write");
        }
        blocking::range(&mut *queue, Op::WriteZeroes, 512, 1024).expect("zeroes");
        blocking::flush(&mut *queue).expect("flush");
        let mut bytes = [9; 512];
        blocking::read_at(&mut *queue, 49 * 512, &mut bytes).expect("read");
        assert_eq!(bytes, [50; 512]);
        let bytes = one.with_bytes(|bytes| bytes.clone());
        assert!(two.with_bytes(|b| *b == bytes) && bytes[0] == 1 && bytes[600] == 0);
        // Many at once, and a queue that is dropped with them.
        for n in 0..8 {
            let r = Request { op: Op::WriteZeroes, offset: n * 512, len: 512, bufs: &[], token: n };
            queue.submit(&r).expect("room");
        }
        assert_eq!(queue.in_flight(), 8);
        drop(queue);
        let bytes = one.with_bytes(|bytes| bytes.clone());
        assert!(two.with_bytes(|b| *b == bytes) && bytes[..4096].iter().all(|b| *b == 0));
    }

    #[test]
    fn errors_of_the_second_are_reported_or_end_it() {
        let (_, _, mirror) = pair("write:ENOSPC:nth=2", OnError::Report);
        let mut queue = mirror.queue(2).expect("a queue");
        let errors = (0..3).map(|_| blocking::write_at(&mut *queue, 0, &[1; 512]));
        let errors: Vec<bool> = errors.map(|e| e.is_err()).collect();
        assert_eq!((errors, mirror.is_dropped()), (vec![false, true, false], false));
        let (one, two, mirror) = pair("write:EIO:nth=2", OnError::Drop);
        let mut queue = mirror.queue(2).expect("a queue");
        for n in 1..=3 {
            blocking::write_at(&mut *queue, 0, &[n; 512]).expect("the first disk has it");
        }
        assert!(mirror.is_dropped());
        assert_eq!((one.with_bytes(|b| b[0]), two.with_bytes(|b| b[0])), (3, 1));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let small = MirrorDisk::new(MemDisk::new(SIZE), MemDisk::new(512), OnError::Report);
        assert_eq!(small.map(drop), Err(Unfit::Small));
    }
}
