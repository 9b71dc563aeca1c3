//! The knobs of a network backend.

use hypervisor::xenbus::knobs::{Knob, Knobs, Reach, number, put};
use hypervisor::xenbus::placement::{self, Placement};

use crate::endpoint::Abilities;
use crate::filter::guard::AntiSpoof;
use crate::filter::vlan::MAX_VLAN;
use crate::limit::Rate;
use crate::offload::Leaves;

/// Most queues that can be asked for.
pub const MAX_QUEUES: u32 = 64;

/// Most pages of a ring that can be asked for, as an order.
pub const MAX_RING_PAGE_ORDER: u32 = 4;

/// Most pages that a queue can be asked to keep mapped: all that its longest rings name.
pub const MAX_STAGING_GRANTS: u32 = 8192;

/// Whether a vif's link is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Packets pass.
    Up,
    /// They are dropped, both ways, and the guest is told (`carrier` is 0).
    Down,
}

impl Carrier {
    fn parse(text: &str) -> Option<Carrier> {
        match text {
            "up" => Some(Carrier::Up),
            "down" => Some(Carrier::Down),
            _ => None,
        }
    }
}

/// Who computes blank checksums and cuts unsegmented packets from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offloads {
    /// What the vif connects to, where it can.
    Host,
    /// This backend: for what reads the host's device without the words that say what is left to
    /// do, as Open vSwitch's user-space datapath does.
    Here,
}

impl Offloads {
    fn parse(text: &str) -> Option<Offloads> {
        match text {
            "host" => Some(Offloads::Host),
            "here" => Some(Offloads::Here),
            _ => None,
        }
    }
    /// What is left to a holder that can do so much.
    pub(crate) fn left_to(self, holder: Abilities) -> Leaves {
        match self {
            Offloads::Host => holder.into(),
            Offloads::Here => Leaves::default(),
        }
    }
}

/// How a network backend serves its devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Most queues offered.
    pub max_queues: u32,
    /// Most pages of each ring that are offered, as an order. Only frontends that know of it, as
    /// ours, have more than one page.
    pub max_ring_page_order: u32,
    /// Pages that a guest may have each queue keep mapped.
    pub staging_grants: u32,
    /// Microseconds that a queue polls before it sleeps.
    pub poll_us: u32,
    /// Where the queues' threads run.
    pub placement: Placement,
    /// Seconds after which frames that wait for a guest's pages are dropped.
    pub rx_stall_s: u32,
    /// How much a vif may move each way.
    pub rate: Rate,
    /// The link.
    pub carrier: Carrier,
    /// Who does what the guest has left to do.
    pub offloads: Offloads,
    /// How closely the guest's addresses are watched.
    pub antispoof: AntiSpoof,
    /// The VLAN that the vif is in; 0 is none, and tags pass as they are.
    pub vlan: u32,
}

impl Default for Config {
    fn default() -> Config {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        Config {
            max_queues: cpus.min(MAX_QUEUES),
            max_ring_page_order: MAX_RING_PAGE_ORDER,
            staging_grants: 512,
            poll_us: 0,
            placement: Placement::default(),
            rx_stall_s: 10,
            rate: Rate::default(),
            carrier: Carrier::Up,
            offloads: Offloads::Host,
            antispoof: AntiSpoof::Off,
            vlan: 0,
        }
    }
}

impl Knobs for Config {
    const KNOBS: &'static [Knob<Config>] = &[
        Knob {
            name: "max_queues",
            unit: "queues",
            default: "CPUs",
            range: "1 to 64",
            help: "most queues offered; each has a thread of its own",
            shows_in: "tx_packets and rx_packets of each queue",
            reach: Reach::Connect,
            set: |c, v| put(&mut c.max_queues, number(v, 1, MAX_QUEUES)),
        },
        Knob {
            name: "max_ring_page_order",
            unit: "order of pages",
            default: "4",
            range: "0 to 4",
            help: "largest rings offered: 4 is 16 pages; only frontends that know of it, as ours, have more than one",
            shows_in: "ring_full",
            reach: Reach::Connect,
            set: |c, v| put(&mut c.max_ring_page_order, number(v, 0, MAX_RING_PAGE_ORDER)),
        },
        Knob {
            name: "staging_grants",
            unit: "pages",
            default: "512",
            range: "0 (none) to 8192",
            help: "pages that a guest may have each queue keep mapped (netif.h, Static Grants), to and from which packets are copied without the hypervisor; only frontends that know of it, as ours, have any",
            shows_in: "tx_staged, rx_staged",
            reach: Reach::Connect,
            set: |c, v| put(&mut c.staging_grants, number(v, 0, MAX_STAGING_GRANTS)),
        },
        Knob {
            name: "poll_us",
            unit: "microseconds",
            default: "0",
            range: "0 to 1000000",
            help: "how long a queue polls before it sleeps, at most",
            shows_in: "polls_paid, sleeps, cpu_ns",
            reach: Reach::Live,
            set: |c, v| put(&mut c.poll_us, number(v, 0, 1_000_000)),
        },
        placement::cpus(|c, v| c.placement.set_cpus(v)),
        placement::node(|c, v| c.placement.set_node(v)),
        Knob {
            name: "rx_stall_s",
            unit: "seconds",
            default: "10",
            range: "1 to 3600",
            help: "after which frames that wait for a guest's pages are dropped",
            shows_in: "rx_stalls, rx_dropped_stalled",
            reach: Reach::Live,
            set: |c, v| put(&mut c.rx_stall_s, number(v, 1, 3600)),
        },
        Knob {
            name: "rate_bytes",
            unit: "bytes/s",
            default: "0",
            range: "0 (no limit) to 2^64 - 1",
            help: "bytes a second each way, of all queues together; the vif's key `rate` of a toolstack goes before it",
            shows_in: "tx_bytes, rx_bytes",
            reach: Reach::Live,
            set: |c, v| put(&mut c.rate.bytes, v.parse().ok()),
        },
        Knob {
            name: "rate_packets",
            unit: "packets/s",
            default: "0",
            range: "0 (no limit) to 2^64 - 1",
            help: "packets a second each way, of all queues together",
            shows_in: "tx_packets, rx_packets",
            reach: Reach::Live,
            set: |c, v| put(&mut c.rate.packets, v.parse().ok()),
        },
        Knob {
            name: "offloads",
            unit: "",
            default: "host",
            range: "host or here",
            help: "who computes checksums and cuts packets that the guest has left as they are; `here` for a host end that cannot, as Open vSwitch's user-space datapath",
            shows_in: "tx_gso, tx_csum_blank",
            reach: Reach::Connect,
            set: |c, v| put(&mut c.offloads, Offloads::parse(v)),
        },
        Knob {
            name: "carrier",
            unit: "",
            default: "up",
            range: "up or down",
            help: "the link, as the guest and the host see it",
            shows_in: "tx_dropped_link, rx_dropped_link",
            reach: Reach::Live,
            set: |c, v| put(&mut c.carrier, Carrier::parse(v)),
        },
        Knob {
            name: "antispoof",
            unit: "",
            default: "off",
            range: "off, mac, ip",
            help: "whether the guest must use the addresses of its node's keys `mac` and `ip`",
            shows_in: "tx_dropped_spoofed",
            reach: Reach::Live,
            set: |c, v| put(&mut c.antispoof, AntiSpoof::parse(v)),
        },
        Knob {
            name: "vlan",
            unit: "",
            default: "0",
            range: "0 (none) to 4094",
            help: "the VLAN that the vif is in; its guest sees no tags",
            shows_in: "tx_dropped_vlan, rx_dropped_vlan",
            reach: Reach::Live,
            set: |c, v| put(&mut c.vlan, number(v, 0, MAX_VLAN)),
        },
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_knob_takes_its_default_and_nothing_beyond_its_range() {
        for knob in Config::KNOBS {
            let mut config = Config::default();
            if knob.default != "CPUs" {
                config.set(knob.name, knob.default).unwrap();
            }
            assert_eq!(config, Config::default(), "{}", knob.name);
            for bad in ["", "-1", "x", "18446744073709551616"] {
                assert!(config.set(knob.name, bad).is_err(), "{}={bad}", knob.name);
            }
        }
        let mut config = Config::default();
        config.set_all("rate_bytes=5, poll_us=7,vlan=4094,antispoof=ip").unwrap();
        assert_eq!((config.rate.bytes, config.poll_us), (5, 7));
        assert_eq!((config.vlan, config.antispoof), (4094, AntiSpoof::Ip));
        for list in ["vlan=4095", "vlan", "antispoof=yes", "poll_us=1000001", "speed=1"] {
            assert!(config.set_all(list).is_err(), "{list}");
        }
        assert_eq!(config.set_live("rx_stall_s", "1"), Ok(()));
        assert!(config.set_live("max_queues", "1").unwrap_err().contains("set it before"));
    }
}
