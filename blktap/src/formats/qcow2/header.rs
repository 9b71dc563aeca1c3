//! The header of a QCOW2 image and its extensions: read, judged and written again. Field names
//! and numbers are those of QEMU's docs/interop/qcow2.rst.
use crate::formats::{BackingName, ImageError};
use crate::storage::Storage;

use super::entry::Layout;
use super::extension::{self, BitmapsExtension, Extension};

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header.
pub const HEADER_V2: usize = 72;
/// Least bytes of a version 3 header.
pub const HEADER_V3: usize = 104;
/// Bytes of the version 3 header that is written: with the compression type, padded.
pub const HEADER_FULL: usize = 112;
/// Largest cluster (2 MiB), as QEMU has it, in bits; the smallest is 512 bytes.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Least cluster bits with extended L2 entries.
pub const EXTENDED_MIN_BITS: u32 = 14;
/// Largest L1 table in bytes, as QEMU has it.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes, as QEMU has it.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// Longest name of a backing file.
pub const MAX_BACKING_NAME: usize = 1023;

/// Incompatible feature: refcounts may be too low or wrong.
pub const INCOMPAT_DIRTY: u64 = 1 << 0;
/// Incompatible feature: do not write.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data lie in another file.
pub const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: the compression type is not zlib.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries of 128 bits.
pub const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
const INCOMPAT_KNOWN: u64 = 0x1f;
/// Compatible feature: refcounts may be written late.
pub const COMPAT_LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature: the bitmaps are consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Autoclear feature: the data file is a raw image of its own.
pub const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;
const AUTOCLEAR_KNOWN: u64 = 3;

/// The version of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 2, `compat=0.10`.
    V2,
    /// 3, `compat=1.1`.
    V3,
}

/// How compressed clusters are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate with a window of 4 KiB.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// A parsed header. What it does not know is kept and written again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which version.
    pub version: Version,
    /// Name of the backing file, as it is written.
    pub backing_file: Option<String>,
    /// Its format, as it is written.
    pub backing_format: Option<String>,
    /// Cluster size in bits.
    pub cluster_bits: u32,
    /// Guest bytes, as they are written: not always a multiple of 512.
    pub size: u64,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where it is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub refcount_table_offset: u64,
    /// Clusters that it has.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// Incompatible features.
    pub incompatible: u64,
    /// Compatible features.
    pub compatible: u64,
    /// Autoclear features.
    pub autoclear: u64,
    /// Width of refcounts: 1 << order bits.
    pub refcount_order: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Header bytes from 112 on, of a version 3 header that is longer than we know.
    pub unknown_fields: Vec<u8>,
    /// Name of the external data file, as it is written.
    pub data_file: Option<String>,
    /// The bitmaps extension.
    pub bitmaps: Option<BitmapsExtension>,
    /// Extensions that are not known, in their order.
    pub unknown_extensions: Vec<Extension>,
}

/// Big-endian numbers at fixed places; bytes beyond the end count as zeroes.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    (be64(bytes, at) >> 32) as u32
}

/// See [`be32`].
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    let mut n = [0; 8];
    let there = bytes.get(at..).unwrap_or_default();
    let len = there.len().min(8);
    n[..len].copy_from_slice(&there[..len]);
    u64::from_be_bytes(n)
}

fn corrupt<T>(text: impl Into<String>) -> Result<T, ImageError> {
    Err(ImageError::Corrupt(text.into()))
}

impl Header {
    /// Reads the header of `storage`. Features that are not supported are refused by name;
    /// whether the tables it names make sense is [`check_tables`](Self::check_tables)'s matter.
    pub fn read(storage: &dyn Storage) -> Result<Header, ImageError> {
        let read = ImageError::io("read the header");
        let mut start = [0; HEADER_FULL];
        let size = storage.size().map_err(ImageError::io("find the size of the file"))?;
        storage.read_at(0, &mut start).map_err(read)?;
        if be32(&start, 0) != MAGIC || size < HEADER_V2 as u64 {
            return Err(ImageError::NotThis("qcow2"));
        }
        let bits = be32(&start, 20);
        if !CLUSTER_BITS.contains(&bits) {
            return Err(ImageError::Unsupported(format!("clusters of 2^{bits} bytes")));
        }
        let mut cluster = vec![0; 1 << bits];
        storage.read_at(0, &mut cluster).map_err(ImageError::io("read the header"))?;
        Header::parse(&cluster)
    }

    /// Parses the first cluster of an image.
    pub fn parse(cluster: &[u8]) -> Result<Header, ImageError> {
        let version = match (be32(cluster, 0), be32(cluster, 4)) {
            (MAGIC, 2) => Version::V2,
            (MAGIC, 3) => Version::V3,
            (MAGIC, n) => return Err(ImageError::Unsupported(format!("qcow2 version {n}"))),
            _ => return Err(ImageError::NotThis("qcow2")),
        };
        let cluster_bits = be32(cluster, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) || cluster.len() < 1 << cluster_bits {
            let text = format!("clusters of 2^{cluster_bits} bytes");
            return Err(ImageError::Unsupported(text));
        }
        let cluster = &cluster[..1 << cluster_bits];
        let mut header = Header {
            version,
            backing_file: None,
            backing_format: None,
            cluster_bits,
            size: be64(cluster, 24),
            l1_size: be32(cluster, 36),
            l1_offset: be64(cluster, 40),
            refcount_table_offset: be64(cluster, 48),
            refcount_table_clusters: be32(cluster, 56),
            snapshot_count: be32(cluster, 60),
            snapshots_offset: be64(cluster, 64),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
            unknown_fields: Vec::new(),
            data_file: None,
            bitmaps: None,
            unknown_extensions: Vec::new(),
        };
        let length = header.parse_v3(cluster)?;
        let backing = backing_range(cluster, length)?;
        let end = backing.as_ref().map_or(cluster.len(), |r| r.start);
        let extensions = extension::parse(&cluster[length..end])?;
        header.check_features(&extensions)?;
        // Last, so that what is not supported is named first.
        match be32(cluster, 32) {
            0 => {}
            1 => return Err(ImageError::Unsupported("AES encryption".into())),
            2 => return Err(ImageError::Unsupported("LUKS encryption".into())),
            n => return Err(ImageError::Unsupported(format!("encryption method {n}"))),
        }
        header.take_extensions(extensions)?;
        if let Some(range) = backing {
            header.backing_file = Some(extension::text(&cluster[range], "backing file name")?);
        }
        header.check()?;
        Ok(header)
    }

    /// The fields that version 2 lacks. Returns the header's length.
    fn parse_v3(&mut self, cluster: &[u8]) -> Result<usize, ImageError> {
        if self.version == Version::V2 {
            return Ok(HEADER_V2);
        }
        self.incompatible = be64(cluster, 72);
        self.compatible = be64(cluster, 80);
        self.autoclear = be64(cluster, 88);
        self.refcount_order = be32(cluster, 96);
        let length = be32(cluster, 100) as usize;
        if length < HEADER_V3 || length > cluster.len() {
            return corrupt(format!("a header of {length} bytes"));
        }
        let method = if length > HEADER_V3 { cluster[104] } else { 0 };
        self.compression = match method {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            n => return Err(ImageError::Unsupported(format!("compression type {n}"))),
        };
        self.unknown_fields = cluster.get(HEADER_FULL..length).unwrap_or_default().to_vec();
        Ok(length)
    }

    /// Refuses incompatible features that are not known, by the names that the image gives them.
    fn check_features(&self, extensions: &[Extension]) -> Result<(), ImageError> {
        let unknown = self.incompatible & !INCOMPAT_KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let names = extensions.iter().find(|e| e.kind == extension::FEATURE_NAMES);
        let name = |bit: u32| {
            let named = names.and_then(|e| extension::feature_name(&e.data, 0, bit as u8));
            named.unwrap_or_else(|| format!("unknown incompatible feature {bit}"))
        };
        let list: Vec<_> = (0..64).filter(|bit| unknown & (1 << bit) != 0).map(name).collect();
        Err(ImageError::Unsupported(list.join(", ")))
    }

    fn take_extensions(&mut self, extensions: Vec<Extension>) -> Result<(), ImageError> {
        for e in extensions {
            match e.kind {
                extension::BACKING_FORMAT => {
                    self.backing_format = Some(extension::text(&e.data, "backing format")?);
                }
                // Written anew.
                extension::FEATURE_NAMES => {}
                extension::CRYPTO => return Err(ImageError::Unsupported("encryption".into())),
                extension::DATA_FILE => {
                    self.data_file = Some(extension::text(&e.data, "data file name")?);
                }
                extension::BITMAPS if self.version == Version::V3 => {
                    self.bitmaps = Some(BitmapsExtension::parse(&e.data)?);
                }
                _ => self.unknown_extensions.push(e),
            }
        }
        Ok(())
    }

    /// What the fields say of each other.
    fn check(&self) -> Result<(), ImageError> {
        if self.refcount_order > 6 {
            return corrupt(format!("refcounts of 2^{} bits", self.refcount_order));
        }
        if self.extended_l2() && self.cluster_bits < EXTENDED_MIN_BITS {
            return corrupt("subclusters of less than 512 bytes");
        }
        let other = self.incompatible & INCOMPAT_COMPRESSION != 0;
        if other != (self.compression != Compression::Zlib) {
            return corrupt("compression type and its feature bit differ");
        }
        if self.has_raw_data() && !self.has_data_file() {
            return corrupt("raw external data without a data file");
        }
        if self.size > i64::MAX as u64 {
            return corrupt(format!("a disk of {} bytes", self.size));
        }
        Ok(())
    }

    /// Whether the L1 table, the refcount table and the snapshot table can be what the header
    /// says: sizes within what QEMU accepts (so that memory stays bounded), aligned, no overflow.
    pub fn check_tables(&self) -> Result<(), ImageError> {
        let layout = self.layout();
        let need = layout.l1_entries(self.size);
        if need > MAX_L1_BYTES / 8 {
            return corrupt(format!("a disk of {} bytes needs too large an L1 table", self.size));
        }
        if u64::from(self.l1_size) < need {
            return corrupt(format!("{} L1 entries, {need} are needed", self.l1_size));
        }
        self.check_table("L1 table", self.l1_offset, u64::from(self.l1_size) * 8, MAX_L1_BYTES)?;
        let refcounts = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if refcounts == 0 {
            return corrupt("no refcount table");
        }
        self.check_table(
            "refcount table",
            self.refcount_table_offset,
            refcounts,
            MAX_REFTABLE_BYTES.max(layout.cluster_size()),
        )?;
        if self.snapshot_count > MAX_SNAPSHOTS {
            return corrupt(format!("{} snapshots", self.snapshot_count));
        }
        let least = u64::from(self.snapshot_count) * 40;
        self.check_table("snapshot table", self.snapshots_offset, least, u64::MAX)
    }

    fn check_table(&self, what: &str, at: u64, bytes: u64, most: u64) -> Result<(), ImageError> {
        if bytes > most {
            return corrupt(format!("{what} of {bytes} bytes"));
        }
        let aligned = at.is_multiple_of(1 << self.cluster_bits);
        let end = at.checked_add(bytes).filter(|end| *end < i64::MAX as u64);
        // Nothing lies in the header's cluster.
        if bytes > 0 && (!aligned || at == 0 || end.is_none()) {
            return corrupt(format!("{what} at {at:#x}"));
        }
        Ok(())
    }

    /// The header without its extensions and without the backing file's name.
    fn fields(&self) -> Vec<u8> {
        let mut out = vec![0; if self.version == Version::V2 { HEADER_V2 } else { HEADER_FULL }];
        let mut put = |at: usize, n: &[u8]| out[at..at + n.len()].copy_from_slice(n);
        put(0, &MAGIC.to_be_bytes());
        put(4, &(if self.version == Version::V2 { 2u32 } else { 3 }).to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &self.l1_size.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(60, &self.snapshot_count.to_be_bytes());
        put(64, &self.snapshots_offset.to_be_bytes());
        if self.version == Version::V3 {
            put(72, &self.incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            let length = (HEADER_FULL + self.unknown_fields.len()) as u32;
            put(100, &length.to_be_bytes());
            put(104, &[u8::from(self.compression == Compression::Zstd)]);
            out.extend_from_slice(&self.unknown_fields);
        }
        out
    }

    /// The header with its extensions, but for the names of feature bits, and without the backing
    /// file's name.
    pub(super) fn without_feature_names(&self) -> Vec<u8> {
        let mut out = self.fields();
        let list = self.extensions();
        let kept = list.iter().filter(|e| e.kind != extension::FEATURE_NAMES);
        kept.for_each(|e| e.append(&mut out));
        extension::end(&mut out);
        out
    }

    /// The header's cluster as it is to be written.
    pub fn serialise(&self) -> Result<Vec<u8>, ImageError> {
        let mut out = self.fields();
        self.extensions().iter().for_each(|e| e.append(&mut out));
        extension::end(&mut out);
        if let Some(name) = &self.backing_file {
            let at = (out.len() as u64).to_be_bytes();
            let len = (name.len() as u32).to_be_bytes();
            out[8..16].copy_from_slice(&at);
            out[16..20].copy_from_slice(&len);
            out.extend_from_slice(name.as_bytes());
        }
        let long = self.backing_file.as_ref().is_some_and(|n| n.len() > MAX_BACKING_NAME);
        if out.len() > 1 << self.cluster_bits || long {
            return Err(ImageError::NoSpace("the header does not fit its cluster".into()));
        }
        out.resize(1 << self.cluster_bits, 0);
        Ok(out)
    }

    fn extensions(&self) -> Vec<Extension> {
        let text = |kind, text: &Option<String>| {
            text.as_ref().map(|t| Extension { kind, data: t.as_bytes().to_vec() })
        };
        let mut list = Vec::new();
        list.extend(text(extension::BACKING_FORMAT, &self.backing_format));
        list.extend(text(extension::DATA_FILE, &self.data_file));
        if self.version == Version::V3 {
            list.push(extension::feature_names());
        }
        list.extend(self.bitmaps.map(BitmapsExtension::to_extension));
        list.extend(self.unknown_extensions.iter().cloned());
        // Small clusters have no room for names.
        let bytes: usize = list.iter().map(|e| 8 + e.data.len().next_multiple_of(8)).sum();
        let fixed = HEADER_FULL + self.unknown_fields.len() + 8;
        let name = self.backing_file.as_ref().map_or(0, String::len);
        if bytes + fixed + name > 1 << self.cluster_bits {
            list.retain(|e| e.kind != extension::FEATURE_NAMES);
        }
        list
    }

    /// Writes what changes while an image is in use, the refcount table's place and the feature
    /// bits: a few bytes of one sector. What else is in the header's cluster, the backing file's
    /// name above all, cannot be torn by it. The caller orders it and syncs.
    pub fn write_fields(&self, storage: &dyn Storage) -> Result<(), ImageError> {
        const CLUSTER_BITS_AT: usize = 20;
        let end = if self.version == Version::V2 { HEADER_V2 } else { 96 };
        let bytes = &self.fields()[CLUSTER_BITS_AT..end];
        let written = storage.write_at(CLUSTER_BITS_AT as u64, bytes);
        written.map_err(ImageError::io("write the header"))
    }

    /// Writes the whole header, which a crash can tear. The caller orders it and syncs.
    pub fn write(&self, storage: &dyn Storage) -> Result<(), ImageError> {
        let bytes = self.serialise()?;
        storage.write_at(0, &bytes).map_err(ImageError::io("write the header"))
    }

    /// How tables and entries are laid out.
    pub fn layout(&self) -> Layout {
        Layout::new(self)
    }
    /// Guest bytes in whole sectors, as QEMU counts them.
    pub fn disk_size(&self) -> u64 {
        self.size - self.size % 512
    }
    /// Whether L2 entries have 32 subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & INCOMPAT_EXTENDED_L2 != 0
    }
    /// Whether guest data lie in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPAT_DATA_FILE != 0
    }
    /// Whether that file is a raw image of its own.
    pub fn has_raw_data(&self) -> bool {
        self.autoclear & AUTOCLEAR_RAW_DATA != 0
    }
    /// Whether refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPAT_DIRTY != 0
    }
    /// Whether it was marked corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPAT_CORRUPT != 0
    }
    /// Whether refcounts may be written late.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible & COMPAT_LAZY_REFCOUNTS != 0
    }
    /// Clears the autoclear features that whoever writes does not know. Returns whether there
    /// were any. The bitmaps' one stays only with a writer that keeps them right.
    pub fn clear_unknown_autoclear(&mut self) -> bool {
        let before = self.autoclear;
        self.autoclear &= AUTOCLEAR_KNOWN;
        self.autoclear != before
    }
    /// The backing file, as the header names it.
    pub fn backing(&self) -> Option<BackingName> {
        let name = self.backing_file.clone()?;
        Some(BackingName { name, format: self.backing_format.clone() })
    }
}

/// Where the name of the backing file is in the first cluster, behind a header of `length`.
fn backing_range(
    cluster: &[u8],
    length: usize,
) -> Result<Option<std::ops::Range<usize>>, ImageError> {
    let (at, len) = (be64(cluster, 8), be32(cluster, 16) as usize);
    if at == 0 || len == 0 {
        return Ok(None);
    }
    if len > MAX_BACKING_NAME {
        return corrupt(format!("a backing file name of {len} bytes"));
    }
    let start = usize::try_from(at).unwrap_or(usize::MAX);
    match start.checked_add(len) {
        Some(end) if start >= length && end <= cluster.len() => Ok(Some(start..end)),
        _ => corrupt(format!("a backing file name at {at:#x}")),
    }
}
