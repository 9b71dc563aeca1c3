//! One request at a time, for commands and tests: submit, wait, answer. Data is copied through
//! memory of its own, so that no failure of the queue can leave the kernel with the caller's.
// Gives the queue the address of that memory.
#![allow(unsafe_code)]

use std::io;

use crate::disk::{DiskQueue, IoBuf, Op, Request};

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// Fills `into` from `offset` on.
pub fn read_at(queue: &mut dyn DiskQueue, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let pages = transfer(queue, Op::Read, offset, pages_for(into.len()), into.len())?;
    for (to, from) in into.chunks_mut(4096).zip(&pages) {
        to.copy_from_slice(&from.0[..to.len()]);
    }
    Ok(())
}

/// Writes `from` at `offset`.
pub fn write_at(queue: &mut dyn DiskQueue, offset: u64, from: &[u8]) -> io::Result<()> {
    let mut pages = pages_for(from.len());
    for (to, from) in pages.iter_mut().zip(from.chunks(4096)) {
        to.0[..from.len()].copy_from_slice(from);
    }
    transfer(queue, Op::Write, offset, pages, from.len()).map(drop)
}

/// Makes everything that was written before durable.
pub fn flush(queue: &mut dyn DiskQueue) -> io::Result<()> {
    range(queue, Op::Flush, 0, 0)
}

/// Carries out a request without data: flush, discard, secure discard, zeroing.
pub fn range(queue: &mut dyn DiskQueue, op: Op, offset: u64, len: u64) -> io::Result<()> {
    answer(perform(queue, &Request { op, offset, len, bufs: &[], token: 0 })?)
}

fn pages_for(len: usize) -> Vec<Page> {
    vec![Page([0; 4096]); len.div_ceil(4096)]
}

fn transfer(
    queue: &mut dyn DiskQueue,
    op: Op,
    offset: u64,
    mut pages: Vec<Page>,
    len: usize,
) -> io::Result<Vec<Page>> {
    // SAFETY: `pages` stays until the request is done: if the queue fails before, it is leaked.
    let buf = unsafe { IoBuf::new(pages.as_mut_ptr().cast(), len) };
    let request = Request { op, offset, len: len as u64, bufs: &[buf], token: 0 };
    match perform(queue, &request) {
        Ok(errno) => answer(errno).map(|()| pages),
        Err(e) => {
            pages.leak();
            Err(e)
        }
    }
}

/// Carries out one request. `Err`: the queue failed, and may still have it.
fn perform(queue: &mut dyn DiskQueue, request: &Request<'_>) -> io::Result<i32> {
    if queue.in_flight() != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the queue has other requests"));
    }
    queue.submit(request).map_err(|_| io::Error::other("the queue has no room"))?;
    let mut done = Vec::with_capacity(1);
    loop {
        queue.poll(&mut done)?;
        match done.first() {
            Some(d) => return Ok(d.errno),
            None => queue.wait(&[], None)?,
        };
    }
}

fn answer(errno: i32) -> io::Result<()> {
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
}
