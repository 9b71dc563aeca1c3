//! To the guest: frames to slots, slots to grant copies, copies to answers. Pure.

use hypervisor::{CopyOp, Direction};

use crate::frame::{Checksum, Gso, Offload};
use crate::hash::Hash;
use crate::proto::{
    Extra, ExtraInfo, RSP_ERROR, RX_CSUM_BLANK, RX_DATA_VALIDATED, RX_EXTRA_INFO, RX_MORE_DATA,
    RxRequest, RxResponse,
};

/// How a guest wants its packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Bytes left free at the beginning of each page (`xdp-headroom`).
    pub headroom: u16,
}

impl Shape {
    /// Bytes of a frame that a page takes.
    fn room(self) -> usize {
        rings::PAGE_SIZE.saturating_sub(usize::from(self.headroom)).max(1)
    }

    /// Slots that the bytes of a frame of `len` bytes take.
    pub fn data_slots(self, len: usize) -> usize {
        len.div_ceil(self.room()).max(1)
    }

    /// Slots that a frame of `len` bytes takes, with its extra information.
    pub fn slots(self, len: usize, gso: Option<Gso>, hash: Option<Hash>) -> usize {
        let extras = [gso.is_some(), self.headroom > 0, hash.is_some()];
        self.data_slots(len) + extras.into_iter().filter(|extra| *extra).count()
    }
}

/// An answer on its way: its status is not known before the copies are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Data(RxResponse),
    Extra(ExtraInfo),
}

/// Frames laid out over the guest's pages together.
#[derive(Debug, Default)]
pub struct Batch {
    answers: Vec<Answer>,
    /// Of each frame: how many answers and how many copies belong to it.
    frames: Vec<(usize, usize)>,
}

impl Batch {
    /// Lays a frame of `len` bytes at `at` in the local buffer over `pages`, which are exactly as
    /// many as [`Shape::slots`] says, and appends its copies. What is known of it is told behind its
    /// first slot.
    pub fn push(
        &mut self,
        shape: Shape,
        (at, len): (usize, usize),
        (offload, hash): (&Offload, Option<Hash>),
        pages: impl IntoIterator<Item = RxRequest>,
        ops: &mut Vec<CopyOp>,
    ) {
        let (mut at, mut left) = (at, len);
        let mut extras = [
            offload.gso.map(|gso| ExtraInfo::from(Extra::Gso(gso))),
            (shape.headroom > 0).then(|| ExtraInfo::from(Extra::Xdp { headroom: shape.headroom })),
            hash.map(|hash| ExtraInfo::from(Extra::from(hash))),
        ]
        .into_iter()
        .flatten()
        .peekable();
        let has_extras = extras.peek().is_some();
        let (first, copies) = (self.answers.len(), ops.len());
        for page in pages {
            // What the frame carries beside its bytes follows its first slot.
            if self.answers.len() > first
                && let Some(extra) = extras.next()
            {
                let more = extras.peek().is_some();
                self.answers.push(Answer::Extra(if more { extra.and_more() } else { extra }));
                continue;
            }
            let bytes = left.min(shape.room());
            left -= bytes;
            let mut flags = if left > 0 { RX_MORE_DATA } else { 0 };
            if self.answers.len() == first {
                flags |= checksum_flags(offload) | if has_extras { RX_EXTRA_INFO } else { 0 };
            }
            self.answers.push(Answer::Data(RxResponse {
                id: page.id,
                offset: shape.headroom,
                flags,
                status: bytes as i16,
            }));
            ops.push(CopyOp {
                gref: page.gref,
                offset: shape.headroom,
                len: bytes as u16,
                at,
                direction: Direction::ToGrant,
                status: 0,
            });
            at += bytes;
        }
        self.frames.push((self.answers.len() - first, ops.len() - copies));
    }

    /// Frames in the batch.
    pub fn frames(&self) -> usize {
        self.frames.len()
    }

    /// Gives the answers in ring order to `respond`, once the copies are made: `ops` are those that
    /// [`push`](Self::push) appended. A frame of which a page could not be written is an error in
    /// all its slots. Returns how many frames that are, and empties the batch.
    pub fn finish(&mut self, ops: &[CopyOp], mut respond: impl FnMut(RxResponse)) -> u64 {
        let (mut ops, mut failed) = (ops, 0);
        let mut answers = self.answers.drain(..);
        for (slots, copies) in self.frames.drain(..) {
            let (mine, rest) = ops.split_at(copies.min(ops.len()));
            ops = rest;
            let bad = mine.iter().any(|op| op.status != 0);
            failed += u64::from(bad);
            for answer in answers.by_ref().take(slots) {
                respond(match answer {
                    Answer::Data(response) if bad => RxResponse { status: RSP_ERROR, ..response },
                    Answer::Data(response) => response,
                    Answer::Extra(extra) => extra.into(),
                });
            }
        }
        failed
    }
}

fn checksum_flags(offload: &Offload) -> u16 {
    match offload.checksum {
        Checksum::Unknown => 0,
        Checksum::Valid => RX_DATA_VALIDATED,
        Checksum::Blank { .. } => RX_CSUM_BLANK | RX_DATA_VALIDATED,
    }
}

#[cfg(test)]
#[path = "rx_tests.rs"]
mod tests;
