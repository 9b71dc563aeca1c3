//! From the guest to the endpoint.

use hypervisor::CopyOp;
use hypervisor::xenbus::Fault;
use rings::Notify;

use super::{BATCH, Run, Worker};
use crate::config::Carrier;
use crate::filter::Refused;
use crate::frame::{Frame, HEAD, HEADROOM, MAX_FRAME};
use crate::offload::{Impossible, claimed, is_told_by_head, pass};
use crate::queue::door::Crossing;
use crate::queue::fault;
use crate::tx::{self, Claim, Dropped, Packet, Verdict};

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
            .map_err(|e| self.fault(format_args!("sending: {e}")))?;
        self.counters.tx_dropped_host.add(self.endpoint.take_dropped());
        Ok(self.run.offered.len() < before)
    }

    /// Takes slots from the ring and finds frames for the packets in them.
    fn gather(&mut self) -> Result<bool, Fault> {
        let mut taken = false;
        self.run.ops.clear();
        let now = self.limits.tx.now();
        while self.run.packets.packets().len() < BATCH && self.pool.free() > RESERVE {
            self.run.limited = now.and_then(|now| self.limits.tx.wait(now));
            if self.run.limited.is_some() {
                break;
            }
            let Some(entry) = self.tx.take().map_err(|e| self.fault(e))? else { break };
            taken = true;
            self.run.taken.push_back(entry.slot);
            let complete = self.run.packets.push(&entry.req);
            if complete.map_err(|e| self.fault(e))? {
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
        let len = usize::from(packet.len);
        let may_cross = self.may_cross(len);
        let placed = frame.map(|mut frame| {
            frame.begin_later(self.run.packets.shift(packet), len);
            frame.set_len(len);
            frame.beyond = may_cross.then(|| self.run.packets.packets().len() - 1);
            let bytes = 0..if may_cross { HEAD } else { len };
            self.run.packets.copies(packet, frame.at(), bytes, &mut self.run.ops);
            (frame, from..self.run.ops.len())
        });
        self.run.copied.push_back(placed);
    }

    /// Whether a packet may go on from the guest's own pages. Of one that fits into a page nothing is
    /// spared by that: two short copies cost less than one more piece.
    fn may_cross(&self, len: usize) -> bool {
        len > rings::PAGE_SIZE
            && self.endpoint.crosses()
            && self.leaves_host.is_all()
            && self.filter.is_off()
            && self.live.staging().get(self.number).is_some_and(|kept| kept.is_empty())
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
        for number in 0..packets.packets().len() {
            if let Some(Some((frame, copies))) = self.run.copied.pop_front() {
                self.receive_copy(&mut packets, number, frame, copies)?;
            }
        }
        if self.endpoint.crosses() {
            self.cross(&mut packets)?;
            self.complete(&mut packets)?;
        }
        packets.packets().iter().for_each(|packet| self.count(packet));
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
            let notified = self.channels.tx().notify();
            notified.map_err(|e| self.fault(format_args!("event channel: {e}")))?;
        }
        Ok(())
    }

    /// Hands frames to the endpoint that go straight into other guests' pages, unless they are to be
    /// held, or dropped.
    fn cross(&mut self, packets: &mut tx::Batch) -> Result<(), Fault> {
        // Whoever has the lock knows that nothing is being sent.
        let hold = self.hold.clone();
        let held = hold.lock();
        if !held.is_open() || self.seen.wishes.carrier == Carrier::Down {
            return Ok(());
        }
        let Run { to_host, crossing: lists, .. } = &mut self.run;
        lists.failed.clear();
        let mut crossing = Crossing {
            grants: &*self.grants,
            domid: self.domid,
            pool: &mut self.pool,
            packets,
            lists,
            crossed: 0,
            error: None,
        };
        self.endpoint.cross(to_host, &mut crossing);
        let (crossed, error) = (crossing.crossed, crossing.error);
        self.counters.tx_crossed.add(crossed);
        for number in lists.failed.drain(..) {
            packets.packets_mut()[number].verdict = Verdict::Dropped(Dropped::Copy);
        }
        error.map_or(Ok(()), |e| Err(self.fault(format_args!("grant copy: {e}"))))
    }

    /// Copies the rest of frames that have not gone from the guest's own pages.
    fn complete(&mut self, packets: &mut tx::Batch) -> Result<(), Fault> {
        self.run.rest.clear();
        for frame in &self.run.to_host {
            if let Some(packet) = frame.beyond.and_then(|number| packets.packets().get(number)) {
                packets.copies(packet, frame.at(), HEAD..frame.len(), &mut self.run.rest);
            }
        }
        self.copy_rest()?;
        let Run { to_host, rest, .. } = &mut self.run;
        for _ in 0..to_host.len() {
            let Some(mut frame) = to_host.pop_front() else { break };
            let bytes = frame.at()..frame.at() + frame.len();
            let is_bad = |op: &CopyOp| op.status != 0 && bytes.contains(&op.at);
            match frame.beyond.take().and_then(|number| packets.packets_mut().get_mut(number)) {
                Some(packet) if rest.iter().any(is_bad) => {
                    packet.verdict = Verdict::Dropped(Dropped::Copy);
                    self.pool.give(frame);
                }
                _ => to_host.push_back(frame),
            }
        }
        Ok(())
    }

    /// Makes the copies that were put off.
    fn copy_rest(&mut self) -> Result<(), Fault> {
        let rest = &mut self.run.rest;
        if rest.is_empty() {
            return Ok(());
        }
        let copied = self.grants.copy(self.domid, self.pool.buffer(), rest);
        copied.map_err(|e| fault(&self.name, format_args!("grant copy: {e}")))?;
        self.counters.tx_batches.add(1);
        self.counters.tx_copied.add(rest.len() as u64);
        Ok(())
    }

    /// A packet's bytes are here, or they could not be read.
    fn receive_copy(
        &mut self,
        packets: &mut tx::Batch,
        number: usize,
        mut frame: Frame,
        copies: std::ops::Range<usize>,
    ) -> Result<(), Fault> {
        const { assert!(HEADROOM + MAX_FRAME > u16::MAX as usize) };
        let mut is_bad = self.run.ops[copies].iter().any(|op| op.status != 0);
        let packet = &packets.packets()[number];
        if frame.beyond.is_some() && !is_told_by_head(&frame, HEAD, packet.claim, packet.gso) {
            // It takes all bytes to know what is left to do.
            frame.beyond = None;
            self.run.rest.clear();
            packets.copies(packet, frame.at(), HEAD..frame.len(), &mut self.run.rest);
            self.copy_rest()?;
            is_bad |= self.run.rest.iter().any(|op| op.status != 0);
        }
        let packet = &mut packets.packets_mut()[number];
        if is_bad {
            packet.verdict = Verdict::Dropped(Dropped::Copy);
            self.pool.give(frame);
        } else if let Err(dropped) = self.pass_on(packet, frame) {
            packet.verdict = Verdict::Dropped(dropped);
        }
        Ok(())
    }

    /// Makes a frame ready for the endpoint, if it may have it.
    fn pass_on(&mut self, packet: &Packet, mut frame: Frame) -> Result<(), Dropped> {
        match claimed(&mut frame, packet.claim, packet.gso) {
            Ok(offload) => (frame.offload, frame.hash) = (offload, packet.hash),
            Err(Impossible) => {
                self.pool.give(frame);
                return Err(Dropped::Offload);
            }
        }
        if let Err(refused) = self.filter.from_guest(&mut frame) {
            self.pool.give(frame);
            return Err(Dropped::Filter(refused));
        }
        let passed = pass(frame, &self.leaves_host, &mut self.pool, &mut self.run.to_host);
        if passed { Ok(()) } else { Err(Dropped::Offload) }
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
