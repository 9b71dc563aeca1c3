//! From the guest: slots to packets, packets to grant copies, copies to answers. Pure.
//!
//! What is fatal and what only costs the packet is as in Linux's xen-netback: a frontend that
//! breaks the protocol loses its vif, one that sends nonsense loses that packet.

use std::ops::Range;

use hypervisor::{CopyOp, Direction};

use crate::filter::Refused;
use crate::frame::Gso;
use crate::hash::Hash;
use crate::proto::{
    ETHERNET_HEADER, Extra, FATAL_PACKET_SLOTS, MAX_EXTRAS, MAX_PACKET_SLOTS, Malformed,
    RSP_DROPPED, RSP_ERROR, RSP_NULL, RSP_OKAY, TX_CSUM_BLANK, TX_DATA_VALIDATED, TX_EXTRA_INFO,
    TX_MORE_DATA, TxRequest, TxResponse,
};

/// Why a frontend cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A packet of so many slots that no frontend can mean it.
    #[error("a packet of more than {FATAL_PACKET_SLOTS} slots")]
    Slots,
    /// More extra information than there is.
    #[error("a packet with more than {MAX_EXTRAS} extra infos")]
    Extras,
    /// Extra information without a meaning.
    #[error(transparent)]
    Extra(#[from] Malformed),
    /// A slot goes beyond its page.
    #[error("{size} bytes at {offset} of a page")]
    Page {
        /// First byte.
        offset: u16,
        /// Bytes.
        size: u16,
    },
}

/// Why a packet goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// More slots than are allowed.
    Slots,
    /// Its slots hold more than the packet.
    Size,
    /// It is shorter than an Ethernet header.
    Short,
    /// A page could not be read.
    Copy,
    /// A checksum or segmentation is asked for that cannot be done.
    Offload,
    /// A filter has refused it.
    Filter(Refused),
    /// The link is down.
    Link,
}

/// What a packet turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A frame to be sent.
    Frame,
    /// No frame but a change of the list of group addresses.
    Multicast(Group),
    /// Nothing; its slots are answered with an error.
    Dropped(Dropped),
}

/// A change of the list of group addresses that the guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// One more.
    Add([u8; 6]),
    /// One less.
    Remove([u8; 6]),
}

/// What the frontend says of the checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Nothing.
    Nothing,
    /// It is right.
    Validated,
    /// It is to be computed.
    Blank,
}

/// A packet from the guest: ranges are those of its [`Batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its slots.
    slots: Range<usize>,
    /// Its pieces.
    pieces: Range<usize>,
    /// Bytes.
    pub len: u16,
    /// What is said of its checksum.
    pub claim: Claim,
    /// Whether it is to be cut.
    pub gso: Option<Gso>,
    /// Its hash, in the guest's words.
    pub hash: Option<Hash>,
    /// What to do with it.
    pub verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Data { id: u16 },
    Extra,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    gref: u32,
    offset: u16,
    len: u16,
}

/// Bytes of a packet in one of the guest's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The granted page.
    pub gref: u32,
    /// First byte in it.
    pub offset: u16,
    /// Bytes, above 0.
    pub len: u16,
    /// The first one's place in the packet.
    pub at: usize,
}

/// What the next slot has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    First,
    Extra,
    Data,
}

/// The packet that is being put together.
#[derive(Clone, Copy, Debug)]
struct Open {
    expect: Expect,
    flags: u16,
    /// Bytes of the packet that are in none of the slots so far but the first.
    rest: u16,
    total: u16,
    extras: usize,
    gso: Option<Gso>,
    hash: Option<Hash>,
    group: Option<Group>,
    dropped: Option<Dropped>,
    first_slot: usize,
    first_piece: usize,
}

const NONE_OPEN: Open = Open {
    expect: Expect::First,
    flags: 0,
    rest: 0,
    total: 0,
    extras: 0,
    gso: None,
    hash: None,
    group: None,
    dropped: None,
    first_slot: 0,
    first_piece: 0,
};

/// Packets taken from the ring together. A packet whose slots are not all there yet stays open
/// until they are.
#[derive(Debug)]
pub struct Batch {
    slots: Vec<Slot>,
    pieces: Vec<Piece>,
    packets: Vec<Packet>,
    open: Open,
}

impl Default for Batch {
    fn default() -> Self {
        Batch { slots: Vec::new(), pieces: Vec::new(), packets: Vec::new(), open: NONE_OPEN }
    }
}

impl Batch {
    /// Takes the next slot of the ring; whether a packet is complete with it.
    pub fn push(&mut self, slot: &TxRequest) -> Result<bool, Broken> {
        let done = match self.open.expect {
            Expect::First => {
                self.begin(slot);
                self.after(slot.flags)
            }
            Expect::Extra => self.extra(slot)?,
            Expect::Data => {
                self.data(slot)?;
                !slot.has(TX_MORE_DATA)
            }
        };
        if done {
            self.close()?;
        }
        Ok(done)
    }

    /// The complete packets, in ring order.
    pub fn packets(&self) -> &[Packet] {
        &self.packets
    }

    /// The same, to note what became of them.
    pub fn packets_mut(&mut self) -> &mut [Packet] {
        &mut self.packets
    }

    /// Forgets the complete packets; an open one stays.
    pub fn clear(&mut self) {
        self.slots.drain(..self.open_slot());
        self.pieces.drain(..self.open_piece());
        (self.open.first_slot, self.open.first_piece) = (0, 0);
        self.packets.clear();
    }

    fn open_slot(&self) -> usize {
        if self.open.expect == Expect::First { self.slots.len() } else { self.open.first_slot }
    }

    fn open_piece(&self) -> usize {
        if self.open.expect == Expect::First { self.pieces.len() } else { self.open.first_piece }
    }

    fn begin(&mut self, slot: &TxRequest) {
        self.open = Open {
            flags: slot.flags,
            rest: slot.size,
            total: slot.size,
            first_slot: self.slots.len(),
            first_piece: self.pieces.len(),
            ..NONE_OPEN
        };
        self.slots.push(Slot::Data { id: slot.id });
        // Its length is what the others leave of the packet's.
        self.pieces.push(Piece { gref: slot.gref, offset: slot.offset, len: 0 });
    }

    /// What follows the first slot, by its flags; whether nothing does.
    fn after(&mut self, flags: u16) -> bool {
        self.open.expect = if flags & TX_EXTRA_INFO != 0 { Expect::Extra } else { Expect::Data };
        self.open.expect == Expect::Data && flags & TX_MORE_DATA == 0
    }

    fn extra(&mut self, slot: &TxRequest) -> Result<bool, Broken> {
        let info = slot.as_extra();
        self.open.extras += 1;
        if self.open.extras > MAX_EXTRAS {
            return Err(Broken::Extras);
        }
        match info.parse()? {
            Extra::Gso(gso) => self.open.gso = Some(gso),
            Extra::McastAdd(address) => self.open.group = Some(Group::Add(address)),
            Extra::McastDel(address) => self.open.group = Some(Group::Remove(address)),
            // A hint: one that makes no sense costs nothing.
            extra @ Extra::Hash { .. } => self.open.hash = Hash::of_extra(&extra),
            // Only backends have a use for it.
            Extra::Xdp { .. } => {}
        }
        self.slots.push(Slot::Extra);
        if info.more() {
            return Ok(false);
        }
        self.open.expect = Expect::Data;
        // A change of the list is a slot of its own, whatever its flags say.
        Ok(self.open.group.is_some() || self.open.flags & TX_MORE_DATA == 0)
    }

    fn data(&mut self, slot: &TxRequest) -> Result<(), Broken> {
        let behind = self.pieces.len() - self.open.first_piece - 1;
        if behind >= FATAL_PACKET_SLOTS {
            return Err(Broken::Slots);
        }
        if behind >= MAX_PACKET_SLOTS {
            self.open.dropped.get_or_insert(Dropped::Slots);
        }
        match self.open.rest.checked_sub(slot.size) {
            Some(rest) => self.open.rest = rest,
            None => _ = self.open.dropped.get_or_insert(Dropped::Size),
        }
        in_page(slot.offset, slot.size)?;
        self.slots.push(Slot::Data { id: slot.id });
        self.pieces.push(Piece { gref: slot.gref, offset: slot.offset, len: slot.size });
        Ok(())
    }

    fn close(&mut self) -> Result<(), Broken> {
        let open = std::mem::replace(&mut self.open, NONE_OPEN);
        let verdict = match (open.dropped, open.group) {
            (_, Some(group)) => Verdict::Multicast(group),
            (Some(dropped), None) => Verdict::Dropped(dropped),
            (None, None) if usize::from(open.total) < ETHERNET_HEADER => {
                Verdict::Dropped(Dropped::Short)
            }
            (None, None) => {
                let first = &mut self.pieces[open.first_piece];
                in_page(first.offset, open.rest)?;
                first.len = open.rest;
                Verdict::Frame
            }
        };
        self.packets.push(Packet {
            slots: open.first_slot..self.slots.len(),
            pieces: open.first_piece..self.pieces.len(),
            len: open.total,
            claim: match open.flags {
                flags if flags & TX_CSUM_BLANK != 0 => Claim::Blank,
                flags if flags & TX_DATA_VALIDATED != 0 => Claim::Validated,
                _ => Claim::Nothing,
            },
            gso: open.gso,
            hash: open.hash,
            verdict,
        });
        Ok(())
    }

    /// How far behind the begin of a page a packet's bytes are to lie so that each piece but the
    /// first lies in a local page as it does in the guest's: no copy is cut then. So they do where
    /// the pieces are what Linux makes of a packet: its headers, and then whole pages.
    pub fn shift(&self, packet: &Packet) -> usize {
        match &self.pieces[packet.pieces.clone()] {
            [first, second, ..] => {
                second.offset.wrapping_sub(first.len) as usize % rings::PAGE_SIZE
            }
            _ => 0,
        }
    }

    /// Where some bytes of a packet lie in the guest's pages, in order. Slots without bytes have none.
    pub fn parts(&self, packet: &Packet, bytes: Range<usize>) -> impl Iterator<Item = Part> {
        let mut first = 0;
        self.pieces[packet.pieces.clone()].iter().filter_map(move |piece| {
            let mine = first..first + usize::from(piece.len);
            first = mine.end;
            let (from, to) = (mine.start.max(bytes.start), mine.end.min(bytes.end));
            // Each is within a page.
            (from < to).then(|| Part {
                gref: piece.gref,
                offset: piece.offset + (from - mine.start) as u16,
                len: (to - from) as u16,
                at: from,
            })
        })
    }

    /// Appends the copies that bring some of a packet's bytes to the local buffer, where its first
    /// byte belongs at `at`.
    pub fn copies(&self, packet: &Packet, at: usize, bytes: Range<usize>, ops: &mut Vec<CopyOp>) {
        ops.extend(self.parts(packet, bytes).map(|part| CopyOp {
            gref: part.gref,
            offset: part.offset,
            len: part.len,
            at: at + part.at,
            direction: Direction::FromGrant,
            status: 0,
        }));
    }

    /// The answers to a packet's slots, in ring order. `accepted` is what a change of the list of
    /// group addresses came to.
    pub fn answers(&self, packet: &Packet, accepted: bool) -> impl Iterator<Item = TxResponse> {
        let status = match packet.verdict {
            Verdict::Frame => RSP_OKAY,
            Verdict::Multicast(_) if accepted => RSP_OKAY,
            Verdict::Dropped(Dropped::Link) => RSP_DROPPED,
            Verdict::Multicast(_) | Verdict::Dropped(_) => RSP_ERROR,
        };
        self.slots[packet.slots.clone()].iter().map(move |slot| match slot {
            Slot::Data { id } => TxResponse { id: *id, status },
            Slot::Extra => TxResponse { id: 0, status: RSP_NULL },
        })
    }
}

/// A slot stays within its page.
fn in_page(offset: u16, size: u16) -> Result<(), Broken> {
    let fits = usize::from(offset) + usize::from(size) <= rings::PAGE_SIZE;
    if fits { Ok(()) } else { Err(Broken::Page { offset, size }) }
}

#[cfg(test)]
#[path = "tx_tests.rs"]
mod tests;
