//! One connection to a switch, from the first message until its rings run: vhost-user's front-end (QEMU's
//! docs/interop/vhost-user.rst), virtio-net's features (VIRTIO 1.2, 5.1.3).

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::Mutex;
use rings::Notify;
use thiserror::Error;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MQ,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::bell::{Bell, Kick};
use super::memory::{LONGEST, Memory, Way, place};
use super::queue::{Output, Port, Trouble, Wire};
use super::ring::{AVAIL, DESC, Events, Ring, SIZE, USED, Writer};
use crate::endpoint::{Abilities, Accepts};

/// The ring that a queue works with, and what its device is kicked by.
#[derive(Debug)]
pub(super) struct Vring {
    pub ring: Ring<Arc<Memory>>,
    pub kick: Kick,
}

impl Vring {
    /// Shows the switch what was lent, and tells it where it wants to be told.
    pub(super) fn publish(&mut self) {
        if self.ring.publish() == Notify::Send {
            self.kick.ring();
        }
    }
}

/// Why there is no connection.
#[derive(Debug, Error)]
pub(super) enum Failure {
    #[error("{0}: {1}")]
    Request(&'static str, vhost::Error),
    #[error("it has no VIRTIO_F_VERSION_1, without which this is not spoken")]
    Legacy,
    #[error("it serves no queue")]
    NoQueue,
    #[error(transparent)]
    System(#[from] io::Error),
}

/// The result of the request `name`.
fn asked<T>(name: &'static str, result: vhost::Result<T>) -> Result<T, Failure> {
    result.map_err(|e| Failure::Request(name, e))
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Of what is offered, what is used: the switch's own work always, the guest's as far as it does it.
pub(super) fn choose(offered: u64, accepts: Accepts, pairs: usize) -> u64 {
    let mut wanted = bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_EVENT_IDX);
    wanted |= VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if pairs > 1 {
        wanted |= bit(VIRTIO_NET_F_MQ);
    }
    // Segments need checksums (5.1.3.1).
    if offered & bit(VIRTIO_NET_F_CSUM) != 0 {
        wanted |= bit(VIRTIO_NET_F_CSUM);
        wanted |= bit(VIRTIO_NET_F_HOST_TSO4) | bit(VIRTIO_NET_F_HOST_TSO6);
    }
    // One bit for both IPs: what only one of them takes is summed by the queue.
    let sums = accepts.checksum4 || accepts.checksum6;
    if sums && offered & bit(VIRTIO_NET_F_GUEST_CSUM) != 0 {
        wanted |= bit(VIRTIO_NET_F_GUEST_CSUM);
        wanted |= if accepts.tso4 { bit(VIRTIO_NET_F_GUEST_TSO4) } else { 0 };
        wanted |= if accepts.tso6 { bit(VIRTIO_NET_F_GUEST_TSO6) } else { 0 };
        let whole = bit(VIRTIO_NET_F_GUEST_TSO4) | bit(VIRTIO_NET_F_GUEST_TSO6);
        if offered & wanted & whole != 0 {
            wanted |= bit(VIRTIO_NET_F_GUEST_ECN);
        }
    }
    offered & wanted
}

/// What the switch does itself; of its packets' length nothing is known.
pub(super) fn abilities(features: u64) -> Abilities {
    let has = |feature| features & bit(feature) != 0;
    Abilities {
        checksum: has(VIRTIO_NET_F_CSUM),
        tso4: has(VIRTIO_NET_F_HOST_TSO4),
        tso6: has(VIRTIO_NET_F_HOST_TSO6),
        ..Abilities::default()
    }
}

/// How many of the queues the switch serves by pairs of rings of their own.
fn pairs(socket: &UnixStream, queues: usize) -> Result<usize, Failure> {
    // One to ask with: from the answer on it knows of rings only half as many as there are, for of
    // network devices pairs are counted.
    let mut asking = Frontend::from_stream(socket.try_clone()?, 0);
    let features = asked("GET_FEATURES", asking.get_features())?;
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
        return Ok(1);
    }
    let protocol = asked("GET_PROTOCOL_FEATURES", asking.get_protocol_features())?;
    if !protocol.contains(Protocol::MQ) {
        return Ok(1);
    }
    asked("SET_PROTOCOL_FEATURES", asking.set_protocol_features(Protocol::MQ))?;
    let most = asked("GET_QUEUE_NUM", asking.get_queue_num())?;
    match queues.min(usize::try_from(most).unwrap_or(usize::MAX)) {
        0 => Err(Failure::NoQueue),
        pairs => Ok(pairs),
    }
}

/// Sets everything up but the rings; which features hold.
fn agree(
    switch: &mut Frontend,
    accepts: Accepts,
    pairs: usize,
    memory: &Memory,
) -> Result<u64, Failure> {
    let offered = asked("GET_FEATURES", switch.get_features())?;
    if offered & bit(VIRTIO_F_VERSION_1) == 0 {
        return Err(Failure::Legacy);
    }
    let features = choose(offered, accepts, pairs);
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
        let protocol = asked("GET_PROTOCOL_FEATURES", switch.get_protocol_features())?;
        let protocol = protocol & (Protocol::MQ | Protocol::REPLY_ACK);
        // Its acknowledgement is needed first: QEMU does not ask for a reply to this one either.
        asked("SET_PROTOCOL_FEATURES", switch.set_protocol_features(protocol))?;
        if protocol.contains(Protocol::REPLY_ACK) {
            switch.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
    }
    asked("SET_OWNER", switch.set_owner())?;
    asked("SET_FEATURES", switch.set_features(features))?;
    asked("SET_MEM_TABLE", switch.set_mem_table(&[memory.region()]))?;
    Ok(features)
}

/// Tells the switch of a ring, which then runs where there are no protocol features.
fn tell(
    switch: &mut Frontend,
    (pair, way): (usize, Way),
    kick: &Kick,
    bell: &Bell,
) -> Result<(), Failure> {
    let (number, place) = (way.number(pair), place(pair, way));
    let at = |part: usize| place.address + (place.ring + part) as u64;
    let config = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: at(DESC),
        used_ring_addr: at(USED),
        avail_ring_addr: at(AVAIL),
        log_addr: None,
    };
    asked("SET_VRING_NUM", switch.set_vring_num(number, SIZE))?;
    asked("SET_VRING_BASE", switch.set_vring_base(number, 0))?;
    asked("SET_VRING_ADDR", switch.set_vring_addr(number, &config))?;
    asked("SET_VRING_CALL", switch.set_vring_call(number, &bell.end()?))?;
    asked("SET_VRING_KICK", switch.set_vring_kick(number, &kick.end()?))
}

/// Brings a connection's rings up; what each queue works with. Waits for the switch without a limit.
pub(super) fn open(
    socket: UnixStream,
    ports: &[Port],
    accepts: Accepts,
    trouble: &Arc<Trouble>,
) -> Result<Vec<Wire>, Failure> {
    let pairs = pairs(&socket, ports.len())?;
    let memory = Arc::new(Memory::new(pairs)?);
    let mut switch = Frontend::from_stream(socket, 2 * pairs as u64);
    let features = agree(&mut switch, accepts, pairs, &memory)?;
    let by_index = features & bit(VIRTIO_RING_F_EVENT_IDX) != 0;
    let events = if by_index { Events::Index } else { Events::Flags };
    let mut rings = Vec::with_capacity(pairs);
    for (pair, port) in ports.iter().enumerate().take(pairs) {
        let vring = |way, writer| -> io::Result<Vring> {
            let ring = Ring::new(memory.clone(), place(pair, way), events, writer);
            Ok(Vring { ring, kick: Kick::new()? })
        };
        let mut receive = vring(Way::Receive, Writer::Device)?;
        (0..SIZE).for_each(|number| receive.ring.lend(number, LONGEST as u32));
        receive.publish();
        let transmit = vring(Way::Transmit, Writer::Driver)?;
        tell(&mut switch, (pair, Way::Receive), &receive.kick, &port.arrived)?;
        tell(&mut switch, (pair, Way::Transmit), &transmit.kick, &port.room)?;
        // It starts a ring with its first kick.
        transmit.kick.ring();
        rings.push((receive, Arc::new(Mutex::new(Output::new(transmit)))));
    }
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
        for number in 0..2 * pairs {
            asked("SET_VRING_ENABLE", switch.set_vring_enable(number, true))?;
        }
    }
    tracing::debug!("{pairs} pairs of rings, features {features:#x}");
    let outputs: Vec<_> = rings.iter().map(|(_, output)| Arc::clone(output)).collect();
    let mut inputs = rings.into_iter().map(|(input, _)| input);
    let abilities = abilities(features);
    let wire = |number: usize| Wire {
        input: inputs.next(),
        output: Arc::clone(&outputs[number % pairs]),
        abilities,
        trouble: Arc::clone(trouble),
    };
    Ok((0..ports.len()).map(wire).collect())
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
