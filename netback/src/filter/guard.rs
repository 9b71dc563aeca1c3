//! Against a guest that speaks for others: what it sends must come from its own addresses, in the
//! Ethernet header, in IP's, in ARP (RFC 826) and in neighbour discovery (RFC 4861).
//!
//! What cannot be looked into does not pass: more than two VLAN tags, header chains of IPv6 that are
//! not whole (RFC 7112), fragmented neighbour discovery (RFC 6980).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::checksum::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Layers, Transport, ethertype};

type Mac = [u8; 6];

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
/// ARP's kinds and lengths of addresses: Ethernet, IPv4, 6 and 4 bytes.
const ARP_OF_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// Ports of DHCP: the client's and the server's (RFC 2131).
const DHCP: [u8; 4] = [0, 68, 0, 67];

/// Next-header numbers of IPv6.
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
/// Extension headers that are looked through.
const MAX_EXTENSIONS: usize = 8;

/// Types of ICMPv6 (RFC 2710, 3810, 4861).
const MLD_REPORT: u8 = 131;
const MLD_DONE: u8 = 132;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const MLD2_REPORT: u8 = 143;
/// Options with a link-layer address: the sender's, the target's.
const SOURCE_LINK: u8 = 1;
const TARGET_LINK: u8 = 2;

/// How closely a guest's addresses are watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AntiSpoof {
    /// Not at all.
    #[default]
    Off,
    /// Ethernet addresses, in the headers, ARP and neighbour discovery.
    Mac,
    /// Also IP addresses. Nothing but ARP and IP passes, and no router advertisement.
    Ip,
}

impl AntiSpoof {
    /// A word of the knob `antispoof`.
    pub fn parse(text: &str) -> Option<AntiSpoof> {
        match text {
            "off" => Some(AntiSpoof::Off),
            "mac" => Some(AntiSpoof::Mac),
            "ip" => Some(AntiSpoof::Ip),
            _ => None,
        }
    }
}

/// Addresses with a common beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix<T> {
    address: T,
    len: u32,
}

impl Prefix<u32> {
    fn holds(self, address: u32) -> bool {
        (address ^ self.address).checked_shr(32 - self.len).unwrap_or(0) == 0
    }
}

impl Prefix<u128> {
    fn holds(self, address: u128) -> bool {
        (address ^ self.address).checked_shr(128 - self.len).unwrap_or(0) == 0
    }
}

/// The addresses that a vif's node gives the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    mac: Option<Mac>,
    v4: Vec<Prefix<u32>>,
    v6: Vec<Prefix<u128>>,
}

impl Addresses {
    /// From the values of the keys `mac`, and `ip`: addresses, or networks `ADDRESS/BITS`, with spaces
    /// or commas between.
    pub fn parse(mac: Option<&str>, ip: Option<&str>) -> Result<Addresses, String> {
        let mut all = Addresses::default();
        if let Some(mac) = mac {
            let parsed = parse_mac(mac.trim());
            all.mac =
                Some(parsed.ok_or_else(|| format!("mac is {mac:?}; it is like 00:16:3e:0:0:1"))?);
        }
        let list = ip.unwrap_or_default().split([' ', ',', '\t', '\n']);
        for text in list.filter(|text| !text.is_empty()) {
            let named = || format!("ip has {text:?}, which is neither an address nor ADDRESS/BITS");
            let (address, bits) = text.split_once('/').unwrap_or((text, ""));
            let address: IpAddr = address.parse().map_err(|_| named())?;
            let most = if address.is_ipv4() { 32 } else { 128 };
            let len = if bits.is_empty() { Some(most) } else { bits.parse().ok() };
            let len = len.filter(|len| *len <= most && !text.ends_with('/')).ok_or_else(named)?;
            match address {
                IpAddr::V4(v4) => all.v4.push(Prefix { address: v4.to_bits(), len }),
                IpAddr::V6(v6) => all.v6.push(Prefix { address: v6.to_bits(), len }),
            }
        }
        Ok(all)
    }
}

/// Six bytes in hexadecimal with colons between; not a group's address.
fn parse_mac(text: &str) -> Option<Mac> {
    let parts: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let mac: Mac = parts?.try_into().ok()?;
    (mac[0] & 1 == 0).then_some(mac)
}

/// Looks at frames of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    mac: Mac,
    /// None: any address.
    ip: Option<Allowed>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Allowed {
    v4: Vec<Prefix<u32>>,
    v6: Vec<Prefix<u128>>,
    /// What the Ethernet address makes of itself (RFC 4291, appendix A).
    link_local: u128,
}

impl Allowed {
    fn v4(&self, address: &[u8]) -> bool {
        let Ok(address) = address.try_into().map(u32::from_be_bytes) else { return false };
        self.v4.iter().any(|prefix| prefix.holds(address))
    }
    fn v6(&self, address: &[u8]) -> bool {
        let Ok(address) = address.try_into().map(u128::from_be_bytes) else { return false };
        address == self.link_local || self.v6.iter().any(|prefix| prefix.holds(address))
    }
}

/// What an IPv6 packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upper {
    /// ICMPv6 that begins there.
    Icmp { at: usize, fragment: bool },
    /// Something else, or a fragment that is not the first.
    Other,
    /// That does not show.
    Unreadable,
}

fn link_local(mac: Mac) -> u128 {
    let [a, b, c, d, e, f] = mac;
    let end = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    (0xfe80 << 112) | u128::from(end)
}

impl Guard {
    /// One that watches as closely as `mode` says; none for [`AntiSpoof::Off`]. The error names the
    /// address that is missing.
    pub fn new(mode: AntiSpoof, addresses: &Addresses) -> Result<Option<Guard>, String> {
        if mode == AntiSpoof::Off {
            return Ok(None);
        }
        let mac = addresses.mac.ok_or("antispoof needs the vif's key mac")?;
        let allowed = Allowed {
            v4: addresses.v4.clone(),
            v6: addresses.v6.clone(),
            link_local: link_local(mac),
        };
        if mode == AntiSpoof::Ip && allowed.v4.is_empty() && allowed.v6.is_empty() {
            return Err("antispoof=ip needs the vif's key ip".into());
        }
        Ok(Some(Guard { mac, ip: (mode == AntiSpoof::Ip).then_some(allowed) }))
    }

    /// Whether a frame comes from the guest's own addresses.
    pub fn permits(&self, frame: &[u8]) -> bool {
        if frame.get(6..12) != Some(&self.mac) {
            return false;
        }
        match ethertype(frame) {
            None => false,
            Some((ETHERTYPE_ARP | ETHERTYPE_RARP, at)) => self.arp(frame, at),
            Some((ETHERTYPE_IPV4, at)) => self.ip.as_ref().is_none_or(|ip| v4(ip, frame, at)),
            Some((ETHERTYPE_IPV6, at)) => self.v6(frame, at),
            Some(_) => self.ip.is_none(),
        }
    }

    fn arp(&self, frame: &[u8], at: usize) -> bool {
        let Some(packet) = frame.get(at..at + 28) else { return false };
        let sender = &packet[14..18];
        // A probe has no sender (RFC 5227).
        let is_known = |ip: &Allowed| sender == [0; 4] || ip.v4(sender);
        packet[..6] == ARP_OF_IPV4
            && packet[8..14] == self.mac
            && self.ip.as_ref().is_none_or(is_known)
    }

    fn v6(&self, frame: &[u8], at: usize) -> bool {
        let Some(header) = frame.get(at..at + 40).filter(|header| header[0] >> 4 == 6) else {
            return false;
        };
        let source = &header[8..24];
        let end = at + 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
        let Some(packet) = frame.get(at..end) else { return false };
        let upper = upper(packet);
        let is_nobody = source == Ipv6Addr::UNSPECIFIED.octets();
        let is_ours = self.ip.as_ref().is_none_or(|ip| ip.v6(source));
        match upper {
            Upper::Unreadable => false,
            Upper::Other => is_ours,
            Upper::Icmp { at, fragment } => {
                let Some(message) = packet.get(at..) else { return false };
                let Some(kind) = message.first().copied() else { return false };
                if (ROUTER_SOLICITATION..=REDIRECT).contains(&kind) && fragment {
                    return false;
                }
                (is_ours || (is_nobody && is_first_word(kind)))
                    && self.discovery(kind, message, is_nobody)
            }
        }
    }

    /// Whether a message of neighbour discovery speaks for this guest alone; others may pass.
    fn discovery(&self, kind: u8, message: &[u8], is_nobody: bool) -> bool {
        let is_known = |target: Option<&[u8]>| {
            self.ip.as_ref().is_none_or(|ip| target.is_some_and(|target| ip.v6(target)))
        };
        let (options, link) = match kind {
            ROUTER_SOLICITATION => (8, SOURCE_LINK),
            ROUTER_ADVERTISEMENT => (16, SOURCE_LINK),
            NEIGHBOUR_SOLICITATION => (24, SOURCE_LINK),
            NEIGHBOUR_ADVERTISEMENT => (24, TARGET_LINK),
            REDIRECT => return self.ip.is_none(),
            _ => return true,
        };
        let is_target_ours = match kind {
            ROUTER_ADVERTISEMENT => self.ip.is_none(),
            NEIGHBOUR_ADVERTISEMENT => is_known(message.get(8..24)),
            // Who has no address yet claims the target (RFC 4862).
            NEIGHBOUR_SOLICITATION if is_nobody => is_known(message.get(8..24)),
            _ => true,
        };
        is_target_ours && message.get(options..).is_some_and(|options| self.is_mine(options, link))
    }

    /// Whether every option of the kind `link` has the guest's own Ethernet address.
    fn is_mine(&self, mut options: &[u8], link: u8) -> bool {
        while let [kind, words, ..] = *options {
            let len = usize::from(words) * 8;
            if len == 0 || len > options.len() {
                return false;
            }
            if kind == link && options[2..8] != self.mac {
                return false;
            }
            options = &options[len..];
        }
        options.is_empty()
    }
}

/// What is sent by who has no address yet.
fn is_first_word(kind: u8) -> bool {
    matches!(
        kind,
        MLD_REPORT | MLD_DONE | MLD2_REPORT | ROUTER_SOLICITATION | NEIGHBOUR_SOLICITATION
    )
}

/// Whether an IPv4 packet has an address of the guest's, or asks for one.
fn v4(ip: &Allowed, frame: &[u8], at: usize) -> bool {
    let Some(header) = frame.get(at..at + 20) else { return false };
    let source = &header[12..16];
    if header[0] >> 4 != 4 {
        return false;
    }
    let asks = || {
        Layers::of(frame).is_some_and(|layers| {
            layers.transport == Transport::Udp && frame[layers.start..layers.start + 4] == DHCP
        })
    };
    ip.v4(source) || (source == Ipv4Addr::UNSPECIFIED.octets() && asks())
}

/// What is behind the headers of an IPv6 packet.
fn upper(packet: &[u8]) -> Upper {
    let (mut next, mut at, mut fragment) = (packet[6], 40, false);
    for _ in 0..=MAX_EXTENSIONS {
        let len = match next {
            ICMPV6 => return Upper::Icmp { at, fragment },
            HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT | AUTHENTICATION => packet.get(at + 1),
            _ => return Upper::Other,
        };
        let (Some(len), Some(header)) = (len, packet.get(at..at + 8)) else {
            return Upper::Unreadable;
        };
        at += match next {
            FRAGMENT => {
                fragment = true;
                // Its offset, of 13 bits.
                if u16::from_be_bytes([header[2], header[3]]) >> 3 != 0 {
                    return Upper::Other;
                }
                8
            }
            AUTHENTICATION => (usize::from(*len) + 2) * 4,
            _ => (usize::from(*len) + 1) * 8,
        };
        next = header[0];
    }
    Upper::Unreadable
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
