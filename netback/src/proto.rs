//! netif's wire format: Xen's io/netif.h. Pure; nothing in a request has been checked.

mod extra;
#[cfg(test)]
mod layout_tests;

pub use extra::{Extra, ExtraInfo, Malformed};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `NETTXF_csum_blank`: the checksum holds the pseudo-header's sum only, or not even that.
pub const TX_CSUM_BLANK: u16 = 1 << 0;
/// `NETTXF_data_validated`: the checksum is known to be right.
pub const TX_DATA_VALIDATED: u16 = 1 << 1;
/// `NETTXF_more_data`: the packet goes on in the next request.
pub const TX_MORE_DATA: u16 = 1 << 2;
/// `NETTXF_extra_info`: the next slot is an [`ExtraInfo`].
pub const TX_EXTRA_INFO: u16 = 1 << 3;

/// `NETRXF_data_validated`
pub const RX_DATA_VALIDATED: u16 = 1 << 0;
/// `NETRXF_csum_blank`
pub const RX_CSUM_BLANK: u16 = 1 << 1;
/// `NETRXF_more_data`
pub const RX_MORE_DATA: u16 = 1 << 2;
/// `NETRXF_extra_info`
pub const RX_EXTRA_INFO: u16 = 1 << 3;
/// `NETRXF_gso_prefix`
pub const RX_GSO_PREFIX: u16 = 1 << 4;

/// `NETIF_RSP_DROPPED`
pub const RSP_DROPPED: i16 = -2;
/// `NETIF_RSP_ERROR`
pub const RSP_ERROR: i16 = -1;
/// `NETIF_RSP_OKAY`; for a received packet the slot's bytes instead.
pub const RSP_OKAY: i16 = 0;
/// `NETIF_RSP_NULL`: the answer to a slot that was an [`ExtraInfo`].
pub const RSP_NULL: i16 = 1;

/// `XEN_NETIF_NR_SLOTS_MIN`: slots of data that a packet may always have. Linux at both ends counts
/// those behind the first.
pub const MAX_PACKET_SLOTS: usize = 18;
/// Slots of data behind the first from which on a frontend is taken for broken; with fewer its
/// packet is dropped (xen-netback's `fatal_skb_slots`).
pub const FATAL_PACKET_SLOTS: usize = 20;
/// Extra information of one packet: each type once, and some to spare.
pub const MAX_EXTRAS: usize = 8;
/// `XEN_NETIF_MAX_TX_SIZE`: longest packet in bytes, with its Ethernet header.
pub const MAX_TX_SIZE: u16 = 0xffff;
/// Bytes of an Ethernet header without a VLAN tag: no packet is shorter.
pub const ETHERNET_HEADER: usize = 14;

/// `XEN_NETIF_GSO_TYPE_TCPV4`
pub const GSO_TYPE_TCPV4: u8 = 1;
/// `XEN_NETIF_GSO_TYPE_TCPV6`
pub const GSO_TYPE_TCPV6: u8 = 2;

/// `XEN_NETIF_EXTRA_TYPE_GSO`
pub const EXTRA_TYPE_GSO: u8 = 1;
/// `XEN_NETIF_EXTRA_TYPE_MCAST_ADD`
pub const EXTRA_TYPE_MCAST_ADD: u8 = 2;
/// `XEN_NETIF_EXTRA_TYPE_MCAST_DEL`
pub const EXTRA_TYPE_MCAST_DEL: u8 = 3;
/// `XEN_NETIF_EXTRA_TYPE_HASH`
pub const EXTRA_TYPE_HASH: u8 = 4;
/// `XEN_NETIF_EXTRA_TYPE_XDP`: only in Linux's copy of the header.
pub const EXTRA_TYPE_XDP: u8 = 5;
/// `XEN_NETIF_EXTRA_FLAG_MORE`: another [`ExtraInfo`] follows.
pub const EXTRA_FLAG_MORE: u8 = 1 << 0;

/// The ring of packets from the guest.
pub struct Tx;
/// The ring of packets to the guest.
pub struct Rx;
/// The ring of control requests.
pub struct Ctrl;

impl rings::Protocol for Tx {
    const NAME: &'static str = "netif-tx";
    type Req = TxRequest;
    type Rsp = TxResponse;
}
impl rings::Protocol for Rx {
    const NAME: &'static str = "netif-rx";
    type Req = RxRequest;
    type Rsp = RxResponse;
}
impl rings::Protocol for Ctrl {
    const NAME: &'static str = "netif-ctrl";
    type Req = CtrlRequest;
    type Rsp = CtrlResponse;
}

/// A slot of a packet from the guest (`struct netif_tx_request`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TxRequest {
    /// The granted page.
    pub gref: u32,
    /// First byte in it.
    pub offset: u16,
    /// `TX_*`
    pub flags: u16,
    /// Echoed in the response.
    pub id: u16,
    /// Bytes: of the whole packet in its first slot, of the slot in the others.
    pub size: u16,
}

impl TxRequest {
    /// Whether the flag `flag` is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
    /// The slot as an [`ExtraInfo`], which it is where the slot before it says so.
    pub fn as_extra(&self) -> ExtraInfo {
        ExtraInfo::read_from_prefix(self.as_bytes()).map(|(info, _)| info).unwrap_or_default()
    }
}

impl From<ExtraInfo> for TxRequest {
    /// The slot that carries the information: for a frontend.
    fn from(info: ExtraInfo) -> TxRequest {
        let mut slot = TxRequest::default();
        slot.as_mut_bytes()[..size_of::<ExtraInfo>()].copy_from_slice(info.as_bytes());
        slot
    }
}

/// The answer to a [`TxRequest`] (`struct netif_tx_response`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TxResponse {
    /// The request's.
    pub id: u16,
    /// `RSP_*`
    pub status: i16,
}

/// A page for packets to the guest (`struct netif_rx_request`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RxRequest {
    /// Echoed in the response.
    pub id: u16,
    /// Unused.
    pub pad: u16,
    /// The granted page.
    pub gref: u32,
}

/// A slot of a packet to the guest (`struct netif_rx_response`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RxResponse {
    /// The request's.
    pub id: u16,
    /// First byte in the page.
    pub offset: u16,
    /// `RX_*`
    pub flags: u16,
    /// Bytes in the page, or a negative `RSP_*`.
    pub status: i16,
}

impl RxResponse {
    /// Whether the flag `flag` is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
    /// The slot as an [`ExtraInfo`], which it is where the slot before it says so.
    pub fn as_extra(&self) -> ExtraInfo {
        zerocopy::transmute!(*self)
    }
}

impl From<ExtraInfo> for RxResponse {
    fn from(info: ExtraInfo) -> RxResponse {
        zerocopy::transmute!(info)
    }
}

/// A request of the control ring (`struct xen_netif_ctrl_request`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CtrlRequest {
    /// Echoed in the response.
    pub id: u16,
    /// `CTRL_*`
    pub kind: u16,
    /// By type.
    pub data: [u32; 3],
}

/// Its answer (`struct xen_netif_ctrl_response`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CtrlResponse {
    /// The request's.
    pub id: u16,
    /// The request's.
    pub kind: u16,
    /// `CTRL_STATUS_*`
    pub status: u32,
    /// By type and status.
    pub data: u32,
}

/// An entry of a list of pages to be kept mapped (`struct xen_netif_gref`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GrefEntry {
    /// The page.
    pub gref: u32,
    /// `GREF_*`
    pub flags: u16,
    /// What became of it: one of `CTRL_STATUS_*`.
    pub status: u16,
}

/// `XEN_NETIF_CTRLF_GREF_readonly`
pub const GREF_READONLY: u16 = 1 << 0;

/// `XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS`
pub const CTRL_GET_HASH_FLAGS: u16 = 1;
/// `XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS`
pub const CTRL_SET_HASH_FLAGS: u16 = 2;
/// `XEN_NETIF_CTRL_TYPE_SET_HASH_KEY`
pub const CTRL_SET_HASH_KEY: u16 = 3;
/// `XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE`
pub const CTRL_GET_HASH_MAPPING_SIZE: u16 = 4;
/// `XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE`
pub const CTRL_SET_HASH_MAPPING_SIZE: u16 = 5;
/// `XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING`
pub const CTRL_SET_HASH_MAPPING: u16 = 6;
/// `XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM`
pub const CTRL_SET_HASH_ALGORITHM: u16 = 7;
/// `XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE`
pub const CTRL_GET_GREF_MAPPING_SIZE: u16 = 8;
/// `XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING`
pub const CTRL_ADD_GREF_MAPPING: u16 = 9;
/// `XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING`
pub const CTRL_DEL_GREF_MAPPING: u16 = 10;

/// `XEN_NETIF_CTRL_STATUS_SUCCESS`
pub const CTRL_STATUS_SUCCESS: u32 = 0;
/// `XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED`
pub const CTRL_STATUS_NOT_SUPPORTED: u32 = 1;
/// `XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER`
pub const CTRL_STATUS_INVALID_PARAMETER: u32 = 2;
/// `XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW`
pub const CTRL_STATUS_BUFFER_OVERFLOW: u32 = 3;

/// `XEN_NETIF_CTRL_HASH_TYPE_IPV4`
pub const HASH_TYPE_IPV4: u32 = 1 << 0;
/// `XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP`
pub const HASH_TYPE_IPV4_TCP: u32 = 1 << 1;
/// `XEN_NETIF_CTRL_HASH_TYPE_IPV6`
pub const HASH_TYPE_IPV6: u32 = 1 << 2;
/// `XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP`
pub const HASH_TYPE_IPV6_TCP: u32 = 1 << 3;

/// `XEN_NETIF_CTRL_HASH_ALGORITHM_NONE`
pub const HASH_ALGORITHM_NONE: u32 = 0;
/// `XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ`
pub const HASH_ALGORITHM_TOEPLITZ: u32 = 1;
