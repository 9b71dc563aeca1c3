//! The frontend's side of xenbus: pieces that a frontend puts together, each of which reads or
//! writes a few keys. [`BlkFront`](super::BlkFront) uses them in order; who wants to misbehave
//! uses some of them.

use std::io;
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, after, select};
use hypervisor::DomId;
use hypervisor::store::{Client, Error, Tx, Watched};
use hypervisor::xenbus::{Key, State};

use crate::negotiate::{Protocol, QueueKeys};
use crate::proto::{Abi, Native, VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE, X86_32, X86_64};

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

    fn number(&self, store: &Client, key: &str) -> Result<Option<u64>, Error> {
        let text = store.get(&format!("{}/{key}", self.back))?;
        Ok(text.and_then(|text| text.trim().parse().ok()))
    }
}

/// Waits for the inbox's bell for up to `limit`; whether it rang.
pub(super) fn bell(store: &Client, limit: Duration) -> bool {
    match store.inbox().bell().recv_timeout(limit) {
        Ok(()) => true,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
    }
}

/// What a backend offers before rings are made; what it does not say is not offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// `feature-persistent`
    pub persistent: bool,
    /// `feature-max-indirect-segments`, 0 without.
    pub max_indirect_segments: u32,
    /// `max-ring-page-order`, or the older `max-ring-pages`.
    pub max_ring_page_order: u32,
    /// `multi-queue-max-queues`, at least 1.
    pub max_queues: u32,
}

impl Offered {
    /// Reads the backend's keys; it must be in state 2.
    pub fn read(store: &Client, node: &Node) -> Result<Offered, Error> {
        let number = |key| -> Result<Option<u32>, Error> {
            Ok(node.number(store, key)?.and_then(|n| u32::try_from(n).ok()))
        };
        let order = match number("max-ring-page-order")? {
            Some(order) => order,
            None => number("max-ring-pages")?.unwrap_or(1).max(1).ilog2(),
        };
        Ok(Offered {
            persistent: number("feature-persistent")? == Some(1),
            max_indirect_segments: number("feature-max-indirect-segments")?.unwrap_or(0),
            max_ring_page_order: order,
            max_queues: number("multi-queue-max-queues")?.unwrap_or(1).max(1),
        })
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
    /// The layout of its requests.
    pub protocol: Protocol,
    /// Whether it keeps its grants.
    pub persistent: bool,
    /// Its queues.
    pub queues: Vec<QueueKeys>,
    /// Which keys it knows.
    pub keys: KeySet,
}

/// The value of `protocol`.
pub fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::X86_64 => X86_64::PROTOCOL,
        Protocol::X86_32 => X86_32::PROTOCOL,
        Protocol::Native => Native::PROTOCOL,
    }
}

impl Chosen {
    /// The keys, below the frontend's directory.
    pub fn keys(&self) -> Vec<Key> {
        let mut keys = vec![("protocol".to_owned(), protocol_name(self.protocol).to_owned())];
        let many = self.queues.len() > 1;
        if self.keys == KeySet::All {
            let mut add = |key: &str, value: usize| keys.push((key.to_owned(), value.to_string()));
            add("feature-persistent", usize::from(self.persistent));
            let pages = self.queues.first().map_or(1, |q| q.ring_refs.len());
            if pages > 1 {
                add("ring-page-order", pages.ilog2() as usize);
                add("num-ring-pages", pages);
            }
            if many {
                add("multi-queue-num-queues", self.queues.len());
            }
        }
        for (number, queue) in self.queues.iter().enumerate() {
            let prefix = if many { format!("queue-{number}/") } else { String::new() };
            let mut add = |key: String, value: u32| keys.push((key, value.to_string()));
            match queue.ring_refs.as_slice() {
                [single] => add(format!("{prefix}ring-ref"), *single),
                refs => refs
                    .iter()
                    .enumerate()
                    .for_each(|(i, gref)| add(format!("{prefix}ring-ref{i}"), *gref)),
            }
            add(format!("{prefix}event-channel"), queue.port);
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
    /// In units of 512 bytes.
    pub sectors: u64,
    /// Bytes of a logical block.
    pub sector_size: u32,
    /// Bytes of a physical block.
    pub physical_sector_size: u32,
    /// The VDISK_ bits.
    pub info: u32,
    /// `feature-flush-cache`
    pub flush: bool,
    /// `feature-barrier`
    pub barrier: bool,
    /// Granularity of discard in bytes, if `feature-discard` is 1.
    pub discard: Option<u32>,
    /// `discard-secure`
    pub secure_discard: bool,
}

impl DiskInfo {
    /// Reads the backend's keys; it must be in state 4. InvalidData: it does not say how large
    /// the disk is, or in blocks that there cannot be.
    pub fn read(store: &Client, node: &Node) -> io::Result<DiskInfo> {
        let number = |key| node.number(store, key);
        let small = |key| -> io::Result<Option<u32>> {
            Ok(number(key)?.and_then(|n| u32::try_from(n).ok()))
        };
        let bad = |key: &str| {
            let text = format!("{}: the backend's {key} makes no sense", node.front);
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let fits = |n: &u32| n.is_power_of_two() && (512..=4096).contains(n);
        let sectors = number("sectors")?.filter(|n| *n <= u64::MAX / 512);
        let sector_size = small("sector-size")?.filter(fits).ok_or_else(|| bad("sector-size"))?;
        let flag = |key| -> io::Result<bool> { Ok(number(key)? == Some(1)) };
        let granularity = small("discard-granularity")?.filter(|n| *n > 0).unwrap_or(sector_size);
        Ok(DiskInfo {
            sectors: sectors.ok_or_else(|| bad("sectors"))?,
            sector_size,
            physical_sector_size: small("physical-sector-size")?.unwrap_or(sector_size),
            info: small("info")?.unwrap_or(0),
            flush: flag("feature-flush-cache")?,
            barrier: flag("feature-barrier")?,
            discard: flag("feature-discard")?.then_some(granularity),
            secure_discard: flag("discard-secure")?,
        })
    }
    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.info & (VDISK_READONLY | VDISK_CDROM) != 0
    }
    /// Whether it is a CD-ROM drive.
    pub fn is_cdrom(&self) -> bool {
        self.info & VDISK_CDROM != 0
    }
    /// Whether its medium can be taken out.
    pub fn is_removable(&self) -> bool {
        self.info & VDISK_REMOVABLE != 0
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
                if let Some(sectors) = node.number(store, "sectors")? {
                    tell(News::Sectors(sectors));
                }
            }
            State::Closing => tell(News::Closing),
            State::Closed | State::Unknown => tell(News::Closed),
            _ => {}
        }
    }
}
