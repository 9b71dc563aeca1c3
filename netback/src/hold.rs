//! What a guest sends, held back until somebody says that it may go. A checkpoint needs that: what the
//! guest has said since the last one must not be heard before the next one is safe.
//!
//! Each queue holds its own packets. Where there is no more room nothing more is taken from the guest:
//! its ring is where packets wait.

use std::collections::VecDeque;

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use crate::frame::{Frame, Offload, Pool};
use crate::hash::Hash;

/// What one queue holds at most.
const PACKETS: usize = 4096;
const BYTES: usize = 16 << 20;

/// What becomes of packets from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// They go.
    #[default]
    Pass,
    /// They are held.
    Hold,
}

/// Packets that are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many.
    pub packets: usize,
    /// Their bytes.
    pub bytes: usize,
}

struct Packet {
    bytes: Vec<u8>,
    offload: Offload,
    hash: Option<Hash>,
}

/// One queue's packets; its lock is free but for the moments of a command.
pub(crate) struct Hold {
    held: Mutex<Held>,
}

pub(crate) struct Held {
    then: Then,
    /// Oldest first.
    waiting: VecDeque<Packet>,
    /// Of those, at the front, that may go.
    released: usize,
    bytes: usize,
    dropped: u64,
}

impl Hold {
    pub(crate) fn new(then: Then) -> Hold {
        let waiting = VecDeque::new();
        Hold { held: Mutex::new(Held { then, waiting, released: 0, bytes: 0, dropped: 0 }) }
    }

    /// As long as this is held nothing is sent and no command is carried out.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock()
    }
}

impl Held {
    /// From now on packets are held. What is released already goes.
    pub(crate) fn begin(&mut self) {
        self.then = Then::Hold;
    }

    /// What is held now may go, oldest first.
    pub(crate) fn release(&mut self, then: Then) -> Amount {
        let amount = self.amount();
        (self.released, self.then) = (self.waiting.len(), then);
        amount
    }

    /// What is held now goes nowhere.
    pub(crate) fn discard(&mut self, then: Then) -> Amount {
        let amount = self.amount();
        self.dropped += amount.packets as u64;
        self.bytes -= amount.bytes;
        self.waiting.truncate(self.released);
        self.then = then;
        amount
    }

    /// What nobody has released.
    pub(crate) fn amount(&self) -> Amount {
        let held = self.waiting.range(self.released..);
        Amount { packets: self.packets(), bytes: held.map(|packet| packet.bytes.len()).sum() }
    }

    /// How many those are.
    pub(crate) fn packets(&self) -> usize {
        self.waiting.len() - self.released
    }

    /// Whether frames pass as if this were not here.
    pub(crate) fn is_open(&self) -> bool {
        self.then == Then::Pass && self.waiting.is_empty() && self.dropped == 0
    }

    /// Packets that were dropped since the last call.
    pub(crate) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    /// Copies frames behind what is held, as far as there is room; how many.
    pub(crate) fn keep(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> usize {
        let before = self.waiting.len();
        while let Some(frame) = frames.pop_front() {
            if self.waiting.len() >= PACKETS || self.bytes + frame.len() > BYTES {
                frames.push_front(frame);
                break;
            }
            self.bytes += frame.len();
            let (offload, hash) = (frame.offload, frame.hash);
            self.waiting.push_back(Packet { bytes: frame.to_vec(), offload, hash });
            pool.give(frame);
        }
        if self.then == Then::Pass {
            // They only wait behind others.
            self.released = self.waiting.len();
        }
        self.waiting.len() - before
    }

    /// Makes frames of what may go, as long as `spare` of the pool's are left.
    pub(crate) fn take(&mut self, frames: &mut VecDeque<Frame>, spare: usize, pool: &mut Pool) {
        while self.released > 0 && pool.free() > spare {
            let (Some(packet), Some(mut frame)) = (self.waiting.pop_front(), pool.take()) else {
                break;
            };
            self.released -= 1;
            self.bytes -= packet.bytes.len();
            frame.set_len(packet.bytes.len());
            frame.copy_from_slice(&packet.bytes);
            (frame.offload, frame.hash) = (packet.offload, packet.hash);
            frames.push_back(frame);
        }
    }
}

#[cfg(test)]
#[path = "hold_tests.rs"]
mod tests;
