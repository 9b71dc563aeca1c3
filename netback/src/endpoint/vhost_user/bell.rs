//! How a switch and a queue wake each other.
//!
//! vhost-user's kicks and calls are eventfds, of which both sides have the same open file: the other
//! side could take O_NONBLOCK from it, and hang whoever reads or writes it next. Of a pipe each side has
//! an end of its own, and 8 bytes go through it as into an eventfd, so that back-ends see no difference.
// The vhost crate takes descriptors as its own kind of eventfd.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::{Errno, read, write};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of a pipe: 512 events that nobody has heard.
const PIPE: usize = 4096;
/// Who rings a bell.
const SWITCH: u64 = 0;
const OWN: u64 = 1;

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    fcntl_setpipe_size(&write, PIPE)?;
    Ok((read, write))
}

/// The descriptor once more, as the vhost crate sends it.
fn copy(end: &OwnedFd) -> io::Result<EventFd> {
    let fd = end.try_clone()?.into_raw_fd();
    // SAFETY: a descriptor that nobody else has; the value is only sent and closed.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}

/// One event. Where the other side has not heard hundreds, it need not be told again.
fn tell(end: &OwnedFd, what: &str) {
    match write(end, &1u64.to_ne_bytes()) {
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
        Err(e) => tracing::debug!("{what}: {e}"),
    }
}

/// What this side tells the switch by.
#[derive(Debug)]
pub(super) struct Kick {
    /// Kept, so that a pipe without a reader never ends the process by a signal.
    read: OwnedFd,
    write: OwnedFd,
}

impl Kick {
    pub(super) fn new() -> io::Result<Kick> {
        let (read, write) = pipe()?;
        Ok(Kick { read, write })
    }
    pub(super) fn ring(&self) {
        tell(&self.write, "kicking a switch");
    }
    /// The switch's end.
    pub(super) fn end(&self) -> io::Result<EventFd> {
        copy(&self.read)
    }
}

/// What a queue hears the switch by, and the link's thread, which has an eventfd that no switch knows.
#[derive(Debug)]
pub(super) struct Bell {
    read: OwnedFd,
    write: OwnedFd,
    own: OwnedFd,
    /// Readable when one of them is.
    either: OwnedFd,
}

impl Bell {
    pub(super) fn new() -> io::Result<Bell> {
        let (read, write) = pipe()?;
        let own = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let either = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (fd, whose) in [(&read, SWITCH), (&own, OWN)] {
            let data = epoll::EventData::new_u64(whose);
            epoll::add(&either, fd, data, epoll::EventFlags::IN)?;
        }
        Ok(Bell { read, write, own, either })
    }
    /// Wakes the queue from within the process.
    pub(super) fn ring(&self) {
        tell(&self.own, "waking a queue");
    }
    /// The switch's end.
    pub(super) fn end(&self) -> io::Result<EventFd> {
        copy(&self.write)
    }
    /// Forgets what was heard so far.
    pub(super) fn still(&self) {
        let (mut events, now) = ([MaybeUninit::uninit(); 2], Timespec { tv_sec: 0, tv_nsec: 0 });
        let Ok((ready, _)) = epoll::wait(&self.either, &mut events, Some(&now)) else { return };
        for event in ready {
            let fd = if event.data.u64() == SWITCH { &self.read } else { &self.own };
            if let Err(e) = read(fd, &mut [0; PIPE]) {
                tracing::debug!("hearing a bell: {e}");
            }
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.either.as_fd()
    }
}
