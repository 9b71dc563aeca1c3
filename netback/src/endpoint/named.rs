//! What a vif connects to by the key `type` of its node.

use std::io;

use hypervisor::xenbus::{Fault, Nodes};

use super::Endpoint;
use super::loopback::Loopback;
use super::user::UserNet;
use crate::backend::{Host, open_tap};

/// An endpoint of which nothing is left when its process ends.
pub struct Plain<E>(pub E);

impl<E: Endpoint + 'static> Host for Plain<E> {
    fn endpoint(&self) -> &dyn Endpoint {
        &self.0
    }
    fn keep(&self) -> io::Result<()> {
        Ok(())
    }
    fn forget(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Packets' length where the node says none.
const MTU: u16 = 1500;

/// Whether a vif's node names a TAP device, as toolstacks write it.
pub fn is_tap(nodes: &Nodes) -> Result<bool, Fault> {
    Ok(matches!(nodes.own("type")?.as_deref(), None | Some("vif" | "vif_ioemu")))
}

/// Opens what a vif's node names: `user`, a network in this process; `loopback`, the vif itself;
/// and what toolstacks write (`vif`, `vif_ioemu`, or nothing), a TAP device.
pub fn open(nodes: &Nodes) -> Result<Box<dyn Host>, Fault> {
    let mtu = || -> Result<u16, Fault> {
        let Some(text) = nodes.own("mtu")? else { return Ok(MTU) };
        let mtu = text.trim().parse().ok().filter(|mtu| *mtu >= 68);
        mtu.ok_or_else(|| Fault(format!("mtu is {text:?}; it must be 68 to 65535")))
    };
    match nodes.own("type")?.as_deref() {
        None | Some("vif" | "vif_ioemu") => open_tap(nodes),
        Some("user") => Ok(Box::new(Plain(UserNet::new(mtu()?)))),
        Some("loopback") => Ok(Box::new(Plain(Loopback::new(mtu()?)))),
        Some(other) => Err(Fault(format!("type is {other:?}; known are vif, user and loopback"))),
    }
}
