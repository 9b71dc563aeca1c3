//! Split virtqueues (VIRTIO 1.2, 2.7): a descriptor table, a ring of what is available and one
//! of what was used.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::chain::{DESC, INDIRECT, NEXT, Raw, table};
use super::inflight::SplitRecord;
use super::{Broken, Chain, Events, Layout, MAX_SIZE, Notify, Pending, Ring, passed};
use crate::export::vhost_user::memory::{Memory, Place};

/// Both rings: flags, index, entries (2.7.6, 2.7.8).
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;
/// Bytes of an entry of the used ring: id, len.
const USED: usize = 8;

/// See the module.
#[derive(Debug)]
pub struct Split {
    layout: Layout,
    /// How far was taken, and how far it is known that there is more.
    taken: u16,
    available: u16,
    /// How far was put, and shown.
    put: u16,
    published: u16,
    /// Heads that are in flight.
    held: Vec<bool>,
    record: Option<SplitRecord>,
    /// What a predecessor had in flight.
    again: VecDeque<u16>,
}

impl Split {
    /// Bytes of the three parts.
    pub fn bytes(size: u16) -> (usize, usize, usize) {
        let size = usize::from(size);
        (size * DESC, ENTRIES + 2 * size + 2, ENTRIES + USED * size + 2)
    }

    /// Goes on at `base`, or where the in-flight record says.
    pub fn new(mut layout: Layout, base: u32) -> Result<Split, Broken> {
        let size = layout.size;
        debug_assert!(size.is_power_of_two() && size <= MAX_SIZE);
        let used = u16::from_le(layout.device.place().u16(INDEX).load(Ordering::Acquire));
        let mut taken = base as u16;
        let (mut record, mut again) = (None, VecDeque::new());
        if let Some(area) = layout.inflight.take() {
            let (attached, heads) = SplitRecord::attach(area, size, used)?;
            if let Some(heads) = heads {
                taken = used.wrapping_add(heads.len() as u16);
                again = heads.into();
            }
            record = Some(attached);
        }
        let held = vec![false; usize::from(size)];
        let (available, put, published) = (taken, used, used);
        Ok(Split { layout, taken, available, put, published, held, record, again })
    }

    fn mask(&self, index: u16) -> usize {
        usize::from(index & (self.layout.size - 1))
    }

    fn driver_index(&self) -> u16 {
        u16::from_le(self.layout.driver.place().u16(INDEX).load(Ordering::Acquire))
    }

    /// The head of the next chain.
    #[inline]
    fn next_head(&mut self) -> Result<Option<u16>, Broken> {
        if let Some(head) = self.again.pop_front() {
            return Ok(Some(head));
        }
        if self.taken == self.available {
            self.available = self.driver_index();
            let ahead = self.available.wrapping_sub(self.taken);
            if ahead > self.layout.size {
                return Err(Broken::Index(ahead, self.layout.size));
            }
            if ahead == 0 {
                return Ok(None);
            }
        }
        let entry = ENTRIES + 2 * self.mask(self.taken);
        let head = u16::from_le(self.layout.driver.place().u16(entry).load(Ordering::Relaxed));
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(head))
    }

    /// 2.7.5: follows a chain through the table, and through the indirect one at its end.
    fn walk(&self, memory: &Memory, head: u16, chain: &mut Chain) -> Result<(), Broken> {
        let size = self.layout.size;
        let raw = follow(self.layout.desc.place(), size, head, chain)?;
        let Some(raw) = raw else { return Ok(()) };
        if raw.words[0] & NEXT != 0 {
            return Err(Broken::Indirect("its descriptor has a next one"));
        }
        let (place, count) = table(memory, raw.addr, raw.len)?;
        match follow(place, count, 0, chain)? {
            Some(_) => Err(Broken::Indirect("it names another one")),
            None => Ok(()),
        }
    }

    /// Whether going from what was published to `put` passes what the driver waits for.
    fn wants(&self, put: u16) -> bool {
        let place = self.layout.driver.place();
        match self.layout.events {
            Events::Index => {
                let at = ENTRIES + 2 * usize::from(self.layout.size);
                let event = u16::from_le(place.u16(at).load(Ordering::Relaxed));
                passed(event, put, self.published)
            }
            Events::Flags => {
                let flags = u16::from_le(place.u16(FLAGS).load(Ordering::Relaxed));
                put != self.published && flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
            }
        }
    }
}

/// Follows the descriptors of one table; the one that names another table ends it.
#[inline]
fn follow(
    place: Place<'_>,
    size: u16,
    head: u16,
    chain: &mut Chain,
) -> Result<Option<Raw>, Broken> {
    let mut at = head;
    // No more than the table has: otherwise they form a circle.
    for _ in 0..size {
        if at >= size {
            return Err(Broken::Next(at, size));
        }
        let raw = Raw::at(place, usize::from(at));
        let [flags, next] = raw.words;
        if flags & INDIRECT != 0 {
            return Ok(Some(raw));
        }
        chain.push(raw.addr, raw.len, flags)?;
        if flags & NEXT == 0 {
            return Ok(None);
        }
        at = next;
    }
    Err(Broken::Long(usize::from(size)))
}

impl Ring for Split {
    #[inline]
    fn prefetch(&self, most: u16) {
        let (driver, table) = (self.layout.driver.place(), self.layout.desc.place());
        let ahead = self.driver_index().wrapping_sub(self.taken).min(most);
        for at in 0..ahead {
            let entry = ENTRIES + 2 * self.mask(self.taken.wrapping_add(at));
            let head = u16::from_le(driver.u16(entry).load(Ordering::Relaxed));
            table.prefetch(usize::from(head) * DESC);
        }
    }

    #[inline]
    fn take(&mut self, memory: &Memory, chain: &mut Chain) -> Result<Option<u16>, Broken> {
        let Some(head) = self.next_head()? else { return Ok(None) };
        match self.held.get_mut(usize::from(head)) {
            None => return Err(Broken::Head(head, self.layout.size)),
            Some(true) => return Err(Broken::Taken(head)),
            Some(held) => *held = true,
        }
        if let Some(record) = &mut self.record {
            record.take(head);
        }
        chain.clear();
        self.walk(memory, head, chain)?;
        Ok(Some(head))
    }

    #[inline]
    fn put(&mut self, id: u16, written: u32) {
        self.held[usize::from(id)] = false;
        if let Some(record) = &mut self.record {
            record.put(id);
        }
        let at = ENTRIES + USED * self.mask(self.put);
        let place = self.layout.device.place();
        place.u32(at).store(u32::from(id).to_le(), Ordering::Relaxed);
        place.u32(at + 4).store(written.to_le(), Ordering::Relaxed);
        self.put = self.put.wrapping_add(1);
    }

    #[inline]
    fn publish(&mut self) -> Notify {
        let put = self.put;
        if put == self.published {
            return Notify::Skip;
        }
        self.layout.device.place().u16(INDEX).store(put.to_le(), Ordering::Release);
        if let Some(record) = &mut self.record {
            record.publish(put);
        }
        // The index before what the driver says of events (2.7.10.2).
        fence(Ordering::SeqCst);
        let wants = self.wants(put);
        self.published = put;
        if wants { Notify::Send } else { Notify::Skip }
    }

    fn is_awaited(&self) -> bool {
        self.wants(self.put)
    }

    #[inline]
    fn peek(&self) -> Pending {
        let nothing = self.again.is_empty()
            && self.taken == self.available
            && self.driver_index() == self.taken;
        if nothing { Pending::Nothing } else { Pending::Work }
    }

    fn arm(&mut self) -> Pending {
        let place = self.layout.device.place();
        match self.layout.events {
            Events::Index => {
                let at = ENTRIES + USED * usize::from(self.layout.size);
                place.u16(at).store(self.taken.to_le(), Ordering::Relaxed);
            }
            Events::Flags => place.u16(FLAGS).store(0, Ordering::Relaxed),
        }
        fence(Ordering::SeqCst);
        self.peek()
    }

    fn disarm(&mut self) {
        // With indexes the one that was asked for is passed, and the next comes after 65536.
        if self.layout.events == Events::Flags {
            let flags = VRING_USED_F_NO_NOTIFY as u16;
            self.layout.device.place().u16(FLAGS).store(flags.to_le(), Ordering::Relaxed);
        }
    }

    fn base(&self) -> u32 {
        u32::from(self.taken)
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
