//! Frames on their way from one queue's thread to another's, by copy: their memory belongs to
//! different pools. What waits is limited in number and in bytes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use crate::frame::{Frame, Offload, Pool};
use crate::hash::Hash;

/// What waits in a mailbox at most.
pub(crate) const FRAMES: usize = 256;
const BYTES: usize = 4 << 20;

struct Packet {
    bytes: Vec<u8>,
    offload: Offload,
    hash: Option<Hash>,
}

/// Frames for one queue.
pub(crate) struct Mailbox {
    packets: Mutex<Packets>,
    /// Readable while there are any.
    wake: OwnedFd,
}

#[derive(Default)]
struct Packets {
    waiting: VecDeque<Packet>,
    bytes: usize,
    /// Memory of packets that were taken.
    spare: Vec<Vec<u8>>,
}

impl Mailbox {
    pub(crate) fn new() -> io::Result<Mailbox> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox { packets: Mutex::default(), wake })
    }

    /// Readable while there are frames.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.packets.lock().waiting.is_empty()
    }

    /// Copies a frame into it; whether there was room.
    pub(crate) fn put(&self, frame: &Frame) -> bool {
        let mut packets = self.packets.lock();
        if packets.waiting.len() >= FRAMES || packets.bytes + frame.len() > BYTES {
            return false;
        }
        let mut bytes = packets.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(frame);
        packets.bytes += bytes.len();
        packets.waiting.push_back(Packet { bytes, offload: frame.offload, hash: frame.hash });
        if packets.waiting.len() == 1
            && let Err(e) = rustix::io::write(&self.wake, &1u64.to_ne_bytes())
        {
            tracing::debug!("waking a queue: {e}");
        }
        true
    }

    /// Copies what there is into frames, up to `room` of them.
    pub(crate) fn take(&self, frames: &mut VecDeque<Frame>, room: usize, pool: &mut Pool) {
        let mut packets = self.packets.lock();
        let before = packets.waiting.len();
        for _ in 0..room.min(before) {
            let Some(mut frame) = pool.take() else { break };
            let Some(packet) = packets.waiting.pop_front() else { break };
            frame.set_len(packet.bytes.len());
            frame.copy_from_slice(&packet.bytes);
            (frame.offload, frame.hash) = (packet.offload, packet.hash);
            packets.bytes -= packet.bytes.len();
            packets.spare.push(packet.bytes);
            frames.push_back(frame);
        }
        if before > 0 && packets.waiting.is_empty() {
            let mut count = [0; 8];
            if let Err(e) = rustix::io::read(&self.wake, &mut count) {
                tracing::debug!("a queue's wake-up: {e}");
            }
        }
    }
}
