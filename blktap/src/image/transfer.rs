//! The way of a request's data: from what was resolved to transfers, and what their ends mean.
// Payload is named by address.
#![allow(unsafe_code)]

use std::ops::Range;

use super::chain::{Found, LayerMiss, Source};
use super::queue::{ImageQueue, TRANSFER_OF_GROUP, TRANSFER_OF_SLOT, UNPACK};
use super::requests::{Copy, Group, Memory, Owner};
use super::workers::Job;
use crate::disk::{IoBuf, MAX_SEGMENTS, Op};
use crate::engine::{Durability, EngineOp};
use crate::formats::{Change, Fresh, ImageError, Outcome, Piece, Target};

/// How far a request went.
pub(super) enum Step {
    /// So many bytes more are on their way.
    Sent(u64),
    /// None: this is to be loaded.
    Miss(LayerMiss),
    /// None: somebody owns the clusters, and will wake this queue.
    Busy,
}

/// A part of a request that is being unpacked.
#[derive(Debug)]
pub(super) struct Unpack {
    slot: u32,
    at: u64,
    len: u64,
    skip: u32,
}

/// Appends the pieces of `bufs` that hold `len` bytes from `at` on.
fn part(bufs: &[IoBuf], at: u64, len: u64, out: &mut Vec<IoBuf>) {
    let (mut skip, mut left) = (at as usize, len as usize);
    for buf in bufs {
        if left == 0 {
            return;
        }
        if skip >= buf.len() {
            skip -= buf.len();
            continue;
        }
        let n = (buf.len() - skip).min(left);
        // SAFETY: inside the buffer, whose maker promised its memory.
        out.push(unsafe { IoBuf::new(buf.addr().add(skip), n) });
        (skip, left) = (0, left - n);
    }
}

/// The part of a request's bytes, without making a list where it is all of them.
fn bufs_of<'a>(
    bufs: &'a [IoBuf],
    at: u64,
    len: u64,
    whole: u64,
    room: &'a mut Vec<IoBuf>,
) -> &'a [IoBuf] {
    if at == 0 && len == whole {
        return bufs;
    }
    room.clear();
    part(bufs, at, len, room);
    room
}

impl ImageQueue {
    /// Sends the start of what is left of a read.
    pub(super) fn send_read(&mut self, index: u32, range: Range<u64>) -> Result<Step, ImageError> {
        self.stretches.clear();
        let chain = &self.shared.chain;
        let bytes = match chain.resolve(range, &mut self.scratch, &mut self.stretches)? {
            Found::Bytes(bytes) => bytes,
            Found::Miss(miss) => return Ok(Step::Miss(miss)),
        };
        let mut at = self.slots.get(index).sent;
        for stretch in &self.stretches {
            let slot = self.slots.get_mut(index);
            let whole = slot.len;
            match stretch.source {
                Source::Data { file, offset } => {
                    slot.pending += 1;
                    let bufs = bufs_of(&slot.bufs, at, stretch.len, whole, &mut self.bufs);
                    let token = TRANSFER_OF_SLOT | u64::from(index);
                    self.lower.start((file, offset), EngineOp::Read, (bufs, stretch.len), token);
                }
                Source::Zero => {
                    for buf in bufs_of(&slot.bufs, at, stretch.len, whole, &mut self.bufs) {
                        // SAFETY: the buffer is valid by its maker's promise.
                        unsafe { buf.addr().write_bytes(0, buf.len()) };
                    }
                }
                Source::Compressed { layer, cluster, skip } => {
                    slot.pending += 1;
                    let unpack = Unpack { slot: index, at, len: stretch.len, skip };
                    let token = UNPACK | u64::from(self.unpacks.insert(unpack));
                    self.lower.job(Job::Unpack { layer, cluster }, token);
                }
            }
            at += stretch.len;
        }
        Ok(Step::Sent(bytes))
    }

    /// A compressed cluster is there.
    pub(super) fn unpacked(&mut self, unpack: u32, mut errno: i32, bytes: &[u8]) {
        let Some(Unpack { slot, at, len, skip }) = self.unpacks.remove(unpack) else { return };
        let start = skip as usize;
        let from = bytes.get(start..start.saturating_add(len as usize));
        if let Some(mut from) = from.filter(|_| errno == 0) {
            self.bufs.clear();
            part(&self.slots.get(slot).bufs, at, len, &mut self.bufs);
            for buf in &self.bufs {
                let (now, rest) = from.split_at(buf.len().min(from.len()));
                // SAFETY: the buffer is valid by its maker's promise, and at least so long.
                unsafe { std::ptr::copy(now.as_ptr(), buf.addr(), now.len()) };
                from = rest;
            }
        } else if errno == 0 {
            errno = libc::EIO;
        }
        self.transfer_ended(slot, errno);
    }

    /// Sends the start of what is left of a change.
    pub(super) fn send_change(
        &mut self,
        index: u32,
        range: Range<u64>,
    ) -> Result<Step, ImageError> {
        let change = match self.slots.get(index).op {
            Op::WriteZeroes => Change::Zero,
            Op::Discard => Change::Discard,
            _ => Change::Write,
        };
        self.pieces.clear();
        self.waiter.set_key(self.slots.key(index));
        let top = self.shared.chain.top();
        let guard = match top.resolve_write(range, change, &self.waiter, &mut self.pieces)? {
            Outcome::Ready(guard) => guard,
            Outcome::Miss(miss) => return Ok(Step::Miss(LayerMiss { layer: 0, miss })),
            Outcome::Busy => return Ok(Step::Busy),
        };
        let mut at = self.slots.get(index).sent;
        let bytes = self.pieces.iter().map(|p| p.len).sum();
        let Some(guard) = guard else {
            for i in 0..self.pieces.len() {
                let piece = self.pieces[i];
                self.send_in_place(index, at, &piece);
                at += piece.len;
            }
            return some(bytes);
        };
        self.slots.get_mut(index).pending += 1;
        // One for the time of sending.
        let group =
            Group { slot: index, guard: Some(guard), pending: 1, errno: 0, copies: Vec::new() };
        let group = self.groups.insert(group);
        let pieces = std::mem::take(&mut self.pieces);
        for piece in &pieces {
            self.send_piece(group, index, at, piece);
            at += piece.len;
        }
        self.pieces = pieces;
        self.group_ended(group, 0);
        some(bytes)
    }

    fn send_in_place(&mut self, index: u32, at: u64, piece: &Piece) {
        let Target::InPlace { file, offset } = piece.target else { return };
        let slot = self.slots.get_mut(index);
        slot.pending += 1;
        let token = TRANSFER_OF_SLOT | u64::from(index);
        let (op, carries) = engine_op(slot.op);
        let len = if carries { piece.len } else { 0 };
        let bufs = bufs_of(&slot.bufs, at, len, slot.len, &mut self.bufs);
        self.lower.start((file, offset), op, (bufs, piece.len), token);
    }

    fn send_piece(&mut self, group: u32, index: u32, at: u64, piece: &Piece) {
        match piece.target {
            Target::Nothing => {}
            Target::InPlace { file, offset } => {
                self.send_middle(group, index, (at, piece.len), (file, offset));
            }
            Target::New { file, offset, head, tail, fresh } => {
                let guest = self.slots.get(index).offset + at;
                let (before, after) = (guest - u64::from(head), guest + piece.len);
                let zero = self.reads_zero(before..guest)
                    && self.reads_zero(after..after + u64::from(tail));
                if zero && fresh == Fresh::Zeroes {
                    if self.slots.get(index).op != Op::WriteZeroes {
                        self.send_middle(group, index, (at, piece.len), (file, offset));
                    }
                    return;
                }
                self.bring_copy(
                    group,
                    (at, piece),
                    (before..guest, after..after + u64::from(tail)),
                    zero,
                );
            }
        }
    }

    /// The change's own bytes, without what a new cluster keeps around them.
    fn send_middle(&mut self, group: u32, index: u32, (at, len): (u64, u64), to: (u16, u64)) {
        let (op, carries) = engine_op(self.slots.get(index).op);
        let Some(g) = self.groups.get_mut(group) else { return };
        g.pending += 1;
        self.bufs.clear();
        if carries {
            part(&self.slots.get(index).bufs, at, len, &mut self.bufs);
        }
        self.lower.start(to, op, (&self.bufs, len), TRANSFER_OF_GROUP | u64::from(group));
    }

    /// Whether a range is known to read as zeroes without looking at data.
    fn reads_zero(&mut self, range: Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        let len = range.end - range.start;
        self.stretches.clear();
        let found = self.shared.chain.resolve(range, &mut self.scratch, &mut self.stretches);
        matches!(found, Ok(Found::Bytes(bytes)) if bytes == len)
            && self.stretches.iter().all(|s| s.source == Source::Zero)
    }

    /// Brings head and tail of a new cluster here, unless they are zeroes.
    fn bring_copy(
        &mut self,
        group: u32,
        (at, piece): (u64, &Piece),
        (head, tail): (Range<u64>, Range<u64>),
        zero: bool,
    ) {
        // Beyond the end of the disk a cluster's bytes are nobody's: zeroes.
        let size = self.shared.size();
        let (before, after) = (head.end - head.start, tail.end - tail.start);
        let mut memory = Memory::zeroes((before + after) as usize);
        let first = memory.addr();
        let (head_len, tail_len) = (before as u32, after as u32);
        let copy = self.copies.insert(Copy {
            group,
            memory,
            head: head_len,
            tail: tail_len,
            reads: 1,
            at,
            len: piece.len,
            target: piece.target,
        });
        let Some(g) = self.groups.get_mut(group) else { return };
        g.copies.push(copy);
        g.pending += 1;
        if !zero {
            for (range, skip) in [(head, 0), (tail, before as usize)] {
                let range = range.start.min(size)..range.end.min(size);
                if range.is_empty() {
                    continue;
                }
                let len = range.end - range.start;
                let owner = Owner::Copy { copy };
                let read = self.slots.take(owner, Op::Read, range.start, len);
                // SAFETY: inside the copy's memory, which lives until its group has ended.
                let buf = unsafe { IoBuf::new(first.add(skip), len as usize) };
                self.slots.get_mut(read).bufs.push(buf);
                if let Some(c) = self.copies.get_mut(copy) {
                    c.reads += 1;
                }
                self.advance(read);
            }
        }
        self.copy_arrived(copy, 0);
    }

    /// A read of a head or tail has ended.
    pub(super) fn copy_arrived(&mut self, copy: u32, errno: i32) {
        let Some(c) = self.copies.get_mut(copy) else { return };
        c.reads -= 1;
        let (group, left) = (c.group, c.reads);
        if let Some(g) = self.groups.get_mut(group)
            && g.errno == 0
        {
            g.errno = errno;
        }
        if left > 0 {
            return;
        }
        let failed = self.groups.get_mut(group).is_none_or(|g| g.errno != 0);
        if !failed {
            self.write_new(copy);
        }
        self.group_ended(group, 0);
    }

    /// Writes a new cluster: head, change, tail.
    fn write_new(&mut self, copy: u32) {
        let Some(c) = self.copies.get_mut(copy) else { return };
        let Target::New { file, offset, fresh, .. } = c.target else { return };
        let (group, at, len) = (c.group, c.at, c.len);
        let (head, tail) = (c.head as usize, c.tail as usize);
        let first = c.memory.addr();
        // SAFETY: the copy's memory, which lives until its group has ended.
        let [head, tail] = unsafe { [IoBuf::new(first, head), IoBuf::new(first.add(head), tail)] };
        let Some(g) = self.groups.get_mut(group) else { return };
        let index = g.slot;
        let start = offset - head.len() as u64;
        let token = TRANSFER_OF_GROUP | u64::from(group);
        let write = EngineOp::Write(Durability::Volatile);
        self.bufs.clear();
        self.bufs.push(head);
        let (_, carries) = engine_op(self.slots.get(index).op);
        if carries {
            part(&self.slots.get(index).bufs, at, len, &mut self.bufs);
            self.bufs.push(tail);
            if self.bufs.len() <= MAX_SEGMENTS {
                g.pending += 1;
                let all = head.len() as u64 + len + tail.len() as u64;
                return self.lower.start((file, start), write, (&self.bufs, all), token);
            }
        }
        for (buf, to) in [(head, start), (tail, offset + len)] {
            if !buf.is_empty() {
                g.pending += 1;
                self.lower.start((file, to), write, (&[buf], buf.len() as u64), token);
            }
        }
        if carries || fresh == Fresh::Unknown {
            self.send_middle(group, index, (at, len), (file, offset));
        }
    }

    /// A write of a group, or the sending of it, has ended.
    pub(super) fn group_ended(&mut self, group: u32, errno: i32) {
        let Some(g) = self.groups.get_mut(group) else { return };
        g.pending -= 1;
        if g.errno == 0 {
            g.errno = errno;
        }
        if g.pending > 0 {
            return;
        }
        let Some(g) = self.groups.remove(group) else { return };
        for copy in g.copies {
            self.copies.remove(copy);
        }
        if let Some(guard) = g.guard {
            match g.errno {
                0 => self.shared.chain.top().commit(guard),
                _ => self.shared.chain.top().abort(guard),
            }
        }
        self.transfer_ended(g.slot, g.errno);
    }
}

fn some(bytes: u64) -> Result<Step, ImageError> {
    if bytes == 0 {
        return Err(ImageError::Invalid("a write was resolved to nothing".into()));
    }
    Ok(Step::Sent(bytes))
}

/// What the engine does for an operation, and whether it carries the request's bytes.
fn engine_op(op: Op) -> (EngineOp, bool) {
    match op {
        Op::WriteZeroes => (EngineOp::Zero, false),
        Op::Discard => (EngineOp::Discard, false),
        _ => (EngineOp::Write(Durability::Volatile), true),
    }
}
