//! blkif's wire format: io/blkif.h in the three ABIs that its `protocol` key names.
//!
//! Pure: [`Abi::parse`] turns a request's bytes into a [`Request`] that is the same for every
//! ABI, [`validate`] judges what can be judged by the request alone. All sector counts are in
//! units of 512 bytes, whatever the disk's logical block size is, as Linux reads the header.

mod check;
mod layout;
pub mod vdev;

pub use check::{
    Checked, Discard, Features, Indirect, Limits, Mode, Range, Refusal, validate, validate_segments,
};
pub use layout::{Abi, Native, SEGMENT_BYTES, WireSegment, X86_32, X86_64, wire};

/// `BLKIF_OP_READ`
pub const OP_READ: u8 = 0;
/// `BLKIF_OP_WRITE`
pub const OP_WRITE: u8 = 1;
/// `BLKIF_OP_WRITE_BARRIER`: earlier writes are stable before it, later ones start after it.
pub const OP_WRITE_BARRIER: u8 = 2;
/// `BLKIF_OP_FLUSH_DISKCACHE`
pub const OP_FLUSH_DISKCACHE: u8 = 3;
/// `BLKIF_OP_DISCARD` (4 is reserved)
pub const OP_DISCARD: u8 = 5;
/// `BLKIF_OP_INDIRECT`
pub const OP_INDIRECT: u8 = 6;

/// `BLKIF_RSP_OKAY`
pub const RSP_OKAY: i16 = 0;
/// `BLKIF_RSP_ERROR`
pub const RSP_ERROR: i16 = -1;
/// `BLKIF_RSP_EOPNOTSUPP`
pub const RSP_EOPNOTSUPP: i16 = -2;

/// `BLKIF_DISCARD_SECURE`
pub const DISCARD_SECURE: u8 = 1;
/// `BLKIF_MAX_SEGMENTS_PER_REQUEST`
pub const MAX_SEGMENTS: usize = 11;
/// `BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Segments in one indirect page.
pub const SEGMENTS_PER_PAGE: usize = rings::PAGE_SIZE / SEGMENT_BYTES;
/// Segments that the format can name in one indirect request.
pub const MAX_INDIRECT_SEGMENTS: usize = MAX_INDIRECT_PAGES * SEGMENTS_PER_PAGE;

/// `VDISK_CDROM`, a bit of the `info` key.
pub const VDISK_CDROM: u32 = 1;
/// `VDISK_REMOVABLE`
pub const VDISK_REMOVABLE: u32 = 2;
/// `VDISK_READONLY`
pub const VDISK_READONLY: u32 = 4;

/// Bytes of the unit in which blkif counts.
pub const SECTOR: u64 = 512;
/// Sectors in a granted page.
pub const SECTORS_PER_PAGE: u8 = (rings::PAGE_SIZE / SECTOR as usize) as u8;

/// A ring of requests in layout `A`.
pub struct Ring<A>(core::marker::PhantomData<fn() -> A>);

impl<A: Abi> rings::Protocol for Ring<A> {
    const NAME: &'static str = "blkif";
    type Req = A::Req;
    type Rsp = A::Rsp;
}

/// A run of sectors in one granted page (`struct blkif_request_segment`), as it was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The granted page.
    pub gref: u32,
    /// First sector in the page.
    pub first_sect: u8,
    /// Last sector in the page, inclusive.
    pub last_sect: u8,
}

impl Segment {
    /// Sectors it covers; 0 if its bounds are the wrong way round.
    pub fn sectors(&self) -> u32 {
        (u32::from(self.last_sect) + 1).saturating_sub(u32::from(self.first_sect))
    }
    /// First byte in the page.
    pub fn offset(&self) -> usize {
        usize::from(self.first_sect) * SECTOR as usize
    }
    /// Bytes it covers.
    pub fn len(&self) -> usize {
        self.sectors() as usize * SECTOR as usize
    }
    /// Whether it covers nothing.
    pub fn is_empty(&self) -> bool {
        self.sectors() == 0
    }
}

/// Operations whose segments are in the request itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectOp {
    /// `BLKIF_OP_READ`
    Read,
    /// `BLKIF_OP_WRITE`
    Write,
    /// `BLKIF_OP_WRITE_BARRIER`; without segments a flush that also orders.
    Barrier,
    /// `BLKIF_OP_FLUSH_DISKCACHE`; with segments a write after the flush.
    Flush,
}

impl DirectOp {
    /// The number on the wire.
    pub const fn code(self) -> u8 {
        match self {
            DirectOp::Read => OP_READ,
            DirectOp::Write => OP_WRITE,
            DirectOp::Barrier => OP_WRITE_BARRIER,
            DirectOp::Flush => OP_FLUSH_DISKCACHE,
        }
    }
    const fn from_code(code: u8) -> Option<DirectOp> {
        match code {
            OP_READ => Some(DirectOp::Read),
            OP_WRITE => Some(DirectOp::Write),
            OP_WRITE_BARRIER => Some(DirectOp::Barrier),
            OP_FLUSH_DISKCACHE => Some(DirectOp::Flush),
            _ => None,
        }
    }
}

/// What a request asks for, as it was sent: nothing in it has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Read, write, barrier or flush (`struct blkif_request`).
    Direct {
        /// Which.
        op: DirectOp,
        /// First sector on the disk.
        sector: u64,
        /// How many of `segments` count; may be above [`MAX_SEGMENTS`].
        nr_segments: u8,
        /// The segments, zeroed from `nr_segments` on.
        segments: [Segment; MAX_SEGMENTS],
    },
    /// Read or write whose segments are in granted pages (`struct blkif_request_indirect`).
    Indirect {
        /// The operation proper, one of the OP_ constants if the frontend is honest.
        inner: u8,
        /// How many segments the pages hold.
        nr_segments: u16,
        /// First sector on the disk.
        sector: u64,
        /// The pages that hold the segments.
        grefs: [u32; MAX_INDIRECT_PAGES],
    },
    /// Discard (`struct blkif_request_discard`).
    Discard {
        /// First sector on the disk.
        sector: u64,
        /// Number of sectors.
        count: u64,
        /// The flag byte; bit 0 is [`DISCARD_SECURE`].
        flag: u8,
    },
    /// An operation that blkif.h does not name.
    Unknown(u8),
}

/// One request, independent of its ABI, as it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The frontend's own value, echoed in the response.
    pub id: u64,
    /// The frontend's virtual device number; nothing depends on it.
    pub handle: u16,
    /// The rest.
    pub body: Body,
}

impl Request {
    /// The operation byte.
    #[inline]
    pub fn operation(&self) -> u8 {
        match self.body {
            Body::Direct { op, .. } => op.code(),
            Body::Indirect { .. } => OP_INDIRECT,
            Body::Discard { .. } => OP_DISCARD,
            Body::Unknown(op) => op,
        }
    }
    /// The response to this request. It echoes the operation, for an indirect request the inner
    /// one: blkfront takes anything else for corruption.
    #[inline]
    pub fn answer(&self, status: i16) -> Response {
        let operation = match self.body {
            Body::Indirect { inner, .. } => inner,
            _ => self.operation(),
        };
        Response { id: self.id, operation, status }
    }
}

/// One response (`struct blkif_response`), independent of its ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The request's.
    pub id: u64,
    /// The request's.
    pub operation: u8,
    /// One of the RSP_ constants.
    pub status: i16,
}

#[cfg(test)]
#[path = "proto/layout_tests.rs"]
mod layout_tests;
#[cfg(test)]
#[path = "proto/tests.rs"]
mod tests;
