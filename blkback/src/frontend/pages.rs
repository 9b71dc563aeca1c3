//! A queue's granted pages: payload passes through them, and indirect tables lie in them.
// Payload is copied between the caller's memory and granted pages, both by address.
#![allow(unsafe_code)]

use std::ptr;
use std::sync::Arc;

use blktap::IoBuf;
use hypervisor::{GrantRef, GrantedPages};
use rings::PAGE_SIZE;

/// No page.
const NONE: u32 = u32::MAX;

/// Pages that belong together, in order, as a list through [`Pages::next`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Chain {
    first: u32,
    last: u32,
    count: u32,
}

impl Chain {
    /// Without pages.
    pub(super) const EMPTY: Chain = Chain { first: NONE, last: NONE, count: 0 };
}

/// Where the payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// From the caller into the pages.
    In,
    /// From the pages to the caller.
    Out,
}

/// Granted pages, all of them granted for as long as the queue lives.
pub(super) struct Pages {
    granted: Arc<dyn GrantedPages>,
    next: Vec<u32>,
    free: Chain,
}

impl Pages {
    pub(super) fn new(granted: Arc<dyn GrantedPages>) -> Pages {
        let count = granted.refs().len() as u32;
        let next = (1..=count).map(|n| if n == count { NONE } else { n }).collect();
        Pages { granted, next, free: Chain { first: 0, last: count - 1, count } }
    }

    /// How many are free.
    pub(super) fn free(&self) -> usize {
        self.free.count as usize
    }

    /// Takes `count` pages; the caller has looked whether there are so many.
    pub(super) fn take(&mut self, count: usize) -> Chain {
        let count = count as u32;
        if count == 0 || count > self.free.count {
            return Chain::EMPTY;
        }
        let first = self.free.first;
        let last = (1..count).fold(first, |page, _| self.next[page as usize]);
        self.free.first = self.next[last as usize];
        self.free.count -= count;
        self.next[last as usize] = NONE;
        Chain { first, last, count }
    }

    /// Gives pages back; they are the next to be taken.
    pub(super) fn give(&mut self, chain: Chain) {
        if chain.count == 0 {
            return;
        }
        self.next[chain.last as usize] = self.free.first;
        if self.free.count == 0 {
            self.free.last = chain.last;
        }
        self.free.first = chain.first;
        self.free.count += chain.count;
    }

    /// One chain of two.
    pub(super) fn join(&mut self, head: Chain, tail: Chain) -> Chain {
        if head.count == 0 {
            return tail;
        }
        if tail.count == 0 {
            return head;
        }
        self.next[head.last as usize] = tail.first;
        Chain { first: head.first, last: tail.last, count: head.count + tail.count }
    }

    /// The references of a chain, in order.
    pub(super) fn refs(&self, chain: Chain) -> impl Iterator<Item = GrantRef> + '_ {
        self.numbers(chain).map(|page| self.granted.refs()[page as usize])
    }

    fn numbers(&self, chain: Chain) -> impl Iterator<Item = u32> + '_ {
        let first = (chain.count > 0).then_some(chain.first);
        let next = |page: &u32| Some(self.next[*page as usize]).filter(|n| *n != NONE);
        std::iter::successors(first, next).take(chain.count as usize)
    }

    /// Writes to the first page of a chain.
    pub(super) fn write(&self, chain: Chain, bytes: &[u8]) {
        self.granted.write(chain.first as usize * PAGE_SIZE, bytes);
    }

    /// Copies `len` bytes between a chain and the caller's memory, whose first `skip` bytes are
    /// left out.
    pub(super) fn copy(&self, chain: Chain, bufs: &[IoBuf], skip: usize, len: usize, way: Way) {
        let mut caller = Cursor::at(bufs, skip);
        let mut left = len;
        for page in self.numbers(chain) {
            let mut at = 0;
            while at < PAGE_SIZE && left > 0 {
                let Some((addr, room)) = caller.room() else { return };
                let some = room.min(PAGE_SIZE - at).min(left);
                // SAFETY: the page lies in the granted run; `addr` has room for `some` bytes and
                // is valid until the request is done, as the maker of the IoBuf promised. No
                // reference is made to either: others may change them.
                unsafe {
                    let page = self.granted.base().add(page as usize * PAGE_SIZE + at);
                    match way {
                        Way::In => ptr::copy(addr, page, some),
                        Way::Out => ptr::copy(page, addr, some),
                    }
                }
                caller.skip(some);
                (at, left) = (at + some, left - some);
            }
        }
    }
}

/// A place in a list of buffers.
pub(super) struct Cursor<'a> {
    bufs: &'a [IoBuf],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn at(bufs: &'a [IoBuf], skip: usize) -> Cursor<'a> {
        let mut cursor = Cursor { bufs, at: 0 };
        cursor.skip(skip);
        cursor
    }
    /// The rest of the present buffer.
    pub(super) fn room(&mut self) -> Option<(*mut u8, usize)> {
        let buf = self.bufs.first()?;
        Some((buf.addr().wrapping_add(self.at), buf.len() - self.at))
    }
    /// Goes on by `bytes`.
    pub(super) fn skip(&mut self, bytes: usize) {
        self.at += bytes;
        while let Some(buf) = self.bufs.first()
            && self.at >= buf.len()
        {
            self.at -= buf.len();
            self.bufs = &self.bufs[1..];
        }
    }
}

/// Memory of the caller's that is granted already.
#[derive(Clone)]
pub(super) struct Region {
    granted: Arc<dyn GrantedPages>,
    start: usize,
}

impl Region {
    pub(super) fn new(granted: Arc<dyn GrantedPages>) -> Region {
        let start = granted.base() as usize;
        Region { granted, start }
    }
    /// The reference of the page at an address and its place in the page, if `len` bytes from
    /// there lie in it.
    pub(super) fn find(&self, addr: *mut u8, len: usize) -> Option<(GrantRef, usize)> {
        let offset = (addr as usize).checked_sub(self.start)?;
        let fits = offset.checked_add(len)? <= self.granted.len();
        fits.then(|| (self.granted.refs()[offset / PAGE_SIZE], offset % PAGE_SIZE))
    }
}
