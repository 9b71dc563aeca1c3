//! The real Xen: /dev/xen/{gntdev,gntalloc,evtchn} through a thin ioctl layer of our own, and
//! xenstored.

mod evtchn;
mod gntalloc;
mod gntdev;
mod ioctl;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::store::Client;
use crate::{Access, DomId, EventChannel, GrantedPages, Grants, Guest, Hypervisor, Port};
use evtchn::Evtchn;

const GNTDEV: &str = "/dev/xen/gntdev";
const GNTALLOC: &str = "/dev/xen/gntalloc";
const EVTCHN: &str = "/dev/xen/evtchn";
/// Where xenstored listens, if this domain runs it.
const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
/// The kernel's own way to xenstored.
const XENBUS: &str = "/dev/xen/xenbus";

/// The Xen that this domain runs on.
pub struct Xen {
    domid: DomId,
}

impl Xen {
    /// Looks whether Xen is there and which domain this is.
    pub fn open() -> io::Result<Xen> {
        open(EVTCHN, "xen-evtchn")?;
        let store = connect()?;
        // Linux and xen-init-dom0 leave it there; dom0's own number is not an assumption.
        let domid = store.get("domid")?.and_then(|text| text.trim().parse().ok());
        let domid = domid.ok_or_else(|| {
            io::Error::other("xenstore has no `domid` for this domain; run xen-init-dom0")
        })?;
        Ok(Xen { domid })
    }
}

/// Opens a device of Xen's, or says what is missing.
fn open(path: &str, module: &str) -> io::Result<File> {
    File::options().read(true).write(true).open(path).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::NotFound if !Path::new("/sys/hypervisor/type").exists() => {
                "this host does not run on Xen; --hypervisor SOCKET uses the bundled one".to_owned()
            }
            io::ErrorKind::NotFound => format!("load its module: modprobe {module}"),
            io::ErrorKind::PermissionDenied => "run as root, or give this user the device".into(),
            _ => "see dmesg".to_owned(),
        };
        io::Error::new(e.kind(), format!("{path}: {e}: {remedy}"))
    })
}

fn connect() -> io::Result<Client> {
    if let Some(path) = std::env::var_os("XENSTORED_PATH") {
        return Client::connect(Path::new(&path));
    }
    match SOCKETS.iter().map(Path::new).find(|path| path.exists()) {
        Some(socket) => Client::connect(socket),
        None => Client::open_device(Path::new(XENBUS)).map_err(|e| {
            io::Error::new(e.kind(), format!("{e}: xenstored does not run, and there is no xenbus"))
        }),
    }
}

impl Hypervisor for Xen {
    fn domid(&self) -> DomId {
        self.domid
    }
    fn store(&self) -> io::Result<Client> {
        connect()
    }
    fn grants(&self) -> io::Result<Box<dyn Grants>> {
        Ok(Box::new(gntdev::Gntdev::new(open(GNTDEV, "xen-gntdev")?)))
    }
    fn bind(&self, domid: DomId, port: Port) -> io::Result<Box<dyn EventChannel>> {
        Ok(Box::new(Evtchn::bind_interdomain(open(EVTCHN, "xen-evtchn")?, domid, port)?))
    }
}

impl Guest for Xen {
    fn domid(&self) -> DomId {
        self.domid
    }
    fn store(&self) -> io::Result<Client> {
        connect()
    }
    fn grant(
        &self,
        peer: DomId,
        pages: usize,
        access: Access,
    ) -> io::Result<Arc<dyn GrantedPages>> {
        let device = open(GNTALLOC, "xen-gntalloc")?;
        Ok(Arc::new(gntalloc::Granted::alloc(device, peer, pages, access)?))
    }
    fn alloc_unbound(&self, peer: DomId) -> io::Result<Box<dyn EventChannel>> {
        Ok(Box::new(Evtchn::alloc_unbound(open(EVTCHN, "xen-evtchn")?, peer)?))
    }
}

#[cfg(test)]
mod tests;
