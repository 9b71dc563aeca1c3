//! The frontend's side of xenbus for a block device: pieces beside those that all devices have
//! ([`hypervisor::xenbus::front`]). [`BlkFront`](super::BlkFront) uses them in order; who wants to
//! misbehave uses some of them.

use std::io;

use hypervisor::store::{Client, Error};
pub use hypervisor::xenbus::front::Node;
use hypervisor::xenbus::keys::Refused;
use hypervisor::xenbus::{Key, State};

use crate::negotiate::{Accepted, DiskKeys, Offer};

/// The kind of a block device in xenstore.
pub const KIND: &str = "vbd";

/// What the backend offers; it must be in state 2 or beyond.
pub fn offer(store: &Client, node: &Node) -> Result<Offer, Refused> {
    Offer::read(|key| node.back_key(store, key))
}

/// What the backend says of its disk; it must be in state 4.
pub(super) fn disk(store: &Client, node: &Node) -> Result<DiskKeys, Refused> {
    DiskKeys::read(|key| node.back_key(store, key))
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
        node.choose(store, &self.keys(), is_choice, State::Initialised)
    }
}

pub(super) fn is_choice(name: &str) -> bool {
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
        let bad =
            |e: Refused| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", node.front));
        let offer = offer(store, node).map_err(bad)?;
        let disk = disk(store, node).map_err(bad)?;
        Ok(DiskInfo { disk, flush: offer.flush, barrier: offer.barrier })
    }
    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.disk.read_only || self.disk.cdrom
    }
}
