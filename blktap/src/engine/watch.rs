//! Foreign descriptors that wake the engine: one-shot polls, armed again after each event, so
//! that an event which is still there is reported again.
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::squeue::Entry;
use io_uring::{opcode, types};

/// Most descriptors that one `wait` takes: one bit each in its answer.
pub const MAX_WATCHES: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Armed,
    Fired,
}

#[derive(Clone, Copy, Debug)]
struct Watch {
    fd: RawFd,
    generation: u32,
    state: State,
}

/// The descriptors of the last `wait`, by position.
pub(super) struct Watches {
    slots: Vec<Watch>,
    generation: u32,
}

impl Watches {
    pub(super) fn new() -> Self {
        Watches { slots: Vec::with_capacity(MAX_WATCHES), generation: 0 }
    }

    /// Makes the watched set equal to `fds` and arms what is not armed. `push` gets the polls,
    /// and the removals of polls that are no longer wanted; a poll's user data is
    /// `tag | generation << 8 | position`.
    pub(super) fn arm(
        &mut self,
        fds: &[BorrowedFd<'_>],
        tag: u64,
        ignore: u64,
        mut push: impl FnMut(Entry) -> bool,
    ) -> bool {
        let mut fits = true;
        while self.slots.len() > fds.len() {
            if let Some(old) = self.slots.pop() {
                fits &= remove(&old, self.slots.len(), tag, ignore, &mut push);
            }
        }
        for (at, fd) in fds.iter().enumerate() {
            let fd = fd.as_raw_fd();
            match self.slots.get(at).copied() {
                Some(old) if old.fd == fd => {}
                Some(old) => {
                    fits &= remove(&old, at, tag, ignore, &mut push);
                    self.slots[at] = self.fresh(fd);
                }
                None => {
                    let fresh = self.fresh(fd);
                    self.slots.push(fresh);
                }
            }
            let watch = &mut self.slots[at];
            if watch.state == State::Idle {
                let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build();
                let armed = push(poll.user_data(mark(watch, at, tag)));
                fits &= armed;
                watch.state = if armed { State::Armed } else { State::Idle };
            }
        }
        fits
    }

    fn fresh(&mut self, fd: RawFd) -> Watch {
        self.generation = self.generation.wrapping_add(1);
        Watch { fd, generation: self.generation, state: State::Idle }
    }

    /// A poll's completion, by its user data without the tag. One of an earlier generation is
    /// of a descriptor that is no longer watched.
    pub(super) fn fired(&mut self, mark: u64) {
        let (at, generation) = ((mark & 0xff) as usize, (mark >> 8) as u32);
        if let Some(watch) = self.slots.get_mut(at)
            && watch.generation == generation
        {
            watch.state = State::Fired;
        }
    }

    /// The descriptors with an event since the last call, a bit each.
    pub(super) fn take(&mut self) -> u64 {
        let mut bits = 0;
        for (at, watch) in self.slots.iter_mut().enumerate() {
            if watch.state == State::Fired {
                bits |= 1 << at;
                watch.state = State::Idle;
            }
        }
        bits
    }
}

fn mark(watch: &Watch, at: usize, tag: u64) -> u64 {
    tag | u64::from(watch.generation) << 8 | at as u64
}

fn remove(
    old: &Watch,
    at: usize,
    tag: u64,
    ignore: u64,
    push: &mut impl FnMut(Entry) -> bool,
) -> bool {
    old.state != State::Armed
        || push(opcode::PollRemove::new(mark(old, at, tag)).build().user_data(ignore))
}
