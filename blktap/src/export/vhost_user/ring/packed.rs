//! Packed virtqueues (VIRTIO 1.2, 2.8): one ring of descriptors, which both sides go round with
//! a wrap counter, and two words of event suppression.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::chain::{DESC, INDIRECT, NEXT, Raw, WRITE, table};
use super::inflight::PackedRecord;
use super::{Broken, Chain, Events, Layout, MAX_SIZE, Notify, Pending, Ring};
use crate::export::vhost_user::memory::Memory;

const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
/// Offsets in a descriptor.
const LEN: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;
/// Offsets in an event suppression structure (2.8.14).
const EVENT_AT: usize = 0;
const EVENT_FLAGS: usize = 2;

/// Flags that say "available" to one whose wrap counter this is, and nothing else.
pub(super) fn available(wrap: bool) -> u16 {
    if wrap { AVAIL } else { USED }
}

/// Whether flags say so (2.8.1).
pub(super) fn is_available(flags: u16, wrap: bool) -> bool {
    (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap
}

/// A place in the ring, with the wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub index: u16,
    pub wrap: bool,
}

impl Position {
    /// From 15 bits of index and one of wrap counter.
    pub fn from_bits(bits: u16) -> Position {
        Position { index: bits & 0x7fff, wrap: bits >> 15 != 0 }
    }
    fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }
    /// `by` entries, at most a whole round, later.
    pub fn after(self, by: u16, size: u16) -> Position {
        let index = self.index + by;
        match index < size {
            true => Position { index, ..self },
            false => Position { index: index - size, wrap: !self.wrap },
        }
    }
    /// Entries from here to another place, in two rounds.
    fn to(self, other: Position, size: u16) -> u32 {
        let size = u32::from(size);
        let at = |p: Position| u32::from(p.index) + if p.wrap { size } else { 0 };
        (at(other) + 2 * size - at(self)) % (2 * size)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Packed {
    layout: Layout,
    taken: Position,
    put: Position,
    published: Position,
    /// Index and flags of the descriptors that were put and not published.
    pending: Vec<(u16, u16)>,
    /// Entries that were put since they were published.
    unpublished: u16,
    /// Entries of the ring that each id in flight takes.
    held: Vec<u16>,
    /// The sum of those.
    holding: u16,
    record: Option<PackedRecord>,
    again: VecDeque<Vec<Raw>>,
    /// The descriptors of the chain that is being taken.
    raws: Vec<Raw>,
}

impl Packed {
    /// Bytes of the three parts.
    pub fn bytes(size: u16) -> (usize, usize, usize) {
        (usize::from(size) * DESC, 4, 4)
    }

    /// Goes on at `base` (place taken, place used), or where the in-flight record says.
    pub fn new(mut layout: Layout, base: u32) -> Result<Packed, Broken> {
        let size = layout.size;
        debug_assert!(size > 0 && size <= MAX_SIZE);
        let (mut taken, mut put) =
            (Position::from_bits(base as u16), Position::from_bits((base >> 16) as u16));
        let (mut record, mut again) = (None, VecDeque::new());
        if let Some(area) = layout.inflight.take() {
            let place = layout.desc.place();
            let flags = |at: u16| place.u16(usize::from(at) * DESC + FLAGS);
            let (attached, found) = PackedRecord::attach(area, size, put, flags)?;
            if let Some(chains) = found {
                put = attached.used();
                let entries: usize = chains.iter().map(Vec::len).sum();
                let entries = u16::try_from(entries).ok().filter(|n| *n <= size);
                taken = put.after(entries.ok_or(Broken::Overfull)?, size);
                again = chains.into();
            }
            record = Some(attached);
        }
        if taken.index >= size || put.index >= size {
            return Err(Broken::Head(taken.index.max(put.index), size));
        }
        Ok(Packed {
            taken,
            put,
            published: put,
            pending: Vec::with_capacity(usize::from(size)),
            unpublished: 0,
            held: vec![0; usize::from(size)],
            holding: 0,
            record,
            again,
            raws: Vec::with_capacity(usize::from(size)),
            layout,
        })
    }

    fn flags(&self, index: u16) -> u16 {
        let at = usize::from(index) * DESC + FLAGS;
        u16::from_le(self.layout.desc.place().u16(at).load(Ordering::Acquire))
    }

    /// Copies the descriptors of the next chain out of the ring.
    fn copy_out(&mut self) -> Result<bool, Broken> {
        self.raws.clear();
        if let Some(chain) = self.again.pop_front() {
            self.raws.extend(chain);
            return Ok(true);
        }
        if !is_available(self.flags(self.taken.index), self.taken.wrap) {
            return Ok(false);
        }
        let size = self.layout.size;
        let mut at = self.taken;
        loop {
            if self.raws.len() >= usize::from(size) {
                return Err(Broken::Long(usize::from(size)));
            }
            let raw = Raw::at(self.layout.desc.place(), usize::from(at.index));
            self.raws.push(raw);
            at = at.after(1, size);
            if raw.words[1] & NEXT == 0 {
                break;
            }
        }
        self.taken = at;
        Ok(true)
    }

    /// The memory that the copied descriptors name.
    fn resolve(&self, memory: &Memory, chain: &mut Chain) -> Result<(), Broken> {
        for raw in &self.raws {
            let flags = raw.words[1];
            if flags & INDIRECT == 0 {
                chain.push(raw.addr, raw.len, flags)?;
                continue;
            }
            if self.raws.len() > 1 {
                // 2.8.8.
                return Err(Broken::Indirect("its descriptor is not alone"));
            }
            let (place, count) = table(memory, raw.addr, raw.len)?;
            for at in 0..usize::from(count) {
                // 2.8.8: of the flags there is only WRITE.
                let raw = Raw::at(place, at);
                if raw.words[1] & INDIRECT != 0 {
                    return Err(Broken::Indirect("it names another one"));
                }
                chain.push(raw.addr, raw.len, raw.words[1])?;
            }
        }
        Ok(())
    }

    /// Whether `by` more entries pass what the driver waits for.
    fn wants(&self, by: u16) -> bool {
        let place = self.layout.driver.place();
        let flags = u32::from(u16::from_le(place.u16(EVENT_FLAGS).load(Ordering::Relaxed)));
        match flags & 3 {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.layout.events == Events::Index => {
                let bits = u16::from_le(place.u16(EVENT_AT).load(Ordering::Relaxed));
                let event = Position::from_bits(bits);
                self.published.to(event, self.layout.size) < u32::from(by)
            }
            _ => by > 0,
        }
    }
}

impl Ring for Packed {
    /// They follow each other, which the processor notices by itself.
    fn prefetch(&self, _: u16) {}

    fn take(&mut self, memory: &Memory, chain: &mut Chain) -> Result<Option<u16>, Broken> {
        let again = !self.again.is_empty();
        if !self.copy_out()? {
            return Ok(None);
        }
        let size = self.layout.size;
        // 2.8.5: the buffer's id is in its last descriptor.
        let id = self.raws.last().map_or(0, |raw| raw.words[0]);
        let entries = self.raws.len() as u16;
        match self.held.get_mut(usize::from(id)) {
            None => return Err(Broken::Head(id, size)),
            Some(held) if *held > 0 => return Err(Broken::Taken(id)),
            Some(held) => *held = entries,
        }
        self.holding += entries;
        // What was put and not published is not the driver's yet.
        if self.holding + self.unpublished > size {
            return Err(Broken::Overfull);
        }
        if let Some(record) = &mut self.record
            && !again
        {
            record.take(id, &self.raws);
        }
        chain.clear();
        self.resolve(memory, chain)?;
        Ok(Some(id))
    }

    fn put(&mut self, id: u16, written: u32) {
        let entries = std::mem::take(&mut self.held[usize::from(id)]);
        self.holding -= entries;
        let at = usize::from(self.put.index) * DESC;
        let place = self.layout.desc.place();
        place.u32(at + LEN).store(written.to_le(), Ordering::Relaxed);
        place.u16(at + ID).store(id.to_le(), Ordering::Relaxed);
        let wrap = if self.put.wrap { AVAIL | USED } else { 0 };
        let flags = wrap | if written > 0 { WRITE } else { 0 };
        self.pending.push((self.put.index, flags));
        self.put = self.put.after(entries, self.layout.size);
        self.unpublished += entries;
        if let Some(record) = &mut self.record {
            record.put(id);
        }
    }

    fn publish(&mut self) -> Notify {
        if self.pending.is_empty() {
            return Notify::Skip;
        }
        if let Some(record) = &mut self.record {
            record.announce(self.put);
        }
        // The driver goes through them in order: none is seen before the first, which is last.
        for (index, flags) in self.pending.drain(..).rev() {
            let at = usize::from(index) * DESC + FLAGS;
            self.layout.desc.place().u16(at).store(flags.to_le(), Ordering::Release);
        }
        if let Some(record) = &mut self.record {
            record.publish();
        }
        fence(Ordering::SeqCst);
        let wants = self.wants(self.unpublished);
        self.unpublished = 0;
        self.published = self.put;
        if wants { Notify::Send } else { Notify::Skip }
    }

    fn is_awaited(&self) -> bool {
        self.wants(self.unpublished)
    }

    fn peek(&self) -> Pending {
        let work =
            !self.again.is_empty() || is_available(self.flags(self.taken.index), self.taken.wrap);
        if work { Pending::Work } else { Pending::Nothing }
    }

    fn arm(&mut self) -> Pending {
        let flags = VRING_PACKED_EVENT_FLAG_ENABLE as u16;
        self.layout.device.place().u16(EVENT_FLAGS).store(flags.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.peek()
    }

    fn disarm(&mut self) {
        let flags = VRING_PACKED_EVENT_FLAG_DISABLE as u16;
        self.layout.device.place().u16(EVENT_FLAGS).store(flags.to_le(), Ordering::Relaxed);
    }

    fn base(&self) -> u32 {
        u32::from(self.taken.bits()) | u32::from(self.put.bits()) << 16
    }

    fn settle(&mut self) {
        // What was not even taken again is still known by the record alone.
        if let Some(record) = &mut self.record
            && self.again.is_empty()
        {
            record.settle();
        }
    }
}
