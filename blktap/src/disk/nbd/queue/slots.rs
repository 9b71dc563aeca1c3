//! Requests that are not answered.

use zerocopy::FromZeros;

use crate::disk::{IoBuf, MAX_SEGMENTS, Op, Request};
use crate::export::nbd::proto::RequestHeader;

/// What a request is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// What it is for.
    Main,
    /// A flush, for servers that have no FUA.
    Flush,
}

/// A request. One that is longer than the server takes goes piece by piece.
pub struct Slot {
    pub used: bool,
    pub op: Op,
    pub offset: u64,
    pub len: u64,
    pub token: u64,
    pub bufs: Vec<IoBuf>,
    pub step: Step,
    /// Bytes of earlier pieces.
    pub at: u64,
    /// Bytes of the present one.
    pub piece: u64,
    /// Those of them that were received.
    pub got: u64,
    /// Whether the present piece was wholly sent: before that no reply can be honest.
    pub sent: bool,
    /// The present piece's first error.
    pub errno: i32,
    pub head: RequestHeader,
    /// The order of requests.
    pub serial: u32,
    /// Changes that were answered before it came.
    pub changes: u64,
}

/// A fixed number of them.
pub struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
    serial: u32,
}

impl Slots {
    pub fn new(depth: u32) -> Slots {
        let slot = |_| Slot {
            used: false,
            op: Op::Flush,
            offset: 0,
            len: 0,
            token: 0,
            bufs: Vec::new(),
            step: Step::Main,
            at: 0,
            piece: 0,
            got: 0,
            sent: false,
            errno: 0,
            head: RequestHeader::new_zeroed(),
            serial: 0,
            changes: 0,
        };
        Slots { slots: (0..depth).map(slot).collect(), free: (0..depth).rev().collect(), serial: 0 }
    }

    pub fn depth(&self) -> usize {
        self.slots.len()
    }
    pub fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a request in.
    pub fn take(&mut self, r: &Request<'_>, changes: u64) -> Option<u32> {
        let number = self.free.pop()?;
        self.serial = self.serial.wrapping_add(1);
        let slot = self.slots.get_mut(number as usize)?;
        slot.bufs.clear();
        slot.bufs.extend(r.bufs.iter().take(MAX_SEGMENTS).filter(|b| !b.is_empty()));
        (slot.used, slot.op, slot.token, slot.changes) = (true, r.op, r.token, changes);
        // A flush has no range, whatever it says.
        let range = if r.op == Op::Flush { (0, 0) } else { (r.offset, r.len) };
        ((slot.offset, slot.len), slot.at) = (range, 0);
        (slot.step, slot.serial) = (Step::Main, self.serial);
        Some(number)
    }

    pub fn give_back(&mut self, number: u32) {
        self.get_mut(number).used = false;
        self.free.push(number);
    }

    /// The one that a reply's cookie means.
    pub fn find(&self, cookie: u64) -> Option<u32> {
        let number = cookie as u32;
        let slot = self.slots.get(number as usize)?;
        (slot.used && slot.head.cookie.get() == cookie).then_some(number)
    }

    /// All in use, in the order in which they came.
    pub fn in_order(&self) -> Vec<u32> {
        let used = self.slots.iter().zip(0u32..).filter(|(slot, _)| slot.used);
        let mut all: Vec<(u32, u32)> =
            used.map(|(slot, number)| (self.serial.wrapping_sub(slot.serial), number)).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        all.into_iter().map(|(_, number)| number).collect()
    }

    pub fn get(&self, number: u32) -> &Slot {
        &self.slots[number as usize]
    }
    pub fn get_mut(&mut self, number: u32) -> &mut Slot {
        &mut self.slots[number as usize]
    }
}
