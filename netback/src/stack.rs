//! smoltcp, a TCP/IP stack, over [`Frame`]s: the user-mode endpoint runs one, and so does a guest's
//! process.
//!
//! Offloads are smoltcp's as far as it has them. It leaves TCP and UDP checksums to this module, in
//! both directions, and segments of TCP over IPv4 to whoever takes unsegmented frames; it has no
//! segmentation offload of IPv6.

pub mod host;
pub mod several;

use std::collections::VecDeque;
use std::num::NonZeroUsize;

use smoltcp::iface::{Config, Interface};
use smoltcp::phy::{
    Checksum as Sums, ChecksumCapabilities, Device, DeviceCapabilities, Medium, PacketMeta,
    RxToken, TxToken,
};
use smoltcp::time::Instant;

use crate::checksum::{self, Ip, Layers, Transport, ethertype};
use crate::endpoint::Accepts;
use crate::frame::{Checksum, Frame, Gso, GsoKind, MAX_FRAME, Pool};
use crate::proto::MAX_TX_SIZE;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// Longest frame that TCP makes for somebody else to cut: the longest that netif carries.
const UNSEGMENTED: usize = MAX_TX_SIZE as usize;
/// Bytes at a frame's beginning that are cleared before smoltcp writes its headers: it leaves what
/// is unused in some of them as it is.
const HEADERS: usize = 128;

/// What the other side takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Longest packet without its Ethernet header, in bytes; 1280 at least.
    pub mtu: u16,
    /// Offloads.
    pub accepts: Accepts,
}

impl Link {
    /// With a packet's length that smoltcp can work with.
    pub fn new(mtu: u16, accepts: Accepts) -> Link {
        Link { mtu: mtu.max(1280), accepts }
    }
}

/// What came in and what goes out, for one call into smoltcp.
pub struct FrameDevice<'a> {
    /// Frames for the stack.
    pub incoming: &'a mut VecDeque<Frame>,
    /// Frames of the stack.
    pub outgoing: &'a mut VecDeque<Frame>,
    /// How many more may be put there.
    pub room: usize,
    /// Where frames come from, and go when the stack is done with them.
    pub pool: &'a mut Pool,
    /// What may go out.
    pub link: Link,
    /// What there was no room for, and incoming frames with wrong checksums.
    pub dropped: &'a mut u64,
    /// Memory for what is dropped.
    pub scratch: &'a mut Vec<u8>,
}

/// A frame for the stack.
pub struct Incoming<'a> {
    bytes: &'a [u8],
}

/// Room for a frame of the stack. One that is not used takes none.
pub struct Outgoing<'a> {
    outgoing: &'a mut VecDeque<Frame>,
    room: &'a mut usize,
    pool: &'a mut Pool,
    link: Link,
    dropped: &'a mut u64,
    scratch: &'a mut Vec<u8>,
    meta: PacketMeta,
}

impl FrameDevice<'_> {
    /// The next frame that is not known to be wrong, to be looked at until the next call. The one
    /// before goes back to the pool.
    fn next(&mut self, current: &mut Option<Frame>) -> bool {
        loop {
            if let Some(done) = current.take() {
                self.pool.give(done);
            }
            *current = self.incoming.pop_front();
            match current {
                None => return false,
                Some(frame) if is_right(frame) => return true,
                Some(_) => *self.dropped += 1,
            }
        }
    }

    fn token(&mut self) -> Outgoing<'_> {
        Outgoing {
            outgoing: self.outgoing,
            room: &mut self.room,
            pool: self.pool,
            link: self.link,
            dropped: self.dropped,
            scratch: self.scratch,
            meta: PacketMeta::default(),
        }
    }
}

/// [`FrameDevice`] as smoltcp takes it. The frame that it looks at belongs to the device.
pub struct Port<'a> {
    device: FrameDevice<'a>,
    current: Option<Frame>,
}

impl<'a> Port<'a> {
    /// For some calls.
    pub fn new(device: FrameDevice<'a>) -> Port<'a> {
        Port { device, current: None }
    }
    /// Whether the next frame is a fragment of an IPv4 packet: what answers it may be longer than
    /// a frame, and has to leave before anything else that is.
    pub fn next_is_fragment(&self) -> bool {
        self.device.incoming.front().is_some_and(|frame| is_fragment(frame))
    }
}

impl Drop for Port<'_> {
    fn drop(&mut self) {
        if let Some(done) = self.current.take() {
            self.device.pool.give(done);
        }
    }
}

impl Device for Port<'_> {
    type RxToken<'b>
        = Incoming<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Outgoing<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        if !self.device.next(&mut self.current) {
            return None;
        }
        Some((Incoming { bytes: self.current.as_deref()? }, self.device.token()))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        let fits = self.device.room > 0 && self.device.pool.free() > 0;
        fits.then(|| self.device.token())
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.device.link)
    }
}

/// What smoltcp is told of a link.
pub fn capabilities(link: Link) -> DeviceCapabilities {
    let mut all = DeviceCapabilities::default();
    all.medium = Medium::Ethernet;
    all.max_transmission_unit = usize::from(link.mtu) + ETHERNET;
    let mut sums = ChecksumCapabilities::default();
    (sums.tcp, sums.udp) = (Sums::None, Sums::None);
    all.checksum = sums;
    let unsegmented = link.accepts.tso4 && link.accepts.checksum4 && link.accepts.scatter;
    all.segmentation.tcpv4 = NonZeroUsize::new(UNSEGMENTED).filter(|_| unsegmented);
    all
}

/// An interface on a link.
pub fn interface(config: Config, link: Link) -> Interface {
    struct Description(Link);
    impl Device for Description {
        type RxToken<'a> = Incoming<'a>;
        type TxToken<'a> = Outgoing<'a>;
        fn receive(&mut self, _: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
            None
        }
        fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
            None
        }
        fn capabilities(&self) -> DeviceCapabilities {
            capabilities(self.0)
        }
    }
    Interface::new(config, &mut Description(link), Instant::ZERO)
}

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.bytes)
    }
}

impl TxToken for Outgoing<'_> {
    fn set_meta(&mut self, meta: PacketMeta) {
        self.meta = meta;
    }

    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let fits = *self.room > 0 && len <= MAX_FRAME;
        let Some(mut frame) = fits.then(|| self.pool.take()).flatten() else {
            *self.dropped += 1;
            self.scratch.clear();
            self.scratch.resize(len, 0);
            return f(self.scratch);
        };
        *self.room -= 1;
        frame.set_len(len);
        frame[..len.min(HEADERS)].fill(0);
        let result = f(&mut frame);
        finish(&mut frame, self.link.accepts, self.meta);
        self.outgoing.push_back(frame);
        result
    }
}

/// Whether a frame is a fragment of an IPv4 packet.
fn is_fragment(frame: &[u8]) -> bool {
    let Some((0x0800, at)) = ethertype(frame) else { return false };
    let Some([high, low]) = frame.get(at + 6..at + 8) else { return false };
    // More fragments, or an offset.
    u16::from_be_bytes([*high, *low]) & 0x3fff != 0
}

/// A number that is the same for all packets between the same addresses and ports. A fragment's
/// ports are not known: it counts by its addresses alone.
pub(crate) fn flow(frame: &[u8]) -> u32 {
    let addresses = match ethertype(frame) {
        Some((0x0800, at)) => frame.get(at + 12..at + 20),
        Some((0x86dd, at)) => frame.get(at + 8..at + 40),
        _ => None,
    };
    let ports = Layers::of(frame).and_then(|layers| frame.get(layers.start..layers.start + 4));
    // FNV-1a.
    let mix = |sum: u32, byte: &u8| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    let sum = addresses.into_iter().chain(ports).flatten().fold(0x811c_9dc5, mix);
    sum ^ (sum >> 16)
}

/// Whether nothing says that a frame's TCP or UDP checksum is wrong.
fn is_right(frame: &Frame) -> bool {
    if frame.offload.checksum != Checksum::Unknown {
        return true;
    }
    let Some(layers) = Layers::of(frame) else { return true };
    let at = layers.start + layers.offset();
    let without = layers.transport == Transport::Udp && layers.ip == Ip::V4;
    if without && frame[at..at + 2] == [0, 0] {
        return true;
    }
    let bytes = &frame[layers.start..layers.end];
    checksum::fold(layers.pseudo(frame, bytes.len()) + checksum::sum(bytes)) == 0xffff
}

/// Says what is left to do with a frame of smoltcp's, whose checksum is 0, and does what may not be
/// left.
fn finish(frame: &mut Frame, accepts: Accepts, meta: PacketMeta) {
    let Some(layers) = Layers::of(frame) else { return };
    let taken = if layers.ip == Ip::V4 { accepts.checksum4 } else { accepts.checksum6 };
    if !taken {
        layers.fill(frame);
        frame.offload.checksum = Checksum::Valid;
        return;
    }
    layers.prepare(frame);
    let (start, offset) = (layers.start as u16, layers.offset() as u16);
    frame.offload.checksum = Checksum::Blank { start, offset };
    if let (Some(size), Transport::Tcp) = (meta.segmentation_offload_size, layers.transport) {
        frame.offload.gso = Some(Gso { kind: GsoKind::TcpV4, size: size.get() });
    }
}

#[cfg(test)]
#[path = "stack_tests.rs"]
mod tests;
