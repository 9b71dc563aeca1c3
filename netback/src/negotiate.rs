//! What the two ends tell each other through xenstore before the rings run: pure functions from
//! and to keys. The keys are those of Xen's io/netif.h; `max-ring-page-order` and what goes with it
//! are blkif's, which netif.h lacks.

mod front;

use hypervisor::xenbus::Key;
use hypervisor::xenbus::keys::{Keys, Refused, key};

use crate::endpoint::Accepts;

/// What a backend offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// `feature-sg`: packets of several slots.
    pub scatter: bool,
    /// `feature-gso-tcpv4`
    pub tso4: bool,
    /// `feature-gso-tcpv6`
    pub tso6: bool,
    /// `feature-ipv6-csum-offload`; IPv4's is always there.
    pub checksum6: bool,
    /// `feature-split-event-channels`
    pub split: bool,
    /// `feature-multicast-control`, and that it may be changed at any time.
    pub multicast: bool,
    /// `feature-ctrl-ring`
    pub ctrl_ring: bool,
    /// `feature-xdp-headroom`
    pub xdp_headroom: bool,
    /// `multi-queue-max-queues`
    pub max_queues: u32,
    /// `max-ring-page-order`; 0 is what unmodified frontends know.
    pub max_ring_page_order: u32,
}

impl Offer {
    /// The keys that a frontend reads before it makes its rings; written before state 2. Written
    /// as 0 too: a predecessor with other knobs may have left another value.
    pub fn keys(&self) -> Vec<Key> {
        let flag = |name, on: bool| key(name, u8::from(on));
        vec![
            flag("feature-sg", self.scatter),
            flag("feature-gso-tcpv4", self.tso4),
            flag("feature-gso-tcpv6", self.tso6),
            flag("feature-ipv6-csum-offload", self.checksum6),
            flag("feature-rx-copy", true),
            flag("feature-rx-flip", false),
            flag("feature-multicast-control", self.multicast),
            flag("feature-dynamic-multicast-control", self.multicast),
            flag("feature-split-event-channels", self.split),
            flag("feature-ctrl-ring", self.ctrl_ring),
            flag("feature-xdp-headroom", self.xdp_headroom),
            key("multi-queue-max-queues", self.max_queues),
            key("max-ring-page-order", self.max_ring_page_order),
        ]
    }
}

/// The event channels of one queue's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// One for both (`event-channel`).
    Shared(u32),
    /// One each (`event-channel-tx`, `event-channel-rx`).
    Split {
        /// Of packets from the guest.
        tx: u32,
        /// Of packets to the guest.
        rx: u32,
    },
}

impl Ports {
    fn all(self) -> Vec<u32> {
        match self {
            Ports::Shared(port) => vec![port],
            Ports::Split { tx, rx } => vec![tx, rx],
        }
    }
}

/// One queue as the frontend has made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueKeys {
    /// Pages of the ring of packets from the guest.
    pub tx_refs: Vec<u32>,
    /// Pages of the ring of packets to the guest.
    pub rx_refs: Vec<u32>,
    /// Their event channels.
    pub ports: Ports,
}

/// The control ring as the frontend has made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CtrlKeys {
    /// `ctrl-ring-ref`
    pub ring_ref: u32,
    /// `event-channel-ctrl`
    pub port: u32,
}

/// Whether a frontend tells of new pages for packets to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxNotify {
    /// It does (`feature-rx-notify`).
    Yes,
    /// It does not: whoever waits for pages has to look.
    No,
}

/// Which group addresses a frontend gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Multicast {
    /// All.
    Flood,
    /// Those that it has named (`request-multicast-control`).
    Listed,
}

/// What a frontend has chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// What it takes of packets.
    pub accepts: Accepts,
    /// Whether it tells of new pages.
    pub rx_notify: RxNotify,
    /// Which group addresses it gets.
    pub multicast: Multicast,
    /// `xdp-headroom`: bytes to leave free before each packet to it.
    pub xdp_headroom: u16,
    /// Its control ring, if it has one.
    pub ctrl: Option<CtrlKeys>,
    /// Its queues.
    pub queues: Vec<QueueKeys>,
}

/// The keys that [`Accepted::live`] reads.
pub const LIVE_KEYS: &[&str] = &["request-multicast-control", "xdp-headroom"];
/// Most bytes that a frontend may have left free in a page (Linux's `XDP_PACKET_HEADROOM` is 256).
pub const MAX_HEADROOM: u32 = 256;

/// Why pages are not exchanged for others.
const FLIP: &str = "is not 1: rx-flip is not supported";
/// Why two rings have to be apart.
const SHARED_PAGE: &str = "names a page of another ring";
const SHARED_PORT: &str = "names the port of another ring";

impl Accepted {
    /// Reads a frontend's keys through `read`. It may know none of the optional ones.
    pub fn read(offer: &Offer, read: impl Fn(&str) -> Option<String>) -> Result<Accepted, Refused> {
        let keys = Keys::of_frontend(read);
        if !keys.flag("request-rx-copy")? {
            return Err(keys.refuse("request-rx-copy", FLIP));
        }
        let count = keys.within("multi-queue-num-queues", 1, 1, offer.max_queues)?;
        let order = keys.within("ring-page-order", 0, 0, offer.max_ring_page_order)?;
        let mut accepted = Accepted {
            accepts: Self::accepts(&keys)?,
            rx_notify: if keys.flag("feature-rx-notify")? { RxNotify::Yes } else { RxNotify::No },
            multicast: Self::multicast(offer, &keys)?,
            xdp_headroom: Self::headroom(offer, &keys)?,
            ctrl: None,
            queues: Vec::new(),
        };
        for number in 0..count {
            let prefix = if count == 1 { String::new() } else { format!("queue-{number}/") };
            let queue = Self::queue(offer, &keys, &prefix, 1 << order)?;
            accepted.check_apart(&keys, &queue, &prefix)?;
            accepted.queues.push(queue);
        }
        accepted.ctrl = accepted.ctrl_keys(offer, &keys)?;
        Ok(accepted)
    }

    fn accepts(keys: &Keys<impl Fn(&str) -> Option<String>>) -> Result<Accepts, Refused> {
        let scatter = keys.flag("feature-sg")?;
        let (checksum4, checksum6) =
            (!keys.flag("feature-no-csum-offload")?, keys.flag("feature-ipv6-csum-offload")?);
        Ok(Accepts {
            scatter,
            checksum4,
            checksum6,
            // An unsegmented packet has several slots and a blank checksum.
            tso4: keys.flag("feature-gso-tcpv4")? && scatter && checksum4,
            tso6: keys.flag("feature-gso-tcpv6")? && scatter && checksum6,
        })
    }

    fn multicast(
        offer: &Offer,
        keys: &Keys<impl Fn(&str) -> Option<String>>,
    ) -> Result<Multicast, Refused> {
        let listed = offer.multicast && keys.flag("request-multicast-control")?;
        Ok(if listed { Multicast::Listed } else { Multicast::Flood })
    }

    /// What a frontend may change while it is connected (`request-multicast-control`,
    /// `xdp-headroom`), read anew.
    pub fn live(
        offer: &Offer,
        read: impl Fn(&str) -> Option<String>,
    ) -> Result<(Multicast, u16), Refused> {
        let keys = Keys::of_frontend(read);
        Ok((Self::multicast(offer, &keys)?, Self::headroom(offer, &keys)?))
    }

    fn headroom(
        offer: &Offer,
        keys: &Keys<impl Fn(&str) -> Option<String>>,
    ) -> Result<u16, Refused> {
        let most = if offer.xdp_headroom { MAX_HEADROOM } else { 0 };
        Ok(keys.within("xdp-headroom", 0, 0, most)? as u16)
    }

    fn queue(
        offer: &Offer,
        keys: &Keys<impl Fn(&str) -> Option<String>>,
        prefix: &str,
        pages: u32,
    ) -> Result<QueueKeys, Refused> {
        let refs = |ring: &str| match pages {
            1 => Ok(vec![keys.required(&format!("{prefix}{ring}-ring-ref"))?]),
            _ => {
                (0..pages).map(|i| keys.required(&format!("{prefix}{ring}-ring-ref{i}"))).collect()
            }
        };
        let name = |key: &str| format!("{prefix}{key}");
        let split = offer.split && keys.get(&name("event-channel-tx")).is_some();
        let ports = if split {
            Ports::Split {
                tx: keys.port(&name("event-channel-tx"))?,
                rx: keys.port(&name("event-channel-rx"))?,
            }
        } else {
            Ports::Shared(keys.port(&name("event-channel"))?)
        };
        Ok(QueueKeys { tx_refs: refs("tx")?, rx_refs: refs("rx")?, ports })
    }

    fn ctrl_keys(
        &self,
        offer: &Offer,
        keys: &Keys<impl Fn(&str) -> Option<String>>,
    ) -> Result<Option<CtrlKeys>, Refused> {
        if !offer.ctrl_ring || keys.number("ctrl-ring-ref")?.is_none() {
            return Ok(None);
        }
        let ctrl = CtrlKeys {
            ring_ref: keys.required("ctrl-ring-ref")?,
            port: keys.port("event-channel-ctrl")?,
        };
        if self.refs().any(|r| r == ctrl.ring_ref) {
            return Err(keys.refuse("ctrl-ring-ref", SHARED_PAGE));
        }
        if self.ports().any(|port| port == ctrl.port) {
            return Err(keys.refuse("event-channel-ctrl", SHARED_PORT));
        }
        Ok(Some(ctrl))
    }

    fn refs(&self) -> impl Iterator<Item = u32> {
        self.queues.iter().flat_map(|q| q.tx_refs.iter().chain(&q.rx_refs).copied())
    }

    fn ports(&self) -> impl Iterator<Item = u32> {
        self.queues.iter().flat_map(|q| q.ports.all())
    }

    /// Two rings in one page would make nonsense of both.
    fn check_apart(
        &self,
        keys: &Keys<impl Fn(&str) -> Option<String>>,
        queue: &QueueKeys,
        prefix: &str,
    ) -> Result<(), Refused> {
        let mine: Vec<u32> = queue.tx_refs.iter().chain(&queue.rx_refs).copied().collect();
        let twice = (1..mine.len()).any(|i| mine[..i].contains(&mine[i]));
        if twice || self.refs().any(|r| mine.contains(&r)) {
            let names = format!("{prefix}tx-ring-ref or rx-ring-ref");
            return Err(keys.refuse(&names, SHARED_PAGE));
        }
        let ports = queue.ports.all();
        let twice = matches!(queue.ports, Ports::Split { tx, rx } if tx == rx);
        if twice || self.ports().any(|port| ports.contains(&port)) {
            return Err(keys.refuse(&format!("{prefix}event-channel"), SHARED_PORT));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "negotiate_tests.rs"]
mod tests;
