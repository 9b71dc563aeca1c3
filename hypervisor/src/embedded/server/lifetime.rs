//! How domains begin and end, and what the toolstack's part of it leaves in the store.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::sockets::Peer;
use super::{Conn, Server};
use crate::DomId;
use crate::core::domains::{CreateError, Kind};
use crate::core::xenstore::path;
use crate::store::wire;

/// How long a backend may take to close a device of a domain that is gone (libxl waits as long).
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
/// XenbusStateInitialising, Closing, Closed (`io/xenbus.h`).
const INITIALISING: &[u8] = b"1";
const CLOSING: &[u8] = b"5";
const CLOSED: &[u8] = b"6";

/// A backend's node of a domain that is gone: removed once its backend has closed it.
#[derive(Debug)]
pub(super) struct Leaving {
    path: String,
    pub(super) until: Instant,
}

impl Server {
    /// Nodes of domain 0.
    pub(super) fn first_nodes(&mut self) {
        let home = path::domain(0);
        self.put(&format!("{home}/name"), b"Domain-0");
        self.put(&format!("{home}/domid"), b"0");
    }

    fn ask_store(&mut self, kind: wire::Kind, path: &str, rest: &[u8]) {
        let payload = [path.as_bytes(), b"\0", rest].concat();
        if let Err(e) = self.store.handle(self.own, kind as u32, 0, &payload) {
            tracing::warn!("xenstore: {kind:?} {path}: {}", e.name());
        }
    }

    fn put(&mut self, path: &str, value: &[u8]) {
        self.ask_store(wire::Kind::Write, path, value);
    }

    fn remove(&mut self, path: &str) {
        self.ask_store(wire::Kind::Rm, path, b"");
    }

    fn folder(&mut self, path: &str, perms: &str) {
        self.ask_store(wire::Kind::Mkdir, path, b"");
        self.ask_store(wire::Kind::SetPerms, path, perms.as_bytes());
    }

    /// Creates a domain and, as libxl does, its nodes: readable for it, some its own.
    pub(super) fn create_domain(
        &mut self,
        wanted: Option<DomId>,
        kind: Kind,
        name: &str,
    ) -> Result<DomId, Errno> {
        let domid = self.domains.create(wanted, kind).map_err(|e| match e {
            CreateError::Exists => Errno::EXIST,
            CreateError::BadNumber => Errno::INVAL,
            CreateError::Full => Errno::NOSPC,
        })?;
        self.store.domain_created(domid);
        let home = path::domain(domid);
        let read = format!("n0\0r{domid}\0");
        let own = format!("n{domid}\0");
        self.folder(&home, &read);
        self.put(&format!("{home}/name"), name.as_bytes());
        self.put(&format!("{home}/domid"), domid.to_string().as_bytes());
        for folder in ["device", "control", "memory"] {
            self.folder(&format!("{home}/{folder}"), &read);
        }
        for folder in ["control/shutdown", "data", "drivers", "feature", "attr", "error"] {
            self.folder(&format!("{home}/{folder}"), &own);
        }
        if kind == Kind::Driver {
            self.folder(&format!("{home}/backend"), &own);
        }
        self.store.introduce(domid);
        Ok(domid)
    }

    /// Ends a domain whose last request connection is gone.
    pub(super) fn end_if_alone(&mut self, domid: DomId) {
        let connected = |c: &Conn| matches!(c, Conn::Requests(p) if p.domid == domid);
        if domid != 0 && !self.conns.values().any(connected) {
            self.destroy_domain(domid);
        }
    }

    /// Ends a domain as `xl destroy` does.
    pub(super) fn destroy_domain(&mut self, domid: DomId) {
        if domid == 0 || self.domains.get(domid).is_none() {
            return;
        }
        let theirs = |(token, c): (&u64, &Conn)| (c.domid() == domid).then_some(*token);
        let tokens: Vec<u64> = self.conns.iter().filter_map(theirs).collect();
        for token in tokens {
            match self.conns.remove(&token) {
                Some(Conn::Requests(peer)) => self.release_peer(token, *peer),
                Some(Conn::Store(conn)) => {
                    self.by_store_id.remove(&conn.id);
                    self.store.disconnect(conn.id);
                }
                None => {}
            }
            self.interests.remove(&token);
        }
        self.domains.destroy(domid);
        self.wires.retain(|(owner, _), _| *owner != domid);
        self.memory.remove_domain(domid);
        for path in self.backend_nodes(domid) {
            self.put(&format!("{path}/online"), b"0");
            match self.store.value(&format!("{path}/state")) {
                None | Some(INITIALISING | CLOSING | CLOSED) => {}
                Some(_) => self.put(&format!("{path}/state"), CLOSING),
            }
            self.leaving.push(Leaving { path, until: Instant::now() + CLOSE_LIMIT });
        }
        for path in [path::domain(domid), format!("/libxl/{domid}")] {
            if self.store.exists(&path) {
                self.remove(&path);
            }
        }
        self.store.release(domid);
    }

    /// Backends' nodes of a domain. They are looked for in the backends' own folders, since what
    /// the domain's folder says of them the domain may have written.
    fn backend_nodes(&self, domid: DomId) -> Vec<String> {
        let mut found = Vec::new();
        for owner in self.store.children("/local/domain") {
            let root = format!("/local/domain/{owner}/backend");
            for class in self.store.children(&root) {
                let folder = format!("{root}/{class}/{domid}");
                let devices = self.store.children(&folder);
                found.extend(devices.iter().map(|device| format!("{folder}/{device}")));
            }
        }
        found
    }

    /// Removes the nodes of devices that their backends have closed, or had long enough for.
    pub(super) fn see_off(&mut self) {
        if self.leaving.is_empty() {
            return;
        }
        let now = Instant::now();
        for leaving in std::mem::take(&mut self.leaving) {
            let state = self.store.value(&format!("{}/state", leaving.path));
            match state {
                None | Some(INITIALISING | CLOSED) => self.clean_up(&leaving.path),
                Some(_) if now >= leaving.until => self.clean_up(&leaving.path),
                Some(_) => self.leaving.push(leaving),
            }
        }
        self.deliver_events();
    }

    /// Removes a device's node and the folders above it that this leaves empty.
    fn clean_up(&mut self, device: &str) {
        if self.store.exists(device) {
            self.remove(device);
        }
        let mut folder = path::parent(device);
        for _ in 0..2 {
            if !self.store.exists(folder) || !self.store.children(folder).is_empty() {
                return;
            }
            self.remove(folder);
            folder = path::parent(folder);
        }
    }

    /// Gives back what a process held through a connection.
    pub(super) fn release_peer(&mut self, token: u64, peer: Peer) {
        for mapped in peer.holds.mapped.values() {
            self.domains.unmap(mapped);
        }
        for port in &peer.holds.ports {
            self.close_port(peer.domid, *port);
        }
        for gref in &peer.holds.refs {
            // One that is still mapped goes when its domain does.
            let _ = self.end_one(peer.domid, *gref);
        }
        self.memory.remove_idle(token);
        let serial = |d| self.domains.get(d).map(|domain| domain.serial);
        let unused: Vec<DomId> = peer
            .holds
            .created
            .iter()
            .filter(|(d, s)| serial(*d) == Some(*s))
            .map(|(d, _)| *d)
            .collect();
        for domid in unused {
            self.end_if_alone(domid);
        }
    }
}
