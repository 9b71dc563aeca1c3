//! What can be said of a request by the request alone.

use super::{
    Body, DISCARD_SECURE, DirectOp, MAX_INDIRECT_SEGMENTS, MAX_SEGMENTS, OP_READ, OP_WRITE,
    RSP_EOPNOTSUPP, RSP_ERROR, Request, SECTOR, SECTORS_PER_PAGE, SEGMENTS_PER_PAGE, Segment,
};

/// Whether the guest may write (the toolstack's `mode` key).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `r`
    ReadOnly,
    /// `w`
    ReadWrite,
}

/// The optional operations that this backend has offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `feature-flush-cache`
    pub flush: bool,
    /// `feature-barrier`
    pub barrier: bool,
    /// `feature-discard`
    pub discard: bool,
    /// `discard-secure`; without it the flag is ignored, as blkif.h says.
    pub secure_discard: bool,
}

/// What a disk and its offer allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The disk's size.
    pub sectors: u64,
    /// The disk's logical block size in bytes, a power of two of at least 512.
    pub block_size: u32,
    /// Whether writes are allowed.
    pub mode: Mode,
    /// `feature-max-indirect-segments`; 0 where indirect requests are not offered.
    pub max_indirect_segments: u16,
    /// The optional operations.
    pub features: Features,
}

/// A range of the disk that lies within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Number of sectors, at least 1.
    pub sectors: u64,
}

impl Range {
    /// First byte.
    pub fn offset(&self) -> u64 {
        self.sector * SECTOR
    }
    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }
}

/// What an indirect request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Indirect {
    /// Disk to guest.
    Read,
    /// Guest to disk.
    Write,
}

/// How thorough a discard is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// The data may go.
    Plain,
    /// All copies of the data must be gone before the answer.
    Secure,
}

/// A request that passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// Move the first `segments` segments of the request; for [`DirectOp::Flush`] flush before.
    Transfer {
        /// What to do.
        op: DirectOp,
        /// Where on the disk.
        range: Range,
        /// How many segments count, 1 to 11.
        segments: usize,
    },
    /// A flush or barrier without data; `op` says which.
    Flush {
        /// [`DirectOp::Flush`] or [`DirectOp::Barrier`].
        op: DirectOp,
    },
    /// Read the segments from `pages` pages, then ask [`validate_segments`].
    Indirect {
        /// What to do.
        op: Indirect,
        /// First sector on the disk.
        sector: u64,
        /// Number of segments, 1 to 4096.
        segments: usize,
        /// How many of the request's indirect pages hold them, 1 to 8.
        pages: usize,
    },
    /// Discard a range.
    Discard {
        /// Where on the disk.
        range: Range,
        /// How.
        kind: Discard,
    },
    /// A discard of no sectors: answer that it is done.
    Nothing,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// blkif.h has no such operation.
    #[error("unknown operation {0}")]
    UnknownOperation(u8),
    /// The operation was not offered.
    #[error("operation {0} was not offered")]
    NotOffered(u8),
    /// Indirect requests can only read and write.
    #[error("indirect operation {0} is neither read nor write")]
    BadIndirectOperation(u8),
    /// A write to a disk that may only be read.
    #[error("write to a read-only disk")]
    ReadOnly,
    /// A read or write without segments.
    #[error("no segments")]
    NoSegments,
    /// More segments than the request or the offer has room for.
    #[error("{found} segments, at most {limit} allowed")]
    TooManySegments {
        /// As sent.
        found: u16,
        /// The limit.
        limit: u16,
    },
    /// A segment's bounds are the wrong way round or outside the page.
    #[error("segment {index}: sectors {first} to {last} of a page of 8")]
    BadSegment {
        /// Which.
        index: u16,
        /// `first_sect`
        first: u8,
        /// `last_sect`
        last: u8,
    },
    /// The range ends beyond the disk's end, or its end is not a number.
    #[error("{sectors} sectors from sector {sector} on a disk of {disk} sectors")]
    BeyondEnd {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
        /// The disk's.
        disk: u64,
    },
    /// The range is not made of whole logical blocks.
    #[error("{sectors} sectors from sector {sector} are not whole blocks of {block_size} bytes")]
    Misaligned {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
        /// The disk's logical block size in bytes.
        block_size: u32,
    },
}

impl Refusal {
    /// The status that the response carries.
    pub fn status(&self) -> i16 {
        match self {
            Refusal::UnknownOperation(_) | Refusal::NotOffered(_) => RSP_EOPNOTSUPP,
            _ => RSP_ERROR,
        }
    }
}

/// Judges a request by itself. For an indirect request [`validate_segments`] has the last word.
#[inline]
pub fn validate(request: &Request, limits: &Limits) -> Result<Checked, Refusal> {
    match request.body {
        Body::Direct { op, sector, nr_segments, segments } => {
            direct(op, sector, nr_segments, &segments, limits)
        }
        Body::Indirect { inner, nr_segments, sector, .. } => {
            indirect(request.operation(), inner, nr_segments, sector, limits)
        }
        Body::Discard { sector, count, flag } => {
            if !limits.features.discard {
                return Err(Refusal::NotOffered(request.operation()));
            }
            writable(limits)?;
            if count == 0 {
                return Ok(Checked::Nothing);
            }
            let secure = flag & DISCARD_SECURE != 0 && limits.features.secure_discard;
            let kind = if secure { Discard::Secure } else { Discard::Plain };
            Ok(Checked::Discard { range: within(sector, count, limits)?, kind })
        }
        Body::Unknown(op) => Err(Refusal::UnknownOperation(op)),
    }
}

/// Judges a list of segments and the range of the disk that they cover together.
#[inline]
pub fn validate_segments(
    sector: u64,
    segments: &[Segment],
    limits: &Limits,
) -> Result<Range, Refusal> {
    if segments.is_empty() {
        return Err(Refusal::NoSegments);
    }
    let mut sectors = 0;
    for (index, s) in segments.iter().enumerate() {
        if s.first_sect > s.last_sect || s.last_sect >= SECTORS_PER_PAGE {
            let (first, last) = (s.first_sect, s.last_sect);
            return Err(Refusal::BadSegment { index: index as u16, first, last });
        }
        sectors += u64::from(s.sectors());
    }
    within(sector, sectors, limits)
}

#[inline]
fn direct(
    op: DirectOp,
    sector: u64,
    nr_segments: u8,
    segments: &[Segment; MAX_SEGMENTS],
    limits: &Limits,
) -> Result<Checked, Refusal> {
    let offered = match op {
        DirectOp::Read | DirectOp::Write => true,
        DirectOp::Barrier => limits.features.barrier,
        DirectOp::Flush => limits.features.flush,
    };
    if !offered {
        return Err(Refusal::NotOffered(op.code()));
    }
    let used = usize::from(nr_segments);
    if used > MAX_SEGMENTS {
        let (found, limit) = (u16::from(nr_segments), MAX_SEGMENTS as u16);
        return Err(Refusal::TooManySegments { found, limit });
    }
    if used == 0 && matches!(op, DirectOp::Barrier | DirectOp::Flush) {
        return Ok(Checked::Flush { op });
    }
    if op != DirectOp::Read {
        writable(limits)?;
    }
    let range = validate_segments(sector, &segments[..used], limits)?;
    Ok(Checked::Transfer { op, range, segments: used })
}

fn indirect(
    operation: u8,
    inner: u8,
    nr_segments: u16,
    sector: u64,
    limits: &Limits,
) -> Result<Checked, Refusal> {
    if limits.max_indirect_segments == 0 {
        return Err(Refusal::NotOffered(operation));
    }
    let op = match inner {
        OP_READ => Indirect::Read,
        OP_WRITE => Indirect::Write,
        other => return Err(Refusal::BadIndirectOperation(other)),
    };
    let limit = limits.max_indirect_segments.min(MAX_INDIRECT_SEGMENTS as u16);
    if nr_segments > limit {
        return Err(Refusal::TooManySegments { found: nr_segments, limit });
    }
    if nr_segments == 0 {
        return Err(Refusal::NoSegments);
    }
    if op == Indirect::Write {
        writable(limits)?;
    }
    // Each segment is at least one sector, so this much is known before the pages are read.
    beyond(sector, u64::from(nr_segments), limits)?;
    let segments = usize::from(nr_segments);
    Ok(Checked::Indirect { op, sector, segments, pages: segments.div_ceil(SEGMENTS_PER_PAGE) })
}

fn writable(limits: &Limits) -> Result<(), Refusal> {
    match limits.mode {
        Mode::ReadOnly => Err(Refusal::ReadOnly),
        Mode::ReadWrite => Ok(()),
    }
}

fn beyond(sector: u64, sectors: u64, limits: &Limits) -> Result<(), Refusal> {
    match sector.checked_add(sectors) {
        Some(end) if end <= limits.sectors => Ok(()),
        _ => Err(Refusal::BeyondEnd { sector, sectors, disk: limits.sectors }),
    }
}

#[inline]
fn within(sector: u64, sectors: u64, limits: &Limits) -> Result<Range, Refusal> {
    beyond(sector, sectors, limits)?;
    let block = u64::from(limits.block_size) / SECTOR;
    if block > 1 && !(sector.is_multiple_of(block) && sectors.is_multiple_of(block)) {
        let block_size = limits.block_size;
        return Err(Refusal::Misaligned { sector, sectors, block_size });
    }
    Ok(Range { sector, sectors })
}
