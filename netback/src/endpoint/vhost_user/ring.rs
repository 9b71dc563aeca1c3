//! The driver's side of a split virtqueue (VIRTIO 1.2, 2.7) over fixed buffers: descriptor `n` is always
//! of buffer `n`, and chains have one descriptor.
//!
//! The device is not trusted. What it writes is an index and pairs of number and length; each is read
//! once and compared with what was lent. The driver's own part of the rings, which the device could
//! change too, is never read back. Pure, over any shared memory.

use std::sync::atomic::{Ordering, fence};

use rings::mem::SharedMem;
use rings::{Notify, Pending};
use thiserror::Error;
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

/// Buffers of a ring.
pub(super) const SIZE: u16 = 256;
/// Where a ring's parts lie: a page each, so that the device writes to one of its own.
pub(super) const DESC: usize = 0;
pub(super) const AVAIL: usize = 4096;
pub(super) const USED: usize = 8192;
/// Bytes of a ring.
pub(super) const BYTES: usize = 12_288;

/// `struct virtq_desc`: address, length, flags, next (2.7.5).
const DESC_BYTES: usize = 16;
/// Both rings: flags and index, 16 bits each, are one word; entries follow (2.7.6, 2.7.8).
const ENTRIES: usize = 4;
/// Of the ring of what is available: a number.
const AVAIL_BYTES: usize = 2;
/// Of the ring of what was used: number and length.
const USED_BYTES: usize = 8;
/// Behind the entries: up to where the driver wants no event, and the device (2.7.10). Aligned to 4,
/// with two bytes behind them that nobody uses.
const USED_EVENT: usize = AVAIL + ENTRIES + AVAIL_BYTES * SIZE as usize;
const AVAIL_EVENT: usize = USED + ENTRIES + USED_BYTES * SIZE as usize;
const _: () = assert!(SIZE.is_power_of_two() && DESC_BYTES * SIZE as usize <= AVAIL);
const _: () = assert!(USED_EVENT.is_multiple_of(4) && USED_EVENT + 4 <= USED);
const _: () = assert!(AVAIL_EVENT.is_multiple_of(4) && AVAIL_EVENT + 4 <= BYTES);

/// How each side says when it wants to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Events {
    /// By indexes (VIRTIO_F_EVENT_IDX).
    Index,
    /// By a flag.
    Flags,
}

/// Who writes to a ring's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    Driver,
    Device,
}

/// What the device says has no meaning.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum Broken {
    #[error("its index tells of {0} buffers more, and {1} are lent")]
    Index(u16, u16),
    #[error("it gives buffer {0} back; there are {SIZE}")]
    Number(u32),
    #[error("it gives buffer {0} back, which it does not have")]
    NotLent(u16),
    #[error("it says {1} bytes of buffer {0}, which has {2}")]
    Length(u16, u32, u32),
}

/// Where a ring and its buffers lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Of the ring: a multiple of a page, from the memory's begin.
    pub ring: usize,
    /// Of the first buffer, and how far the next one is.
    pub buffers: usize,
    pub stride: usize,
    /// What the device calls the memory's first byte.
    pub address: u64,
}

/// A buffer that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub number: u16,
    /// Bytes that the device says it has written; no more than were lent.
    pub len: usize,
}

/// The driver's side. Indexes count on over 65536.
#[derive(Debug)]
pub(super) struct Ring<M> {
    memory: M,
    place: Place,
    events: Events,
    writer: Writer,
    /// What was lent, and how far the device has been shown it.
    lent: u16,
    shown: u16,
    /// What was taken back, and how far it is known that there is more.
    taken: u16,
    used: u16,
    /// Bytes of each buffer that the device has; 0: it does not have it.
    lengths: Box<[u32]>,
    wanted: Wanted,
}

impl<M: SharedMem> Ring<M> {
    /// A new ring in memory of zeros, with nothing lent. The device tells of nothing until
    /// [`arm`](Self::arm), but of the first buffer where events go by indexes.
    pub(super) fn new(memory: M, place: Place, events: Events, writer: Writer) -> Ring<M> {
        let lengths = vec![0; usize::from(SIZE)].into();
        let (lent, shown, taken, used) = (0, 0, 0, 0);
        let wanted = Wanted::No;
        let ring =
            Ring { memory, place, events, writer, lent, shown, taken, used, lengths, wanted };
        ring.show(0, Ordering::Relaxed);
        ring
    }

    /// Flags and index of what is available.
    fn show(&self, index: u16, ordering: Ordering) {
        let silent = self.events == Events::Flags && self.wanted == Wanted::No;
        let flags = if silent { VRING_AVAIL_F_NO_INTERRUPT } else { 0 };
        let word = flags | u32::from(index) << 16;
        self.memory.word(self.place.ring + AVAIL).store(word.to_le(), ordering);
    }

    fn buffer(&self, number: u16) -> usize {
        self.place.buffers + usize::from(number) * self.place.stride
    }

    /// Copies the begin of a buffer out.
    pub(super) fn read(&self, number: u16, into: &mut [u8]) {
        self.memory.read(self.buffer(number), into);
    }

    /// Copies into a buffer that the device does not have.
    pub(super) fn write(&self, number: u16, from: &[u8]) {
        self.memory.write(self.buffer(number), from);
    }

    /// Lends a buffer with `len` bytes, above 0, to the device, which is shown it by
    /// [`publish`](Self::publish). The caller has taken it back before, or never lent it.
    pub(super) fn lend(&mut self, number: u16, len: u32) {
        debug_assert!(len > 0 && self.lengths[usize::from(number)] == 0);
        self.lengths[usize::from(number)] = len;
        let flags = if self.writer == Writer::Device { VRING_DESC_F_WRITE as u16 } else { 0 };
        let mut desc = [0; DESC_BYTES];
        let address = self.place.address + self.buffer(number) as u64;
        desc[..8].copy_from_slice(&address.to_le_bytes());
        desc[8..12].copy_from_slice(&len.to_le_bytes());
        desc[12..14].copy_from_slice(&flags.to_le_bytes());
        self.memory.write(self.place.ring + DESC + DESC_BYTES * usize::from(number), &desc);
        let entry = ENTRIES + AVAIL_BYTES * usize::from(self.lent % SIZE);
        self.memory.write(self.place.ring + AVAIL + entry, &number.to_le_bytes());
        self.lent = self.lent.wrapping_add(1);
    }

    /// Shows the device what was lent; whether it wants to be told.
    pub(super) fn publish(&mut self) -> Notify {
        let (new, old) = (self.lent, self.shown);
        if new == old {
            return Notify::Skip;
        }
        self.show(new, Ordering::Release);
        self.shown = new;
        // The index before what the device says of events (2.7.13.4.1).
        fence(Ordering::SeqCst);
        let at = if self.events == Events::Index { AVAIL_EVENT } else { USED };
        let word = u32::from_le(self.memory.word(self.place.ring + at).load(Ordering::Relaxed));
        let wanted = match self.events {
            Events::Index => passed(word as u16, new, old),
            Events::Flags => word & VRING_USED_F_NO_NOTIFY == 0,
        };
        if wanted { Notify::Send } else { Notify::Skip }
    }

    /// How far the device has used what it was lent.
    fn look(&self) -> u16 {
        let word = self.memory.word(self.place.ring + USED).load(Ordering::Acquire);
        (u32::from_le(word) >> 16) as u16
    }

    /// The next buffer that came back.
    pub(super) fn take(&mut self) -> Result<Option<Used>, Broken> {
        if self.taken == self.used {
            let used = self.look();
            let (ahead, lent) =
                (used.wrapping_sub(self.taken), self.shown.wrapping_sub(self.taken));
            if ahead > lent {
                return Err(Broken::Index(ahead, lent));
            }
            if ahead == 0 {
                return Ok(None);
            }
            self.used = used;
        }
        let mut entry = [0; USED_BYTES];
        let at = USED + ENTRIES + USED_BYTES * usize::from(self.taken % SIZE);
        self.memory.read(self.place.ring + at, &mut entry);
        let half = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| entry[at + n]));
        let (id, len) = (half(0), half(4));
        let number = u16::try_from(id).ok().filter(|number| *number < SIZE);
        let number = number.ok_or(Broken::Number(id))?;
        match std::mem::take(&mut self.lengths[usize::from(number)]) {
            0 => return Err(Broken::NotLent(number)),
            most if len > most => return Err(Broken::Length(number, len, most)),
            _ => {}
        }
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(Used { number, len: len as usize }))
    }

    /// Whether a buffer has come back.
    pub(super) fn peek(&self) -> Pending {
        let nothing = self.taken == self.used && self.look() == self.taken;
        if nothing { Pending::Nothing } else { Pending::Work }
    }

    /// Asks to be told of the next buffer that comes back; whether there is one already.
    pub(super) fn arm(&mut self) -> Pending {
        self.wanted = Wanted::Yes;
        match self.events {
            Events::Index => {
                let word = u32::from(self.taken).to_le();
                self.memory.word(self.place.ring + USED_EVENT).store(word, Ordering::Relaxed);
            }
            Events::Flags => self.show(self.shown, Ordering::Relaxed),
        }
        // What is wanted before the index (2.7.14.1).
        fence(Ordering::SeqCst);
        self.peek()
    }

    /// Asks not to be told. With indexes that is so once the one that was asked for has passed.
    pub(super) fn disarm(&mut self) {
        if std::mem::replace(&mut self.wanted, Wanted::No) == Wanted::Yes
            && self.events == Events::Flags
        {
            self.show(self.shown, Ordering::Relaxed);
        }
    }

    /// Buffers that the device has.
    pub(super) fn outside(&self) -> u16 {
        self.lent.wrapping_sub(self.taken)
    }
}

/// Whether the driver wants to be told of what was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Yes,
    No,
}

/// Whether going on from `old` to `new` passes `event` (2.7.10.1's `vring_need_event`).
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
