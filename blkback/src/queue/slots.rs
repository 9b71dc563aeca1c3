//! The requests that a queue has taken and not answered yet: one slot each, made once.

use rings::persistent::Pin;

use super::memory::Page;
use crate::proto::{self, DirectOp, Response, Segment};

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing.
    Free,
    /// Its segments are known; memory has not been found for them yet.
    Taken,
    /// A flush runs before its data may go.
    PreFlush,
    /// Its data, flush or discard is with the disk.
    Running,
}

/// What a request wants of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Read,
    Write,
    Flush,
    /// Everything before is on the disk before it, and it before everything after.
    Barrier,
    Discard,
    SecureDiscard,
}

/// One request.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub stage: Stage,
    pub work: Work,
    /// The answer so far.
    pub answer: Response,
    /// Bytes.
    pub offset: u64,
    pub len: u64,
    pub segments: u16,
    /// Its data go through memory of this process's own, whatever the queue's way is.
    pub copied: bool,
    /// When its batch was taken, in ns.
    pub taken_at: u64,
}

const FREE: Slot = Slot {
    stage: Stage::Free,
    work: Work::Read,
    answer: Response { id: 0, operation: 0, status: 0 },
    offset: 0,
    len: 0,
    segments: 0,
    copied: false,
    taken_at: 0,
};

impl Slot {
    /// A slot for a request of which nothing but its answer's head is known.
    pub(super) fn taken(answer: Response, taken_at: u64) -> Slot {
        Slot { stage: Stage::Taken, answer, taken_at, ..FREE }
    }
}

impl From<DirectOp> for Work {
    fn from(op: DirectOp) -> Work {
        match op {
            DirectOp::Read => Work::Read,
            DirectOp::Write => Work::Write,
            DirectOp::Flush => Work::Flush,
            DirectOp::Barrier => Work::Barrier,
        }
    }
}

impl From<proto::Indirect> for Work {
    fn from(op: proto::Indirect) -> Work {
        match op {
            proto::Indirect::Read => Work::Read,
            proto::Indirect::Write => Work::Write,
        }
    }
}

impl From<proto::Discard> for Work {
    fn from(kind: proto::Discard) -> Work {
        match kind {
            proto::Discard::Plain => Work::Discard,
            proto::Discard::Secure => Work::SecureDiscard,
        }
    }
}

/// Where one segment's bytes are while its request runs.
pub(super) struct Piece {
    pub segment: Segment,
    pub place: Place,
}

/// A place for a segment's bytes.
pub(super) enum Place {
    /// None yet.
    Nowhere,
    /// In the guest's own page, pinned in the persistent pool.
    Mapped(Pin),
    /// In the guest's own page, mapped for this request alone.
    Lent(Page),
    /// In a page of the copy buffer.
    Copied(u32),
}

impl Piece {
    /// Whether its bytes still need a place.
    pub(super) fn is_nowhere(&self) -> bool {
        matches!(self.place, Place::Nowhere)
    }
}

/// All slots of a queue with their segments.
pub(super) struct Slots {
    slots: Vec<Slot>,
    /// The ring's right to answer each of them.
    tokens: Vec<Option<rings::Slot>>,
    pieces: Vec<Piece>,
    per_slot: usize,
}

impl Slots {
    /// `count` slots of up to `per_slot` segments.
    pub(super) fn new(count: usize, per_slot: usize) -> Slots {
        let nowhere = || Piece { segment: Segment::default(), place: Place::Nowhere };
        Slots {
            slots: vec![FREE; count],
            tokens: (0..count).map(|_| None).collect(),
            pieces: std::iter::repeat_with(nowhere).take(count * per_slot).collect(),
            per_slot,
        }
    }

    pub(super) fn get(&self, slot: u32) -> &Slot {
        &self.slots[slot as usize]
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> &mut Slot {
        &mut self.slots[slot as usize]
    }

    /// Keeps a taken request's token; its index is the slot's number.
    pub(super) fn hold(&mut self, token: rings::Slot) -> u32 {
        let slot = token.index();
        self.tokens[slot] = Some(token);
        slot as u32
    }

    /// Frees a slot and gives its token, to answer with. What was known of its request stays
    /// readable until the slot is taken again.
    pub(super) fn free(&mut self, slot: u32) -> Option<rings::Slot> {
        self.slots[slot as usize].stage = Stage::Free;
        self.tokens[slot as usize].take()
    }

    /// Room for the segments of a slot.
    pub(super) fn room(&mut self, slot: u32) -> &mut [Piece] {
        let at = slot as usize * self.per_slot;
        &mut self.pieces[at..at + self.per_slot]
    }

    /// The segments of a slot.
    pub(super) fn pieces(&mut self, slot: u32) -> &mut [Piece] {
        let at = slot as usize * self.per_slot;
        let count = usize::from(self.slots[slot as usize].segments);
        &mut self.pieces[at..at + count]
    }
}
