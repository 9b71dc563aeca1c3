//! What is left to do with a frame, brought to what its next holder can do. Pure.

use std::collections::VecDeque;

use crate::checksum::{Ip, Layers, complete};
use crate::endpoint::{Abilities, Accepts};
use crate::frame::{Checksum, Frame, Gso, GsoKind, Offload, Pool};
use crate::segment;
use crate::tx::Claim;

/// The longest TCP header (RFC 9293).
const TCP_HEADER_MOST: usize = 60;

/// What the holder behind can be left to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaves {
    checksum4: bool,
    checksum6: bool,
    tso4: bool,
    tso6: bool,
}

impl From<Abilities> for Leaves {
    fn from(a: Abilities) -> Leaves {
        Leaves {
            checksum4: a.checksum,
            checksum6: a.checksum,
            tso4: a.checksum && a.tso4,
            tso6: a.checksum && a.tso6,
        }
    }
}

impl From<Accepts> for Leaves {
    fn from(a: Accepts) -> Leaves {
        Leaves { checksum4: a.checksum4, checksum6: a.checksum6, tso4: a.tso4, tso6: a.tso6 }
    }
}

impl Leaves {
    fn checksum(&self, ip: Ip) -> bool {
        if ip == Ip::V4 { self.checksum4 } else { self.checksum6 }
    }
    fn gso(&self, kind: GsoKind) -> bool {
        if kind == GsoKind::TcpV4 { self.tso4 } else { self.tso6 }
    }
    /// Whether everything can be left.
    pub fn is_all(&self) -> bool {
        self.checksum4 && self.checksum6 && self.tso4 && self.tso6
    }
    /// Whether a frame can be left as it is.
    pub fn takes(&self, frame: &Frame) -> bool {
        match (frame.offload.gso, frame.offload.checksum) {
            (Some(gso), _) => self.gso(gso.kind),
            (None, Checksum::Blank { .. }) => self.checksum4 && self.checksum6,
            (None, Checksum::Unknown | Checksum::Valid) => true,
        }
    }
}

/// A checksum or a segmentation that cannot be done: the headers do not have what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Impossible;

/// What a frame from a guest leaves to do, from what the guest says of it and from its headers. A
/// blank checksum gets the pseudo-header's sum, whatever the guest has put there.
pub fn claimed(frame: &mut [u8], claim: Claim, gso: Option<Gso>) -> Result<Offload, Impossible> {
    if let Some(gso) = gso {
        let layers = segment::layers(frame, gso).ok_or(Impossible)?;
        // A packet of one segment is none to be cut. One with padding has a length that lies.
        let gso = (segment::count(&layers, gso) > 1).then_some(gso);
        return blank(frame, &layers, gso);
    }
    match claim {
        Claim::Nothing => Ok(Offload::default()),
        Claim::Validated => Ok(Offload { checksum: Checksum::Valid, gso: None }),
        Claim::Blank => {
            let layers = Layers::of(frame).ok_or(Impossible)?;
            blank(frame, &layers, None)
        }
    }
}

/// Whether [`claimed`] looks at and changes the first `head` bytes of a frame only.
pub fn is_told_by_head(frame: &[u8], head: usize, claim: Claim, gso: Option<Gso>) -> bool {
    if gso.is_none() && claim != Claim::Blank {
        return true;
    }
    // Padding needs all bytes to be summed. What leaves the head may not be there.
    Layers::of(frame)
        .is_some_and(|layers| layers.end == frame.len() && layers.start + TCP_HEADER_MOST <= head)
}

fn blank(frame: &mut [u8], layers: &Layers, gso: Option<Gso>) -> Result<Offload, Impossible> {
    if layers.end < frame.len() {
        // Whoever completes a checksum sums to the frame's end: with padding that is wrong.
        if gso.is_some() {
            return Err(Impossible);
        }
        layers.fill(frame);
        return Ok(Offload { checksum: Checksum::Valid, gso });
    }
    layers.prepare(frame);
    let (start, offset) = (layers.start as u16, layers.offset() as u16);
    Ok(Offload { checksum: Checksum::Blank { start, offset }, gso })
}

/// Does what the next holder cannot be left to do, and appends the frame, or what it was cut into.
/// What cannot be done drops the frame: it goes back to the pool, and `false` is the answer.
pub fn pass(mut frame: Frame, next: &Leaves, pool: &mut Pool, into: &mut VecDeque<Frame>) -> bool {
    if let Some(gso) = frame.offload.gso
        && !next.gso(gso.kind)
    {
        let cut = segment::cut(&frame, gso, pool, into);
        pool.give(frame);
        return cut;
    }
    if let Checksum::Blank { start, offset } = frame.offload.checksum {
        let left = match (next.checksum4, next.checksum6) {
            (true, true) => true,
            (false, false) => false,
            _ => Layers::of(&frame).is_some_and(|layers| next.checksum(layers.ip)),
        };
        if !left {
            if !complete(&mut frame, start.into(), offset.into()) {
                pool.give(frame);
                return false;
            }
            frame.offload.checksum = Checksum::Valid;
        }
    }
    into.push_back(frame);
    true
}

#[cfg(test)]
#[path = "offload_tests.rs"]
mod tests;
