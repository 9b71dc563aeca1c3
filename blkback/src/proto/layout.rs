//! The bytes. Every field is unaligned and every gap has a name, so the structures are exactly
//! what the C compilers of the three ABIs make of io/blkif.h, and no byte of them is undefined.

use zerocopy::little_endian::{I16, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::{
    Body, DISCARD_SECURE, DirectOp, MAX_INDIRECT_PAGES, MAX_SEGMENTS, OP_DISCARD, OP_INDIRECT,
    Request, Response, Segment,
};

/// Bytes of a segment, in a request and in an indirect page alike.
pub const SEGMENT_BYTES: usize = size_of::<WireSegment>();

/// `struct blkif_request_segment`; the same in every ABI.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct WireSegment {
    /// `gref`
    pub gref: U32,
    /// `first_sect`
    pub first_sect: u8,
    /// `last_sect`
    pub last_sect: u8,
    /// Padding, written as 0.
    pub pad: [u8; 2],
}

impl From<WireSegment> for Segment {
    fn from(w: WireSegment) -> Segment {
        Segment { gref: w.gref.get(), first_sect: w.first_sect, last_sect: w.last_sect }
    }
}

impl From<Segment> for WireSegment {
    fn from(s: Segment) -> WireSegment {
        let Segment { gref, first_sect, last_sect } = s;
        WireSegment { gref: gref.into(), first_sect, last_sect, pad: [0; 2] }
    }
}

/// One of the three byte layouts.
pub trait Abi: 'static {
    /// A request slot, as large as `struct blkif_request`.
    type Req: FromBytes + IntoBytes + Immutable + KnownLayout + Copy + Send + 'static;
    /// A response.
    type Rsp: FromBytes + IntoBytes + Immutable + KnownLayout + Copy + Send + 'static;
    /// The value of the frontend's `protocol` key (`XEN_IO_PROTO_ABI_*` of io/protocols.h).
    const PROTOCOL: &'static str;
    /// Reads a request; accepts any bytes.
    fn parse(raw: &Self::Req) -> Request;
    /// Writes a request; bytes that it does not use are 0.
    fn encode(request: &Request) -> Self::Req;
    /// Reads a response; accepts any bytes.
    fn parse_response(raw: &Self::Rsp) -> Response;
    /// Writes a response; its padding is 0.
    fn encode_response(response: &Response) -> Self::Rsp;
}

/// The layout of the machine that this program runs on.
pub enum Native {}
/// The layout of a 32-bit x86 guest, where a 64-bit number is aligned to 4.
pub enum X86_32 {}
/// The layout of a 64-bit x86 guest.
pub enum X86_64 {}

macro_rules! layout {
    ($module:ident, $what:literal, pad $pad:literal, indirect $indirect:literal, rsp $rsp:literal,
     for $($abi:ident = $protocol:expr),+) => {
        #[doc = $what]
        pub mod $module {
            use super::*;

            /// `struct blkif_request`: the whole slot.
            #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct Direct {
                /// `operation`
                pub operation: u8,
                /// `nr_segments`
                pub nr_segments: u8,
                /// `handle`
                pub handle: U16,
                /// Padding.
                pub pad: [u8; $pad],
                /// `id`
                pub id: U64,
                /// `sector_number`
                pub sector_number: U64,
                /// `seg`
                pub seg: [WireSegment; MAX_SEGMENTS],
            }

            /// `struct blkif_request_discard`
            #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct Discard {
                /// `operation`
                pub operation: u8,
                /// `flag`
                pub flag: u8,
                /// `handle`
                pub handle: U16,
                /// Padding.
                pub pad: [u8; $pad],
                /// `id`
                pub id: U64,
                /// `sector_number`
                pub sector_number: U64,
                /// `nr_sectors`
                pub nr_sectors: U64,
            }

            /// `struct blkif_request_indirect`
            #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct Indirect {
                /// `operation`
                pub operation: u8,
                /// `indirect_op`
                pub indirect_op: u8,
                /// `nr_segments`
                pub nr_segments: U16,
                /// Padding.
                pub pad: [u8; $pad],
                /// `id`
                pub id: U64,
                /// `sector_number`
                pub sector_number: U64,
                /// `handle`
                pub handle: U16,
                /// Padding.
                pub pad2: [u8; 2],
                /// `indirect_grefs`
                pub indirect_grefs: [U32; MAX_INDIRECT_PAGES],
                /// Padding up to 64 bytes.
                pub tail: [u8; $indirect],
            }

            /// `struct blkif_response`
            #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct Response {
                /// `id`
                pub id: U64,
                /// `operation`
                pub operation: u8,
                /// Padding.
                pub pad: u8,
                /// `status`
                pub status: I16,
                /// Padding.
                pub tail: [u8; $rsp],
            }

            // Both are views of a slot: the casts below rely on it.
            const _: () = assert!(size_of::<Discard>() <= size_of::<Direct>());
            const _: () = assert!(size_of::<Indirect>() <= size_of::<Direct>());

            #[inline]
            fn view<T: FromBytes>(raw: &Direct) -> T {
                match T::read_from_prefix(raw.as_bytes()) {
                    Ok((view, _)) => view,
                    Err(_) => T::new_zeroed(),
                }
            }

            fn slot<T: IntoBytes + Immutable>(view: &T) -> Direct {
                let mut raw = Direct::new_zeroed();
                let bytes = view.as_bytes();
                raw.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
                raw
            }

            #[inline]
            pub(super) fn parse(raw: &Direct) -> Request {
                let body = match (DirectOp::from_code(raw.operation), raw.operation) {
                    (Some(op), _) => {
                        let mut segments = [Segment::default(); MAX_SEGMENTS];
                        let used = usize::from(raw.nr_segments).min(MAX_SEGMENTS);
                        for (to, from) in segments[..used].iter_mut().zip(&raw.seg) {
                            *to = (*from).into();
                        }
                        let (sector, nr_segments) = (raw.sector_number.get(), raw.nr_segments);
                        Body::Direct { op, sector, nr_segments, segments }
                    }
                    (None, OP_DISCARD) => {
                        let d: Discard = view(raw);
                        let (sector, count) = (d.sector_number.get(), d.nr_sectors.get());
                        Body::Discard { sector, count, flag: d.flag & DISCARD_SECURE }
                    }
                    (None, OP_INDIRECT) => {
                        let i: Indirect = view(raw);
                        let body = Body::Indirect {
                            inner: i.indirect_op,
                            nr_segments: i.nr_segments.get(),
                            sector: i.sector_number.get(),
                            grefs: i.indirect_grefs.map(U32::get),
                        };
                        return Request { id: i.id.get(), handle: i.handle.get(), body };
                    }
                    (None, op) => Body::Unknown(op),
                };
                Request { id: raw.id.get(), handle: raw.handle.get(), body }
            }

            #[inline]
            pub(super) fn encode(request: &Request) -> Direct {
                let mut raw = Direct::new_zeroed();
                raw.operation = request.operation();
                raw.handle = request.handle.into();
                raw.id = request.id.into();
                match request.body {
                    Body::Direct { sector, nr_segments, segments, .. } => {
                        raw.nr_segments = nr_segments;
                        raw.sector_number = sector.into();
                        raw.seg = segments.map(WireSegment::from);
                        raw
                    }
                    Body::Discard { sector, count, flag } => {
                        let mut d: Discard = view(&raw);
                        d.flag = flag;
                        d.sector_number = sector.into();
                        d.nr_sectors = count.into();
                        slot(&d)
                    }
                    Body::Indirect { inner, nr_segments, sector, grefs } => slot(&Indirect {
                        operation: OP_INDIRECT,
                        indirect_op: inner,
                        nr_segments: nr_segments.into(),
                        pad: [0; $pad],
                        id: request.id.into(),
                        sector_number: sector.into(),
                        handle: request.handle.into(),
                        pad2: [0; 2],
                        indirect_grefs: grefs.map(U32::new),
                        tail: [0; $indirect],
                    }),
                    Body::Unknown(_) => raw,
                }
            }
        }

        $(impl Abi for $abi {
            type Req = $module::Direct;
            type Rsp = $module::Response;
            const PROTOCOL: &'static str = $protocol;

            #[inline]
            fn parse(raw: &Self::Req) -> Request {
                $module::parse(raw)
            }
            #[inline]
            fn encode(request: &Request) -> Self::Req {
                $module::encode(request)
            }
            #[inline]
            fn parse_response(raw: &Self::Rsp) -> Response {
                Response {
                    id: raw.id.get(),
                    operation: raw.operation,
                    status: raw.status.get(),
                }
            }
            #[inline]
            fn encode_response(response: &Response) -> Self::Rsp {
                let Response { id, operation, status } = *response;
                $module::Response {
                    id: id.into(),
                    operation,
                    pad: 0,
                    status: status.into(),
                    tail: [0; $rsp],
                }
            }
        })+
    };
}

#[cfg(target_arch = "x86")]
layout!(packed4, "64-bit numbers aligned to 4, as on 32-bit x86.",
    pad 0, indirect 8, rsp 0, for X86_32 = "x86_32-abi", Native = "x86_32-abi");
#[cfg(target_arch = "x86")]
layout!(packed8, "64-bit numbers aligned to 8, as everywhere but on 32-bit x86.",
    pad 4, indirect 4, rsp 4, for X86_64 = "x86_64-abi");

#[cfg(not(target_arch = "x86"))]
layout!(packed4, "64-bit numbers aligned to 4, as on 32-bit x86.",
    pad 0, indirect 8, rsp 0, for X86_32 = "x86_32-abi");
#[cfg(not(target_arch = "x86"))]
layout!(packed8, "64-bit numbers aligned to 8, as everywhere but on 32-bit x86.",
    pad 4, indirect 4, rsp 4, for X86_64 = "x86_64-abi", Native = NATIVE_PROTOCOL);

#[cfg(not(target_arch = "x86"))]
const NATIVE_PROTOCOL: &str = if cfg!(target_arch = "x86_64") { "x86_64-abi" } else { "arm-abi" };

/// The structures themselves.
pub mod wire {
    pub use super::{WireSegment, packed4, packed8};
}
