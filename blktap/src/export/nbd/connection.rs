//! One connection: a thread with a queue of the disk. It receives many requests at once, submits
//! them together, and sends all replies that are ready in one call, payload from where the disk
//! has put it; in between it sleeps for the socket and for completions in one call.

mod input;
mod poller;
mod replies;
mod requests;
mod slots;
mod unaligned;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::handshake::{Context, Session};
use super::negotiate::Agreed;
use super::request::{Terms, Unreadable};
use super::server::Export;
use super::status::{StatusThread, Subject};
use super::transport::Transport;
use crate::disk::{DiskQueue, Done};
use input::{Input, Received};
use poller::Poller;
pub use slots::SLOTS;
use slots::Slots;

/// How long a client may take to read its last replies when the server ends.
const PARTING: Duration = Duration::from_secs(5);

/// Why a connection was ended by this side.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The handshake went wrong.
    #[error("handshake: {0}")]
    Handshake(#[from] super::handshake::Broken),
    /// The handshake took too long.
    #[error("the handshake was not done within {} s", .0.as_secs_f32())]
    Late(Duration),
    /// Bytes that were to be encrypted were not.
    #[error("unencrypted bytes behind NBD_OPT_STARTTLS")]
    Unencrypted,
    /// No queue for the disk.
    #[error("opening a queue of the disk: {0}")]
    Queue(io::Error),
    /// A request that cannot be read.
    #[error("{0}")]
    Request(#[from] Unreadable),
    /// The disk's queue is broken.
    #[error("the disk's queue: {0}")]
    Disk(io::Error),
    /// No memory, no thread, no descriptor.
    #[error("out of resources: {0}")]
    Resources(io::Error),
    /// The socket, or TLS on it.
    #[error("{0}")]
    Socket(io::Error),
    /// The server ends and the client does not read.
    #[error("the client did not read its replies within {} s", PARTING.as_secs())]
    Stuck,
}

/// What the connection still takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Open,
    /// The client is done, or the server is: what is in flight ends.
    Closing,
}

/// See the module.
pub(super) struct Connection<'a> {
    // Dropped first: then nobody uses the slots' memory any more.
    queue: Box<dyn DiskQueue>,
    slots: Slots,
    transport: Transport,
    input: Input,
    terms: Terms,
    contexts: Vec<Context>,
    export: &'a Export,
    /// The disk's unit.
    block: u32,
    /// Whether zeroing by discard is right.
    punches: bool,
    /// The write whose payload is being received, and how much of it is there.
    receiving: Option<(u32, usize)>,
    /// Whether the last receive has brought something, and whether there may be more that no
    /// descriptor tells of.
    came: bool,
    more: bool,
    /// Bytes of a refused write that are to be skipped.
    skip: usize,
    /// Slots that the queue had no room for.
    waiting: VecDeque<u32>,
    /// Replies in their order, and how much of the first one is sent.
    out: VecDeque<u32>,
    sent: usize,
    done: Vec<Done>,
    status: Option<StatusThread>,
    poller: Poller,
    wake: Arc<OwnedFd>,
    stop: BorrowedFd<'a>,
    mode: Mode,
    stopped: Option<Instant>,
    requests: u64,
}

impl<'a> Connection<'a> {
    /// After the handshake.
    pub fn new(
        transport: Transport,
        agreed: Agreed,
        export: &'a Export,
        stop: BorrowedFd<'a>,
    ) -> Result<Self, Cause> {
        let Session { terms, contexts, .. } = agreed.session;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Connection {
            queue: agreed.queue,
            slots: Slots::new(),
            transport,
            input: Input::new(&agreed.rest),
            terms,
            contexts,
            punches: Self::punches(&*export.disk),
            block: export.disk.geometry().logical_block,
            export,
            receiving: None,
            came: false,
            more: true,
            skip: 0,
            waiting: VecDeque::with_capacity(SLOTS as usize),
            out: VecDeque::with_capacity(SLOTS as usize),
            sent: 0,
            done: Vec::with_capacity(SLOTS as usize),
            status: None,
            poller: Poller::new(),
            wake: Arc::new(wake.map_err(|e| Cause::Resources(e.into()))?),
            stop,
            mode: Mode::Open,
            stopped: None,
            requests: 0,
        })
    }

    /// Serves until either side is done: how many requests there were.
    pub fn run(&mut self) -> Result<u64, Cause> {
        loop {
            let taking = self.parse()?;
            self.complete()?;
            let freed = self.send()?;
            if freed && !taking {
                // What had no slot may have one now.
                continue;
            }
            if self.mode == Mode::Closing && self.slots.are_idle() {
                self.transport.close();
                return Ok(self.requests);
            }
            let taking = taking && self.mode == Mode::Open;
            if self.more && taking {
                self.receive()?;
                continue;
            }
            let mut poller = std::mem::replace(&mut self.poller, Poller::new());
            let found = poller.poll(|| self.look(taking));
            self.poller = poller;
            if !found? {
                self.sleep(taking)?;
            }
        }
    }

    /// Looks once whether there is something to do.
    fn look(&mut self, taking: bool) -> Result<bool, Cause> {
        self.queue.poll(&mut self.done).map_err(Cause::Disk)?;
        if !self.done.is_empty() {
            return Ok(true);
        }
        if !taking {
            return Ok(false);
        }
        self.receive()?;
        Ok(self.came)
    }

    /// Waits for something to do, or for bytes from the client.
    fn sleep(&mut self, taking: bool) -> Result<(), Cause> {
        if !self.waiting.is_empty() && self.queue.in_flight() == 0 {
            return Ok(());
        }
        let fds = [self.wake.as_fd(), self.transport.as_fd(), self.stop];
        // In the order of their numbers: the first is always there, the last only in time.
        let (fds, socket, stop) = match (taking, self.mode) {
            (true, _) => (&fds[..], 1, 2),
            (false, Mode::Open) => (&[fds[0], fds[2]][..], u8::MAX, 1),
            (false, Mode::Closing) => (&fds[..1], u8::MAX, u8::MAX),
        };
        let ready = self.queue.wait(fds, None).map_err(Cause::Disk)?;
        let is = |bit: u8| bit < 64 && ready & 1 << bit != 0;
        if is(0) {
            self.collect_status()?;
        }
        if is(stop) {
            self.end_for_server();
        }
        self.more |= is(socket) && self.mode == Mode::Open;
        Ok(())
    }

    /// Receives what is there.
    fn receive(&mut self) -> Result<(), Cause> {
        let payload = match self.receiving {
            Some((slot, got)) => {
                let slot = self.slots.get_mut(slot);
                &mut slot.memory.bytes_mut()[got..slot.len as usize]
            }
            None => &mut [],
        };
        let received = self.input.receive(&mut self.transport, payload);
        let (received, more) = received.map_err(Cause::Socket)?;
        (self.came, self.more) = (received != Received::Nothing, more);
        match (received, &mut self.receiving) {
            (Received::Payload(n), Some((_, got))) => *got += n,
            (Received::End, _) => {
                self.mode = Mode::Closing;
                self.forget_partial();
            }
            _ => {}
        }
        Ok(())
    }

    /// A write that is not whole is none.
    fn forget_partial(&mut self) {
        if let Some((slot, _)) = self.receiving.take() {
            self.slots.give_back(slot);
        }
    }

    /// Nothing that is not yet on its way is taken any more.
    fn end_input(&mut self) {
        self.mode = Mode::Closing;
        self.forget_partial();
        self.input.skip(usize::MAX);
    }

    fn end_for_server(&mut self) {
        self.queue.hurry();
        self.end_input();
        self.stopped = Some(Instant::now() + PARTING);
    }

    fn collect_status(&mut self) -> Result<(), Cause> {
        let mut count = [0; 8];
        // Read before the answers: what comes after it wakes again.
        match rustix::io::read(&self.wake, &mut count) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(e) => return Err(Cause::Resources(e.into())),
        }
        while let Some((slot, told)) = self.status.as_ref().and_then(StatusThread::answer) {
            if self.slots.get(slot).memory.len() < told.len()
                && !self.slots.grow(slot, told.len()).map_err(Cause::Resources)?
            {
                self.reply(slot, libc::ENOMEM);
                continue;
            }
            let target = self.slots.get_mut(slot);
            target.memory.bytes_mut()[..told.len()].copy_from_slice(&told);
            target.reply_memory(told.len());
            self.out.push_back(slot);
        }
        Ok(())
    }

    fn status(&mut self) -> io::Result<&StatusThread> {
        if self.status.is_none() {
            let subject =
                Subject { disk: Arc::clone(&self.export.disk), contexts: self.contexts.clone() };
            self.status = Some(StatusThread::start(subject, Arc::clone(&self.wake))?);
        }
        self.status.as_ref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}
