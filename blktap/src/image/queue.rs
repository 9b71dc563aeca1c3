//! A thread's queue of an image: takes requests, has them resolved, and sees them through.
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use perf::Handle;

use super::chain::{Scratch, Stretch};
use super::lower::Lower;
use super::requests::{Copy, Group, Owner, Parked, Slab, Slots, Then};
use super::transfer::{Step, Unpack};
use super::workers::{ANSWERS, Answer, Job};
use super::{Commits, Shared};
use crate::disk::{DiskQueue, Done, Full, IoBuf, MAX_SEGMENTS, Op, Request, check_range, wait_for};
use crate::engine::{EngineCounters, EngineOp};
use crate::filters::priority::Priority;
use crate::formats::{ImageError, LeaseHolder, Piece, Waiter};

/// What a lower token's upper half says about its lower half.
pub(super) const TRANSFER_OF_SLOT: u64 = 0;
pub(super) const TRANSFER_OF_GROUP: u64 = 1 << 32;
const LOAD: u64 = 2 << 32;
pub(super) const UNPACK: u64 = 3 << 32;
const KIND: u64 = !0 << 32;

/// A queue of an [`ImageDisk`](super::ImageDisk).
pub struct ImageQueue {
    /// First: dropped before what its transfers use.
    pub(super) lower: Lower,
    pub(super) shared: Arc<Shared>,
    pub(super) slots: Slots,
    pub(super) groups: Slab<Group>,
    pub(super) copies: Slab<Copy>,
    pub(super) unpacks: Slab<Unpack>,
    leases: LeaseHolder,
    pub(super) waiter: Waiter,
    depth: u32,
    ready: Vec<Done>,
    done: Vec<Done>,
    pub(super) scratch: Scratch,
    pub(super) stretches: Vec<Stretch>,
    pub(super) pieces: Vec<Piece>,
    pub(super) bufs: Vec<IoBuf>,
}

impl ImageQueue {
    pub(super) fn new(shared: Arc<Shared>, depth: u32) -> io::Result<ImageQueue> {
        let chain = Arc::clone(&shared.chain);
        let lower = Lower::new(Arc::clone(&chain), Arc::clone(&shared.workers), depth)?;
        Ok(ImageQueue {
            waiter: Waiter::new(Arc::clone(lower.mailbox()), 0),
            lower,
            slots: Slots::new(depth),
            groups: Slab::default(),
            copies: Slab::default(),
            unpacks: Slab::default(),
            leases: chain.top().leases().holder(),
            depth,
            ready: Vec::with_capacity(depth as usize),
            done: Vec::with_capacity(2 * depth as usize),
            scratch: chain.scratch(),
            stretches: Vec::with_capacity(64),
            pieces: Vec::with_capacity(64),
            bufs: Vec::with_capacity(MAX_SEGMENTS),
            shared,
        })
    }

    /// What is wrong with a request.
    fn check(&self, r: &Request<'_>) -> Result<(), i32> {
        if self.shared.read_only() && r.op != Op::Read {
            return Err(libc::EROFS);
        }
        check_range(r, self.shared.size(), u64::from(self.shared.logical))?;
        match r.op {
            Op::Read | Op::Write | Op::WriteFua => {
                let sum = r.bufs.iter().try_fold(0u64, |sum, b| sum.checked_add(b.len() as u64));
                let fits = sum == Some(r.len) && pieces_of(r.bufs) <= MAX_SEGMENTS;
                if fits { Ok(()) } else { Err(libc::EINVAL) }
            }
            Op::SecureDiscard => Err(libc::EOPNOTSUPP),
            Op::Flush | Op::Discard | Op::WriteZeroes => Ok(()),
        }
    }

    /// Goes on with a request as far as it goes.
    pub(super) fn advance(&mut self, index: u32) {
        // What ends at once must not end the request under this loop's feet.
        self.slots.get_mut(index).pending += 1;
        self.send_on(index);
        self.slots.get_mut(index).pending -= 1;
        self.settle(index);
    }

    fn send_on(&mut self, index: u32) {
        loop {
            let slot = self.slots.get(index);
            if slot.errno != 0 || slot.sent >= slot.len {
                return;
            }
            let range = slot.offset + slot.sent..slot.offset + slot.len;
            let step = match slot.op {
                Op::Read => self.send_read(index, range),
                _ => self.send_change(index, range),
            };
            match step {
                Ok(Step::Sent(bytes)) => self.slots.get_mut(index).sent += bytes,
                Ok(Step::Miss(miss)) => {
                    self.slots.get_mut(index).parked = Parked::Load;
                    let token = LOAD | u64::from(self.slots.key(index));
                    return self.lower.job(Job::Load(miss), token);
                }
                Ok(Step::Busy) => return self.slots.get_mut(index).parked = Parked::Busy,
                Err(e) => self.fail(index, &e),
            }
        }
    }

    fn fail(&mut self, index: u32, error: &ImageError) {
        self.shared.log.say(&self.shared.chain, error);
        self.slots.get_mut(index).errno = error.errno();
    }

    /// Ends a request if nothing of it is left.
    pub(super) fn settle(&mut self, index: u32) {
        let slot = self.slots.get_mut(index);
        let all_sent = slot.errno != 0 || slot.sent >= slot.len;
        if !all_sent || slot.pending > 0 || slot.parked != Parked::No {
            return;
        }
        let then = std::mem::replace(&mut slot.then, Then::Answer);
        let flush = match then {
            Then::Answer => false,
            // Also in place: the cluster may have come to its place a moment ago.
            Then::Commit => self.shared.chain.top().has_unflushed(),
            Then::Flush => true,
        };
        let slot = self.slots.get_mut(index);
        if flush && slot.errno == 0 {
            return self.start_flush(index);
        }
        let (owner, errno, lease) = (slot.owner, slot.errno, slot.lease.take());
        if let Some(lease) = lease {
            self.leases.end(lease);
        }
        self.slots.free(index);
        match owner {
            Owner::User { token } => self.ready.push(Done { token, errno }),
            Owner::Copy { copy } => self.copy_arrived(copy, errno),
        }
    }

    /// Data first, then the metadata that the format keeps.
    fn start_flush(&mut self, index: u32) {
        let chain = Arc::clone(&self.shared.chain);
        let slot = self.slots.get_mut(index);
        slot.pending += 1;
        if self.shared.read_only() {
            return self.transfer_ended(index, 0);
        }
        if chain.top().has_unflushed() {
            return self.lower.job(Job::Flush, TRANSFER_OF_SLOT | u64::from(index));
        }
        for (file, storage) in chain.top().files().iter().enumerate() {
            if storage.needs_sync() {
                self.slots.get_mut(index).pending += 1;
                let token = TRANSFER_OF_SLOT | u64::from(index);
                self.lower.start((file as u16, 0), EngineOp::Sync, (&[], 0), token);
            }
        }
        self.transfer_ended(index, 0);
    }

    /// Something that a request counts as pending has ended.
    pub(super) fn transfer_ended(&mut self, index: u32, errno: i32) {
        let slot = self.slots.get_mut(index);
        slot.pending -= 1;
        // Who cannot discard has done all that a discard asks for.
        let ignored = slot.op == Op::Discard && errno == libc::EOPNOTSUPP;
        if slot.errno == 0 && !ignored {
            slot.errno = errno;
        }
        self.settle(index);
    }

    fn dispatch(&mut self, token: u64, errno: i32, bytes: &[u8]) {
        let low = token as u32;
        match token & KIND {
            TRANSFER_OF_SLOT => self.transfer_ended(low, errno),
            TRANSFER_OF_GROUP => self.group_ended(low, errno),
            LOAD => {
                if let Some(index) = self.slots.parked(low) {
                    let slot = self.slots.get_mut(index);
                    slot.parked = Parked::No;
                    // A part that was sent before may have failed meanwhile.
                    if slot.errno == 0 {
                        slot.errno = errno;
                    }
                    self.advance(index);
                }
            }
            _ => self.unpacked(low, errno, bytes),
        }
    }

    /// Deals with everything that has ended or woken.
    fn reap(&mut self) -> io::Result<()> {
        let mut done = std::mem::take(&mut self.done);
        let result = self.lower.poll(&mut done);
        for d in done.drain(..) {
            self.dispatch(d.token, d.errno, &[]);
        }
        self.done = done;
        if self.lower.mailbox().is_rung() {
            while let Some(key) = self.lower.mailbox().take() {
                if key == ANSWERS {
                    continue;
                }
                if let Some(index) = self.slots.parked(key) {
                    self.slots.get_mut(index).parked = Parked::No;
                    self.advance(index);
                }
            }
        }
        while let Some(Answer { token, errno, bytes }) = self.lower.answer() {
            self.dispatch(token, errno, &bytes);
        }
        result?;
        self.lower.submit()
    }

    /// What is left when the lower side has failed: nobody may wait for its clusters for ever.
    fn give_up(&mut self) {
        while self.lower.has_jobs() {
            // Who has a job posts to the mailbox when it is done.
            let _ = wait_for(&[self.lower.mailbox().as_fd()], None);
            while self.lower.mailbox().take().is_some() {}
            while self.lower.answer().is_some() {}
        }
        self.lower.stop();
        for group in self.groups.drain() {
            if let Some(guard) = group.guard {
                self.shared.chain.top().abort(guard);
            }
        }
    }
}

/// How many pieces of memory are left when neighbours are joined.
fn pieces_of(bufs: &[IoBuf]) -> usize {
    if bufs.len() <= MAX_SEGMENTS {
        return bufs.len();
    }
    let apart = |w: &[IoBuf]| w[0].addr().wrapping_add(w[0].len()) != w[1].addr();
    1 + bufs.windows(2).filter(|w| apart(w)).count()
}

impl DiskQueue for ImageQueue {
    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.in_flight() >= self.depth {
            return Err(Full);
        }
        if r.op == Op::Flush {
            let index = self.slots.take(Owner::User { token: r.token }, r.op, 0, 0);
            self.start_flush(index);
            return Ok(());
        }
        if let Err(errno) = self.check(r) {
            self.ready.push(Done { token: r.token, errno });
            return Ok(());
        }
        let owner = Owner::User { token: r.token };
        let index = self.slots.take(owner, r.op, r.offset, r.len);
        let slot = self.slots.get_mut(index);
        slot.bufs.extend_from_slice(r.bufs);
        slot.lease = Some(self.leases.take());
        let changes = matches!(r.op, Op::Write | Op::WriteZeroes | Op::Discard);
        if changes && self.shared.commits == Commits::BeforeAnswer {
            slot.then = Then::Commit;
        }
        self.advance(index);
        Ok(())
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.lower.submit()
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        self.reap()?;
        done.append(&mut self.ready);
        Ok(())
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        if fds.is_empty() && timeout.is_none() && self.in_flight() == 0 {
            return Ok(0);
        }
        let timeout = if self.ready.is_empty() { timeout } else { Some(Duration::ZERO) };
        self.lower.wait(fds, timeout)
    }
    fn unwatch(&mut self) -> io::Result<()> {
        self.lower.unwatch()
    }
    fn prioritize(&mut self, priority: Priority) {
        self.lower.prioritize(priority);
    }
    fn in_flight(&self) -> u32 {
        self.slots.users + self.ready.len() as u32
    }
    fn counters(&self) -> Option<Handle<EngineCounters>> {
        self.lower.counters()
    }
    fn count_in(&mut self, counters: Handle<EngineCounters>) {
        self.lower.count_in(counters);
    }
}

impl Drop for ImageQueue {
    fn drop(&mut self) {
        while self.slots.users > 0 {
            if self.reap().is_err() {
                return self.give_up();
            }
            // Who changes these clusters may be this very thread, by another queue.
            if self.slots.all_wait_for_others() {
                return;
            }
            if self.lower.wait(&[], None).is_err() {
                return self.give_up();
            }
        }
    }
}
