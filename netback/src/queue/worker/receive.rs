//! From the endpoint to the guest.

use std::time::Instant;

use hypervisor::xenbus::Fault;
use rings::Notify;

use super::{BATCH, Worker};
use crate::config::Carrier;
use crate::frame::{Checksum, Frame};
use crate::offload::pass;

impl Worker {
    /// Takes frames from the endpoint and copies what there are pages for; whether there was any.
    pub(super) fn receive(&mut self) -> Result<bool, Fault> {
        let pages = self.take_pages()?;
        let arrived = self.take_frames()?;
        let copied = self.lay_out()?;
        self.watch_stall(pages);
        Ok(arrived || copied)
    }

    /// The guest's free pages, in ring order; whether there are new ones.
    fn take_pages(&mut self) -> Result<bool, Fault> {
        let before = self.run.pages.len();
        while let Some(entry) = self.rx.take().map_err(|e| self.corrupt(&e))? {
            self.run.pages.push_back((entry.slot, entry.req));
        }
        Ok(self.run.pages.len() > before)
    }

    /// Frames from the endpoint, if those before them are gone: where the guest has no pages, frames
    /// wait there.
    fn take_frames(&mut self) -> Result<bool, Fault> {
        if !self.run.to_guest.is_empty() && !self.run.stalled {
            return Ok(false);
        }
        let room = BATCH.min(self.pool.free());
        let mut arrived = std::mem::take(&mut self.run.arrived);
        // What another queue has found to be for this one.
        if let Some(inbox) = self.inboxes.get(self.number) {
            inbox.take(&mut arrived, room, &mut self.pool);
        }
        let chosen = arrived.len();
        self.endpoint
            .receive(&mut arrived, room - chosen, &mut self.pool)
            .map_err(|e| self.failed("receiving", &e))?;
        let any = !arrived.is_empty();
        for (number, frame) in arrived.drain(..).enumerate() {
            if number < chosen { self.accept(frame) } else { self.admit(frame) }
        }
        self.run.arrived = arrived;
        Ok(any)
    }

    /// Passes a frame on that the guest may have and wants, to the queue where it wants it.
    fn admit(&mut self, mut frame: Frame) {
        let wishes = &self.seen.wishes;
        if wishes.carrier == Carrier::Down {
            self.counters.rx_dropped_link.add(1);
            return self.pool.give(frame);
        }
        // The guest's own list and hash are of frames as it sees them: without the tag.
        if !self.filter.to_guest(&mut frame) {
            self.counters.rx_dropped_vlan.add(1);
            return self.pool.give(frame);
        }
        if !wishes.wants(&frame) {
            self.counters.rx_filtered.add(1);
            return self.pool.give(frame);
        }
        frame.hash = None;
        if wishes.spread.is_on() {
            frame.hash = wishes.spread.hash(&frame);
            let queue = wishes.spread.queue(frame.hash, self.inboxes.len());
            if queue != self.number
                && let Some(inbox) = self.inboxes.get(queue)
            {
                let counter = if inbox.put(&frame) {
                    &self.counters.rx_steered
                } else {
                    &self.counters.rx_dropped_steered
                };
                counter.add(1);
                return self.pool.give(frame);
            }
        }
        self.accept(frame);
    }

    fn accept(&mut self, frame: Frame) {
        let (hash, from) = (frame.hash, self.run.to_guest.len());
        if !pass(frame, &self.leaves_guest, &mut self.pool, &mut self.run.to_guest) {
            self.counters.rx_dropped_offload.add(1);
        }
        // The pieces of a packet that was cut are of the same flow.
        self.run.to_guest.range_mut(from..).for_each(|frame| frame.hash = hash);
    }

    /// Whether the guest takes a frame that long at all.
    fn fits(&self, frame: &Frame) -> bool {
        let data = self.shape().data_slots(frame.len());
        frame.len() <= usize::from(u16::MAX) && (self.accepts.scatter || data == 1)
    }

    /// Lays out and copies frames as far as there are pages; whether there was any.
    fn lay_out(&mut self) -> Result<bool, Fault> {
        self.run.ops.clear();
        let mut sent = 0;
        self.run.limited[1] = None;
        let now = self.limits.rx.now();
        while let Some(frame) = self.run.to_guest.front() {
            if !self.fits(frame) {
                self.counters.rx_dropped_size.add(1);
                self.give_front();
                continue;
            }
            let slots = self.shape().slots(frame.len(), frame.offload.gso, frame.hash);
            // A ring's worth of pages is never too few for a packet.
            if slots > self.run.pages.len() || sent == BATCH {
                break;
            }
            self.run.limited[1] = now.and_then(|now| self.limits.rx.wait(now));
            if self.run.limited[1].is_some() {
                break;
            }
            let Some(frame) = self.run.to_guest.pop_front() else { break };
            now.inspect(|now| self.limits.rx.charge(frame.len(), *now));
            self.spread(&frame, slots);
            // Its memory is read by the copy; only then does it go back to the pool.
            self.run.arrived.push_back(frame);
            sent += 1;
        }
        if sent > 0 {
            self.deliver()?;
        }
        Ok(sent > 0)
    }

    /// Lays a frame out over the next pages.
    fn spread(&mut self, frame: &Frame, slots: usize) {
        let shape = self.shape();
        let run = &mut self.run;
        let answered = &mut run.answered;
        let pages = run.pages.drain(..slots).map(|(slot, page)| {
            answered.push_back(slot);
            page
        });
        let place = (frame.at(), frame.len());
        let about = (&frame.offload, frame.hash);
        run.laid_out.push(shape, place, about, pages, &mut run.ops);
        self.count_received(frame, slots);
    }

    /// Makes the copies, answers and publishes.
    fn deliver(&mut self) -> Result<(), Fault> {
        let copied = self.copy()?;
        self.counters.rx_batches.add(copied.calls());
        self.counters.rx_staged.add(copied.staged);
        self.counters.rx_copied.add(copied.copied);
        while let Some(frame) = self.run.arrived.pop_front() {
            self.pool.give(frame);
        }
        let (rx, answered) = (&mut self.rx, &mut self.run.answered);
        let failed = self.run.laid_out.finish(&self.run.ops, |response| {
            if let Some(slot) = answered.pop_front() {
                rx.respond(slot, &response);
            }
        });
        self.counters.rx_dropped_copy.add(failed);
        if self.rx.publish() == Notify::Send {
            self.channels.rx().notify().map_err(|e| self.failed("event channel", &e))?;
        }
        Ok(())
    }

    fn give_front(&mut self) {
        if let Some(frame) = self.run.to_guest.pop_front() {
            self.pool.give(frame);
        }
    }

    /// Drops what has been waiting for pages for too long, and then all that comes until there are
    /// new ones (XSA-392: it is the frame that waits, however many pages there are).
    fn watch_stall(&mut self, new_pages: bool) {
        if new_pages {
            self.run.stalled = false;
        }
        // Who waits for the limit does not wait for the guest.
        if self.run.to_guest.is_empty() || self.run.limited[1].is_some() {
            self.run.blocked = None;
            return;
        }
        let now = Instant::now();
        let since = *self.run.blocked.get_or_insert(now);
        if now.duration_since(since) >= self.stall && !self.run.stalled {
            self.run.stalled = true;
            self.counters.rx_stalls.add(1);
        }
        if self.run.stalled {
            self.counters.rx_dropped_stalled.add(self.run.to_guest.len() as u64);
            while !self.run.to_guest.is_empty() {
                self.give_front();
            }
        }
    }

    fn count_received(&self, frame: &Frame, slots: usize) {
        let c = &self.counters;
        c.rx_packets.add(1);
        c.rx_bytes.add(frame.len() as u64);
        c.rx_slots.add(slots as u64);
        c.rx_gso.add(u64::from(frame.offload.gso.is_some()));
        let blank = matches!(frame.offload.checksum, Checksum::Blank { .. });
        c.rx_csum_blank.add(u64::from(blank));
    }
}
