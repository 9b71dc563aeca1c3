//! Packets from the guest: frames to pages and slots, responses to free pages.

use std::sync::Arc;

use hypervisor::GrantedPages;
use perf::Handle;
use rings::{FrontRing, PAGE_SIZE, RingCounters};

use super::{Fault, Totals};
use crate::endpoint::Accepts;
use crate::frame::{Checksum, Frame, GsoKind};
use crate::proto::{
    ETHERNET_HEADER, Extra, ExtraInfo, MAX_PACKET_SLOTS, MAX_TX_SIZE, RSP_DROPPED, RSP_NULL,
    TX_CSUM_BLANK, TX_DATA_VALIDATED, TX_EXTRA_INFO, TX_MORE_DATA, Tx, TxRequest,
};

/// What has become of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    /// It is in the ring.
    Yes,
    /// There is no room now.
    Later,
    /// The backend takes no such frame.
    Never,
}

/// See the module.
pub(super) struct Transmit {
    pub ring: FrontRing<Tx, Arc<dyn GrantedPages>>,
    pages: Arc<dyn GrantedPages>,
    /// Pages that hold nothing; a request's id is its page's number.
    free: Vec<u16>,
    /// Whether a page is in the ring.
    used: Vec<bool>,
    takes: Accepts,
    /// Whether the backend takes hashes (`XEN_NETIF_EXTRA_TYPE_HASH`).
    pub takes_hash: bool,
}

impl Transmit {
    /// At an empty ring, with pages that the backend may read.
    pub(super) fn new(
        memory: Arc<dyn GrantedPages>,
        pages: Arc<dyn GrantedPages>,
        takes: Accepts,
        counters: Handle<RingCounters>,
    ) -> Result<Transmit, rings::SizeError> {
        let count = pages.refs().len().min(usize::from(u16::MAX)) as u16;
        Ok(Transmit {
            ring: FrontRing::init(memory, counters)?,
            pages,
            free: (0..count).rev().collect(),
            used: vec![false; usize::from(count)],
            takes,
            takes_hash: false,
        })
    }

    /// What packets are copied through.
    pub(super) fn pages(&self) -> &Arc<dyn GrantedPages> {
        &self.pages
    }

    /// Takes the responses that are there.
    pub(super) fn reap(&mut self, totals: &mut Totals) -> Result<(), Fault> {
        while let Some(rsp) = self.ring.take()? {
            if rsp.status == RSP_NULL {
                continue;
            }
            match self.used.get_mut(usize::from(rsp.id)) {
                Some(used) if *used => *used = false,
                _ => return Err(Fault::TxId(rsp.id)),
            }
            self.free.push(rsp.id);
            match rsp.status {
                0.. => {}
                RSP_DROPPED => totals.tx_dropped += 1,
                _ => totals.tx_errors += 1,
            }
        }
        Ok(())
    }

    /// Whether all that was sent has been answered.
    pub(super) fn is_idle(&self) -> bool {
        self.ring.in_flight() == 0
    }

    fn will_take(&self, frame: &Frame) -> bool {
        let gso = frame.offload.gso.is_none_or(|gso| match gso.kind {
            GsoKind::TcpV4 => self.takes.tso4,
            GsoKind::TcpV6 => self.takes.tso6,
        });
        let long = frame.len() <= PAGE_SIZE || self.takes.scatter;
        let fits = (ETHERNET_HEADER..=usize::from(MAX_TX_SIZE)).contains(&frame.len());
        gso && long && fits && frame.len().div_ceil(PAGE_SIZE) <= MAX_PACKET_SLOTS
    }

    /// Puts a frame into the ring; the backend sees it when the ring is published.
    pub(super) fn push(&mut self, frame: &Frame) -> Pushed {
        if !self.will_take(frame) {
            return Pushed::Never;
        }
        let slots = frame.len().div_ceil(PAGE_SIZE);
        let hash = frame.hash.filter(|_| self.takes_hash);
        let gso = frame.offload.gso.map(Extra::Gso);
        let extras = gso.into_iter().chain(hash.map(Extra::from));
        let behind = extras.clone().count();
        if self.free.len() < slots || (self.ring.free() as usize) < slots + behind {
            return Pushed::Later;
        }
        let mut flags = match frame.offload.checksum {
            Checksum::Unknown => 0,
            Checksum::Valid => TX_DATA_VALIDATED,
            Checksum::Blank { .. } => TX_CSUM_BLANK | TX_DATA_VALIDATED,
        };
        let mut size = frame.len() as u16;
        for (number, bytes) in frame.chunks(PAGE_SIZE).enumerate() {
            let Some(id) = self.free.pop() else { break };
            self.pages.write(usize::from(id) * PAGE_SIZE, bytes);
            self.used[usize::from(id)] = true;
            if number + 1 < slots {
                flags |= TX_MORE_DATA;
            }
            if number == 0 && behind > 0 {
                flags |= TX_EXTRA_INFO;
            }
            if number > 0 {
                size = bytes.len() as u16;
            }
            self.slot(TxRequest {
                gref: self.pages.refs()[usize::from(id)],
                offset: 0,
                flags,
                id,
                size,
            });
            for (n, extra) in extras.clone().enumerate().filter(|_| number == 0) {
                let info = ExtraInfo::from(extra);
                self.slot(if n + 1 < behind { info.and_more() } else { info }.into());
            }
            flags = 0;
        }
        Pushed::Yes
    }

    /// Tells the backend of a group address in a request that carries no packet.
    pub(super) fn push_control(&mut self, extra: Extra) -> Pushed {
        if self.ring.free() < 2 {
            return Pushed::Later;
        }
        let Some(id) = self.free.pop() else { return Pushed::Later };
        self.used[usize::from(id)] = true;
        let gref = self.pages.refs()[usize::from(id)];
        let size = ETHERNET_HEADER as u16;
        self.slot(TxRequest { gref, offset: 0, flags: TX_EXTRA_INFO, id, size });
        self.slot(ExtraInfo::from(extra).into());
        Pushed::Yes
    }

    /// There is room: it has been looked for.
    fn slot(&mut self, slot: TxRequest) {
        let pushed = self.ring.push(&slot);
        debug_assert!(pushed.is_ok(), "no slot for {slot:?}");
    }
}
