//! Losing a server, and coming back to it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use rustix::pipe::{PipeFlags, pipe_with};

use super::super::shared::{Member, Shared};
use super::slots::Step;
use super::{Link, NbdQueue};
use crate::disk::Done;

/// Pauses between attempts: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A thread that connects until it succeeds or nobody wants it any more.
pub struct Reconnect {
    got: Receiver<Member>,
    /// Readable at the thread's end.
    end: OwnedFd,
}

impl Reconnect {
    pub fn start(shared: Arc<Shared>) -> io::Result<Reconnect> {
        let (send, got) = channel();
        let (end, held) = pipe_with(PipeFlags::CLOEXEC)?;
        let run = move || {
            let mut pause = PAUSES.0;
            // Its reader is gone when the queue is.
            let wanted = || !is_orphan(&held);
            while wanted() {
                match shared.connect() {
                    Ok(member) => {
                        // Nobody takes it: it is closed.
                        let _ = send.send(member);
                        break;
                    }
                    Err(e) => tracing::debug!("nbd: connecting again: {e}"),
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSES.1);
            }
            drop(send);
            drop(held);
        };
        std::thread::Builder::new().name("nbd-reconnect".into()).spawn(run)?;
        Ok(Reconnect { got, end })
    }
}

/// Whether a pipe's other end is closed.
fn is_orphan(pipe: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(pipe, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
}

impl AsFd for Reconnect {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

impl NbdQueue {
    /// The connection is of no use any more.
    pub(super) fn lose(&mut self, why: &io::Error) {
        tracing::warn!(
            "nbd: {:?}: {why}: connecting again, {} requests wait",
            self.shared.options.target.place,
            self.slots.used()
        );
        // The old connection is closed before a new one is made.
        self.link =
            Link::Lost { reconnect: None, end: Instant::now() + self.shared.options.patience };
        self.shared.lose();
        self.input.clear();
        self.out.clear();
        self.sent = 0;
        for number in self.slots.in_order() {
            self.prepare(number);
        }
        self.come_back();
    }

    /// Takes a new connection, if there is one, or sees to it that there will be.
    pub(super) fn come_back(&mut self) {
        let Link::Lost { reconnect, .. } = &mut self.link else { return };
        match reconnect.as_ref().map(|r| r.got.try_recv()) {
            Some(Ok(member)) => {
                tracing::info!("nbd: {:?}: connected again", self.shared.options.target.place);
                self.link = Link::Up(member);
            }
            Some(Err(TryRecvError::Empty)) => {}
            Some(Err(TryRecvError::Disconnected)) => *reconnect = None,
            None => match Reconnect::start(Arc::clone(&self.shared)) {
                Ok(started) => *reconnect = Some(started),
                // It is tried again.
                Err(e) => tracing::debug!("nbd: {e}"),
            },
        }
    }

    /// Answers what has waited for too long.
    pub(super) fn give_up(&mut self) {
        if !matches!(&self.link, Link::Lost { end, .. } if *end <= Instant::now()) {
            return;
        }
        self.out.clear();
        for number in self.slots.in_order() {
            let token = self.slots.get(number).token;
            self.slots.give_back(number);
            self.done.push(Done { token, errno: libc::EIO });
        }
    }

    /// A step is done.
    pub(super) fn finish_step(&mut self, number: u32) {
        let slot = self.slots.get_mut(number);
        let mut errno = slot.errno;
        slot.at += slot.piece;
        if errno == 0 && slot.step == Step::Main && slot.at < slot.len {
            return self.prepare(number);
        }
        if errno == 0 && slot.step == Step::Main && self.flushes_after(number) {
            self.slots.get_mut(number).step = Step::Flush;
            return self.prepare(number);
        }
        let slot = self.slots.get(number);
        let (token, changes) = (slot.token, slot.changes);
        match slot.op {
            crate::disk::Op::Flush if errno == 0 => errno = self.shared.note_flush(changes),
            crate::disk::Op::Read | crate::disk::Op::WriteFua | crate::disk::Op::Flush => {}
            _ => self.shared.note_change(),
        }
        self.slots.give_back(number);
        self.done.push(Done { token, errno });
    }
}
