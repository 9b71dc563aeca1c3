//! What a vif connects to by the key `type` of its node.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Weak};

use hypervisor::xenbus::{Fault, Nodes};
use parking_lot::Mutex;

use super::Endpoint;
use super::loopback::Loopback;
use super::packet::Packet;
use super::stream::{Address, Role, Stream};
use super::switch::{Switch, SwitchPort};
use super::user::UserNet;
use super::vhost_user::VhostUser;
use super::xdp::Xdp;
use crate::backend::{Host, Open, open_tap};

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

/// What an address of ours begins with, before a colon.
const PREFIXES: [&str; 7] =
    ["packet", "xdp", "stream", "stream-server", "switch", "vhost-user", "vhost-user-server"];

/// What a vif's node names: the key `type`; or `bridge`, if it begins as one of these: a toolstack
/// passes that on as it is.
fn name(nodes: &Nodes) -> Result<Option<String>, Fault> {
    let is_ours =
        |text: &String| text.split_once(':').is_some_and(|(kind, _)| PREFIXES.contains(&kind));
    match nodes.own("type")? {
        Some(kind) if !matches!(&*kind, "vif" | "vif_ioemu") => Ok(Some(kind)),
        _ => Ok(nodes.own("bridge")?.filter(is_ours)),
    }
}

/// Whether a vif's node names a TAP device.
pub fn is_tap(nodes: &Nodes) -> Result<bool, Fault> {
    Ok(name(nodes)?.is_none())
}

/// Opens what a vif's node names: `user`, a network in this process; `loopback`, the vif itself;
/// `packet:IFACE` and `xdp:IFACE`, an interface of the host; `stream:ADDRESS` and
/// `stream-server:ADDRESS`, a stream socket, its address an absolute path or HOST:PORT;
/// `switch:NAME`, a port of a switch between the vifs of this process that name the same one;
/// `vhost-user:PATH` and `vhost-user-server:PATH`, a switch in user space; and what toolstacks write
/// (`vif`, `vif_ioemu`, or nothing), a TAP device.
pub fn opener() -> Arc<Open> {
    let switches = Switches::default();
    Arc::new(move |nodes: &Nodes| open(nodes, &switches))
}

/// Switches by their names, as long as they have ports.
#[derive(Default)]
struct Switches(Mutex<HashMap<String, Weak<Switch>>>);

impl Switches {
    fn port(&self, name: &str, mtu: u16) -> SwitchPort {
        let mut switches = self.0.lock();
        let known = switches.get(name).and_then(Weak::upgrade);
        let switch = known.unwrap_or_else(|| {
            switches.retain(|_, switch| switch.strong_count() > 0);
            let switch = Switch::new();
            switches.insert(name.to_owned(), Arc::downgrade(&switch));
            switch
        });
        switch.port(mtu)
    }
}

fn open(nodes: &Nodes, switches: &Switches) -> Result<Box<dyn Host>, Fault> {
    let Some(name) = name(nodes)? else { return open_tap(nodes) };
    let mtu = || -> Result<u16, Fault> {
        let Some(text) = nodes.own("mtu")? else { return Ok(MTU) };
        let mtu = text.trim().parse().ok().filter(|mtu| *mtu >= 68);
        mtu.ok_or_else(|| Fault(format!("mtu is {text:?}; it must be 68 to 65535")))
    };
    let stream = |role, address: &str| -> Result<Box<dyn Host>, Fault> {
        let parsed = Address::parse(address).ok_or_else(|| {
            Fault(format!("{name}: {address:?} is neither an absolute path nor HOST:PORT"))
        })?;
        Ok(Box::new(Plain(Stream::open(role, parsed, mtu()?)?)))
    };
    let vhost_user = |role, path: &str| -> Result<Box<dyn Host>, Fault> {
        if !path.starts_with('/') {
            return Err(Fault(format!("{name}: {path:?} is no absolute path")));
        }
        Ok(Box::new(Plain(VhostUser::open(role, path.into(), mtu()?)?)))
    };
    match name.split_once(':').unwrap_or((&name, "")) {
        ("user", "") => Ok(Box::new(Plain(UserNet::new(mtu()?)))),
        ("loopback", "") => Ok(Box::new(Plain(Loopback::new(mtu()?)))),
        ("packet", interface) => Ok(Box::new(Plain(Packet::open(interface)?))),
        ("xdp", interface) => Ok(Box::new(Plain(Xdp::open(interface)?))),
        ("stream", address) => stream(Role::Client, address),
        ("stream-server", address) => stream(Role::Server, address),
        ("switch", name) if !name.is_empty() => Ok(Box::new(Plain(switches.port(name, mtu()?)))),
        ("vhost-user", path) => vhost_user(Role::Client, path),
        ("vhost-user-server", path) => vhost_user(Role::Server, path),
        _ => Err(Fault(format!(
            "type is {name:?}; known are vif, user, loopback, packet:IFACE, xdp:IFACE, \
             stream:ADDRESS, stream-server:ADDRESS, switch:NAME, vhost-user:PATH and \
             vhost-user-server:PATH"
        ))),
    }
}
