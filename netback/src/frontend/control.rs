//! The control ring's end in the guest: one request at a time.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::xenbus::queue::wait;
use hypervisor::{Access, DomId, EventChannel, GrantedPages, Guest};
use perf::Handle;
use rings::{FrontRing, Notify, Pending};
use rustix::event::{PollFd, PollFlags};

use crate::hash::{MAX_KEY, MAX_MAPPING};
use crate::negotiate::CtrlKeys;
use crate::proto::{
    CTRL_SET_HASH_ALGORITHM, CTRL_SET_HASH_FLAGS, CTRL_SET_HASH_KEY, CTRL_SET_HASH_MAPPING,
    CTRL_SET_HASH_MAPPING_SIZE, CTRL_STATUS_SUCCESS, Ctrl, CtrlRequest, CtrlResponse,
    HASH_ALGORITHM_TOEPLITZ,
};

/// How a guest wants packets to it spread over its queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashChoice {
    /// Over which parts of packets (`HASH_TYPE_*`).
    pub types: u32,
    /// The key of Toeplitz's hash, at most 40 bytes.
    pub key: Vec<u8>,
    /// A queue for each hash modulo the length, at most 128 of them.
    pub mapping: Vec<u32>,
}

/// See the module.
pub(super) struct Control {
    ring: FrontRing<Ctrl, Arc<dyn GrantedPages>>,
    memory: Arc<dyn GrantedPages>,
    /// What a request needs the backend to read.
    page: Arc<dyn GrantedPages>,
    channel: Box<dyn EventChannel>,
    patience: Duration,
    next: u16,
}

impl Control {
    pub(super) fn make(
        guest: &dyn Guest,
        backend: DomId,
        patience: Duration,
    ) -> io::Result<Control> {
        let memory = guest.grant(backend, 1, Access::ReadWrite)?;
        let ring = FrontRing::init(memory.clone(), Handle::default());
        let unfit =
            |e: rings::SizeError| io::Error::new(io::ErrorKind::InvalidInput, e.to_string());
        Ok(Control {
            ring: ring.map_err(unfit)?,
            memory,
            page: guest.grant(backend, 1, Access::ReadOnly)?,
            channel: guest.alloc_unbound(backend)?,
            patience,
            next: 0,
        })
    }

    pub(super) fn keys(&self) -> CtrlKeys {
        CtrlKeys { ring_ref: self.memory.refs()[0], port: self.channel.port() }
    }

    /// Asks, and waits for the answer.
    pub(super) fn ask(&mut self, kind: u16, data: [u32; 3]) -> io::Result<CtrlResponse> {
        let id = self.next;
        self.next = id.wrapping_add(1);
        let full = |_| io::Error::from(io::ErrorKind::WouldBlock);
        self.ring.push(&CtrlRequest { id, kind, data }).map_err(full)?;
        if self.ring.publish() == Notify::Send {
            self.channel.notify()?;
        }
        let end = Instant::now() + self.patience;
        loop {
            let taken = self.ring.take().map_err(io::Error::other)?;
            match taken {
                Some(answer) if (answer.id, answer.kind) == (id, kind) => return Ok(answer),
                // Of a request that was given up.
                Some(_) => continue,
                None => {}
            }
            if self.ring.arm().map_err(io::Error::other)? == Pending::Work {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            wait(&mut [PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::IN)], Some(left))?;
            if self.channel.acknowledge()? {
                self.ring.woken();
            }
        }
    }

    /// The same; whatever is no success is an error.
    fn must(&mut self, what: &str, kind: u16, data: [u32; 3]) -> io::Result<u32> {
        let answer = self.ask(kind, data)?;
        if answer.status == CTRL_STATUS_SUCCESS {
            return Ok(answer.data);
        }
        let text = format!("{what}: the backend answers with status {}", answer.status);
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }

    pub(super) fn page(&self) -> &Arc<dyn GrantedPages> {
        &self.page
    }

    pub(super) fn choose(&mut self, choice: &HashChoice) -> io::Result<()> {
        if choice.key.len() > MAX_KEY || choice.mapping.len() > MAX_MAPPING {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a key or table too long"));
        }
        let gref = self.page.refs()[0];
        self.must("hash algorithm", CTRL_SET_HASH_ALGORITHM, [HASH_ALGORITHM_TOEPLITZ, 0, 0])?;
        self.page.write(0, &choice.key);
        self.must("hash key", CTRL_SET_HASH_KEY, [gref, choice.key.len() as u32, 0])?;
        let entries = choice.mapping.len() as u32;
        self.must("size of the table", CTRL_SET_HASH_MAPPING_SIZE, [entries, 0, 0])?;
        if entries > 0 {
            let table: Vec<u8> = choice.mapping.iter().flat_map(|q| q.to_ne_bytes()).collect();
            self.page.write(0, &table);
            self.must("table of queues", CTRL_SET_HASH_MAPPING, [gref, entries, 0])?;
        }
        self.must("kinds of hash", CTRL_SET_HASH_FLAGS, [choice.types, 0, 0])?;
        Ok(())
    }
}
