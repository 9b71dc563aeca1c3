//! Frames over a stream socket, each behind its length: what QEMU's `-netdev stream` and `-netdev
//! socket` speak, and with them passt and socket_vmnet. It is one stream, so the vif has one
//! queue, and checksums and segmentation are done before.
//!
//! A client connects again a second after its peer has gone; a server serves one peer after another.
//! While nobody is there, what the guest sends is dropped and counted. A peer that does not read holds
//! the guest's packets up, in the guest's ring.

mod input;
pub(super) mod peer;

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use self::input::Input;
pub use self::peer::{Address, Role};
use self::peer::{Dial, Peer};
use super::{Abilities, Accepts, Endpoint, EndpointQueue, Waits};
use crate::frame::{Frame, Pool};

/// The length before each frame, in big-endian order.
const LENGTH: usize = 4;
/// Frames of one call.
const BATCH: usize = 64;

/// One end of a stream.
pub struct Stream {
    dial: Arc<Dial>,
    mtu: u16,
}

impl Stream {
    /// A server listens from now on. The error names the address.
    pub fn open(role: Role, address: Address, mtu: u16) -> io::Result<Stream> {
        Ok(Stream { dial: Arc::new(Dial::new(role, address)?), mtu })
    }
}

impl Endpoint for Stream {
    fn abilities(&self) -> Abilities {
        Abilities { checksum: false, tso4: false, tso6: false, mtu: self.mtu }
    }
    fn most_queues(&self) -> u32 {
        1
    }
    fn connect(&self, _: usize, _: Accepts) -> io::Result<()> {
        Ok(())
    }
    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        if number > 0 {
            return Err(io::Error::new(io::ErrorKind::NotFound, "a stream has one queue"));
        }
        Ok(Box::new(StreamQueue {
            peer: Peer::new(self.dial.clone()),
            input: Input::default(),
            begun: 0,
            cut: false,
            full: false,
            dropped: 0,
            last: Instant::now(),
        }))
    }
    fn disconnect(&self) {}
}

struct StreamQueue {
    peer: Peer,
    input: Input,
    /// Bytes of the first frame that were sent, with its length, which then stands before it.
    begun: usize,
    /// The first frame was begun, and its peer has gone.
    cut: bool,
    /// The socket took no more.
    full: bool,
    dropped: u64,
    /// A time that has passed.
    last: Instant,
}

/// Puts its length before a frame; whether there was room.
fn put(frame: &mut Frame) -> bool {
    let len = frame.len() as u32;
    let room = frame.grow_front(LENGTH);
    if room {
        frame[..LENGTH].copy_from_slice(&len.to_be_bytes());
    }
    room
}

impl StreamQueue {
    fn refuse(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) {
        self.dropped += 1;
        frames.pop_front().into_iter().for_each(|frame| pool.give(frame));
    }

    fn lose(&mut self, why: &str) {
        self.peer.lose(why);
        self.input.clear();
        self.cut |= std::mem::take(&mut self.begun) > 0;
        self.full = false;
    }

    /// Sends a batch; whether more can be sent.
    fn send_some(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> Result<bool, Errno> {
        let headed = usize::from(self.begun > 0);
        let plain = frames.iter_mut().take(BATCH).skip(headed);
        let ready = headed + plain.map(put).take_while(|put| *put).count();
        if ready == 0 {
            self.refuse(frames, pool);
            return Ok(true);
        }
        let mut slices = [IoSlice::new(&[]); BATCH];
        for (slice, frame) in slices.iter_mut().zip(frames.range(..ready)) {
            *slice = IoSlice::new(frame);
        }
        slices[0].advance(self.begun);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = match self.peer.socket() {
            Some(fd) => sendmsg(fd, &slices[..ready], &mut SendAncillaryBuffer::default(), flags),
            None => Err(Errno::NOTCONN),
        };
        let mut bytes = self.begun + *sent.as_ref().unwrap_or(&0);
        let mut left = ready;
        while left > 0 && frames.front().is_some_and(|frame| frame.len() <= bytes) {
            let Some(frame) = frames.pop_front() else { break };
            bytes -= frame.len();
            left -= 1;
            pool.give(frame);
        }
        self.begun = bytes;
        let headed = usize::from(bytes > 0);
        frames.range_mut(headed..left).for_each(|frame| frame.trim_front(LENGTH));
        sent.map(|_| left == 0)
    }
}

impl EndpointQueue for StreamQueue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        if std::mem::take(&mut self.cut) {
            self.refuse(frames, pool);
        }
        self.full = false;
        self.peer.attend();
        while !frames.is_empty() && self.peer.socket().is_some() {
            match self.send_some(frames, pool) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.full = true;
                    return Ok(());
                }
                Err(e) => self.lose(&e.to_string()),
            }
        }
        // Nobody is there; what was begun is among these.
        self.cut = false;
        self.dropped += frames.len() as u64;
        frames.drain(..).for_each(|frame| pool.give(frame));
        Ok(())
    }

    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        self.peer.attend();
        let most = frames.len() + room;
        while let Some(socket) = self.peer.socket() {
            match self.input.take(frames, most, pool) {
                Ok(dropped) => self.dropped += dropped,
                Err(e) => {
                    self.lose(&e.to_string());
                    break;
                }
            }
            if frames.len() >= most || self.input.has_frame() {
                break;
            }
            match self.input.fill(socket) {
                Ok(0) => self.lose("it has closed"),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => self.lose(&e.to_string()),
            }
        }
        Ok(())
    }

    fn waits(&self) -> Waits<'_> {
        let ready = self.input.has_frame().then_some(self.last);
        Waits {
            readable: self.peer.readable(),
            writable: self.peer.socket().filter(|_| self.full),
            deadline: ready.or(self.peer.deadline()),
            ..Waits::default()
        }
    }

    fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
#[path = "stream/tests.rs"]
mod tests;
