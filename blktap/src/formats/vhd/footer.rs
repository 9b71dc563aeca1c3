//! The footer: 512 bytes at the end of each image, and a copy of it at the start of images with
//! a block table ("Hard Disk Footer Format").
use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::growth::{self, Search};
use crate::formats::ImageError;
use crate::storage::Storage;

/// Bytes of a footer.
pub(super) const FOOTER: u64 = 512;
/// "The maximum size for a virtual hard disk is 2040 gigabytes": so it is in QEMU and Hyper-V.
pub(super) const LARGEST_DISK: u64 = 2040 << 30;
/// No further structure.
pub(super) const NOWHERE: u64 = u64::MAX;
const COOKIE: [u8; 8] = *b"conectix";
/// What a mark begins with.
const MARK: [u8; 8] = *b"ringgrow";
/// 2000-01-01T00:00:00Z in seconds since 1970.
const EPOCH: u64 = 946_684_800;
/// tapdisk's version whose bitmaps are little-endian words.
pub(super) const TAPDISK_OLD: u32 = 0x0000_0001;
/// The version of tapdisk's layout that is written here.
const TAPDISK_NOW: u32 = 0x0001_0003;

/// How an image keeps its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One after the other.
    Fixed,
    /// In blocks that are allocated when they are first written.
    Dynamic,
    /// As `Dynamic`, on top of a parent.
    Differencing,
}

/// Cylinders, heads and sectors a track: how old machines address disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors a track.
    pub sectors: u8,
}

impl Geometry {
    /// The largest; it says nothing about the size.
    pub const LARGEST: Geometry = Geometry { cylinders: 65535, heads: 16, sectors: 255 };

    /// The geometry that the specification computes for so many sectors ("CHS calculation").
    pub fn of(sectors: u64) -> Geometry {
        let total = sectors.min(Self::LARGEST.total()) as u32;
        if total >= 65535 * 16 * 63 {
            return Self::with(total, 16, 255);
        }
        let tracks = total / 17;
        let heads = tracks.div_ceil(1024).max(4);
        if tracks < heads * 1024 && heads <= 16 {
            return Self::with(total, heads, 17);
        }
        if total / 31 < 16 * 1024 {
            return Self::with(total, 16, 31);
        }
        Self::with(total, 16, 63)
    }

    fn with(total: u32, heads: u32, sectors: u32) -> Geometry {
        let cylinders = (total / sectors / heads) as u16;
        Geometry { cylinders, heads: heads as u8, sectors: sectors as u8 }
    }

    /// All sectors.
    pub fn total(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// What goes into the footer of a disk of `size` bytes, so that readers that go by the
    /// geometry see the same size as those that go by the size: where no geometry is exact, the
    /// largest, which QEMU takes for "go by the size" (as its own force_size writes it).
    pub(super) fn to_write(size: u64) -> Geometry {
        let geometry = Self::of(size / 512);
        if geometry.total() * 512 == size { geometry } else { Self::LARGEST }
    }
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub(super) struct Footer {
    cookie: [u8; 8],
    pub features: U32,
    pub version: U32,
    /// Where the dynamic header is.
    pub data_offset: U64,
    pub timestamp: U32,
    pub creator: [u8; 4],
    pub creator_version: U32,
    pub creator_os: U32,
    pub original_size: U64,
    pub current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    kind: U32,
    checksum: U32,
    pub id: [u8; 16],
    pub saved: u8,
    /// tapdisk's mark of a base image that no virtual machine uses by itself.
    pub hidden: u8,
    /// Reserved by the specification: a mark while a fixed image grows, else zeroes.
    growing: Growing,
    reserved: [u8; 402],
}

/// Where the footer of a fixed image that grows was, and where it goes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Growing {
    mark: [u8; 8],
    from: U64,
    to: U64,
}

/// The complement of the sum of all bytes, the checksum's own counted as zeroes.
pub(super) fn checksum(bytes: &[u8], own: U32) -> U32 {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u32, |s, b| s.wrapping_add(u32::from(*b)));
    U32::new(!sum(bytes).wrapping_sub(sum(own.as_bytes())))
}

/// Seconds since 2000, as all of the format's times are.
pub(super) fn to_vhd_time(time: SystemTime) -> u32 {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    u32::try_from(seconds.saturating_sub(EPOCH)).unwrap_or(u32::MAX)
}

pub(super) fn from_vhd_time(seconds: u32) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(EPOCH + u64::from(seconds))
}

/// What a place that may hold a footer holds.
#[derive(Clone, Copy, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "there are two of them")]
pub(super) enum Found {
    Footer(Footer),
    /// It has the cookie and not the checksum.
    Damaged,
    Nothing,
}

/// A kind as the footer has it.
fn number_of(kind: Kind) -> U32 {
    U32::new(match kind {
        Kind::Fixed => 2,
        Kind::Dynamic => 3,
        Kind::Differencing => 4,
    })
}

impl Footer {
    /// A footer of a new image, with its checksum.
    pub fn new(kind: Kind, size: u64, id: [u8; 16], created: SystemTime) -> Footer {
        let mut footer = Footer::new_zeroed();
        footer.cookie = COOKIE;
        // "Reserved: this bit must always be set".
        footer.features = U32::new(2);
        footer.version = U32::new(0x0001_0000);
        footer.data_offset = U64::new(if kind == Kind::Fixed { NOWHERE } else { FOOTER });
        footer.timestamp = U32::new(to_vhd_time(created));
        // tapdisk's: its readers, QEMU's and Hyper-V's go by the size, and look for the batmap.
        footer.creator = *b"tap\0";
        footer.creator_version = U32::new(TAPDISK_NOW);
        footer.original_size = U64::new(size);
        footer.id = id;
        footer.kind = number_of(kind);
        footer.set_size(size);
        footer
    }

    /// Another kind, with the checksum.
    pub fn set_kind(&mut self, kind: Kind) {
        self.kind = number_of(kind);
        self.checksum = self.computed();
    }

    /// Another size, with geometry and checksum.
    pub fn set_size(&mut self, size: u64) {
        let geometry = Geometry::to_write(size);
        self.current_size = U64::new(size);
        self.cylinders = U16::new(geometry.cylinders);
        self.heads = geometry.heads;
        self.sectors = geometry.sectors;
        self.checksum = self.computed();
    }

    /// Where the footer was before the image grew, to where it is then, while growing has not
    /// ended.
    pub fn growing(&self) -> Option<Range<u64>> {
        let (from, to) = (self.growing.from.get(), self.growing.to.get());
        let sectors = from.is_multiple_of(512) && to.is_multiple_of(512);
        (self.growing.mark == MARK && sectors && from < to).then_some(from..to)
    }

    /// Sets or clears the mark, with the checksum.
    pub fn set_growing(&mut self, growing: Option<Range<u64>>) {
        self.growing = growing.map_or_else(Growing::new_zeroed, |g| Growing {
            mark: MARK,
            from: U64::new(g.start),
            to: U64::new(g.end),
        });
        self.checksum = self.computed();
    }

    fn computed(&self) -> U32 {
        checksum(self.as_bytes(), self.checksum)
    }

    /// Early tapdisks set `hidden` and left the checksum.
    fn is_sound(&self) -> bool {
        let shown = Footer { hidden: 0, ..*self };
        let old = matches!(self.creator_version.get(), TAPDISK_OLD | 0x0001_0001);
        self.checksum == self.computed()
            || self.is_tapdisk() && old && self.checksum == shown.computed()
    }

    pub fn is_tapdisk(&self) -> bool {
        self.creator.starts_with(b"tap")
    }

    /// What 512 bytes are.
    pub fn parse(bytes: &[u8; 512]) -> Found {
        let Ok(footer) = Footer::read_from_bytes(bytes) else { return Found::Nothing };
        match footer {
            f if f.cookie != COOKIE => Found::Nothing,
            f if f.is_sound() => Found::Footer(f),
            _ => Found::Damaged,
        }
    }

    pub fn kind(&self) -> Result<Kind, ImageError> {
        match self.kind.get() {
            2 => Ok(Kind::Fixed),
            3 => Ok(Kind::Dynamic),
            4 => Ok(Kind::Differencing),
            n => Err(ImageError::Unsupported(format!("VHD disk type {n}"))),
        }
    }

    pub fn geometry(&self) -> Geometry {
        Geometry { cylinders: self.cylinders.get(), heads: self.heads, sectors: self.sectors }
    }

    /// Guest bytes, by QEMU's rule: the creator says whether the size counts or the geometry.
    pub fn disk_size(&self) -> Result<u64, ImageError> {
        let geometry = self.geometry();
        let by_size = self.is_tapdisk()
            || matches!(&self.creator, b"win " | b"qem2" | b"d2v " | b"CTXS" | b"wa\0\0")
            || geometry.total() == Geometry::LARGEST.total();
        let size = match by_size {
            true => self.current_size.get() / 512 * 512,
            false => geometry.total() * 512,
        };
        match size {
            0 => Err(ImageError::Corrupt("the disk's size is 0".into())),
            n if n > LARGEST_DISK => Err(too_large(n)),
            n => Ok(n),
        }
    }
}

pub(super) fn too_large(size: u64) -> ImageError {
    ImageError::Unsupported(format!(
        "a VHD disk of {size} bytes: the format ends at 2040 GiB ({LARGEST_DISK} bytes)"
    ))
}

/// What an image's two places for a footer hold.
pub(super) struct Footers {
    /// The file's size.
    pub file_size: u64,
    /// At the start.
    pub head: Found,
    /// At the end, or before the zeroes that cut-off growing left there.
    pub tail: Found,
    tail_at: u64,
}

fn read_footer(storage: &dyn Storage, at: u64, len: usize) -> Result<[u8; 512], ImageError> {
    let mut bytes = [0; 512];
    storage.read_at(at, &mut bytes[..len]).map_err(ImageError::io("read the footer"))?;
    Ok(bytes)
}

impl Footers {
    pub fn read(storage: &dyn Storage) -> Result<Footers, ImageError> {
        Self::search(storage, Search::Short)
    }

    /// As [`read`](Footers::read), looking so far for the footer of an image that was growing.
    pub fn search(storage: &dyn Storage, search: Search) -> Result<Footers, ImageError> {
        let file_size = storage.size().map_err(ImageError::io("read the size"))?;
        if file_size < FOOTER - 1 {
            return Err(ImageError::NotThis("VHD"));
        }
        let head = Footer::parse(&read_footer(storage, 0, 512)?);
        // "Versions previous to Microsoft Virtual PC 2004 create a 511-byte disk footer."
        let len = if file_size % 512 == 511 { 511 } else { 512.min(file_size) };
        let bytes = read_footer(storage, file_size - len, len as usize)?;
        let tail_at = file_size.saturating_sub(FOOTER - 1) / 512 * 512;
        let mut footers = Footers { file_size, head, tail: Footer::parse(&bytes), tail_at };
        if bytes == [0; 512] && !footers.has_copy()? {
            let found = growth::before_zeroes(storage, file_size, search)?;
            let growing = |(at, f): &(u64, Footer)| f.growing().is_some_and(|g| g.start == *at);
            if let Some((at, footer)) = found.filter(growing) {
                footers.found(at, footer);
            }
        }
        Ok(footers)
    }

    /// Whether the file begins with the copy of a footer; a fixed disk begins with the guest's.
    pub fn has_copy(&self) -> Result<bool, ImageError> {
        Ok(matches!(self.head, Found::Footer(head) if head.kind()? != Kind::Fixed))
    }

    /// With the footer that counts found elsewhere.
    pub fn found(&mut self, at: u64, footer: Footer) {
        (self.tail, self.tail_at) = (Found::Footer(footer), at);
    }

    /// Where the footer at the end is, or belongs: behind the last whole sector before it.
    pub fn tail_at(&self) -> u64 {
        self.tail_at
    }

    /// The footer that counts. The first sector of a fixed disk is the guest's, and so may the
    /// last of a file be that somebody left in a hurry: where both are footers, they must be the
    /// same image's, or one of them is a guest's invention.
    pub fn choose(&self) -> Result<Footer, ImageError> {
        match (self.head, self.tail) {
            (Found::Footer(head), Found::Footer(tail)) => {
                let fixed = [head.kind()?, tail.kind()?].map(|k| k == Kind::Fixed);
                match fixed {
                    // A guest may keep an image of its own in its first sector.
                    [true, true] => Ok(tail),
                    [false, false] if head.id == tail.id => Ok(head),
                    _ => Err(ImageError::Corrupt(
                        "the footers at its start and at its end are of different images".into(),
                    )),
                }
            }
            // A fixed disk has no copy at the start.
            (Found::Footer(head), _) if head.kind()? != Kind::Fixed => Ok(head),
            (_, Found::Footer(tail)) => Ok(tail),
            (Found::Nothing, Found::Nothing) | (Found::Footer(_), Found::Nothing) => {
                Err(ImageError::NotThis("VHD"))
            }
            _ => Err(ImageError::Corrupt("the footer's checksum is wrong".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_of_the_specification() {
        let of = |sectors| {
            let g = Geometry::of(sectors);
            (g.cylinders, g.heads, g.sectors)
        };
        assert_eq!(of(8 * 2048), (240, 4, 17));
        assert_eq!(of(2 << 21), (4161, 16, 63));
        assert_eq!(of(65535 * 16 * 63), (16191, 16, 255));
        assert_eq!(Geometry::of(u64::MAX), Geometry::LARGEST);
    }

    #[test]
    fn a_footer_checks_itself() {
        let id = [7; 16];
        let footer = Footer::new(Kind::Dynamic, 1 << 30, id, SystemTime::now());
        let mut bytes: [u8; 512] = footer.as_bytes().try_into().expect("512 bytes");
        assert!(matches!(Footer::parse(&bytes), Found::Footer(f) if f == footer));
        assert_eq!(footer.disk_size().expect("a size"), 1 << 30);
        for i in 8..512 {
            bytes[i] ^= 1;
            assert!(Footer::parse(&bytes) == Found::Damaged, "byte {i}");
            bytes[i] ^= 1;
        }
    }
}
