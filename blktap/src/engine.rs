//! One io_uring per queue: moves bytes between named memory and open files.
//!
//! An [`Engine`] belongs to the thread that first enters it (its requests, its completions and
//! the descriptors it watches). Everything it needs is allocated when it is made; one
//! `io_uring_enter` sends a batch, waits for completions and for foreign descriptors.
// An engine owns raw addresses; what makes that sound is written at its constructor.
#![allow(unsafe_code)]

mod bounce;
mod counters;
mod inline;
mod ioctl;
mod ops;
mod setup;
#[cfg(test)]
mod tests;
mod watch;

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicI32;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use perf::Handle;
use rustix::event::{PollFd, PollFlags, poll};

pub use counters::EngineCounters;
pub use setup::{RingMode, SetupError};
pub use watch::MAX_WATCHES;

use crate::disk::{Done, Full, IoBuf};
use ioctl::IoctlThread;
use ops::Ops;
use setup::Fence;
use watch::Watches;

/// Most requests that one engine holds at once.
pub const MAX_DEPTH: u32 = 8192;

/// A longer timeout is cut: clocks overflow.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 86400);

/// User data: what a completion belongs to. Requests carry their slot's number alone.
const TAG: u64 = 0xff << 56;
const TAG_WATCH: u64 = 1 << 56;
const TAG_HELPER: u64 = 2 << 56;
const TAG_IGNORE: u64 = 3 << 56;

/// What kind of file an engine works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Discards are fallocate(PUNCH_HOLE).
    Regular,
    /// Discards are BLKDISCARD.
    Block,
}

/// What a read finds beyond the end of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PastEnd {
    /// EIO: the file is the disk, and has shrunk.
    Error,
    /// Zeroes: the file grows as an image format writes to it.
    Zeroes,
}

/// A file that an engine does I/O on.
#[derive(Clone, Debug)]
pub struct EngineFile {
    /// The open file; the engine keeps it open, and with it every lock held through it.
    pub file: Arc<File>,
    /// What it is.
    pub kind: FileKind,
    /// Alignment that the file asks of each segment's address, 1 for none. Requests that miss
    /// it go through a bounce buffer.
    pub memory_align: u32,
    /// Alignment that the file asks of each segment's length, 1 for none.
    pub length_align: u32,
    /// What a read finds beyond its end.
    pub past_end: PastEnd,
    /// The errno of the first sync that failed, 0 before. The kernel reports lost writes once:
    /// whoever shares the file looks here.
    pub sync_failed: Arc<AtomicI32>,
}

/// How durable a write is when it completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// After the next sync.
    Volatile,
    /// At once (RWF_DSYNC).
    Through,
}

/// What an engine can do with a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineOp {
    /// File to buffers.
    Read,
    /// Buffers to file.
    Write(Durability),
    /// fdatasync of the whole file; the range is ignored.
    Sync,
    /// Give the range back: PUNCH_HOLE or BLKDISCARD.
    Discard,
    /// BLKSECDISCARD; block devices only.
    SecureDiscard,
    /// Make the range read as zeroes: ZERO_RANGE, else PUNCH_HOLE, else by writing.
    Zero,
}

/// One request to an engine. Ranges are not checked against the file's size.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'a> {
    /// Which of the engine's files.
    pub file: u16,
    /// What to do.
    pub op: EngineOp,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Memory, for reads and writes; its lengths sum up to `len`.
    pub bufs: &'a [IoBuf],
    /// Comes back in the [`Done`].
    pub token: u64,
}

/// How to make an engine.
#[derive(Debug)]
pub struct EngineConfig {
    /// Requests held at once, up to [`MAX_DEPTH`].
    pub depth: u32,
    /// Files, named by their position in [`Transfer::file`].
    pub files: Vec<EngineFile>,
    /// The newest mode to try; older kernels get what they have.
    pub newest: RingMode,
}

/// Tries io_uring out: a word on the mode that queues will have, or why there will be none.
pub fn doctor() -> Result<String, SetupError> {
    let engine =
        Engine::new(EngineConfig { depth: 1, files: Vec::new(), newest: RingMode::Deferred })?;
    Ok(match engine.mode() {
        RingMode::Deferred => "works (deferred completions)",
        RingMode::Cooperative => "works (cooperative completions; Linux 6.1 has better)",
        RingMode::Plain => "works (interrupting completions; Linux 6.1 has better)",
    }
    .to_owned())
}

/// Why an enter came back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Woken {
    Event,
    Timeout,
    Signal,
    /// The kernel wants completions taken first, or is out of memory for the moment.
    Busy,
}

/// An io_uring with its requests. See the module.
pub struct Engine {
    ring: ManuallyDrop<IoUring>,
    fence: Fence,
    mode: RingMode,
    enabled: bool,
    helper_armed: bool,
    watches: Watches,
    ops: Ops,
    counters: Handle<EngineCounters>,
}

// SAFETY: the addresses it holds are its own allocations and buffers whose makers promised that
// they outlive the requests; neither is tied to a thread. (The kernel ties an entered ring to its
// thread, refuses others with EEXIST, and `drop` copes with that.)
unsafe impl Send for Engine {}

impl Engine {
    /// Makes the ring, registers the files and allocates everything.
    pub fn new(config: EngineConfig) -> Result<Self, SetupError> {
        let depth = config.depth;
        if !(1..=MAX_DEPTH).contains(&depth) {
            return Err(SetupError::Depth(depth));
        }
        // Room for every request and a whole change of the watched set.
        let entries = (depth + 2 * MAX_WATCHES as u32 + 2).next_power_of_two();
        let fds: Vec<_> = config.files.iter().map(|f| f.file.as_raw_fd()).collect();
        let made = setup::make(entries, &fds, config.newest)?;
        Ok(Engine {
            ring: ManuallyDrop::new(made.ring),
            fence: made.fence,
            mode: made.mode,
            enabled: false,
            helper_armed: false,
            watches: Watches::new(TAG_WATCH, TAG_IGNORE),
            ops: Ops::new(depth, config.files),
            counters: Handle::default(),
        })
    }

    /// The mode that the kernel gave.
    pub fn mode(&self) -> RingMode {
        self.mode
    }

    /// What the engine counts; readable from any thread.
    pub fn counters(&self) -> &Handle<EngineCounters> {
        &self.counters
    }

    /// Counts into `counters` (in a stats page, say) from now on.
    pub fn count_in(&mut self, counters: Handle<EngineCounters>) {
        self.counters = counters;
    }

    /// What the kernel is told of the priority of reads and writes from now on: an ioprio, or 0.
    pub fn prioritize(&mut self, ioprio: u16) {
        self.ops.ioprio = ioprio;
    }

    /// Requests started and not yet polled as done.
    pub fn in_flight(&self) -> u32 {
        (self.ops.busy() + self.ops.ready.len()) as u32
    }

    /// Takes a request; it goes to the kernel with the next `submit`, `poll` or `wait`.
    pub fn start(&mut self, transfer: &Transfer<'_>) -> Result<(), Full> {
        if self.in_flight() as usize >= self.ops.depth() {
            return Err(Full);
        }
        let helped = match transfer.op {
            EngineOp::SecureDiscard => true,
            EngineOp::Discard => {
                let file = self.ops.files.get(usize::from(transfer.file));
                file.is_some_and(|(f, _)| f.kind == FileKind::Block)
            }
            _ => false,
        };
        if helped && self.ops.helper.is_none() {
            match IoctlThread::start(self.ops.depth() as u32) {
                Ok(helper) => self.ops.helper = Some(helper),
                Err(_) => return self.answer(transfer.token, libc::EAGAIN),
            }
        }
        self.ops.start(transfer, &mut self.ring.submission(), &self.counters);
        Ok(())
    }

    /// Takes a request whose answer is known already.
    pub fn answer(&mut self, token: u64, errno: i32) -> Result<(), Full> {
        if self.in_flight() as usize >= self.ops.depth() {
            return Err(Full);
        }
        self.ops.ready.push(Done { token, errno });
        Ok(())
    }

    /// Sends what was taken.
    pub fn submit(&mut self) -> io::Result<()> {
        self.watch_helper();
        // Twice at most: a full completion queue is emptied in between.
        for _ in 0..2 {
            if self.unsent() && self.enter(0, None)? == Woken::Busy {
                self.reap();
            }
        }
        self.write_inline();
        Ok(())
    }

    /// Appends what is done, after sending what was taken. No system call if nothing was taken
    /// and the kernel has not flagged work that waits for this thread.
    pub fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        self.watch_helper();
        self.submit_or_look()?;
        self.write_inline();
        self.reap();
        done.append(&mut self.ops.ready);
        Ok(())
    }

    /// Sends what was taken; sleeps until something is done, a descriptor is readable, a signal
    /// came, or the time is over.
    pub fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        if fds.len() > MAX_WATCHES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 64 descriptors"));
        }
        self.reap();
        let mut left = timeout.map(|t| t.min(LONGEST_WAIT));
        let deadline = left.map(|t| Instant::now() + t);
        loop {
            self.arm(fds)?;
            self.write_inline();
            let ready = !self.ops.ready.is_empty() || self.watches.pending();
            if ready || (fds.is_empty() && self.idle(timeout)) {
                self.submit_or_look()?;
                self.reap();
                return Ok(self.watches.take());
            }
            let woken = self.enter(1, left)?;
            if woken == Woken::Busy {
                std::thread::yield_now();
            }
            self.reap();
            let bits = self.watches.take();
            if bits != 0 || !self.ops.ready.is_empty() || woken == Woken::Signal {
                return Ok(bits);
            }
            if let Some(deadline) = deadline {
                left = Some(deadline.saturating_duration_since(Instant::now()));
                if woken == Woken::Timeout || left == Some(Duration::ZERO) {
                    return Ok(0);
                }
            }
        }
    }

    /// Stops watching every descriptor and makes the kernel let go of them. Needed before one
    /// of them is closed while its number may be used again.
    pub fn unwatch(&mut self) -> io::Result<()> {
        let mut sq = self.ring.submission();
        // SAFETY: a removal names no memory.
        let fits = self.watches.forget(|entry| unsafe { sq.push(&entry) }.is_ok());
        drop(sq);
        if !fits {
            return Err(io::Error::other("no room to let go of descriptors"));
        }
        self.submit()?;
        // A removed poll lets go of its file when its completion runs.
        self.submit_or_look()?;
        self.reap();
        Ok(())
    }

    /// Whether there is nothing at all to wait for.
    fn idle(&self, timeout: Option<Duration>) -> bool {
        timeout.is_none() && self.ops.busy() == 0
    }

    fn submit_or_look(&mut self) -> io::Result<()> {
        if self.unsent() || self.kernel_waits() {
            self.enter(0, None)?;
        }
        Ok(())
    }

    fn arm(&mut self, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.watch_helper();
        let mut sq = self.ring.submission();
        let counters = &self.counters;
        let fits = self.watches.arm(fds, |entry| {
            counters.polls.add(1);
            // SAFETY: a poll or its removal names no memory.
            unsafe { sq.push(&entry) }.is_ok()
        });
        if fits { Ok(()) } else { Err(io::Error::other("no room to watch descriptors")) }
    }

    /// Watches the helper thread's eventfd while it has work.
    fn watch_helper(&mut self) {
        let Some(helper) = &self.ops.helper else { return };
        if self.helper_armed || helper.outstanding() == 0 {
            return;
        }
        let fd = types::Fd(helper.event());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(TAG_HELPER);
        // SAFETY: a poll names no memory.
        self.helper_armed = unsafe { self.ring.submission().push(&entry) }.is_ok();
    }

    /// Behind what the kernel is to work on meanwhile.
    #[inline]
    fn write_inline(&mut self) {
        if self.ops.has_inline() {
            self.ops.write_inline(&mut self.ring.submission(), &self.counters);
        }
    }

    fn unsent(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Whether the kernel holds completions that only an enter brings out.
    fn kernel_waits(&mut self) -> bool {
        let sq = self.ring.submission();
        sq.taskrun() || sq.cq_overflow()
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<Woken> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        self.counters.enters.add(1);
        self.counters.sleeps.add(want as u64);
        let submitter = self.ring.submitter();
        let result = match timeout {
            Some(t) if want > 0 && self.ring.params().is_feature_ext_arg() => {
                let spec = types::Timespec::from(t);
                submitter.submit_with_args(want, &types::SubmitArgs::new().timespec(&spec))
            }
            Some(t) if want > 0 => return self.enter_then_poll(t),
            _ => submitter.submit_and_wait(want),
        };
        woken(result)
    }

    /// Kernels before 5.11 have no timeout in enter.
    fn enter_then_poll(&mut self, timeout: Duration) -> io::Result<Woken> {
        let sent = woken(self.ring.submitter().submit())?;
        if sent != Woken::Event || !self.ring.completion().is_empty() {
            return Ok(sent);
        }
        self.counters.enters.add(1);
        // SAFETY: the ring's descriptor stays open during the call.
        let fd = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        let limit = rustix::event::Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&limit)) {
            Ok(0) => Ok(Woken::Timeout),
            Ok(_) => Ok(Woken::Event),
            Err(rustix::io::Errno::INTR) => Ok(Woken::Signal),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes all completions, sends on what has more to do.
    fn reap(&mut self) {
        let (_, mut sq, cq) = self.ring.split();
        for cqe in cq {
            let data = cqe.user_data();
            match data & TAG {
                0 => self.ops.complete(data as u32, cqe.result(), &mut sq, &self.counters),
                TAG_WATCH => self.watches.fired(data),
                TAG_HELPER => {
                    self.helper_armed = false;
                    if let Some(helper) = &self.ops.helper {
                        helper.acknowledge();
                    }
                }
                _ => {}
            }
        }
        while let Some((index, errno)) = self.ops.helper.as_mut().and_then(IoctlThread::next) {
            match errno {
                0 => self.ops.finish(index, 0),
                e => self.ops.failed(index, e, &mut sq, &self.counters),
            }
        }
        if self.ops.has_backlog() {
            self.ops.send_backlog(&mut sq, &self.counters);
        }
    }

    /// Waits until every request is done. `Err`: this thread may not enter the ring.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            self.write_inline();
            self.reap();
            if self.ops.busy() == 0 {
                return Ok(());
            }
            self.watch_helper();
            if self.enter(1, None)? == Woken::Busy {
                std::thread::yield_now();
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let quiet = (self.ops.busy() == 0 || self.drain().is_ok()) && self.unwatch().is_ok();
        // Otherwise it is another thread's ring: closing it cancels what can be cancelled, and
        // the rest ends by itself. The kernel takes a ring apart in the background (some 50 ms);
        // giving the files back before spares waiting for that.
        if quiet {
            let _ = self.ring.submitter().unregister_files();
        }
        // SAFETY: not used again.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
        // Until the kernel is done, requests may use the buffers, and the files stay open and
        // locked.
        self.fence.wait();
    }
}

fn woken(result: io::Result<usize>) -> io::Result<Woken> {
    match result {
        Ok(_) => Ok(Woken::Event),
        Err(e) => match e.raw_os_error() {
            Some(libc::ETIME) => Ok(Woken::Timeout),
            Some(libc::EINTR) => Ok(Woken::Signal),
            Some(libc::EBUSY | libc::EAGAIN) => Ok(Woken::Busy),
            Some(libc::EEXIST) => Err(io::Error::other(
                "this queue belongs to the thread that used it first (EEXIST)",
            )),
            _ => Err(e),
        },
    }
}
