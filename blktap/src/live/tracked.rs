//! Requests of a queue while a job copies the disk.
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::control::{Station, Tracking};
use super::second::{Order, Second};
use crate::disk::{DiskQueue, Done, Full, IoBuf, Op, Request, wait_for};

/// A request of the queue's user.
struct Slot {
    token: u64,
    op: Op,
    bufs: Vec<IoBuf>,
    /// What is not done of it: parts on their way, and those held.
    left: u32,
    errno: i32,
}

/// A part of a request on its way. Its number is the token below.
struct Part {
    slot: u32,
    range: Range<u64>,
    change: bool,
    /// The range is reserved: the second disk gets it as well.
    doubled: bool,
    /// Answers to come; 0: the place is free.
    left: u32,
}

/// What a queue does with a part.
enum Way {
    Current,
    Both,
    Held,
}

/// See the module.
pub(super) struct Requests {
    slots: Vec<Slot>,
    free: Vec<u32>,
    parts: Vec<Part>,
    free_parts: Vec<u32>,
    /// Parts that wait for the window or for another change of the same bytes, in order.
    held: Vec<(u32, Range<u64>)>,
    /// The held may go on.
    look_again: bool,
    /// Parts for which the queue below had no room.
    later: VecDeque<u32>,
    ready: Vec<Done>,
    done: Vec<Done>,
    window: Range<u64>,
    /// Where changes below the window go as well; kept while answers of it are to come.
    second: Option<Arc<Second>>,
    doubles: bool,
    /// Answers that the second disk owes.
    abroad: u32,
    station: Arc<Station>,
    depth: u32,
}

fn is_change(op: Op) -> bool {
    !matches!(op, Op::Read | Op::Flush)
}

/// Whether the operation may be carried out in pieces: it has no memory.
fn can_be_split(op: Op) -> bool {
    matches!(op, Op::Discard | Op::SecureDiscard | Op::WriteZeroes)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Requests {
    pub(super) fn new(station: Arc<Station>, depth: u32) -> Requests {
        Requests {
            slots: Vec::new(),
            free: Vec::new(),
            parts: Vec::new(),
            free_parts: Vec::new(),
            held: Vec::new(),
            look_again: false,
            later: VecDeque::new(),
            ready: Vec::new(),
            done: Vec::new(),
            window: 0..0,
            second: None,
            doubles: false,
            abroad: 0,
            station,
            depth,
        }
    }

    /// Takes over a job's window. The next poll lets go on what waited for the last one.
    pub(super) fn adopt(&mut self, tracking: &Tracking) {
        self.window = tracking.window.clone();
        self.doubles = tracking.second.is_some();
        if self.doubles {
            self.second.clone_from(&tracking.second);
        }
        self.look_again = !self.held.is_empty();
    }

    /// The job has ended: nothing waits for it any more, and new changes go to one disk.
    pub(super) fn release(&mut self) {
        self.window = 0..0;
        self.doubles = false;
        self.look_again = !self.held.is_empty();
    }

    /// Nothing is in flight, and nothing is tracked from here on.
    pub(super) fn forget(&mut self) {
        self.release();
        self.second = None;
    }

    pub(super) fn in_flight(&self) -> u32 {
        (self.slots.len() - self.free.len() + self.ready.len()) as u32
    }

    /// Whether a poll has something to do at once.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty() || self.look_again
    }

    /// Whether a change inside the window is on its way.
    pub(super) fn changes_in_window(&self) -> bool {
        let on_its_way = |p: &&Part| p.left > 0 && p.change;
        self.parts.iter().filter(on_its_way).any(|p| overlap(&p.range, &self.window))
    }

    pub(super) fn submit(
        &mut self,
        inner: &mut dyn DiskQueue,
        r: &Request<'_>,
    ) -> Result<(), Full> {
        if self.in_flight() >= self.depth {
            return Err(Full);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            let bufs = Vec::new();
            self.slots.push(Slot { token: 0, op: Op::Read, bufs, left: 0, errno: 0 });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        // One more, so that what ends at once does not end the request before all is sent.
        (slot.token, slot.op, slot.left, slot.errno) = (r.token, r.op, 1, 0);
        slot.bufs.clear();
        slot.bufs.extend_from_slice(r.bufs);
        self.dispatch(inner, index, r.offset..r.offset.saturating_add(r.len));
        self.one_less(index);
        Ok(())
    }

    /// Sends a range of a request where it belongs, or holds it.
    fn dispatch(&mut self, inner: &mut dyn DiskQueue, slot: u32, range: Range<u64>) {
        let op = self.slots[slot as usize].op;
        let window = self.window.clone();
        if !is_change(op) || range.is_empty() || range.start >= window.end {
            self.send(inner, slot, range, Way::Current);
        } else if range.end <= window.start {
            let way = self.way_below(op, &range);
            self.send(inner, slot, range, way);
        } else if can_be_split(op) && overlap(&range, &window) {
            let (from, to) = (range.start.max(window.start), range.end.min(window.end));
            self.send(inner, slot, from..to, Way::Held);
            if range.start < from {
                self.dispatch(inner, slot, range.start..from);
            }
            if to < range.end {
                self.send(inner, slot, to..range.end, Way::Current);
            }
        } else {
            self.send(inner, slot, range, Way::Held);
        }
    }

    /// Where a change of what was copied goes.
    fn way_below(&self, op: Op, range: &Range<u64>) -> Way {
        match &self.second {
            Some(second) if self.doubles && second.wants(op) => {
                // Two changes of the same bytes must come to both disks in one order.
                if second.reserve(range, &self.station) { Way::Both } else { Way::Held }
            }
            _ => Way::Current,
        }
    }

    fn send(&mut self, inner: &mut dyn DiskQueue, slot: u32, range: Range<u64>, way: Way) {
        let request = &mut self.slots[slot as usize];
        request.left += 1;
        let doubled = match way {
            Way::Held => return self.held.push((slot, range)),
            Way::Current => false,
            Way::Both => true,
        };
        let (change, left) = (is_change(request.op), 1 + u32::from(doubled));
        let part = Part { slot, range: range.clone(), change, doubled, left };
        let number = match self.free_parts.pop() {
            Some(number) => {
                self.parts[number as usize] = part;
                number
            }
            None => {
                self.parts.push(part);
                self.parts.len() as u32 - 1
            }
        };
        if let (true, Some(second)) = (doubled, &self.second) {
            self.abroad += 1;
            second.order(Order {
                op: request.op,
                range,
                bufs: request.bufs.clone(),
                part: number,
                station: Arc::clone(&self.station),
            });
        }
        if !self.later.is_empty() || !self.send_below(inner, number) {
            self.later.push_back(number);
        }
    }

    /// `false`: there was no room.
    fn send_below(&self, inner: &mut dyn DiskQueue, number: u32) -> bool {
        let part = &self.parts[number as usize];
        let slot = &self.slots[part.slot as usize];
        let (offset, len) = (part.range.start, part.range.end - part.range.start);
        let token = u64::from(number);
        inner.submit(&Request { op: slot.op, offset, len, bufs: &slot.bufs, token }).is_ok()
    }

    pub(super) fn poll(
        &mut self,
        inner: &mut dyn DiskQueue,
        done: &mut Vec<Done>,
    ) -> io::Result<()> {
        let mut below = std::mem::take(&mut self.done);
        let result = inner.poll(&mut below);
        for d in below.drain(..) {
            self.answered(d.token as u32, d.errno);
        }
        self.done = below;
        while let Some(part) = self.station.answers.pop() {
            self.abroad -= 1;
            self.answered(part, 0);
        }
        while let Some(part) = self.later.pop_front() {
            if !self.send_below(inner, part) {
                self.later.push_front(part);
                break;
            }
        }
        if !self.held.is_empty() {
            self.go_on(inner);
        }
        self.look_again = false;
        done.append(&mut self.ready);
        result
    }

    /// Tries what is held once more.
    fn go_on(&mut self, inner: &mut dyn DiskQueue) {
        for (slot, range) in std::mem::take(&mut self.held) {
            self.dispatch(inner, slot, range);
            self.one_less(slot);
        }
    }

    fn answered(&mut self, number: u32, errno: i32) {
        let Some(part) = self.parts.get_mut(number as usize) else { return };
        part.left -= 1;
        let (left, index) = (part.left, part.slot);
        let slot = &mut self.slots[index as usize];
        if slot.errno == 0 {
            slot.errno = errno;
        }
        if left > 0 {
            return;
        }
        if let (true, Some(second)) = (part.doubled, &self.second) {
            second.give_back(&part.range);
        }
        self.free_parts.push(number);
        self.one_less(index);
    }

    /// One thing less that a request waits for.
    fn one_less(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.left -= 1;
        if slot.left == 0 {
            self.ready.push(Done { token: slot.token, errno: slot.errno });
            self.free.push(index);
        }
    }

    /// Waits until the second disk uses no memory of a request any more. The queue below is gone.
    pub(super) fn wait_for_second(&mut self) {
        while self.abroad > 0 {
            while self.station.answers.pop().is_some() {
                self.abroad -= 1;
            }
            if self.abroad > 0 {
                // It fails for a bad descriptor alone, and this is one of ours.
                let _ = wait_for(&[self.station.event()], None);
                self.station.calm();
            }
        }
        if let Some(second) = &self.second {
            let on_their_way = self.parts.iter().filter(|p| p.left > 0 && p.doubled);
            on_their_way.for_each(|part| second.give_back(&part.range));
        }
    }
}
