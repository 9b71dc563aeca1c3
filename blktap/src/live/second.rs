//! The second disk of a job: a thread carries out there what the guest changes meanwhile.
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::queue::SegQueue;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use super::control::Station;
use crate::disk::{Disk, DiskQueue, Done, IoBuf, Op, Request, wait_for};

/// Requests in flight on the second disk.
const DEPTH: u32 = 128;
/// How often it is looked whether the last queue has let go, once that is expected.
const LOOK: Duration = Duration::from_millis(5);

/// What becomes of discards on the second disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// They are carried out there too.
    Pass,
    /// They are left out: the range keeps what it reads as.
    Drop,
}

/// A change for the second disk.
pub(super) struct Order {
    pub(super) op: Op,
    pub(super) range: Range<u64>,
    pub(super) bufs: Vec<IoBuf>,
    /// Its number in the queue that it comes from.
    pub(super) part: u32,
    pub(super) station: Arc<Station>,
}

impl Order {
    /// Done, or given up: no memory of it is in use.
    fn answer(self) {
        self.station.answers.push(self.part);
        self.station.wake();
    }
}

/// Ranges that are on their way to both disks, and who waits for one of them.
#[derive(Default)]
struct Busy {
    ranges: Vec<Range<u64>>,
    waiting: Vec<Arc<Station>>,
}

/// See the module.
pub(super) struct Second {
    orders: SegQueue<Order>,
    wake: OwnedFd,
    ends: AtomicBool,
    failed: AtomicBool,
    failure: Mutex<Option<String>>,
    busy: Mutex<Busy>,
    discards: Discards,
}

impl Second {
    /// Starts the thread, which lives until [`end`](Self::end) was called and nobody else has this.
    pub(super) fn start(
        disk: &dyn Disk,
        discards: Discards,
    ) -> io::Result<(Arc<Second>, JoinHandle<()>)> {
        let second = Arc::new(Second {
            orders: SegQueue::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            ends: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            busy: Mutex::default(),
            discards,
        });
        let (queue, own) = (disk.queue(DEPTH)?, Arc::clone(&second));
        let run = move || own.run(queue);
        let thread = std::thread::Builder::new().name("second disk".into()).spawn(run)?;
        Ok((second, thread))
    }

    /// Whether a change is carried out here.
    pub(super) fn wants(&self, op: Op) -> bool {
        let discards = matches!(op, Op::Discard | Op::SecureDiscard);
        !(self.failed.load(Ordering::Relaxed) || discards && self.discards == Discards::Drop)
    }

    /// Takes a range for a change of both disks; `false`: another change has a part of it, and
    /// the station will be woken when that is done.
    pub(super) fn reserve(&self, range: &Range<u64>, station: &Arc<Station>) -> bool {
        let mut busy = self.busy.lock();
        if busy.ranges.iter().any(|r| r.start < range.end && range.start < r.end) {
            if !busy.waiting.iter().any(|s| Arc::ptr_eq(s, station)) {
                busy.waiting.push(Arc::clone(station));
            }
            return false;
        }
        busy.ranges.push(range.clone());
        true
    }

    /// The change of a range is done.
    pub(super) fn give_back(&self, range: &Range<u64>) {
        let mut busy = self.busy.lock();
        if let Some(at) = busy.ranges.iter().position(|r| r == range) {
            busy.ranges.swap_remove(at);
        }
        busy.waiting.drain(..).for_each(|station| station.wake());
    }

    /// Has a change carried out. Its station gets an answer in any case.
    pub(super) fn order(&self, order: Order) {
        self.orders.push(order);
        self.ring();
    }

    /// The first error, in words.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    /// The thread ends when nobody has this any more: a queue may not know yet.
    pub(super) fn end(&self) {
        self.ends.store(true, Ordering::Release);
        self.ring();
    }

    fn ring(&self) {
        // It can only fail when its count is full, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn fail(&self, why: String) {
        self.failure.lock().get_or_insert(why);
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Whether no order can come any more.
    fn is_over(self: &Arc<Self>) -> bool {
        self.ends.load(Ordering::Acquire) && Arc::strong_count(self) == 1 && self.orders.is_empty()
    }

    /// How long to sleep: nobody tells when the last queue lets go.
    fn patience(&self) -> Option<Duration> {
        self.ends.load(Ordering::Acquire).then_some(LOOK)
    }

    fn run(self: &Arc<Self>, mut queue: Box<dyn DiskQueue>) {
        let mut on_their_way = Table::default();
        if let Err(e) = self.serve(&mut *queue, &mut on_their_way) {
            self.fail(format!("the other disk: {e}"));
        }
        // Afterwards no memory is in use.
        drop(queue);
        on_their_way.orders.into_iter().flatten().for_each(Order::answer);
        self.answer_the_rest();
    }

    fn serve(self: &Arc<Self>, queue: &mut dyn DiskQueue, table: &mut Table) -> io::Result<()> {
        let mut done = Vec::new();
        loop {
            // Before looking, so that nothing that comes later is missed.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            while queue.in_flight() < DEPTH
                && let Some(order) = self.orders.pop()
            {
                self.send(queue, table, order);
            }
            queue.poll(&mut done)?;
            for Done { token, errno } in done.drain(..) {
                self.done(table, token, errno);
            }
            if queue.in_flight() == 0 && self.is_over() {
                return Ok(());
            }
            queue.wait(&[self.wake.as_fd()], self.patience())?;
        }
    }

    fn send(&self, queue: &mut dyn DiskQueue, table: &mut Table, order: Order) {
        let op = if order.op == Op::WriteFua { Op::Write } else { order.op };
        let (offset, len) = (order.range.start, order.range.end - order.range.start);
        let bufs = order.bufs.clone();
        let token = table.put(order);
        if queue.submit(&Request { op, offset, len, bufs: &bufs, token }).is_err() {
            self.done(table, token, libc::EBUSY);
        }
    }

    fn done(&self, table: &mut Table, token: u64, errno: i32) {
        let Some(order) = table.take(token) else { return };
        let discards = matches!(order.op, Op::Discard | Op::SecureDiscard);
        // Who cannot discard has done all that a discard asks for.
        if errno != 0 && !(discards && errno == libc::EOPNOTSUPP) {
            let error = io::Error::from_raw_os_error(errno);
            let Range { start, end } = order.range;
            self.fail(format!("the other disk: bytes {start} to {end} cannot be written: {error}"));
        }
        order.answer();
    }

    /// After an error: whoever still orders is not kept waiting.
    fn answer_the_rest(self: &Arc<Self>) {
        loop {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            while let Some(order) = self.orders.pop() {
                order.answer();
            }
            if self.is_over() || wait_for(&[self.wake.as_fd()], self.patience()).is_err() {
                return;
            }
        }
    }
}

/// Orders on their way, by their tokens.
#[derive(Default)]
struct Table {
    orders: Vec<Option<Order>>,
    free: Vec<usize>,
}

impl Table {
    fn put(&mut self, order: Order) -> u64 {
        match self.free.pop() {
            Some(at) => {
                self.orders[at] = Some(order);
                at as u64
            }
            None => {
                self.orders.push(Some(order));
                self.orders.len() as u64 - 1
            }
        }
    }
    fn take(&mut self, token: u64) -> Option<Order> {
        let order = self.orders.get_mut(token as usize)?.take()?;
        self.free.push(token as usize);
        Some(order)
    }
}
