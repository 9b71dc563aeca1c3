//! The frontend's side of xenbus: pieces that a frontend puts together, each of which reads or
//! writes a few keys. [`BlkFront`](super::BlkFront) uses them in order; who wants to misbehave
//! uses some of them.

use std::io;
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, after, select};
use hypervisor::DomId;
use hypervisor::store::{Client, Error, Tx, Watched};
use hypervisor::xenbus::{Key, State};

use crate::negotiate::{Accepted, DiskKeys, Offer, Unusable};
use crate::proto::SECTOR;

/// How often a state is looked at even if no watch fires.
const LOOK: Duration = Duration::from_millis(100);

/// A device's two directories, as the frontend finds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The frontend's directory, below the domain's own.
    pub front: String,
    /// The backend's directory.
    pub back: String,
    /// The backend's domain.
    pub backend: DomId,
}

impl Node {
    /// Reads where the backend of the block device `devid` is. NotFound: there is no such device.
    pub fn find(store: &Client, devid: u32) -> io::Result<Node> {
        let front = format!("device/vbd/{devid}");
        let missing = |key: &str| {
            io::Error::new(io::ErrorKind::NotFound, format!("{front}/{key} is not in xenstore"))
        };
        let back = store.get(&format!("{front}/backend"))?.ok_or_else(|| missing("backend"))?;
        let id = store.get(&format!("{front}/backend-id"))?;
        let backend = id.and_then(|id| id.trim().parse().ok());
        Ok(Node { backend: backend.ok_or_else(|| missing("backend-id"))?, front, back })
    }

    /// The backend's state; `Unknown` when its directory is gone.
    pub fn backend_state(&self, store: &Client) -> Result<State, Error> {
        let state = store.get(&format!("{}/state", self.back))?;
        Ok(state.map_or(State::Unknown, |s| State::parse(&s)))
    }

    /// The frontend's own state.
    pub fn own_state(&self, store: &Client) -> Result<State, Error> {
        let state = store.get(&format!("{}/state", self.front))?;
        Ok(state.map_or(State::Unknown, |s| State::parse(&s)))
    }

    /// Writes the frontend's state.
    pub fn set_state(&self, store: &Client, state: State) -> Result<(), Error> {
        store.write(Tx::NONE, &format!("{}/state", self.front), state.to_string())
    }

    /// Waits until the backend's state is one that `wanted` likes. TimedOut after `patience`,
    /// with what the backend has written to its error node, if it has.
    pub fn wait_backend(
        &self,
        store: &Client,
        patience: Duration,
        wanted: impl Fn(State) -> bool,
    ) -> io::Result<State> {
        let token = "wait-backend";
        let path = format!("{}/state", self.back);
        store.watch(&path, token)?;
        let result = self.wait_watched(store, patience, wanted);
        store.unwatch(&path, token)?;
        result
    }

    fn wait_watched(
        &self,
        store: &Client,
        patience: Duration,
        wanted: impl Fn(State) -> bool,
    ) -> io::Result<State> {
        let end = Instant::now() + patience;
        loop {
            let state = self.backend_state(store)?;
            if wanted(state) {
                return Ok(state);
            }
            if Instant::now() >= end {
                let text = format!("{}: the backend stays in state {state}", self.front);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            if bell(store, LOOK) && store.inbox().take().contains(&Watched::Closed) {
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, "xenstored is gone"));
            }
        }
    }

    /// What the backend offers; it must be in state 2 or beyond.
    pub fn offer(&self, store: &Client) -> Result<Offer, Unusable> {
        Offer::read(|key| self.back_key(store, key))
    }

    /// What the backend says of its disk; it must be in state 4.
    fn disk(&self, store: &Client) -> Result<DiskKeys, Unusable> {
        DiskKeys::read(|key| self.back_key(store, key))
    }

    fn back_key(&self, store: &Client, key: &str) -> Option<String> {
        store.get(&format!("{}/{key}", self.back)).ok().flatten()
    }
}

/// Waits for the inbox's bell for up to `limit`; whether it rang.
pub(super) fn bell(store: &Client, limit: Duration) -> bool {
    match store.inbox().bell().recv_timeout(limit) {
        Ok(()) => true,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
    }
}

/// Which keys a frontend knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeySet {
    /// Those of today's blkfront.
    All,
    /// `ring-ref`, `event-channel` and `protocol` alone, as the first frontends.
    Essential,
}

/// What a frontend writes before state 3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// What it has chosen.
    pub accepted: Accepted,
    /// Which keys it knows.
    pub keys: KeySet,
}

impl Chosen {
    /// The keys, below the frontend's directory.
    pub fn keys(&self) -> Vec<Key> {
        let mut keys = self.accepted.front_keys();
        if self.keys == KeySet::Essential {
            keys.retain(|(key, _)| key != "feature-persistent");
        }
        keys
    }

    /// Writes the keys and state 3 in one transaction, after removing what an earlier life of
    /// the frontend left.
    pub fn write(&self, store: &Client, node: &Node) -> Result<(), Error> {
        store.transaction(|tx| {
            for name in store.list(tx, &node.front)? {
                if is_choice(&name) {
                    store.remove(tx, &format!("{}/{name}", node.front))?;
                }
            }
            for (key, value) in self.keys() {
                store.write(tx, &format!("{}/{key}", node.front), value)?;
            }
            store.write(tx, &format!("{}/state", node.front), State::Initialised.to_string())
        })
    }
}

fn is_choice(name: &str) -> bool {
    let one_of = ["protocol", "feature-persistent", "event-channel", "multi-queue-num-queues"];
    let pages = ["ring-page-order", "num-ring-pages"];
    one_of.contains(&name)
        || pages.contains(&name)
        || name.starts_with("ring-ref")
        || name.starts_with("queue-")
}

/// What a connected backend says of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// The disk.
    pub disk: DiskKeys,
    /// `feature-flush-cache`
    pub flush: bool,
    /// `feature-barrier`
    pub barrier: bool,
}

impl DiskInfo {
    /// Reads the backend's keys; it must be in state 4. InvalidData: they make no disk.
    pub fn read(store: &Client, node: &Node) -> io::Result<DiskInfo> {
        let bad = |e: Unusable| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", node.front))
        };
        let offer = node.offer(store).map_err(bad)?;
        let disk = node.disk(store).map_err(bad)?;
        Ok(DiskInfo { disk, flush: offer.flush, barrier: offer.barrier })
    }
    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.disk.read_only || self.disk.cdrom
    }
}

/// Closes a device politely: 5, the backend's 5, 6, the backend's 6.
pub fn close(store: &Client, node: &Node, patience: Duration) -> io::Result<()> {
    let gone = |s| matches!(s, State::Closed | State::Unknown);
    node.set_state(store, State::Closing)?;
    node.wait_backend(store, patience, |s| s == State::Closing || gone(s))?;
    node.set_state(store, State::Closed)?;
    node.wait_backend(store, patience, gone).map(drop)
}

/// What the watcher of a connected device reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// The backend is connected; the disk has so many sectors.
    Sectors(u64),
    /// The backend wants to close.
    Closing,
    /// The backend has closed, or is gone.
    Closed,
    /// xenstored is gone.
    NoStore,
}

/// Watches a connected backend until `stop` closes or `tell` says that it is enough.
pub(super) fn watch(
    store: &Client,
    node: &Node,
    stop: &crossbeam::channel::Receiver<()>,
    mut tell: impl FnMut(News),
) -> Result<(), Error> {
    store.watch(&node.back, "backend")?;
    let inbox = store.inbox().clone();
    loop {
        select! {
            recv(stop) -> _ => return Ok(()),
            recv(inbox.bell()) -> _ => {}
            recv(after(Duration::from_secs(5))) -> _ => {}
        }
        if inbox.take().contains(&Watched::Closed) {
            tell(News::NoStore);
            return Ok(());
        }
        match node.backend_state(store)? {
            State::Connected => {
                if let Ok(disk) = node.disk(store) {
                    let sectors = disk.size / SECTOR;
                    tell(News::Sectors(sectors));
                }
            }
            State::Closing => tell(News::Closing),
            State::Closed | State::Unknown => tell(News::Closed),
            _ => {}
        }
    }
}
