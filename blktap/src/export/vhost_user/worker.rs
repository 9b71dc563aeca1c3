//! The loop of one queue: take a batch, submit it, reap, answer, notify once.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{IoSliceMut, ReadWriteFlags, preadv2, write};

use super::blk::{self, ID_BYTES, IOERR, OK, UNSUPP, Work};
use super::connection::Cause;
use super::memory::{Memory, Window};
use super::ring::{Broken, Chain, Notify, Pending, Ring};
use crate::disk::{DiskQueue, Done, IoBuf, Op, Request};
use perf::polling::Pollers;

/// As in the Xen backend, and for its reasons: requests taken in one go,
const BATCH: usize = 16;
/// answers for which a driver that sleeps is woken once,
const ANSWERS: u32 = 64;
/// and the ns that the first of them may wait for the others, from when its request was taken.
const HELD: u128 = 10_000;

/// What the connection tells a queue's thread while it runs.
#[derive(Debug)]
pub struct Control {
    wake: OwnedFd,
    stop: AtomicBool,
    ended: AtomicBool,
    /// Which descriptor to notify; a new number means another one.
    call: Mutex<Option<Arc<OwnedFd>>>,
    changes: AtomicU64,
    /// Whether writes may stay in a cache until a flush.
    pub writeback: Arc<AtomicBool>,
}

impl Control {
    /// With the descriptor to notify.
    pub fn new(call: Option<Arc<OwnedFd>>, writeback: Arc<AtomicBool>) -> io::Result<Control> {
        Ok(Control {
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stop: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            call: Mutex::new(call),
            changes: AtomicU64::new(0),
            writeback,
        })
    }

    /// Another descriptor to notify.
    pub fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        *self.call.lock() = call;
        self.changes.fetch_add(1, Ordering::Release);
        self.wake();
    }

    /// Ends the thread, when what it has taken is answered.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// The thread is about to end.
    pub fn set_ended(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Whether it was.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Whoever has filled the descriptor up and made it block holds the thread: this frees it.
    pub fn unblock(&self) {
        if let Some(call) = &*self.call.lock() {
            take_count(call);
        }
    }

    fn wake(&self) {
        // It can only be full, and then it is readable.
        let _ = write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Takes an eventfd's count, if there is one. Never waits, even if the other side has cleared
/// O_NONBLOCK.
fn take_count(fd: &OwnedFd) {
    let mut count = [0; 8];
    let mut into = [IoSliceMut::new(&mut count)];
    // An offset of -1 is none.
    let _ = preadv2(fd, &mut into, u64::MAX, ReadWriteFlags::NOWAIT);
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Guest address of its status byte.
    status: u64,
    /// Bytes that are written to its chain if it goes well.
    written: u32,
    /// Whether it is to be on stable storage, and takes a flush for that.
    then_flush: bool,
}

/// What a queue's thread is made of.
pub struct Parts {
    pub index: u16,
    pub size: u16,
    pub disk: Box<dyn DiskQueue>,
    pub memory: Arc<Memory>,
    /// The in-flight region, which can be torn as well.
    pub inflight: Option<Window>,
    pub kick: Arc<OwnedFd>,
    pub control: Arc<Control>,
    pub id: [u8; ID_BYTES],
    /// Whether zeroing may be done by discard.
    pub punches: bool,
    pub poll_us: u32,
}

/// See the module.
pub struct Worker<R> {
    parts: Parts,
    ring: R,
    slots: Vec<Slot>,
    /// What was taken in this round.
    batch: [(u16, Chain); BATCH],
    bufs: Vec<IoBuf>,
    done: Vec<Done>,
    pollers: Pollers,
    call: Option<Arc<OwnedFd>>,
    changes: u64,
    /// Answers that are not published.
    unpublished: u32,
    /// When the first requests were taken of which the driver has not been told.
    held_since: Option<Instant>,
    /// Disk requests that were taken in this round.
    submitted: bool,
    requests: u64,
}

/// How a queue ended: its base, and how many requests it had.
pub struct Ended {
    pub base: u32,
    pub requests: u64,
}

impl<R: Ring> Worker<R> {
    pub fn new(ring: R, parts: Parts) -> Worker<R> {
        let size = usize::from(parts.size);
        let call = parts.control.call.lock().clone();
        Worker {
            slots: vec![Slot { status: 0, written: 0, then_flush: false }; size],
            batch: std::array::from_fn(|_| (0, Chain::new())),
            bufs: Vec::with_capacity(crate::disk::MAX_SEGMENTS),
            done: Vec::with_capacity(size),
            pollers: Pollers::new(parts.poll_us),
            call,
            changes: 0,
            unpublished: 0,
            held_since: None,
            submitted: false,
            requests: 0,
            ring,
            parts,
        }
    }

    /// Serves until told to stop or until the driver breaks the ring; then waits for what is in
    /// flight.
    pub fn run(mut self) -> Result<Ended, Cause> {
        self.ring.disarm();
        let served = self.serve();
        let drained = self.drain(served.is_ok());
        served?;
        drained?;
        self.ring.settle();
        Ok(Ended { base: self.ring.base(), requests: self.requests })
    }

    fn serve(&mut self) -> Result<(), Cause> {
        // What came while nobody listened was told to nobody.
        self.notify();
        while !self.parts.control.stop.load(Ordering::Acquire) {
            if self.parts.control.changes.load(Ordering::Acquire) != self.changes {
                self.adopt();
            }
            if self.round()? {
                self.pollers.worked();
            } else if !self.pollers.of(self.parts.disk.in_flight()).spin() {
                self.sleep()?;
            }
        }
        Ok(())
    }

    /// Takes the new descriptor over. It is notified at once: what was told to the last one
    /// meanwhile may have been lost there.
    fn adopt(&mut self) {
        self.changes = self.parts.control.changes.load(Ordering::Acquire);
        self.call = self.parts.control.call.lock().clone();
        self.notify();
    }

    /// One round; whether there was anything to do.
    fn round(&mut self) -> Result<bool, Cause> {
        self.reap()?;
        let done = !self.done.is_empty();
        self.done.clear();
        self.publish_batch();
        let taken = self.take()?;
        Ok(taken > 0 || done)
    }

    fn check_torn(&self) -> Result<(), Cause> {
        let inflight = self.parts.inflight.as_ref();
        if self.parts.memory.is_torn() || inflight.is_some_and(Window::is_torn) {
            return Err(self.broken(Broken::Torn));
        }
        Ok(())
    }

    fn broken(&self, why: Broken) -> Cause {
        Cause::Ring(self.parts.index, why)
    }

    // ---- from the ring to the disk

    /// In passes over the batch, each of which brings nearer what the next one reads: the driver
    /// has just written it, so that it lies in another processor's cache.
    fn take(&mut self) -> Result<usize, Cause> {
        let mut taken = 0;
        self.ring.prefetch(BATCH as u16);
        while taken < BATCH {
            let (id, chain) = &mut self.batch[taken];
            let next = self.ring.take(&self.parts.memory, chain);
            *id = match next {
                Ok(Some(id)) => id,
                Ok(None) => break,
                Err(e) => {
                    // Zeroes in the place of what was taken away look like anything.
                    self.check_torn()?;
                    return Err(self.broken(e));
                }
            };
            blk::prefetch(&self.parts.memory, chain);
            if taken == 0 && self.held_since.is_none() {
                self.held_since = Some(Instant::now());
            }
            taken += 1;
        }
        for at in 0..taken {
            self.accept(at)?;
        }
        if taken > 0 {
            self.check_torn()?;
            self.requests += taken as u64;
        }
        if std::mem::take(&mut self.submitted) {
            self.parts.disk.submit_all().map_err(Cause::Disk)?;
        }
        Ok(taken)
    }

    fn accept(&mut self, at: usize) -> Result<(), Cause> {
        let (id, ref chain) = self.batch[at];
        let parsed = blk::parse(&self.parts.memory, chain, &mut self.bufs);
        let request = parsed.map_err(|e| self.broken(e))?;
        let through = !self.parts.control.writeback.load(Ordering::Relaxed);
        let slot = &mut self.slots[usize::from(id)];
        *slot = Slot { status: request.status, written: 1, then_flush: false };
        let (op, then_flush) = match request.work {
            Err(status) => {
                self.answer(id, status);
                return Ok(());
            }
            Ok(Work::Id) => {
                blk::write_id(&self.parts.memory, chain, &self.parts.id, request.room);
                slot.written = request.room.saturating_add(1).min(ID_BYTES as u32 + 1);
                self.answer(id, OK);
                return Ok(());
            }
            Ok(Work::Read) => {
                slot.written = request.room.saturating_add(1);
                (Op::Read, false)
            }
            Ok(Work::Write) if through => (Op::WriteFua, false),
            Ok(Work::Write) => (Op::Write, false),
            Ok(Work::Flush) => (Op::Flush, false),
            Ok(Work::Discard) => (Op::Discard, through),
            Ok(Work::Zero { unmap }) if unmap && self.parts.punches => (Op::Discard, through),
            Ok(Work::Zero { .. }) => (Op::WriteZeroes, through),
        };
        slot.then_flush = then_flush;
        self.submit(id, op, request.offset, request.len)
    }

    fn submit(&mut self, id: u16, op: Op, offset: u64, len: u64) -> Result<(), Cause> {
        let bufs =
            if matches!(op, Op::Read | Op::Write | Op::WriteFua) { &self.bufs[..] } else { &[] };
        let request = Request { op, offset, len, bufs, token: u64::from(id) };
        self.submitted = true;
        // One request an entry of the ring, and the queue was made for as many.
        let sent = self.parts.disk.submit(&request);
        sent.map_err(|_| Cause::Disk(io::Error::other("the disk's queue is full")))
    }

    // ---- from the disk to the ring

    fn reap(&mut self) -> Result<(), Cause> {
        self.parts.disk.poll(&mut self.done).map_err(Cause::Disk)?;
        for at in 0..self.done.len() {
            let Done { token, errno } = self.done[at];
            let id = token as u16;
            let slot = &mut self.slots[usize::from(id)];
            if errno == 0 && std::mem::take(&mut slot.then_flush) {
                self.submit(id, Op::Flush, 0, 0)?;
                continue;
            }
            let status = match errno {
                0 => OK,
                libc::EOPNOTSUPP => UNSUPP,
                _ => IOERR,
            };
            self.answer(id, status);
        }
        Ok(())
    }

    #[inline]
    fn answer(&mut self, id: u16, status: u8) {
        let slot = self.slots[usize::from(id)];
        if let Some(place) = self.parts.memory.place(slot.status, 1) {
            place.u8(0).store(status, Ordering::Relaxed);
        }
        self.ring.put(id, if status == OK { slot.written } else { 1 });
        self.unpublished += 1;
    }

    /// Publishes, unless that means waking a driver which has more for this end to do first.
    fn publish_batch(&mut self) {
        if self.unpublished == 0 {
            return;
        }
        let ring = &self.ring;
        let few = self.unpublished < ANSWERS;
        if few && ring.is_awaited() && ring.peek() == Pending::Work {
            let since = *self.held_since.get_or_insert_with(Instant::now);
            if since.elapsed().as_nanos() < HELD {
                return;
            }
        }
        self.publish();
    }

    fn publish(&mut self) {
        (self.unpublished, self.held_since) = (0, None);
        if self.ring.publish() == Notify::Send {
            self.notify();
        }
    }

    fn notify(&self) {
        if let Some(call) = &self.call {
            // It can only be full, and then it is readable.
            let _ = write(call, &1u64.to_ne_bytes());
        }
    }

    // ---- sleep

    /// Waits for the driver, the disk or the connection.
    fn sleep(&mut self) -> Result<(), Cause> {
        if self.unpublished > 0 {
            self.publish();
        }
        if self.ring.arm() == Pending::Work {
            self.ring.disarm();
            return Ok(());
        }
        let in_flight = self.parts.disk.in_flight();
        let before = Instant::now();
        let fds = [self.parts.kick.as_fd(), self.parts.control.wake.as_fd()];
        let ready = self.parts.disk.wait(&fds, None).map_err(Cause::Disk)?;
        self.pollers.of(in_flight).slept(before.elapsed().as_nanos() as u64);
        if ready & 1 != 0 {
            take_count(&self.parts.kick);
        }
        if ready & 2 != 0 {
            take_count(&self.parts.control.wake);
        }
        self.ring.disarm();
        self.check_torn()
    }

    /// Waits for all that is in flight, and answers it unless the ring is broken.
    fn drain(&mut self, whole: bool) -> Result<(), Cause> {
        while self.parts.disk.in_flight() > 0 {
            self.parts.disk.wait(&[], None).map_err(Cause::Disk)?;
            self.done.clear();
            match whole {
                true => self.reap()?,
                false => self.parts.disk.poll(&mut self.done).map_err(Cause::Disk)?,
            }
        }
        if whole {
            self.publish();
            // A driver that goes on with another device finds this one quiet.
            self.ring.arm();
        }
        self.parts.disk.unwatch().map_err(Cause::Disk)
    }
}
