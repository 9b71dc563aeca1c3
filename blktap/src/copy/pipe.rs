//! Buffers, and the channels between the threads of a copy, whose receivers can be waited for
//! beside a queue's completions.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crossbeam::channel::{self, TryRecvError};
use rustix::event::{EventfdFlags, eventfd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{CopyError, Piece};

#[repr(C, align(4096))]
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
struct Page([u8; 4096]);

/// Memory that every disk takes without copying.
pub(super) struct Buffer(Vec<Page>);

impl Buffer {
    fn new(len: usize) -> Buffer {
        Buffer(vec![Page([0; 4096]); len.div_ceil(4096)])
    }
    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_slice().as_bytes()
    }
    pub(super) fn addr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// Sends, and wakes who waits for the other end. Dropping it wakes as well.
pub(super) struct Sender<T> {
    channel: Option<channel::Sender<T>>,
    event: Arc<OwnedFd>,
}

/// The end that is waited for.
pub(super) struct Receiver<T> {
    channel: channel::Receiver<T>,
    event: Arc<OwnedFd>,
}

/// What a look at a channel shows.
pub(super) enum Next<T> {
    Item(T),
    Nothing,
    /// The sender is gone and all was received.
    End,
}

fn channel<T>() -> io::Result<(Sender<T>, Receiver<T>)> {
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    let event = Arc::new(eventfd(0, flags)?);
    // Never holds more than there are buffers.
    let (send, receive) = channel::unbounded();
    let sender = Sender { channel: Some(send), event: Arc::clone(&event) };
    Ok((sender, Receiver { channel: receive, event }))
}

impl<T> Sender<T> {
    /// `false`: the receiver is gone.
    pub(super) fn send(&self, item: T) -> bool {
        let sent = self.channel.as_ref().is_some_and(|c| c.send(item).is_ok());
        self.wake();
        sent
    }
    fn wake(&self) {
        // It can only fail when its count is full, and then it is readable.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.channel = None;
        self.wake();
    }
}

impl<T> Receiver<T> {
    pub(super) fn next(&self) -> Next<T> {
        match self.channel.try_recv() {
            Ok(item) => Next::Item(item),
            Err(TryRecvError::Empty) => Next::Nothing,
            Err(TryRecvError::Disconnected) => Next::End,
        }
    }
    /// Sleeps until there is something or the sender is gone; `None`: it is gone.
    pub(super) fn wait(&self, limit: std::time::Duration) -> Next<T> {
        match self.channel.recv_timeout(limit) {
            Ok(item) => Next::Item(item),
            Err(channel::RecvTimeoutError::Timeout) => Next::Nothing,
            Err(channel::RecvTimeoutError::Disconnected) => Next::End,
        }
    }
    /// Readable when something was sent since the last [`calm`](Self::calm).
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
    /// Call it before looking, so that nothing sent later is missed.
    pub(super) fn calm(&self) {
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
    }
}

/// What a reader holds of the pipes.
pub(super) struct ReaderEnds {
    pub(super) free: Receiver<Buffer>,
    pub(super) read: Sender<Result<Piece, CopyError>>,
}

/// What the other side holds.
pub(super) struct Ends {
    pub(super) free: Sender<Buffer>,
    pub(super) read: Receiver<Result<Piece, CopyError>>,
}

/// A pair of pipes with `count` buffers of `size` bytes in it.
pub(super) fn ends(count: u32, size: usize) -> io::Result<(ReaderEnds, Ends)> {
    let (give, free) = channel()?;
    let (read, receive) = channel()?;
    for _ in 0..count {
        give.send(Buffer::new(size));
    }
    Ok((ReaderEnds { free, read }, Ends { free: give, read: receive }))
}
