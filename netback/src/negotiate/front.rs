//! The frontend's side: reading what a backend offers, writing what was chosen.

use hypervisor::xenbus::Key;
use hypervisor::xenbus::keys::{Keys, Refused, key};

use super::{Accepted, FLIP, Multicast, Offer, Ports, QueueKeys, RxNotify};

/// The largest ring that a frontend is ready for, as log2 of its pages.
const MAX_ORDER: u32 = 4;
/// The most queues that it is ready for.
const MAX_QUEUES: u32 = 256;

impl Offer {
    /// Reads a backend's offer through `read`. What it does not mention it does not offer; what is
    /// larger than a frontend needs is cut.
    pub fn read(read: impl Fn(&str) -> Option<String>) -> Result<Offer, Refused> {
        let keys = Keys::of_backend(read);
        if !keys.flag("feature-rx-copy")? {
            return Err(keys.refuse("feature-rx-copy", FLIP));
        }
        Ok(Offer {
            scatter: keys.flag("feature-sg")?,
            tso4: keys.flag("feature-gso-tcpv4")?,
            tso6: keys.flag("feature-gso-tcpv6")?,
            checksum6: keys.flag("feature-ipv6-csum-offload")?,
            split: keys.flag("feature-split-event-channels")?,
            multicast: keys.flag("feature-multicast-control")?,
            ctrl_ring: keys.flag("feature-ctrl-ring")?,
            xdp_headroom: keys.flag("feature-xdp-headroom")?,
            max_queues: keys.number("multi-queue-max-queues")?.unwrap_or(1).clamp(1, MAX_QUEUES),
            max_ring_page_order: keys.number("max-ring-page-order")?.unwrap_or(0).min(MAX_ORDER),
        })
    }
}

impl QueueKeys {
    fn front_keys(&self, prefix: &str) -> Vec<Key> {
        let mut keys = Vec::new();
        for (ring, refs) in [("tx", &self.tx_refs), ("rx", &self.rx_refs)] {
            match &refs[..] {
                [one] => keys.push(key(&format!("{prefix}{ring}-ring-ref"), one)),
                several => keys.extend(
                    several
                        .iter()
                        .enumerate()
                        .map(|(i, gref)| key(&format!("{prefix}{ring}-ring-ref{i}"), gref)),
                ),
            }
        }
        match self.ports {
            Ports::Shared(port) => keys.push(key(&format!("{prefix}event-channel"), port)),
            Ports::Split { tx, rx } => {
                keys.push(key(&format!("{prefix}event-channel-tx"), tx));
                keys.push(key(&format!("{prefix}event-channel-rx"), rx));
            }
        }
        keys
    }
}

impl Accepted {
    /// The keys that a frontend writes, below its directory.
    pub fn front_keys(&self) -> Vec<Key> {
        let flag = |name, on: bool| key(name, u8::from(on));
        let takes = self.accepts;
        let mut keys = vec![
            flag("request-rx-copy", true),
            flag("feature-rx-notify", self.rx_notify == RxNotify::Yes),
            flag("feature-sg", takes.scatter),
            flag("feature-gso-tcpv4", takes.tso4),
            flag("feature-gso-tcpv6", takes.tso6),
            flag("feature-no-csum-offload", !takes.checksum4),
            flag("feature-ipv6-csum-offload", takes.checksum6),
            flag("request-multicast-control", self.multicast == Multicast::Listed),
            key("xdp-headroom", self.xdp_headroom),
        ];
        let pages = self.queues.first().map_or(1, |queue| queue.tx_refs.len());
        if pages > 1 {
            keys.push(key("ring-page-order", pages.ilog2()));
        }
        if let Some(ctrl) = self.ctrl {
            keys.push(key("ctrl-ring-ref", ctrl.ring_ref));
            keys.push(key("event-channel-ctrl", ctrl.port));
        }
        match &self.queues[..] {
            [one] => keys.extend(one.front_keys("")),
            several => {
                keys.push(key("multi-queue-num-queues", several.len()));
                for (number, queue) in several.iter().enumerate() {
                    keys.extend(queue.front_keys(&format!("queue-{number}/")));
                }
            }
        }
        keys
    }

    /// Whether a key of the frontend's directory is one that an earlier life may have left.
    pub fn is_choice(name: &str) -> bool {
        let whole = [
            "request-rx-copy",
            "feature-rx-notify",
            "feature-sg",
            "feature-gso-tcpv4",
            "feature-gso-tcpv6",
            "feature-no-csum-offload",
            "feature-ipv6-csum-offload",
            "request-multicast-control",
            "xdp-headroom",
            "ring-page-order",
            "ctrl-ring-ref",
            "multi-queue-num-queues",
        ];
        let begins = ["tx-ring-ref", "rx-ring-ref", "event-channel", "queue-"];
        whole.contains(&name) || begins.iter().any(|b| name.starts_with(b))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::CtrlKeys;
    use super::*;
    use crate::endpoint::Accepts;

    const OFFER: Offer = Offer {
        scatter: true,
        tso4: true,
        tso6: false,
        checksum6: true,
        split: true,
        multicast: true,
        ctrl_ring: true,
        xdp_headroom: true,
        max_queues: 4,
        max_ring_page_order: 2,
    };

    fn map(keys: Vec<Key>) -> BTreeMap<String, String> {
        keys.into_iter().collect()
    }

    #[test]
    fn an_offer_is_read_as_it_was_written() {
        let keys = map(OFFER.keys());
        assert_eq!(Offer::read(|key| keys.get(key).cloned()), Ok(OFFER));
    }

    #[test]
    fn the_least_offer_and_senseless_ones() {
        let read = |text: &str| {
            let keys = text.split_whitespace().filter_map(|p| p.split_once('='));
            let keys: BTreeMap<_, _> = keys.collect();
            Offer::read(|key| keys.get(key).map(|v| (*v).to_owned()))
        };
        let least = read("feature-rx-copy=1").expect("an offer");
        assert_eq!((least.max_queues, least.max_ring_page_order), (1, 0));
        assert!(!least.scatter && !least.tso4 && !least.split && !least.ctrl_ring);
        let most =
            read("feature-rx-copy=1 multi-queue-max-queues=4000000000 max-ring-page-order=9")
                .expect("an offer");
        assert_eq!((most.max_queues, most.max_ring_page_order), (MAX_QUEUES, MAX_ORDER));
        let refused = |text| read(text).expect_err("nonsense").to_string();
        let flip = "backend key feature-rx-copy is not 1: rx-flip is not supported";
        assert_eq!(refused("feature-rx-flip=1"), flip);
        let bad = "backend key feature-sg is \"-1\", which is not a number";
        assert_eq!(refused("feature-rx-copy=1 feature-sg=-1"), bad);
    }

    #[test]
    fn a_choice_is_read_as_it_was_written() {
        let queue = |n: u32, pages: u32, split| QueueKeys {
            tx_refs: (0..pages).map(|i| 100 * n + i + 1).collect(),
            rx_refs: (0..pages).map(|i| 100 * n + i + 51).collect(),
            ports: if split {
                Ports::Split { tx: 10 * n + 1, rx: 10 * n + 2 }
            } else {
                Ports::Shared(10 * n + 1)
            },
        };
        for (queues, pages, split) in
            [(1, 1, false), (1, 1, true), (4, 1, true), (3, 4, false), (1, 4, true)]
        {
            let accepted = Accepted {
                accepts: Accepts {
                    scatter: true,
                    checksum6: true,
                    tso6: true,
                    ..Accepts::default()
                },
                rx_notify: RxNotify::Yes,
                multicast: Multicast::Listed,
                xdp_headroom: 256,
                ctrl: Some(CtrlKeys { ring_ref: 9000, port: 900 }),
                queues: (0..queues).map(|n| queue(n, pages, split)).collect(),
            };
            let keys = map(accepted.front_keys());
            let top = |key: &String| Accepted::is_choice(key.split('/').next().unwrap_or(key));
            assert!(keys.keys().all(top), "{keys:?}");
            assert_eq!(Accepted::read(&OFFER, |key| keys.get(key).cloned()), Ok(accepted));
        }
        assert!(
            !["backend", "backend-id", "mac", "handle", "state", "mtu"]
                .iter()
                .any(|key| Accepted::is_choice(key))
        );
    }
}
