//! Requests that a filter holds back.

use std::collections::VecDeque;

use crate::disk::{DiskQueue, Full, IoBuf, Op, Request};

/// A request that waits: all that `submit` was given.
pub(super) struct Held {
    pub op: Op,
    pub offset: u64,
    pub len: u64,
    pub token: u64,
    bufs: Vec<IoBuf>,
}

impl Held {
    pub(super) fn of(r: &Request<'_>) -> Held {
        let Request { op, offset, len, token, .. } = *r;
        Held { op, offset, len, token, bufs: r.bufs.to_vec() }
    }
    /// As it was given.
    pub(super) fn request(&self) -> Request<'_> {
        Request {
            op: self.op,
            offset: self.offset,
            len: self.len,
            bufs: &self.bufs,
            token: self.token,
        }
    }
}

/// Requests that wait in their order. Lists of buffers are used again.
#[derive(Default)]
pub(super) struct Line {
    held: VecDeque<Held>,
    spare: Vec<Vec<IoBuf>>,
}

impl Line {
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
    pub(super) fn get(&self, at: usize) -> Option<&Held> {
        self.held.get(at)
    }
    /// Takes a request as the last one.
    pub(super) fn push(&mut self, r: &Request<'_>) {
        let mut bufs = self.spare.pop().unwrap_or_default();
        bufs.extend_from_slice(r.bufs);
        let Request { op, offset, len, token, .. } = *r;
        self.held.push_back(Held { op, offset, len, token, bufs });
    }
    /// Passes the first one on, if there is one and `below` has room.
    pub(super) fn pass(&mut self, below: &mut dyn DiskQueue) -> Result<(), Full> {
        if let Some(first) = self.held.front() {
            below.submit(&first.request())?;
        }
        self.drop_first();
        Ok(())
    }
    /// Forgets the first one; its token.
    pub(super) fn drop_first(&mut self) -> Option<u64> {
        let Held { mut bufs, token, .. } = self.held.pop_front()?;
        bufs.clear();
        self.spare.push(bufs);
        Some(token)
    }
}
