//! What a packet carries beside its bytes (`struct netif_extra_info`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{
    EXTRA_FLAG_MORE, EXTRA_TYPE_GSO, EXTRA_TYPE_HASH, EXTRA_TYPE_MCAST_ADD, EXTRA_TYPE_MCAST_DEL,
    EXTRA_TYPE_XDP, GSO_TYPE_TCPV4, GSO_TYPE_TCPV6,
};
use crate::frame::{Gso, GsoKind};

/// A slot that is no data (`struct netif_extra_info`), as it was sent.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(2))]
pub struct ExtraInfo {
    /// `EXTRA_TYPE_*`
    pub kind: u8,
    /// `EXTRA_FLAG_*`
    pub flags: u8,
    /// By type.
    pub data: [u8; 6],
}

/// What an [`ExtraInfo`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// The packet is to be cut into segments.
    Gso(Gso),
    /// The guest wants frames to this group address.
    McastAdd([u8; 6]),
    /// And no longer.
    McastDel([u8; 6]),
    /// The packet's hash.
    Hash {
        /// Number of the bit in `HASH_TYPE_*`.
        kind: u8,
        /// `HASH_ALGORITHM_*`
        algorithm: u8,
        /// The hash.
        value: u32,
    },
    /// Bytes that the backend leaves free before each packet.
    Xdp {
        /// How many.
        headroom: u16,
    },
}

/// Why an extra information makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Its type is none that there is.
    #[error("extra info of the unknown type {0}")]
    Type(u8),
    /// Segments of another protocol than TCP.
    #[error("segmentation of the unknown kind {0}")]
    GsoKind(u8),
    /// Segments of no bytes.
    #[error("segments of 0 bytes")]
    GsoSize,
}

impl ExtraInfo {
    /// Whether another one follows.
    pub fn more(&self) -> bool {
        self.flags & EXTRA_FLAG_MORE != 0
    }
    /// The same with another one behind it.
    #[must_use]
    pub fn and_more(mut self) -> ExtraInfo {
        self.flags |= EXTRA_FLAG_MORE;
        self
    }
    /// What it says.
    pub fn parse(&self) -> Result<Extra, Malformed> {
        let [a, b, c, d, e, f] = self.data;
        match self.kind {
            EXTRA_TYPE_GSO => {
                let size = u16::from_ne_bytes([a, b]);
                let kind = match c {
                    GSO_TYPE_TCPV4 => GsoKind::TcpV4,
                    GSO_TYPE_TCPV6 => GsoKind::TcpV6,
                    other => return Err(Malformed::GsoKind(other)),
                };
                if size == 0 { Err(Malformed::GsoSize) } else { Ok(Extra::Gso(Gso { kind, size })) }
            }
            EXTRA_TYPE_MCAST_ADD => Ok(Extra::McastAdd(self.data)),
            EXTRA_TYPE_MCAST_DEL => Ok(Extra::McastDel(self.data)),
            EXTRA_TYPE_HASH => {
                // "LSB ---- value ---- MSB"
                Ok(Extra::Hash { kind: a, algorithm: b, value: u32::from_le_bytes([c, d, e, f]) })
            }
            EXTRA_TYPE_XDP => Ok(Extra::Xdp { headroom: u16::from_ne_bytes([a, b]) }),
            other => Err(Malformed::Type(other)),
        }
    }
}

impl From<Extra> for ExtraInfo {
    fn from(extra: Extra) -> ExtraInfo {
        let (kind, data) = match extra {
            Extra::Gso(gso) => {
                let [a, b] = gso.size.to_ne_bytes();
                let kind = match gso.kind {
                    GsoKind::TcpV4 => GSO_TYPE_TCPV4,
                    GsoKind::TcpV6 => GSO_TYPE_TCPV6,
                };
                (EXTRA_TYPE_GSO, [a, b, kind, 0, 0, 0])
            }
            Extra::McastAdd(address) => (EXTRA_TYPE_MCAST_ADD, address),
            Extra::McastDel(address) => (EXTRA_TYPE_MCAST_DEL, address),
            Extra::Hash { kind, algorithm, value } => {
                let [a, b, c, d] = value.to_le_bytes();
                (EXTRA_TYPE_HASH, [kind, algorithm, a, b, c, d])
            }
            Extra::Xdp { headroom } => {
                let [a, b] = headroom.to_ne_bytes();
                (EXTRA_TYPE_XDP, [a, b, 0, 0, 0, 0])
            }
        };
        ExtraInfo { kind, flags: 0, data }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{RxResponse, TxRequest};
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for extra in [
            Extra::Gso(Gso { kind: GsoKind::TcpV4, size: 1448 }),
            Extra::Gso(Gso { kind: GsoKind::TcpV6, size: u16::MAX }),
            Extra::McastAdd([1, 2, 3, 4, 5, 6]),
            Extra::McastDel([1, 0, 0x5e, 0, 0, 1]),
            Extra::Hash { kind: 3, algorithm: 1, value: 0x8765_4321 },
            Extra::Xdp { headroom: 256 },
        ] {
            let info = ExtraInfo::from(extra).and_more();
            assert_eq!(info.parse(), Ok(extra));
            assert!(info.more());
            assert_eq!(TxRequest::from(info).as_extra(), info);
            assert_eq!(RxResponse::from(info).as_extra(), info);
        }
    }

    #[test]
    fn what_makes_no_sense() {
        let gso = |data| ExtraInfo { kind: EXTRA_TYPE_GSO, flags: 0, data }.parse();
        assert_eq!(gso([0, 0, GSO_TYPE_TCPV4, 0, 0, 0]), Err(Malformed::GsoSize));
        assert_eq!(gso([1, 0, 0, 0, 0, 0]), Err(Malformed::GsoKind(0)));
        assert_eq!(gso([1, 0, 3, 0, 0, 0]), Err(Malformed::GsoKind(3)));
        for kind in [0, 6, 255] {
            let info = ExtraInfo { kind, flags: 0, data: [0; 6] };
            assert_eq!(info.parse(), Err(Malformed::Type(kind)));
        }
    }
}
