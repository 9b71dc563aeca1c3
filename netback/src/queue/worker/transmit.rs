//! From the guest to the endpoint.

use hypervisor::xenbus::Fault;
use rings::Notify;

use super::{BATCH, Worker};
use crate::config::Carrier;
use crate::filter::Refused;
use crate::frame::{Frame, HEADROOM, MAX_FRAME};
use crate::offload::{Impossible, claimed, pass};
use crate::tx::{Claim, Dropped, Packet, Verdict};

/// Frames that are kept for packets to the guest.
const RESERVE: usize = 96;

impl Worker {
    /// Takes a batch of packets from the guest and hands it on; whether there was any.
    pub(super) fn transmit(&mut self) -> Result<bool, Fault> {
        // What the endpoint has not taken stays first, and nothing is taken behind it: the guest's
        // ring is where packets wait.
        let mut moved = self.hand_on()?;
        if !self.has_output() {
            moved |= self.gather()?;
            self.fetch()?;
            self.hand_on()?;
        }
        Ok(moved)
    }

    /// Hands frames to the endpoint, or holds them; whether there was any that could be.
    fn hand_on(&mut self) -> Result<bool, Fault> {
        // Whoever has the lock knows that nothing is being sent.
        let hold = self.hold.clone();
        let mut held = hold.lock();
        if held.is_open() {
            self.run.offered.append(&mut self.run.to_host);
            return self.offer();
        }
        let kept = held.keep(&mut self.run.to_host, &mut self.pool);
        self.counters.tx_dropped_held.add(held.take_dropped());
        let mut moved = kept > 0;
        loop {
            if self.run.offered.is_empty() {
                held.take(&mut self.run.offered, RESERVE, &mut self.pool);
            }
            if !self.offer()? {
                break;
            }
            moved = true;
        }
        self.counters.tx_held.set(held.packets() as u64);
        Ok(moved)
    }

    /// Offers frames to the endpoint; whether it took any.
    fn offer(&mut self) -> Result<bool, Fault> {
        let before = self.run.offered.len();
        if before == 0 {
            return Ok(false);
        }
        if self.seen.wishes.carrier == Carrier::Down {
            // What was taken before the link went, or held.
            self.counters.tx_dropped_link.add(before as u64);
            self.run.offered.drain(..).for_each(|frame| self.pool.give(frame));
            return Ok(true);
        }
        self.endpoint
            .send(&mut self.run.offered, &mut self.pool)
            .map_err(|e| self.failed("sending", &e))?;
        self.counters.tx_dropped_host.add(self.endpoint.take_dropped());
        Ok(self.run.offered.len() < before)
    }

    /// Takes slots from the ring and finds frames for the packets in them.
    fn gather(&mut self) -> Result<bool, Fault> {
        let mut taken = false;
        self.run.ops.clear();
        let now = self.limits.tx.now();
        while self.run.packets.packets().len() < BATCH && self.pool.free() > RESERVE {
            self.run.limited[0] = now.and_then(|now| self.limits.tx.wait(now));
            if self.run.limited[0].is_some() {
                break;
            }
            let Some(entry) = self.tx.take().map_err(|e| self.corrupt(&e))? else { break };
            taken = true;
            self.run.taken.push_back(entry.slot);
            let complete = self.run.packets.push(&entry.req);
            if complete.map_err(|e| Fault(format!("{}: {e}", self.name)))? {
                self.place();
                let len = self.run.packets.packets().last().map_or(0, |packet| packet.len);
                now.inspect(|now| self.limits.tx.charge(len.into(), *now));
            }
        }
        Ok(taken)
    }

    /// A frame for the packet that is complete now, and the copies into it.
    fn place(&mut self) {
        if self.seen.wishes.carrier == Carrier::Down
            && let Some(packet) = self.run.packets.packets_mut().last_mut()
            && packet.verdict == Verdict::Frame
        {
            packet.verdict = Verdict::Dropped(Dropped::Link);
        }
        let Some(packet) = self.run.packets.packets().last() else { return };
        let from = self.run.ops.len();
        let frame = match packet.verdict {
            Verdict::Frame => self.pool.take(),
            Verdict::Multicast(_) | Verdict::Dropped(_) => None,
        };
        let placed = frame.map(|mut frame| {
            frame.begin_later(self.run.packets.shift(packet), packet.len.into());
            frame.set_len(usize::from(packet.len));
            self.run.packets.copies(packet, frame.at(), &mut self.run.ops);
            (frame, from..self.run.ops.len())
        });
        self.run.copied.push_back(placed);
    }

    /// Copies the batch, answers it, and makes it ready for the endpoint.
    fn fetch(&mut self) -> Result<(), Fault> {
        if self.run.packets.packets().is_empty() {
            return Ok(());
        }
        let copied = self.copy()?;
        self.counters.tx_batches.add(copied.calls());
        self.counters.tx_staged.add(copied.staged);
        self.counters.tx_copied.add(copied.copied);
        let mut packets = std::mem::take(&mut self.run.packets);
        for packet in packets.packets_mut() {
            if let Some(Some((frame, copies))) = self.run.copied.pop_front() {
                self.receive_copy(packet, frame, copies);
            }
            self.count(packet);
        }
        let mut slots = 0;
        for packet in packets.packets() {
            let accepted = match packet.verdict {
                Verdict::Multicast(group) => self.live.change(|wishes| wishes.change(group)),
                Verdict::Frame | Verdict::Dropped(_) => false,
            };
            for answer in packets.answers(packet, accepted) {
                let Some(slot) = self.run.taken.pop_front() else { break };
                self.tx.respond(slot, &answer);
                slots += 1;
            }
        }
        // Frames that these packets call forth are judged by the list as it is now.
        self.live.refresh(&mut self.seen);
        self.counters.tx_slots.add(slots);
        packets.clear();
        self.run.packets = packets;
        if self.tx.publish() == Notify::Send {
            self.channels.tx().notify().map_err(|e| self.failed("event channel", &e))?;
        }
        Ok(())
    }

    /// A packet's bytes are here, or they could not be read.
    fn receive_copy(
        &mut self,
        packet: &mut Packet,
        mut frame: Frame,
        copies: std::ops::Range<usize>,
    ) {
        const { assert!(HEADROOM + MAX_FRAME > u16::MAX as usize) };
        if self.run.ops[copies].iter().any(|op| op.status != 0) {
            packet.verdict = Verdict::Dropped(Dropped::Copy);
            return self.pool.give(frame);
        }
        match claimed(&mut frame, packet.claim, packet.gso) {
            Ok(offload) => (frame.offload, frame.hash) = (offload, packet.hash),
            Err(Impossible) => {
                packet.verdict = Verdict::Dropped(Dropped::Offload);
                return self.pool.give(frame);
            }
        }
        if let Err(refused) = self.filter.from_guest(&mut frame) {
            packet.verdict = Verdict::Dropped(Dropped::Filter(refused));
            return self.pool.give(frame);
        }
        if !pass(frame, &self.leaves_host, &mut self.pool, &mut self.run.to_host) {
            packet.verdict = Verdict::Dropped(Dropped::Offload);
        }
    }

    fn count(&self, packet: &Packet) {
        let c = &self.counters;
        match packet.verdict {
            Verdict::Frame => {
                c.tx_packets.add(1);
                c.tx_bytes.add(packet.len.into());
                c.tx_gso.add(u64::from(packet.gso.is_some()));
                c.tx_csum_blank.add(u64::from(packet.claim == Claim::Blank));
            }
            Verdict::Multicast(_) => {}
            Verdict::Dropped(Dropped::Copy) => c.tx_dropped_copy.add(1),
            Verdict::Dropped(Dropped::Offload) => c.tx_dropped_offload.add(1),
            Verdict::Dropped(Dropped::Link) => c.tx_dropped_link.add(1),
            Verdict::Dropped(Dropped::Filter(Refused::Spoofed)) => c.tx_dropped_spoofed.add(1),
            Verdict::Dropped(Dropped::Filter(Refused::Vlan)) => c.tx_dropped_vlan.add(1),
            Verdict::Dropped(Dropped::Slots | Dropped::Size | Dropped::Short) => {
                c.tx_dropped_bad.add(1);
            }
        }
    }
}
