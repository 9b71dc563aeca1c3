//! From the caller to the ring.

use blktap::{Full, IoBuf, MAX_SEGMENTS, Op, Request as DiskRequest};
use rings::PAGE_SIZE;
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::super::pages::{Chain, Cursor, Way};
use super::{Call, Payload, Queue};
use crate::proto::{
    self, Abi, Body, DISCARD_SECURE, DirectOp, Request, SECTOR, Segment, WireSegment,
};
use hypervisor::xenbus::front::Stage;

impl<A: Abi> Queue<A> {
    /// What can be said of a request without asking the backend.
    pub(super) fn judge(&self, r: &DiskRequest<'_>) -> Result<Payload, i32> {
        let errno = |e: Errno| Err(e.raw_os_error());
        match self.shared.health.stage() {
            Stage::Connected => {}
            Stage::Closing => return errno(Errno::NODEV),
            Stage::Broken => return errno(Errno::IO),
        }
        let info = &self.shared.info;
        if r.op == Op::Flush {
            return Ok(Payload::Without);
        }
        blktap::check_range(r, self.shared.sectors() * SECTOR, u64::from(info.disk.logical_block))?;
        if r.op != Op::Read && info.is_read_only() {
            return errno(Errno::ROFS);
        }
        match r.op {
            Op::Discard if info.disk.discard.is_none() => return errno(Errno::OPNOTSUPP),
            Op::SecureDiscard if !info.disk.secure_discard => return errno(Errno::OPNOTSUPP),
            Op::Discard | Op::SecureDiscard | Op::Flush => return Ok(Payload::Without),
            Op::WriteZeroes => return Ok(Payload::Zeroes),
            Op::Read | Op::Write | Op::WriteFua => {}
        }
        let sum = r.bufs.iter().try_fold(0u64, |sum, b| sum.checked_add(b.len() as u64));
        if sum != Some(r.len) || r.bufs.len() > MAX_SEGMENTS {
            return errno(Errno::INVAL);
        }
        Ok(if self.is_granted(r.bufs) { Payload::Granted } else { Payload::Copied })
    }

    /// Whether all of it lies, in whole sectors, in memory that the backend can reach.
    pub(super) fn is_granted(&self, bufs: &[IoBuf]) -> bool {
        let sectors = |n: usize| n.is_multiple_of(SECTOR as usize);
        !self.regions.is_empty()
            && bufs.iter().all(|b| {
                let whole = sectors(b.addr() as usize) && sectors(b.len());
                whole && self.regions.iter().any(|r| r.find(b.addr(), b.len()).is_some())
            })
    }

    pub(super) fn take_job(&mut self, r: &DiskRequest<'_>, payload: Payload) -> Result<u32, Full> {
        let number = self.free_jobs.pop().ok_or(Full)?;
        self.in_use += 1;
        let flush_after = r.op == Op::WriteFua && self.flush_op().is_some();
        let job = &mut self.jobs[number as usize];
        job.bufs.clear();
        job.bufs.extend(r.bufs.iter().filter(|b| !b.is_empty()));
        (job.used, job.op, job.token, job.payload) = (true, r.op, r.token, payload);
        (job.offset, job.len, job.issued) = (r.offset, r.len, 0);
        (job.calls, job.errno) = (0, 0);
        job.flush_after = flush_after;
        Ok(number)
    }

    pub(super) fn flush_op(&self) -> Option<DirectOp> {
        let info = &self.shared.info;
        match (info.flush, info.barrier) {
            (true, _) => Some(DirectOp::Flush),
            (false, true) => Some(DirectOp::Barrier),
            // Without either the disk has no cache that could be flushed.
            (false, false) => None,
        }
    }

    /// Puts as much of the staged job, and of flushes that wait, into the ring as there is room.
    pub(super) fn advance(&mut self) {
        while let Some(job) = self.flushes.last().copied() {
            if !self.push_flush(job) {
                return;
            }
            self.flushes.pop();
        }
        while let Some(job) = self.staged {
            if !self.push_part(job) {
                return;
            }
            let j = &self.jobs[job as usize];
            if j.issued == j.len {
                self.staged = None;
            }
        }
    }

    pub(super) fn push_flush(&mut self, job: u32) -> bool {
        let Some(op) = self.flush_op() else { return false };
        let body =
            Body::Direct { op, sector: 0, nr_segments: 0, segments: [Segment::default(); 11] };
        self.push(job, op.code(), Chain::EMPTY, 0, body)
    }

    /// The next part of a job; `false` where there is no room.
    pub(super) fn push_part(&mut self, number: u32) -> bool {
        let job = &self.jobs[number as usize];
        match job.op {
            Op::Flush => self.push_flush(number),
            Op::Discard | Op::SecureDiscard => {
                let flag = if job.op == Op::SecureDiscard { DISCARD_SECURE } else { 0 };
                let (sector, count, len) = (job.offset / SECTOR, job.len / SECTOR, job.len);
                let body = Body::Discard { sector, count, flag };
                self.push(number, proto::OP_DISCARD, Chain::EMPTY, len, body)
            }
            Op::Read => self.push_transfer(number, DirectOp::Read),
            Op::Write | Op::WriteFua | Op::WriteZeroes => {
                self.push_transfer(number, DirectOp::Write)
            }
        }
    }

    pub(super) fn push_transfer(&mut self, number: u32, op: DirectOp) -> bool {
        if self.ring.free() == 0 {
            return false;
        }
        let Some((chain, len)) = self.gather(number) else { return false };
        let job = &self.jobs[number as usize];
        if op == DirectOp::Write && job.payload == Payload::Copied {
            self.pages.copy(chain, &job.bufs, job.issued as usize, len as usize, Way::In);
        }
        let sector = (job.offset + job.issued) / SECTOR;
        let count = self.segments.len();
        if count <= proto::MAX_SEGMENTS {
            let mut segments = [Segment::default(); proto::MAX_SEGMENTS];
            segments[..count].copy_from_slice(&self.segments);
            let body = Body::Direct { op, sector, nr_segments: count as u8, segments };
            return self.push(number, op.code(), chain, len, body);
        }
        self.counters.indirect.add(1);
        self.table.clear();
        self.table.extend(self.segments.iter().map(|s| WireSegment::from(*s)));
        let table = self.pages.take(1);
        self.pages.write(table, self.table.as_bytes());
        let mut grefs = [0; proto::MAX_INDIRECT_PAGES];
        grefs[0] = self.pages.refs(table).next().unwrap_or(0);
        // Behind the payload, which is copied from the chain's beginning.
        let chain = self.pages.join(chain, table);
        let body = Body::Indirect { inner: op.code(), nr_segments: count as u16, sector, grefs };
        self.push(number, op.code(), chain, len, body)
    }

    /// Finds the segments of a job's next part: the pages taken for it and its bytes. `None`
    /// where there are not enough pages.
    pub(super) fn gather(&mut self, number: u32) -> Option<(Chain, u64)> {
        let job = &self.jobs[number as usize];
        let left = job.len - job.issued;
        self.segments.clear();
        if job.payload == Payload::Granted {
            // One more for a table.
            let room = self.pages.free() > 0;
            return room.then(|| (Chain::EMPTY, self.gather_granted(number)));
        }
        let len = left.min((self.max_segments * PAGE_SIZE) as u64);
        let count = (len as usize).div_ceil(PAGE_SIZE);
        let table = usize::from(count > proto::MAX_SEGMENTS);
        let owned = if job.payload == Payload::Copied { count } else { 0 };
        if owned + table > self.pages.free() {
            return None;
        }
        let chain = self.pages.take(owned);
        let zero = self.pages.refs(self.zeroes).next().unwrap_or(0);
        let refs = self.pages.refs(chain).chain(std::iter::repeat(zero));
        for (at, gref) in refs.take(count).enumerate() {
            let bytes = (len as usize - at * PAGE_SIZE).min(PAGE_SIZE);
            self.segments.push(segment(gref, 0, bytes));
        }
        Some((chain, len))
    }

    /// As [`gather`](Self::gather), of memory that is granted: each piece of a page a segment.
    pub(super) fn gather_granted(&mut self, number: u32) -> u64 {
        let job = &self.jobs[number as usize];
        let mut caller = Cursor::at(&job.bufs, job.issued as usize);
        let (mut len, left) = (0, (job.len - job.issued) as usize);
        while len < left && self.segments.len() < self.max_segments {
            let Some((addr, room)) = caller.room() else { break };
            let to_end = PAGE_SIZE - addr as usize % PAGE_SIZE;
            let bytes = room.min(to_end).min(left - len);
            let Some((gref, at)) = self.regions.iter().find_map(|r| r.find(addr, bytes)) else {
                break;
            };
            self.segments.push(segment(gref, at, bytes));
            caller.skip(bytes);
            len += bytes;
        }
        // A request ends at a whole block; segments are whole sectors.
        let block = self.shared.info.disk.logical_block as usize;
        while !len.is_multiple_of(block) {
            let Some(last) = self.segments.last_mut() else { break };
            let excess = (len % block).min(last.len());
            len -= excess;
            match last.len() - excess {
                0 => drop(self.segments.pop()),
                rest => *last = segment(last.gref, last.offset(), rest),
            }
        }
        len as u64
    }

    /// Writes one request into the ring.
    pub(super) fn push(
        &mut self,
        job: u32,
        operation: u8,
        chain: Chain,
        len: u64,
        body: Body,
    ) -> bool {
        let Some(number) = self.free_calls.last().copied().filter(|_| self.ring.free() > 0) else {
            self.pages.give(chain);
            return false;
        };
        let id = self.calls[number as usize].id;
        // One answer for each slot is in flight at most, so the ring has room.
        if self.ring.push(&A::encode(&Request { id, handle: 0, body })).is_err() {
            self.pages.give(chain);
            return false;
        }
        self.free_calls.pop();
        let j = &mut self.jobs[job as usize];
        let skip = j.issued;
        j.issued += len;
        j.calls += 1;
        self.calls[number as usize] = Call { id, used: true, operation, job, chain, skip, len };
        self.count(operation, len);
        true
    }

    pub(super) fn count(&self, operation: u8, len: u64) {
        let c = &self.counters;
        match operation {
            proto::OP_READ => {
                c.rd_req.add(1);
                c.rd_sect.add(len / SECTOR);
            }
            proto::OP_WRITE => {
                c.wr_req.add(1);
                c.wr_sect.add(len / SECTOR);
            }
            proto::OP_DISCARD => c.ds_req.add(1),
            proto::OP_WRITE_BARRIER => c.barriers.add(1),
            _ => c.f_req.add(1),
        }
    }
}

fn segment(gref: u32, at: usize, bytes: usize) -> Segment {
    let first = at / SECTOR as usize;
    let last = first + bytes / SECTOR as usize - 1;
    Segment { gref, first_sect: first as u8, last_sect: last as u8 }
}
