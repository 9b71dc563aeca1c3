//! The xenstore tree with its watches, transactions and permissions, as xenstored (Xen 4.17)
//! behaves behind `io/xs_wire.h`. No socket and no ring is known here: a caller feeds requests
//! in with [`Store::handle`] and carries replies and [`Event`]s out.
//!
//! All memory is bounded by connection and by domain; the limits are [`limits`].

mod access;
mod ops;
pub mod path;
mod perms;
#[cfg(test)]
mod tests;
mod tree;
mod watch;

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub use perms::{Perm, Rights};
pub use watch::Event;

use crate::DomId;
use crate::store::wire::{Kind, PAYLOAD_MAX};
use tree::{Transaction, Tree};
use watch::{Fire, Watches};

/// What one connection or domain may use up. Domain 0 is held by the larger numbers.
pub mod limits {
    /// Nodes that a domain may own (ENOSPC).
    pub const NODES: i64 = 1000;
    /// Watches of a domain's connection (E2BIG).
    pub const WATCHES: usize = 128;
    /// Transactions of a domain's connection at a time (ENOSPC).
    pub const TRANSACTIONS: usize = 10;
    /// Nodes touched by one transaction of a domain (ENOSPC).
    pub const TRANSACTION_NODES: usize = 1024;
    /// A node has fewer bytes of its own: header, permissions, value, names of its children
    /// (ENOSPC).
    pub const NODE_BYTES: usize = 2048;
    /// Permissions of one node (ENOSPC).
    pub const PERMS: usize = 5;
    /// Watches of a connection of domain 0.
    pub const PRIVILEGED_WATCHES: usize = 16384;
    /// Transactions of a connection of domain 0.
    pub const PRIVILEGED_TRANSACTIONS: usize = 1024;
}

/// An error of the protocol; its `Debug` form is its name on the wire.
#[allow(missing_docs, clippy::upper_case_acronyms)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    EINVAL,
    EACCES,
    EEXIST,
    ENOENT,
    ENOSPC,
    ENOSYS,
    EBUSY,
    EAGAIN,
    E2BIG,
    EPERM,
}

impl Errno {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Errno::EINVAL => "EINVAL",
            Errno::EACCES => "EACCES",
            Errno::EEXIST => "EEXIST",
            Errno::ENOENT => "ENOENT",
            Errno::ENOSPC => "ENOSPC",
            Errno::ENOSYS => "ENOSYS",
            Errno::EBUSY => "EBUSY",
            Errno::EAGAIN => "EAGAIN",
            Errno::E2BIG => "E2BIG",
            Errno::EPERM => "EPERM",
        }
    }
}

/// A connection's number; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(u64);

/// One connection.
#[derive(Clone, Debug)]
struct Conn {
    domid: DomId,
    /// Where its relative paths start.
    home: String,
    transactions: BTreeMap<u32, Transaction>,
    next_tx: u32,
    watches: usize,
}

/// The store.
#[derive(Clone, Debug)]
pub struct Store {
    tree: Tree,
    watches: Watches,
    conns: HashMap<ConnId, Conn>,
    next_conn: u64,
    introduced: BTreeSet<DomId>,
    /// Domains that exist, introduced or not.
    known: BTreeSet<DomId>,
    targets: BTreeMap<DomId, DomId>,
    fires: Vec<Fire>,
    events: Vec<Event>,
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

impl Store {
    /// The tree as xenstored starts it, domain 0 introduced.
    pub fn new() -> Self {
        Store {
            tree: Tree::new(),
            watches: Watches::default(),
            conns: HashMap::new(),
            next_conn: 1,
            introduced: BTreeSet::from([0]),
            known: BTreeSet::from([0]),
            targets: BTreeMap::new(),
            fires: Vec::new(),
            events: Vec::new(),
        }
    }

    /// A new connection that acts as `domid`. Its relative paths start in the domain's folder.
    pub fn connect(&mut self, domid: DomId) -> ConnId {
        let id = ConnId(self.next_conn);
        self.next_conn += 1;
        let home = path::domain(domid);
        let conn = Conn { domid, home, transactions: BTreeMap::new(), next_tx: 1, watches: 0 };
        self.conns.insert(id, conn);
        id
    }

    /// Ends a connection: its transactions are dropped, its watches go.
    pub fn disconnect(&mut self, id: ConnId) {
        if self.conns.remove(&id).is_some() {
            self.watches.remove_conn(id);
        }
    }

    /// Does one request. `Ok`: the payload of a reply of the same kind, at most
    /// [`PAYLOAD_MAX`] bytes; `Err`: what the error reply names. Watch events that it caused
    /// wait in [`take_events`](Self::take_events); they are to be sent after the reply.
    pub fn handle(
        &mut self,
        id: ConnId,
        kind: u32,
        tx_id: u32,
        payload: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        let kind = Kind::from_u32(kind).ok_or(Errno::ENOSYS)?;
        if payload.len() > PAYLOAD_MAX || !self.conns.contains_key(&id) {
            return Err(Errno::EINVAL);
        }
        let reply = self.dispatch(id, kind, tx_id, payload);
        self.fire_all();
        let reply = reply?;
        if reply.len() > PAYLOAD_MAX { Err(Errno::E2BIG) } else { Ok(reply) }
    }

    /// Takes the watch events that are to be sent, oldest first.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Lets XS_INTRODUCE and XS_SET_PERMS name a domain that has come to be.
    pub fn domain_created(&mut self, domid: DomId) {
        self.known.insert(domid);
    }

    /// Introduces a domain; `@introduceDomain` fires where it was not.
    pub fn introduce(&mut self, domid: DomId) {
        self.known.insert(domid);
        if self.introduced.insert(domid) {
            self.fires.push(Fire::special(path::INTRODUCE, domid));
            self.fire_all();
        }
    }

    /// Forgets a domain: what it owned is removed, it loses its permissions elsewhere, and
    /// `@releaseDomain` fires. Its connections are the caller's to end.
    pub fn release(&mut self, domid: DomId) {
        self.known.remove(&domid);
        self.targets.remove(&domid);
        self.tree.forget_domain(domid, &mut self.fires);
        if self.introduced.remove(&domid) {
            self.fires.push(Fire::special(path::RELEASE, domid));
        }
        self.fire_all();
    }

    /// Whether a domain is introduced.
    pub fn is_introduced(&self, domid: DomId) -> bool {
        self.introduced.contains(&domid)
    }

    /// A node's value, read with domain 0's rights.
    pub fn value(&self, path: &str) -> Option<&[u8]> {
        self.tree.main(path).map(|node| node.data.as_slice())
    }

    /// Whether a node is there.
    pub fn exists(&self, path: &str) -> bool {
        self.tree.main(path).is_some()
    }

    /// Names of a node's children, read with domain 0's rights; none where it is not there.
    pub fn children(&self, path: &str) -> Vec<String> {
        self.tree.main(path).map_or_else(Vec::new, |node| node.children.clone())
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.tree.len()
    }

    /// Connections at the moment.
    pub fn connections(&self) -> usize {
        self.conns.len()
    }

    fn fire_all(&mut self) {
        for fire in std::mem::take(&mut self.fires) {
            self.watches.fire(&fire, &self.tree, &self.targets, &mut self.events);
        }
    }
}
