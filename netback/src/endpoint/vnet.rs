//! The virtio-net header before each frame (`struct virtio_net_hdr` of the virtio specification,
//! legacy byte order), as TAP devices and packet sockets have it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::frame::{Checksum, Frame, Gso, GsoKind, Offload};

/// How long the header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    /// 10 bytes: packet sockets know no other before Linux 6.6.
    Short,
    /// 12 bytes, with a number of buffers, so that the frame behind it is aligned to 4.
    Long,
}

impl Size {
    /// In bytes.
    pub(super) const fn bytes(self) -> usize {
        match self {
            Size::Short => size_of::<VnetHeader>() - 2,
            Size::Long => size_of::<VnetHeader>(),
        }
    }
}

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct VnetHeader {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

/// Puts the header before a frame; whether there was room.
pub(super) fn put(frame: &mut Frame, size: Size) -> bool {
    let mut header = VnetHeader::default();
    match frame.offload.checksum {
        Checksum::Unknown => {}
        Checksum::Valid => header.flags = DATA_VALID,
        Checksum::Blank { start, offset } => {
            header.flags = NEEDS_CSUM;
            (header.csum_start, header.csum_offset) = (start, offset);
            if let Some(gso) = frame.offload.gso {
                header.gso_type = match gso.kind {
                    GsoKind::TcpV4 => GSO_TCPV4,
                    GsoKind::TcpV6 => GSO_TCPV6,
                };
                header.gso_size = gso.size;
                // The TCP header's length is in its 13th byte.
                let words = frame.get(usize::from(start) + 12).map_or(5, |b| b >> 4);
                header.hdr_len = start + u16::from(words) * 4;
            }
        }
    }
    let len = size.bytes();
    let room = frame.grow_front(len);
    if room {
        frame[..len].copy_from_slice(&header.as_bytes()[..len]);
    }
    room
}

/// Takes the header from a frame of `len` bytes with it; whether it makes sense.
pub(super) fn take(frame: &mut Frame, len: usize, size: Size) -> bool {
    frame.set_len(len);
    let mut header = VnetHeader::default();
    let Some(bytes) = frame.get(..size.bytes()) else { return false };
    header.as_mut_bytes()[..size.bytes()].copy_from_slice(bytes);
    frame.trim_front(size.bytes());
    let checksum = if header.flags & NEEDS_CSUM != 0 {
        Checksum::Blank { start: header.csum_start, offset: header.csum_offset }
    } else if header.flags & DATA_VALID != 0 {
        Checksum::Valid
    } else {
        Checksum::Unknown
    };
    let kind = match header.gso_type & !GSO_ECN {
        GSO_NONE => None,
        GSO_TCPV4 => Some(GsoKind::TcpV4),
        GSO_TCPV6 => Some(GsoKind::TcpV6),
        // Never offered.
        _ => return false,
    };
    let gso = match kind {
        Some(_) if header.gso_size == 0 => return false,
        kind => kind.map(|kind| Gso { kind, size: header.gso_size }),
    };
    frame.offload = Offload { checksum, gso };
    !frame.is_empty()
}
