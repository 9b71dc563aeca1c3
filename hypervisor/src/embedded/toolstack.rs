//! Making and ending domains.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::link::{Link, malformed};
use super::message::Request;
use crate::DomId;
use crate::core::domains::Kind;

/// A connection that may create and end domains: one of domain 0.
#[derive(Clone, Debug)]
pub struct Toolstack {
    link: Arc<Link>,
}

impl Toolstack {
    /// Connects to a hypervisor's socket.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Toolstack { link: Link::connect(socket)? })
    }

    /// The connection itself.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// A connection to the store.
    pub fn store(&self) -> io::Result<crate::store::Client> {
        self.link.store()
    }

    /// Creates a domain with its nodes in the store, introduces it, and says its number. Until
    /// it has been connected it ends with this connection. EEXIST: the number is taken.
    pub fn create_domain(&self, domid: Option<DomId>, kind: Kind, name: &str) -> io::Result<DomId> {
        let request = Request::CreateDomain { domid, kind, name: name.to_owned() };
        self.link.call(&request)?.fields().u16().ok_or_else(malformed)
    }

    /// A connection that acts as the domain, to be handed to its process: whoever has it is the
    /// domain, and when the last such connection is closed the domain ends. So close this copy
    /// once the process has it.
    pub fn connect_domain(&self, domid: DomId) -> io::Result<OwnedFd> {
        self.link.call(&Request::ConnectDomain { domid })?.fd()
    }

    /// Ends a domain, whatever its process does: its requests are refused and its lifeline becomes
    /// readable. What it has mapped itself it keeps until it exits, and so do its ends of event
    /// channels: end the process as well. ESRCH: there is none.
    pub fn destroy_domain(&self, domid: DomId) -> io::Result<()> {
        self.link.call(&Request::DestroyDomain { domid }).map(|_| ())
    }

    /// All domains, ascending.
    pub fn domains(&self) -> io::Result<Vec<DomId>> {
        let reply = self.link.call(&Request::ListDomains)?;
        let mut fields = reply.fields();
        let count = fields.u32().ok_or_else(malformed)?;
        (0..count).map(|_| fields.u16().ok_or_else(malformed)).collect()
    }
}
