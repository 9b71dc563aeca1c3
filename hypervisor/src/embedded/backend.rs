//! The using side: [`Hypervisor`] for a backend's process.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::channel::Channel;
use super::grants::GrantHandle;
use super::link::{Link, malformed};
use super::message::Request;
use crate::{DomId, EventChannel, Grants, Hypervisor, Port};

/// A backend's process on the bundled hypervisor.
#[derive(Clone, Debug)]
pub struct Backend {
    link: Arc<Link>,
}

impl Backend {
    /// Connects to a hypervisor's socket as a process of domain 0.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Backend { link: Link::connect(socket)? })
    }

    /// As the domain that a connection was made for (a driver domain).
    pub fn new(link: Arc<Link>) -> Self {
        Backend { link }
    }

    /// Becomes readable when the hypervisor is gone or this domain has ended.
    pub fn lifeline(&self) -> io::Result<OwnedFd> {
        self.link.lifeline()
    }
}

impl Hypervisor for Backend {
    fn domid(&self) -> DomId {
        self.link.domid()
    }
    fn store(&self) -> io::Result<crate::store::Client> {
        self.link.store()
    }
    fn grants(&self) -> io::Result<Box<dyn Grants>> {
        Ok(Box::new(GrantHandle::new(self.link.another()?)))
    }
    fn bind(&self, domid: DomId, port: Port) -> io::Result<Box<dyn EventChannel>> {
        let mut reply = self.link.call(&Request::Bind { domid, port })?;
        let port = reply.fields().u32().ok_or_else(malformed)?;
        let (read, write) = (reply.fd()?, reply.fd()?);
        Ok(Box::new(Channel::new(self.link.clone(), port, read, write)))
    }
}
