//! Packets to the guest: pages into the ring, responses and what lies in the pages to frames.

use std::collections::VecDeque;
use std::sync::Arc;

use hypervisor::GrantedPages;
use perf::Handle;
use rings::{FrontRing, PAGE_SIZE, RingCounters};

use super::{Fault, Totals};
use crate::frame::{Frame, Gso, MAX_FRAME, Pool};
use crate::hash::Hash;
use crate::offload::claimed;
use crate::proto::{
    Extra, RX_CSUM_BLANK, RX_DATA_VALIDATED, RX_EXTRA_INFO, RX_MORE_DATA, Rx, RxRequest, RxResponse,
};
use crate::tx::Claim;

/// What the next response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The first slot of a packet.
    First,
    /// More of its bytes.
    Data,
    /// Information about it; then its bytes, if there are more.
    Extra { more: bool },
}

/// A packet that has not wholly come.
struct Partial {
    frame: Frame,
    flags: u16,
    gso: Option<Gso>,
    /// It is dropped at its end.
    bad: bool,
}

/// See the module.
pub(super) struct Receive {
    pub ring: FrontRing<Rx, Arc<dyn GrantedPages>>,
    pages: Arc<dyn GrantedPages>,
    free: Vec<u16>,
    /// Pages in the ring, oldest first: a response lies in the slot of the request whose page it
    /// speaks of.
    posted: VecDeque<u16>,
    next: Next,
    partial: Option<Partial>,
    /// The hash that came with the last packet that had one.
    pub hash: Option<u32>,
}

impl Receive {
    /// At an empty ring, with pages that the backend may write.
    pub(super) fn new(
        memory: Arc<dyn GrantedPages>,
        pages: Arc<dyn GrantedPages>,
        counters: Handle<RingCounters>,
    ) -> Result<Receive, rings::SizeError> {
        let count = pages.refs().len().min(usize::from(u16::MAX)) as u16;
        Ok(Receive {
            ring: FrontRing::init(memory, counters)?,
            pages,
            free: (0..count).rev().collect(),
            posted: VecDeque::with_capacity(usize::from(count)),
            next: Next::First,
            partial: None,
            hash: None,
        })
    }

    /// What packets are copied through.
    pub(super) fn pages(&self) -> &Arc<dyn GrantedPages> {
        &self.pages
    }

    /// Puts all free pages into the ring, as far as they fit; the backend sees them when it is
    /// published.
    pub(super) fn post(&mut self) {
        while self.ring.free() > 0 {
            let Some(id) = self.free.pop() else { return };
            let request = RxRequest { id, pad: 0, gref: self.pages.refs()[usize::from(id)] };
            if self.ring.push(&request).is_err() {
                self.free.push(id);
                return;
            }
            self.posted.push_back(id);
        }
    }

    /// Takes responses until `room` frames have been made of them, or there are none.
    pub(super) fn take(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
        totals: &mut Totals,
    ) -> Result<(), Fault> {
        let end = frames.len().saturating_add(room);
        while frames.len() < end && (self.partial.is_some() || pool.free() > 0) {
            let Some(rsp) = self.ring.take()? else { return Ok(()) };
            let page = self.posted.pop_front().ok_or(Fault::RxId(rsp.id))?;
            self.free.push(page);
            let is_last = match self.next {
                Next::Extra { more } => self.extra(&rsp, more),
                Next::First | Next::Data => self.data(&rsp, page, pool)?,
            };
            if is_last && let Some(packet) = self.partial.take() {
                self.next = Next::First;
                finish(packet, frames, pool, totals);
            }
        }
        Ok(())
    }

    /// Takes an information; whether the packet ends with it.
    fn extra(&mut self, rsp: &RxResponse, more: bool) -> bool {
        let info = rsp.as_extra();
        if let Some(packet) = &mut self.partial {
            match info.parse() {
                Ok(Extra::Gso(gso)) => packet.gso = Some(gso),
                Ok(extra @ Extra::Hash { value, .. }) => {
                    self.hash = Some(value);
                    packet.frame.hash = Hash::of_extra(&extra);
                }
                Ok(_) => {}
                Err(_) => packet.bad = true,
            }
        }
        if info.more() {
            return false;
        }
        self.next = Next::Data;
        !more
    }

    /// Takes bytes; whether the packet ends with them.
    fn data(&mut self, rsp: &RxResponse, page: u16, pool: &mut Pool) -> Result<bool, Fault> {
        if rsp.id != page {
            return Err(Fault::RxId(rsp.id));
        }
        if self.partial.is_none() {
            let Some(frame) = pool.take() else { return Err(Fault::NoFrame) };
            self.partial = Some(Partial { frame, flags: rsp.flags, gso: None, bad: false });
        }
        let Some(packet) = &mut self.partial else { return Err(Fault::NoFrame) };
        let (offset, before) = (usize::from(rsp.offset), packet.frame.len());
        match usize::try_from(rsp.status) {
            Ok(len) if offset + len > PAGE_SIZE => {
                return Err(Fault::RxSpan { offset: rsp.offset, len: rsp.status });
            }
            Ok(len) if before + len <= MAX_FRAME => {
                packet.frame.set_len(before + len);
                let from = usize::from(page) * PAGE_SIZE + offset;
                self.pages.read(from, &mut packet.frame[before..]);
            }
            Ok(_) | Err(_) => packet.bad = true,
        }
        let more = rsp.flags & RX_MORE_DATA != 0;
        if self.next == Next::First && rsp.flags & RX_EXTRA_INFO != 0 {
            self.next = Next::Extra { more };
            return Ok(false);
        }
        self.next = Next::Data;
        Ok(!more)
    }
}

/// Passes on a packet that has wholly come.
fn finish(packet: Partial, frames: &mut VecDeque<Frame>, pool: &mut Pool, totals: &mut Totals) {
    let Partial { mut frame, flags, gso, bad } = packet;
    let claim = if flags & RX_CSUM_BLANK != 0 {
        Claim::Blank
    } else if flags & RX_DATA_VALIDATED != 0 {
        Claim::Validated
    } else {
        Claim::Nothing
    };
    let good = !bad && !frame.is_empty();
    let Some(offload) = good.then(|| claimed(&mut frame, claim, gso).ok()).flatten() else {
        totals.rx_errors += 1;
        return pool.give(frame);
    };
    frame.offload = offload;
    totals.rx_frames += 1;
    frames.push_back(frame);
}
