//! BLKDISCARD and BLKSECDISCARD block and have no io_uring form before Linux 6.12: a helper
//! thread, started on first use, makes the call and raises an eventfd.
// ioctl(2) takes its argument by address.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

/// `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// `_IO(0x12, 125)` of linux/fs.h.
const BLKSECDISCARD: libc::c_ulong = 0x127d;

/// Which call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Discard,
    SecureDiscard,
}

struct Job {
    slot: u32,
    file: Arc<File>,
    call: Call,
    range: [u64; 2],
}

/// The helper thread of one engine; at most `depth` jobs are out at once.
pub(super) struct IoctlThread {
    jobs: Option<SyncSender<Job>>,
    results: Receiver<(u32, i32)>,
    event: Arc<OwnedFd>,
    outstanding: u32,
    thread: Option<JoinHandle<()>>,
}

impl IoctlThread {
    pub(super) fn start(depth: u32) -> io::Result<Self> {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (jobs, inbox) = sync_channel::<Job>(depth as usize);
        let (outbox, results) = sync_channel(depth as usize);
        let bell = Arc::clone(&event);
        let thread =
            std::thread::Builder::new().name("blktap-discard".into()).spawn(move || {
                for job in inbox {
                    let errno = perform(&job);
                    if outbox.send((job.slot, errno)).is_err() {
                        return;
                    }
                    // Full cannot happen: the counter is far below its limit.
                    let _ = rustix::io::write(&*bell, &1u64.to_ne_bytes());
                }
            })?;
        Ok(IoctlThread { jobs: Some(jobs), results, event, outstanding: 0, thread: Some(thread) })
    }

    /// Hands a job over; `false` if the thread is gone.
    pub(super) fn send(
        &mut self,
        slot: u32,
        file: &Arc<File>,
        call: Call,
        range: [u64; 2],
    ) -> bool {
        let job = Job { slot, file: Arc::clone(file), call, range };
        let sent = self.jobs.as_ref().is_some_and(|j| j.try_send(job).is_ok());
        self.outstanding += u32::from(sent);
        sent
    }

    /// The next finished job: its slot and errno.
    pub(super) fn next(&mut self) -> Option<(u32, i32)> {
        let result = self.results.try_recv().ok();
        self.outstanding -= u32::from(result.is_some());
        result
    }

    /// Takes back the eventfd's signal, so that polling it waits for the next one.
    pub(super) fn acknowledge(&self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&*self.event, &mut count);
    }

    pub(super) fn outstanding(&self) -> u32 {
        self.outstanding
    }

    pub(super) fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Drop for IoctlThread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn perform(job: &Job) -> i32 {
    let request = match job.call {
        Call::Discard => BLKDISCARD,
        Call::SecureDiscard => BLKSECDISCARD,
    };
    loop {
        // SAFETY: both calls read two u64 (start and length in bytes) from the address.
        let r = unsafe { libc::ioctl(job.file.as_raw_fd(), request, job.range.as_ptr()) };
        if r == 0 {
            return 0;
        }
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        if errno != libc::EINTR {
            return errno;
        }
    }
}
