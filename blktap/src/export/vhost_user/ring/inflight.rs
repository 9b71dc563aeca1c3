//! What is in flight, kept in memory that outlives this process: the front-end has its file and
//! gives it to the successor (vhost-user, "Inflight I/O tracking", which has the layouts and the
//! order of the steps).
//!
//! The region is written only; what was in it is read once, when a ring starts, and judged.

use std::sync::atomic::{AtomicU16, Ordering};

use super::Broken;
use super::chain::Raw;
use super::packed::{Position, available, is_available};
use crate::export::vhost_user::memory::{Place, Window};

const VERSION: usize = 8;
const DESC_NUM: usize = 10;
/// The only version there is.
const CURRENT: u16 = 1;

/// Bytes that each queue of `size` entries gets, whichever its kind.
pub fn stride(size: u16) -> u64 {
    (packed::HEAD + packed::ENTRY * usize::from(size)).next_multiple_of(64) as u64
}

/// The part of the region that one queue has.
#[derive(Debug)]
pub struct Area(pub Window);

impl Area {
    fn judge(&self, size: u16) -> Result<bool, Broken> {
        if !self.0.is_aligned(8) || (self.0.len() as u64) < stride(size) {
            return Err(Broken::Inflight("it is too small, or not aligned"));
        }
        let place = self.0.place();
        match place.u16(VERSION).load(Ordering::Acquire) {
            0 => Ok(false),
            CURRENT if place.u16(DESC_NUM).load(Ordering::Relaxed) == size => Ok(true),
            CURRENT => Err(Broken::Inflight("it is for a queue of another size")),
            _ => Err(Broken::Inflight("its version is unknown")),
        }
    }
    fn place(&self) -> Place<'_> {
        self.0.place()
    }
    fn zero(&self) {
        let zero = [0; 64];
        for at in (0..self.0.len()).step_by(64) {
            let rest = (self.0.len() - at).min(64);
            self.place().write(at, &zero[..rest]);
        }
    }
    fn make(&self, size: u16) {
        self.place().u16(DESC_NUM).store(size, Ordering::Relaxed);
        self.place().u16(VERSION).store(CURRENT, Ordering::Release);
    }
}

/// QueueRegionSplit and DescStateSplit.
mod split {
    pub const LAST_BATCH_HEAD: usize = 12;
    pub const USED_IDX: usize = 14;
    pub const HEAD: usize = 16;
    pub const ENTRY: usize = 16;
    pub const INFLIGHT: usize = 0;
    pub const NEXT: usize = 6;
    pub const COUNTER: usize = 8;
}

/// The record of a split ring.
#[derive(Debug)]
pub struct SplitRecord {
    area: Area,
    counter: u64,
    last: u16,
    /// Those that were put since the last publication.
    batch: Vec<u16>,
}

fn split_entry(id: u16) -> usize {
    split::HEAD + split::ENTRY * usize::from(id)
}

impl SplitRecord {
    /// Takes the region up. `None`: it is new. Otherwise the heads in flight, in order.
    pub fn attach(
        area: Area,
        size: u16,
        used: u16,
    ) -> Result<(SplitRecord, Option<Vec<u16>>), Broken> {
        let found = if area.judge(size)? { Some(Self::read(&area, size, used)?) } else { None };
        if found.is_none() {
            area.zero();
            area.place().u16(split::USED_IDX).store(used, Ordering::Relaxed);
            area.make(size);
        }
        let (heads, counter) = match found {
            Some((heads, counter)) => (Some(heads), counter),
            None => (None, 0),
        };
        let batch = Vec::with_capacity(usize::from(size));
        Ok((SplitRecord { area, counter, last: 0, batch }, heads))
    }

    /// "When reconnecting".
    fn read(area: &Area, size: u16, used: u16) -> Result<(Vec<u16>, u64), Broken> {
        let place = area.place();
        let word = |at: usize| place.u16(at).load(Ordering::Relaxed);
        let batch = used.wrapping_sub(word(split::USED_IDX));
        if batch != 0 {
            // Published, and not yet cleared here. A ring that was made anew since has no batch.
            let mut head = word(split::LAST_BATCH_HEAD);
            for _ in 0..batch.min(size) {
                if head >= size {
                    return Err(Broken::Inflight("its last batch names no descriptor"));
                }
                place.u8(split_entry(head) + split::INFLIGHT).store(0, Ordering::Relaxed);
                head = word(split_entry(head) + split::NEXT);
            }
            place.u16(split::USED_IDX).store(used, Ordering::Release);
        }
        let counter = |id: u16| place.u64(split_entry(id) + split::COUNTER).load(Ordering::Relaxed);
        let held = |id: &u16| place.u8(split_entry(*id)).load(Ordering::Relaxed) != 0;
        let mut heads: Vec<(u64, u16)> =
            (0..size).filter(held).map(|id| (counter(id), id)).collect();
        heads.sort_unstable();
        let next = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok((heads.into_iter().map(|(_, id)| id).collect(), next))
    }

    /// "When receiving available buffers from the driver".
    #[inline]
    pub fn take(&mut self, head: u16) {
        let (place, at) = (self.area.place(), split_entry(head));
        place.u64(at + split::COUNTER).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        place.u8(at + split::INFLIGHT).store(1, Ordering::Release);
    }

    /// "When supplying used buffers to the driver", 1 to 3.
    #[inline]
    pub fn put(&mut self, head: u16) {
        let place = self.area.place();
        place.u16(split_entry(head) + split::NEXT).store(self.last, Ordering::Relaxed);
        place.u16(split::LAST_BATCH_HEAD).store(head, Ordering::Release);
        self.last = head;
        self.batch.push(head);
    }

    /// And its end, the used ring's index having been moved to `used`.
    #[inline]
    pub fn publish(&mut self, used: u16) {
        let place = self.area.place();
        for head in self.batch.drain(..) {
            place.u8(split_entry(head) + split::INFLIGHT).store(0, Ordering::Release);
        }
        place.u16(split::USED_IDX).store(used, Ordering::Release);
    }

    /// As new.
    pub fn settle(&mut self) {
        self.area.place().u16(VERSION).store(0, Ordering::Release);
    }
}

/// QueueRegionPacked and DescStatePacked.
mod packed {
    pub const FREE_HEAD: usize = 12;
    pub const OLD_FREE_HEAD: usize = 14;
    pub const USED_IDX: usize = 16;
    pub const OLD_USED_IDX: usize = 18;
    pub const USED_WRAP: usize = 20;
    pub const OLD_USED_WRAP: usize = 21;
    pub const HEAD: usize = 32;
    pub const ENTRY: usize = 32;
    pub const INFLIGHT: usize = 0;
    pub const NEXT: usize = 2;
    pub const LAST: usize = 4;
    pub const NUM: usize = 6;
    pub const COUNTER: usize = 8;
    pub const ID: usize = 16;
    pub const FLAGS: usize = 18;
    pub const LEN: usize = 20;
    pub const ADDR: usize = 24;
}

/// The record of a packed ring: entries in a free list, a chain of them for each buffer.
#[derive(Debug)]
pub struct PackedRecord {
    area: Area,
    counter: u64,
    used: Position,
    /// The list's links and its head, as they are in the region.
    next: Vec<u16>,
    free: u16,
    /// First and last entry of each buffer in flight, by its id.
    held: Vec<(u16, u16)>,
    /// Of those that were put since the last publication.
    batch: Vec<(u16, u16)>,
}

fn packed_entry(entry: u16) -> usize {
    packed::HEAD + packed::ENTRY * usize::from(entry)
}

/// Chains in flight, in order.
type Chains = Vec<Vec<Raw>>;

impl PackedRecord {
    /// Takes the region up; `flags` are those of a descriptor of the ring. `None`: it is new.
    pub fn attach<'a>(
        area: Area,
        size: u16,
        used: Position,
        flags: impl Fn(u16) -> &'a AtomicU16,
    ) -> Result<(PackedRecord, Option<Chains>), Broken> {
        let known = area.judge(size)?;
        let mut record = PackedRecord {
            area,
            counter: 0,
            used,
            next: (1..=size).collect(),
            free: 0,
            held: vec![(0, 0); usize::from(size)],
            batch: Vec::with_capacity(usize::from(size)),
        };
        if known {
            record.roll(size, flags)?;
            let chains = record.read(size)?;
            return Ok((record, Some(chains)));
        }
        record.area.zero();
        for entry in 0..size {
            // The last one's is no entry: the list's end.
            record.link(entry, entry + 1);
        }
        record.show(packed::USED_IDX, packed::USED_WRAP, used);
        record.settle_old();
        record.area.make(size);
        Ok((record, None))
    }

    /// Where the next used descriptor goes.
    pub fn used(&self) -> Position {
        self.used
    }

    fn word(&self, at: usize) -> u16 {
        self.area.place().u16(at).load(Ordering::Relaxed)
    }
    fn set(&self, at: usize, value: u16) {
        self.area.place().u16(at).store(value, Ordering::Release);
    }
    fn set_byte(&self, at: usize, value: u8) {
        self.area.place().u8(at).store(value, Ordering::Release);
    }
    fn link(&mut self, entry: u16, next: u16) {
        self.next[usize::from(entry)] = next;
        self.set(packed_entry(entry) + packed::NEXT, next);
    }
    fn position(&self, index: usize, wrap: usize) -> Position {
        let wrap = self.area.place().u8(wrap).load(Ordering::Relaxed) != 0;
        Position { index: self.word(index), wrap }
    }
    fn show(&self, index: usize, wrap: usize, position: Position) {
        self.set(index, position.index);
        self.set_byte(wrap, u8::from(position.wrap));
    }
    fn settle_old(&self) {
        self.set(packed::OLD_FREE_HEAD, self.free);
        self.show(packed::OLD_USED_IDX, packed::OLD_USED_WRAP, self.used);
    }

    /// Commits or takes back a publication that was cut short.
    fn roll<'a>(&mut self, size: u16, flags: impl Fn(u16) -> &'a AtomicU16) -> Result<(), Broken> {
        let old = self.position(packed::OLD_USED_IDX, packed::OLD_USED_WRAP);
        let new = self.position(packed::USED_IDX, packed::USED_WRAP);
        if old.index >= size || new.index >= size {
            return Err(Broken::Inflight("its place in the ring is none"));
        }
        let first = u16::from_le(flags(old.index).load(Ordering::Acquire));
        let published = new != old && !is_available(first, old.wrap);
        if !published {
            // Those behind the first may have been marked already: they would be taken for
            // used as soon as the first one is.
            let mut at = old;
            for _ in 0..size {
                if at == new {
                    break;
                }
                flags(at.index).store(available(at.wrap).to_le(), Ordering::Release);
                at = at.after(1, size);
            }
        }
        let free = if published { packed::FREE_HEAD } else { packed::OLD_FREE_HEAD };
        (self.used, self.free) = (if published { new } else { old }, self.word(free));
        self.set(packed::FREE_HEAD, self.free);
        self.show(packed::USED_IDX, packed::USED_WRAP, self.used);
        self.settle_old();
        Ok(())
    }

    /// What is in flight, after `roll`.
    fn read(&mut self, size: u16) -> Result<Chains, Broken> {
        for entry in 0..size {
            self.next[usize::from(entry)] = self.word(packed_entry(entry) + packed::NEXT);
        }
        let mut seen = vec![false; usize::from(size)];
        let mut at = self.free;
        while let Some(seen) = seen.get_mut(usize::from(at)) {
            if std::mem::replace(seen, true) {
                return Err(Broken::Inflight("its free list goes in a circle"));
            }
            self.set_byte(packed_entry(at) + packed::INFLIGHT, 0);
            at = self.next[usize::from(at)];
        }
        let mut heads = Vec::new();
        for entry in 0..size {
            let base = packed_entry(entry);
            if self.area.place().u8(base + packed::INFLIGHT).load(Ordering::Relaxed) != 0 {
                let counter = self.area.place().u64(base + packed::COUNTER);
                heads.push((counter.load(Ordering::Relaxed), entry));
            }
        }
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        heads.into_iter().map(|(_, head)| self.chain(head, &mut seen)).collect()
    }

    fn chain(&mut self, head: u16, seen: &mut [bool]) -> Result<Vec<Raw>, Broken> {
        let count = self.word(packed_entry(head) + packed::NUM);
        let mut raws = Vec::new();
        let (mut at, mut last) = (head, head);
        for _ in 0..count {
            match seen.get_mut(usize::from(at)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Broken::Inflight("a chain of it is broken")),
            }
            let (place, base) = (self.area.place(), packed_entry(at));
            raws.push(Raw {
                addr: place.u64(base + packed::ADDR).load(Ordering::Relaxed),
                len: place.u32(base + packed::LEN).load(Ordering::Relaxed),
                words: [self.word(base + packed::ID), self.word(base + packed::FLAGS)],
            });
            last = at;
            at = self.next[usize::from(at)];
        }
        let id = raws.last().map(|raw| usize::from(raw.words[0]));
        let held = id.and_then(|id| self.held.get_mut(id));
        *held.ok_or(Broken::Inflight("a chain of it has no buffer"))? = (head, last);
        Ok(raws)
    }

    /// "When receiving available buffers from the driver".
    pub fn take(&mut self, id: u16, raws: &[Raw]) {
        let head = self.free;
        let base = packed_entry(head);
        self.set(base + packed::NUM, 0);
        let place = self.area.place();
        place.u64(base + packed::COUNTER).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        let mut last = head;
        for raw in raws {
            last = self.free;
            let (place, base) = (self.area.place(), packed_entry(last));
            place.u64(base + packed::ADDR).store(raw.addr, Ordering::Relaxed);
            place.u32(base + packed::LEN).store(raw.len, Ordering::Relaxed);
            place.u16(base + packed::FLAGS).store(raw.words[1], Ordering::Relaxed);
            place.u16(base + packed::ID).store(raw.words[0], Ordering::Relaxed);
            self.free = self.next[usize::from(last)];
        }
        self.set(base + packed::LAST, last);
        self.set(base + packed::NUM, raws.len() as u16);
        self.set_byte(base + packed::INFLIGHT, 1);
        self.held[usize::from(id)] = (head, last);
        self.set(packed::FREE_HEAD, self.free);
        self.set(packed::OLD_FREE_HEAD, self.free);
    }

    /// "When supplying used buffers to the driver", 1 and 2. Its entries are free only with the
    /// publication: until then others may be taken, and must not get them.
    pub fn put(&mut self, id: u16) {
        self.batch.push(self.held[usize::from(id)]);
    }

    /// 3 to 6: what was put is free, and the ring will be at `used`; the driver cannot see that
    /// yet.
    pub fn announce(&mut self, used: Position) {
        for at in 0..self.batch.len() {
            let (head, last) = self.batch[at];
            self.link(last, self.free);
            self.free = head;
        }
        self.set(packed::FREE_HEAD, self.free);
        self.used = used;
        self.show(packed::USED_IDX, packed::USED_WRAP, used);
    }

    /// It can.
    pub fn publish(&mut self) {
        while let Some((head, _)) = self.batch.pop() {
            self.set_byte(packed_entry(head) + packed::INFLIGHT, 0);
        }
        self.settle_old();
    }

    /// As new.
    pub fn settle(&mut self) {
        self.set(VERSION, 0);
    }
}
