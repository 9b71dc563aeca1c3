//! A switch in user space (Open vSwitch with DPDK, VPP, DPDK's own programs) over vhost-user. The vif is
//! the front-end, which QEMU is otherwise: it owns the memory and the rings, and drives them. The
//! switch is the back-end.
//!
//! **What the switch sees** is a memfd with the rings and packet buffers of this connection, made anew for
//! each; never the guest's memory, which QEMU shows whole, nor this process's. Frames are copied between
//! the queue's own and these buffers. A buffer has room for the longest frame: a received frame
//! is one buffer and one copy, with nothing to put together from what the switch says of parts
//! (VIRTIO_NET_F_MRG_RXBUF), and 256 buffers hold 256 frames of any length. What no long frame has used
//! is no memory.
//!
//! **What the switch says is not trusted** (`ring`). Where it makes no sense, or the switch goes, the
//! connection ends: packets are dropped and counted until there is another one, and the guest stays
//! connected. A client tries again after a second, and later each time if nothing comes of it; a server takes
//! who comes next.
//!
//! Messages go by a thread of the vif's own (`link`), for a switch may be slow to answer. Queues look at
//! memory alone, and at descriptors before they sleep.
//!
//! Checksums and segments are left to the switch where it does them, and done by the queue otherwise. Where
//! it has fewer pairs of rings than the vif has queues, the rest send through those of others.

mod bell;
mod link;
mod memory;
mod queue;
mod ring;
mod session;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use self::link::Link;
use self::queue::Queue;
use super::stream::peer::Dial;
use super::stream::{Address, Role};
use super::{Abilities, Accepts, Endpoint, EndpointQueue};

/// Pairs of rings that messages can name: a kick's has 8 bits for a ring (VHOST_USER_VRING_IDX_MASK).
const MOST_QUEUES: u32 = 128;

/// One end of a vhost-user connection: the front-end's.
pub struct VhostUser {
    dial: Arc<Dial>,
    mtu: u16,
    link: Mutex<Option<Link>>,
}

impl VhostUser {
    /// A client connects to the switch's socket, once a guest is there; a server listens from now on.
    /// The error names the path.
    pub fn open(role: Role, path: PathBuf, mtu: u16) -> io::Result<VhostUser> {
        let dial = Arc::new(Dial::new(role, Address::Unix(path))?);
        Ok(VhostUser { dial, mtu, link: Mutex::default() })
    }
}

impl Endpoint for VhostUser {
    fn abilities(&self) -> Abilities {
        // What one switch does not do, and the next does, is done by the queues meanwhile.
        Abilities { checksum: true, tso4: true, tso6: true, mtu: self.mtu }
    }

    fn most_queues(&self) -> u32 {
        MOST_QUEUES
    }

    fn connect(&self, queues: usize, accepts: Accepts) -> io::Result<()> {
        let mut link = self.link.lock();
        *link = None;
        *link = Some(Link::start(self.dial.clone(), queues, accepts)?);
        Ok(())
    }

    fn queue(&self, number: usize) -> io::Result<Box<dyn EndpointQueue>> {
        let link = self.link.lock();
        let link = link.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        Ok(Box::new(Queue::new(link.ports(), number)?))
    }

    fn disconnect(&self) {
        *self.link.lock() = None;
    }
}
