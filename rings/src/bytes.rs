//! Byte rings: the shared pages of xenstore (`xenstore_domain_interface` in io/xs_wire.h) and of
//! the console (`xencons_interface` in io/console.h).
//!
//! Two lanes, each with a consumer and a producer index and no event index: the caller notifies
//! the other side after every read or write that moved something.

use core::fmt;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::mem::{Region, SharedMem};
use crate::protocol::{Corrupt, SizeError};

/// Offset of `server_features` in the xenstore page.
pub const XENSTORE_SERVER_FEATURES: usize = 2064;
/// Offset of `connection` in the xenstore page.
pub const XENSTORE_CONNECTION: usize = 2068;
/// Offset of `error` in the xenstore page.
pub const XENSTORE_ERROR: usize = 2072;

/// Which shared page it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// `xenstore_domain_interface`: 1024 bytes of requests, 1024 of replies.
    Xenstore,
    /// `xencons_interface`: 1024 bytes of input, 2048 of output.
    Console,
}

/// Which end of it this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest: writes requests or output.
    Front,
    /// The server: reads them.
    Back,
}

/// One lane's place in the page: buffer, its size (a power of two), and its two indices.
#[derive(Clone, Copy)]
struct Lane {
    buffer: usize,
    size: u32,
    consumer: (usize, &'static str),
    producer: (usize, &'static str),
}

impl Interface {
    fn name(self) -> &'static str {
        match self {
            Interface::Xenstore => "xenstore",
            Interface::Console => "console",
        }
    }
    /// The lanes from the guest and to it.
    fn lanes(self) -> (Lane, Lane) {
        let lane = |buffer, size, consumer, producer| Lane { buffer, size, consumer, producer };
        match self {
            Interface::Xenstore => (
                lane(0, 1024, (2048, "req_cons"), (2052, "req_prod")),
                lane(1024, 1024, (2056, "rsp_cons"), (2060, "rsp_prod")),
            ),
            Interface::Console => (
                lane(1024, 2048, (3080, "out_cons"), (3084, "out_prod")),
                lane(0, 1024, (3072, "in_cons"), (3076, "in_prod")),
            ),
        }
    }
}

/// One end of a byte ring. It trusts the page for the other side's indices only.
pub struct ByteRing<M> {
    region: Region<M>,
    name: &'static str,
    input: Lane,
    output: Lane,
    consumed: u32,
    produced: u32,
}

impl<M: SharedMem> ByteRing<M> {
    /// Takes one end of the page as it is; a fresh page is all zeroes.
    pub fn attach(memory: M, interface: Interface, end: End) -> Result<Self, ByteRingError> {
        let name = interface.name();
        if memory.len() < crate::PAGE_SIZE {
            return Err(SizeError { ring: name, bytes: memory.len() }.into());
        }
        let region = Region::new(memory);
        let (from_guest, to_guest) = interface.lanes();
        let (input, output) = match end {
            End::Front => (to_guest, from_guest),
            End::Back => (from_guest, to_guest),
        };
        let consumed = region.word(input.consumer.0).load(Relaxed);
        let produced = region.word(output.producer.0).load(Relaxed);
        let ring = ByteRing { region, name, input, output, consumed, produced };
        ring.readable()?;
        ring.writable()?;
        Ok(ring)
    }

    /// A word of the page, such as [`XENSTORE_CONNECTION`].
    pub fn word(&self, offset: usize) -> &core::sync::atomic::AtomicU32 {
        self.region.word(offset)
    }

    /// Bytes that can be read now.
    pub fn readable(&self) -> Result<usize, Corrupt> {
        let producer = self.region.word(self.input.producer.0).load(Acquire);
        let there = producer.wrapping_sub(self.consumed);
        if there > self.input.size {
            let (least, room) = (self.consumed, self.input.size);
            return Err(self.corrupt(self.input.producer.1, producer, least, room));
        }
        Ok(there as usize)
    }

    /// Bytes that can be written now.
    pub fn writable(&self) -> Result<usize, Corrupt> {
        let consumer = self.region.word(self.output.consumer.0).load(Acquire);
        let (size, used) = (self.output.size, self.produced.wrapping_sub(consumer));
        if used > size {
            let least = self.produced.wrapping_sub(size);
            return Err(self.corrupt(self.output.consumer.1, consumer, least, size));
        }
        Ok((size - used) as usize)
    }

    fn corrupt(&self, index: &'static str, found: u32, least: u32, room: u32) -> Corrupt {
        Corrupt { ring: self.name, index, found, least, room }
    }

    /// Reads up to `into.len()` bytes; how many there were. Notify the other side if not 0.
    pub fn read(&mut self, into: &mut [u8]) -> Result<usize, Corrupt> {
        let n = self.readable()?.min(into.len());
        let (first, at) = split(self.input, self.consumed, n);
        let (head, tail) = into[..n].split_at_mut(first);
        self.region.owner().read(at, head);
        self.region.owner().read(self.input.buffer, tail);
        self.consumed = self.consumed.wrapping_add(n as u32);
        self.region.word(self.input.consumer.0).store(self.consumed, Release);
        Ok(n)
    }

    /// Writes as much of `from` as there is room for; how many bytes that were. Notify the other
    /// side if not 0.
    pub fn write(&mut self, from: &[u8]) -> Result<usize, Corrupt> {
        let n = self.writable()?.min(from.len());
        let (first, at) = split(self.output, self.produced, n);
        let (head, tail) = from[..n].split_at(first);
        self.region.owner().write(at, head);
        self.region.owner().write(self.output.buffer, tail);
        self.produced = self.produced.wrapping_add(n as u32);
        self.region.word(self.output.producer.0).store(self.produced, Release);
        Ok(n)
    }
}

/// How many of `n` bytes lie before the end of the lane's buffer, and where they start.
fn split(lane: Lane, index: u32, n: usize) -> (usize, usize) {
    let masked = (index & (lane.size - 1)) as usize;
    (n.min(lane.size as usize - masked), lane.buffer + masked)
}

/// Why a byte ring cannot be attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ByteRingError {
    /// The memory is less than a page.
    Size(SizeError),
    /// The indices are impossible.
    Corrupt(Corrupt),
}

impl fmt::Display for ByteRingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ByteRingError::Size(e) => e.fmt(f),
            ByteRingError::Corrupt(e) => e.fmt(f),
        }
    }
}
impl core::error::Error for ByteRingError {}
impl From<SizeError> for ByteRingError {
    fn from(e: SizeError) -> Self {
        ByteRingError::Size(e)
    }
}
impl From<Corrupt> for ByteRingError {
    fn from(e: Corrupt) -> Self {
        ByteRingError::Corrupt(e)
    }
}

#[cfg(test)]
#[path = "bytes_tests.rs"]
mod tests;
