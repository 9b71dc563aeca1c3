//! Foreign descriptors that wake the engine: one-shot polls, armed again after each event, so
//! that an event which is still there is reported again.
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::squeue::Entry;
use io_uring::{opcode, types};

/// Most descriptors that one `wait` takes: one bit each in its answer.
pub const MAX_WATCHES: usize = 64;

/// Not in the present set.
const ABSENT: u8 = u8::MAX;

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
    /// Its bit in the present set.
    bit: u8,
}

/// The descriptors of this and earlier `wait`s, by number. One that is absent from the present
/// set stays armed, for sets alternate; its event is then not reported but looked for again.
pub(super) struct Watches {
    slots: Vec<Watch>,
    generation: u32,
    tag: u64,
    ignore: u64,
}

impl Watches {
    /// Polls carry the user data `tag | generation << 8 | slot`, their removals `ignore`.
    pub(super) fn new(tag: u64, ignore: u64) -> Self {
        Watches { slots: Vec::with_capacity(MAX_WATCHES), generation: 0, tag, ignore }
    }

    /// Makes `fds` the present set and arms what is not armed. `push` says whether there was
    /// room for an entry; so does the answer for all of them.
    pub(super) fn arm(
        &mut self,
        fds: &[BorrowedFd<'_>],
        mut push: impl FnMut(Entry) -> bool,
    ) -> bool {
        for watch in &mut self.slots {
            watch.bit = ABSENT;
        }
        let known = |slots: &[Watch], fd| slots.iter().any(|w| w.fd == fd);
        let fresh = fds.iter().filter(|fd| !known(&self.slots, fd.as_raw_fd())).count();
        let mut fits = true;
        if self.slots.len() + fresh > MAX_WATCHES {
            fits = self.forget(&mut push);
        }
        for (bit, fd) in fds.iter().enumerate() {
            let fd = fd.as_raw_fd();
            let at = self.slots.iter().position(|w| w.fd == fd).unwrap_or_else(|| {
                let generation = self.generation;
                self.slots.push(Watch { fd, generation, state: State::Idle, bit: ABSENT });
                self.slots.len() - 1
            });
            let watch = &mut self.slots[at];
            watch.bit = bit as u8;
            if watch.state == State::Idle {
                let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build();
                let mark = self.tag | u64::from(watch.generation) << 8 | at as u64;
                let armed = push(poll.user_data(mark));
                fits &= armed;
                watch.state = if armed { State::Armed } else { State::Idle };
            }
        }
        fits
    }

    /// Removes every watch.
    pub(super) fn forget(&mut self, mut push: impl FnMut(Entry) -> bool) -> bool {
        let mut fits = true;
        for (at, watch) in self.slots.drain(..).enumerate() {
            if watch.state == State::Armed {
                let mark = self.tag | u64::from(watch.generation) << 8 | at as u64;
                let removal = opcode::PollRemove::new(mark).build();
                fits &= push(removal.user_data(self.ignore));
            }
        }
        self.generation = self.generation.wrapping_add(1);
        fits
    }

    /// A poll's completion, by its user data. One of an earlier generation is of a descriptor
    /// that is no longer watched.
    pub(super) fn fired(&mut self, data: u64) {
        let mark = data & !self.tag;
        let (at, generation) = ((mark & 0xff) as usize, (mark >> 8) as u32);
        if let Some(watch) = self.slots.get_mut(at)
            && watch.generation == generation
        {
            watch.state = State::Fired;
        }
    }

    /// Whether a descriptor of the present set has an event that was not taken yet.
    pub(super) fn pending(&self) -> bool {
        self.slots.iter().any(|w| w.state == State::Fired && w.bit != ABSENT)
    }

    /// The descriptors of the present set with an event since the last call, a bit each.
    pub(super) fn take(&mut self) -> u64 {
        let mut bits = 0;
        for watch in &mut self.slots {
            if watch.state == State::Fired {
                watch.state = State::Idle;
                if watch.bit != ABSENT {
                    bits |= 1 << watch.bit;
                }
            }
        }
        bits
    }
}
