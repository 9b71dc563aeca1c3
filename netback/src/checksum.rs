//! Checksums of TCP and UDP over IPv4 and IPv6 in software, and where in a frame they are. Pure.
//!
//! netif says only *that* a checksum is blank; what it belongs to stands in the frame's headers,
//! which are the guest's: every length is checked against the frame.

/// Protocol numbers (RFC 9293, RFC 768) and those of IPv6's extension headers (RFC 8200).
const TCP: u8 = 6;
const UDP: u8 = 17;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
/// Extension headers that are looked through.
const MAX_EXTENSIONS: usize = 8;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;

/// Which IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ip {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

/// Which protocol over IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

/// Where a frame's headers are; all of it lies within the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// Which IP.
    pub ip: Ip,
    /// Which protocol over it.
    pub transport: Transport,
    /// First byte of the IP header.
    pub network: usize,
    /// First byte of the TCP or UDP header.
    pub start: usize,
    /// First byte of what TCP or UDP carry.
    pub payload: usize,
    /// First byte behind the IP packet: what follows is padding.
    pub end: usize,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The ethertype of a frame behind up to two VLAN tags, and where what it names begins.
pub fn ethertype(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = 12;
    for _ in 0..3 {
        let found = be16(frame, at)?;
        if !matches!(found, ETHERTYPE_VLAN | ETHERTYPE_QINQ) {
            return Some((found, at + 2));
        }
        at += 4;
    }
    None
}

impl Layers {
    /// Finds the headers of an unfragmented TCP or UDP packet; `None` if it is none, or not whole.
    pub fn of(frame: &[u8]) -> Option<Layers> {
        match ethertype(frame)? {
            (ETHERTYPE_IPV4, at) => Layers::v4(frame, at),
            (ETHERTYPE_IPV6, at) => Layers::v6(frame, at),
            _ => None,
        }
    }

    fn v4(frame: &[u8], network: usize) -> Option<Layers> {
        let first = *frame.get(network)?;
        let header = usize::from(first & 0xf) * 4;
        let total = usize::from(be16(frame, network + 2)?);
        // More fragments, or an offset.
        let fragment = be16(frame, network + 6)? & 0x3fff != 0;
        let protocol = *frame.get(network + 9)?;
        if first >> 4 != 4 || header < 20 || total < header || fragment {
            return None;
        }
        Layers::over(frame, Ip::V4, network, network + header, protocol, network + total)
    }

    fn v6(frame: &[u8], network: usize) -> Option<Layers> {
        if frame.get(network)? >> 4 != 6 {
            return None;
        }
        let end = network + 40 + usize::from(be16(frame, network + 4)?);
        let (mut next, mut at) = (*frame.get(network + 6)?, network + 40);
        for _ in 0..MAX_EXTENSIONS {
            if !matches!(next, HOP_BY_HOP | ROUTING | DESTINATION) {
                break;
            }
            next = *frame.get(at)?;
            at += (usize::from(*frame.get(at + 1)?) + 1) * 8;
        }
        Layers::over(frame, Ip::V6, network, at, next, end)
    }

    fn over(
        frame: &[u8],
        ip: Ip,
        network: usize,
        start: usize,
        protocol: u8,
        end: usize,
    ) -> Option<Layers> {
        if end > frame.len() {
            return None;
        }
        let (transport, header) = match protocol {
            TCP => (Transport::Tcp, usize::from(frame.get(start + 12)? >> 4) * 4),
            UDP => (Transport::Udp, 8),
            _ => return None,
        };
        let least = if transport == Transport::Tcp { 20 } else { 8 };
        let payload = start + header;
        let whole = header >= least && payload <= end;
        whole.then_some(Layers { ip, transport, network, start, payload, end })
    }

    /// Where the checksum is, from `start` on.
    pub fn offset(&self) -> usize {
        match self.transport {
            Transport::Tcp => 16,
            Transport::Udp => 6,
        }
    }

    /// The pseudo-header's sum for a TCP or UDP part of `len` bytes (RFC 9293, RFC 8200).
    pub fn pseudo(&self, frame: &[u8], len: usize) -> u64 {
        let addresses = match self.ip {
            Ip::V4 => self.network + 12..self.network + 20,
            Ip::V6 => self.network + 8..self.network + 40,
        };
        let protocol = if self.transport == Transport::Tcp { TCP } else { UDP };
        // A number added in big-endian words, as the bytes are.
        let tail = u16::from(protocol).to_be_bytes();
        let len = (len as u32).to_be_bytes();
        sum(&frame[addresses]) + sum(&tail) + sum(&len)
    }

    /// Puts the pseudo-header's sum into the checksum's place, as is due where it is blank.
    pub fn prepare(&self, frame: &mut [u8]) {
        let partial = fold(self.pseudo(frame, self.end - self.start));
        let at = self.start + self.offset();
        frame[at..at + 2].copy_from_slice(&partial.to_ne_bytes());
    }

    /// Computes the checksum and puts it into its place.
    pub fn fill(&self, frame: &mut [u8]) {
        self.prepare(frame);
        complete(&mut frame[..self.end], self.start, self.offset());
    }
}

/// The sum of 16-bit words as they lie in memory; an odd last byte is followed by a 0.
pub fn sum(bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<4>();
    let total: u64 = words.iter().map(|w| u64::from(u32::from_ne_bytes(*w))).sum();
    let mut last = [0; 4];
    last[..tail.len()].copy_from_slice(tail);
    total + u64::from(u32::from_ne_bytes(last))
}

/// A sum in 16 bits.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Completes a blank checksum: the sum from `start` to the frame's end, with the pseudo-header's that
/// stands in its place, belongs at `start + offset`. Whether it lies in the frame.
pub fn complete(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let at = start.saturating_add(offset);
    if at.checked_add(2).is_none_or(|end| end > frame.len()) {
        return false;
    }
    // 0 would say that there is none (RFC 768); for TCP the two are the same.
    let value = match !fold(sum(&frame[start..])) {
        0 => 0xffff,
        value => value,
    };
    frame[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    true
}

#[cfg(test)]
#[path = "checksum_tests.rs"]
pub(crate) mod tests;
