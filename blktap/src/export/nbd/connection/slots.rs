//! Requests on their way: a fixed number, each with memory of its own that is used again.

use std::io;
use std::ops::Range;

use zerocopy::IntoBytes;

use super::super::memory::{Memory, PAGE};
use super::super::proto::{
    Chunk, DataChunk, ErrorChunk, MAX_PAYLOAD, chunk, error_of, last_chunk, simple,
};
use super::super::request::{Replies, Work};
use crate::disk::Op;

/// Requests that one connection has on their way.
pub const SLOTS: u32 = 128;
/// Bytes of payload that one connection holds, beside its largest request.
const MEMORY: usize = MAX_PAYLOAD as usize;
/// A slot's memory beyond this is not kept for a request that needs little of it.
const ROOMY: usize = 1 << 20;

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its operation, and whether a flush follows.
    Main(Op, Then),
    /// The flush after it.
    Flushing,
    /// Reading ahead: so many bytes are done.
    Caching(u64),
}

/// What follows an operation that went well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The reply.
    Reply,
    /// A flush.
    Flush,
}

/// A request.
pub struct Slot {
    pub memory: Memory,
    pub cookie: u64,
    pub work: Work,
    pub offset: u64,
    pub len: u32,
    pub stage: Stage,
    /// The reply's fixed part.
    head: [u8; 32],
    head_len: usize,
    /// The part of `memory` that follows it.
    data: Range<usize>,
}

impl Slot {
    fn new() -> Slot {
        Slot {
            memory: Memory::default(),
            cookie: 0,
            work: Work::Flush,
            offset: 0,
            len: 0,
            stage: Stage::Flushing,
            head: [0; 32],
            head_len: 0,
            data: 0..0,
        }
    }

    fn set_head(&mut self, head: &[u8], data: Range<usize>) {
        self.head[..head.len()].copy_from_slice(head);
        (self.head_len, self.data) = (head.len(), data);
    }

    /// Prepares the reply: an error, or success without data.
    pub fn reply(&mut self, errno: i32, replies: Replies) {
        let by_chunk = matches!(self.work, Work::Read | Work::BlockStatus { .. });
        if replies == Replies::Simple || !by_chunk {
            let head = simple(self.cookie, error_of(errno));
            return self.set_head(head.as_bytes(), 0..0);
        }
        let len = (size_of::<ErrorChunk>() - size_of::<Chunk>()) as u32;
        let chunk = last_chunk(chunk::ERROR, self.cookie, len);
        let head = ErrorChunk { chunk, error: error_of(errno).into(), message: 0.into() };
        self.set_head(head.as_bytes(), 0..0);
    }

    /// Prepares the reply of a read: `data` of its memory.
    pub fn reply_data(&mut self, data: Range<usize>, replies: Replies) {
        if replies == Replies::Simple {
            let head = simple(self.cookie, 0);
            return self.set_head(head.as_bytes(), data);
        }
        if data.is_empty() {
            // A chunk of data has data.
            let head = last_chunk(chunk::NONE, self.cookie, 0);
            return self.set_head(head.as_bytes(), data);
        }
        let len = size_of::<u64>() as u32 + self.len;
        let chunk = last_chunk(chunk::OFFSET_DATA, self.cookie, len);
        let head = DataChunk { chunk, offset: self.offset.into() };
        self.set_head(head.as_bytes(), data);
    }

    /// Prepares a reply that is wholly in the memory.
    pub fn reply_memory(&mut self, len: usize) {
        self.set_head(&[], 0..len);
    }

    /// The reply's bytes.
    pub fn pieces(&self) -> [&[u8]; 2] {
        [&self.head[..self.head_len], &self.memory.bytes()[self.data.clone()]]
    }
    /// How many there are.
    pub fn reply_len(&self) -> usize {
        self.head_len + self.data.len()
    }
}

/// All requests of a connection.
pub struct Slots {
    slots: Vec<Slot>,
    /// The one used last is taken first: its memory is in the processor's cache.
    free: Vec<u32>,
    held: usize,
}

impl Slots {
    pub fn new() -> Slots {
        Slots {
            slots: (0..SLOTS).map(|_| Slot::new()).collect(),
            free: (0..SLOTS).rev().collect(),
            held: 0,
        }
    }

    /// A slot with memory for `need` bytes; `None`: others must end first.
    pub fn take(&mut self, need: usize) -> io::Result<Option<u32>> {
        let Some(number) = self.free.last().copied() else { return Ok(None) };
        // A small request must not hold on to what a large one left.
        let has = self.slots[number as usize].memory.len();
        let oversized = has > ROOMY && need > 0 && need < has / 16;
        if (has < need || oversized) && !self.grow(number, need)? {
            return Ok(None);
        }
        self.free.pop();
        Ok(Some(number))
    }

    /// Gives a slot (the last free one, or one in use) more memory, if the limit allows it. One
    /// request alone always gets what it needs.
    pub fn grow(&mut self, number: u32, need: usize) -> io::Result<bool> {
        let size = need.next_multiple_of(PAGE);
        self.release(number);
        if self.held + size > MEMORY {
            // What lies idle is given back before anybody waits.
            for at in 0..self.free.len() {
                self.release(self.free[at]);
            }
            if self.held + size > MEMORY && self.free.len() < SLOTS as usize {
                return Ok(false);
            }
        }
        let memory = Memory::new(size)?;
        self.held += memory.len();
        self.slots[number as usize].memory = memory;
        Ok(true)
    }

    fn release(&mut self, number: u32) {
        let memory = std::mem::take(&mut self.slots[number as usize].memory);
        self.held -= memory.len();
    }

    /// A slot is free again.
    pub fn give_back(&mut self, number: u32) {
        self.free.push(number);
    }

    /// Whether all are free.
    pub fn are_idle(&self) -> bool {
        self.free.len() == SLOTS as usize
    }

    pub fn get(&self, number: u32) -> &Slot {
        &self.slots[number as usize]
    }
    pub fn get_mut(&mut self, number: u32) -> &mut Slot {
        &mut self.slots[number as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_limited_and_used_again() {
        let mut slots = Slots::new();
        let most = MAX_PAYLOAD as usize;
        let first = slots.take(most).unwrap().unwrap();
        assert_eq!(slots.take(PAGE).unwrap(), None, "one such request is all that fits");
        let small = slots.take(0).unwrap().expect("what needs no memory goes on");
        slots.give_back(small);
        slots.give_back(first);
        assert_eq!(slots.take(most).unwrap(), Some(first));
        assert_eq!(slots.held, most);
        slots.give_back(first);
        // Many small ones push the large one's memory out.
        let many: Vec<u32> = (0..100).map(|_| slots.take(65536).unwrap().unwrap()).collect();
        assert!(slots.held <= most);
        many.into_iter().for_each(|n| slots.give_back(n));
        assert_eq!(slots.take(most + 2 * PAGE).unwrap().map(|n| n < SLOTS), Some(true));
    }
}
