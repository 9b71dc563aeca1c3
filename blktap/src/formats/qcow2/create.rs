//! New images.
use crate::engine::FileKind;
use crate::formats::{BackingName, ImageError};
use crate::storage::Storage;

use super::entry::{self, COPIED, Layout};
use super::header::{
    AUTOCLEAR_RAW_DATA, CLUSTER_BITS, COMPAT_LAZY_REFCOUNTS, Compression, EXTENDED_MIN_BITS,
    Header, INCOMPAT_COMPRESSION, INCOMPAT_DATA_FILE, INCOMPAT_EXTENDED_L2, MAX_BACKING_NAME,
    MAX_L1_BYTES, MAX_REFTABLE_BYTES, Version,
};

/// Bytes that are written at once.
const PIECE: usize = 1 << 20;
/// What a header is written in last: a sector, which a power cut does not tear.
const SECTOR: usize = 512;
/// Longest name of a backing file's format that QEMU reads.
const MAX_FORMAT_NAME: usize = 15;

/// What of a new image has its place from the beginning: `preallocation` of `qemu-img create`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All clusters and tables; the file stays sparse.
    Metadata,
    /// The same, and the file has its space.
    Falloc,
    /// The same, and the file is written with zeroes.
    Full,
}

/// How clusters lie in an external data file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataFileKind {
    /// The image's tables say what is where.
    #[default]
    Mapped,
    /// It is a raw image of the disk as well: `data_file_raw=on`.
    Raw,
}

/// An external data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its name, as it is to be written.
    pub name: String,
    /// What it holds.
    pub kind: DataFileKind,
}

/// A new image: the options of `qemu-img create -f qcow2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Guest bytes; rounded up to whole sectors of 512.
    pub size: u64,
    /// `compat`: 0.10 or 1.1.
    pub version: Version,
    /// `cluster_size`: bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// `refcount_bits`: a power of two from 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// `lazy_refcounts`.
    pub lazy_refcounts: bool,
    /// `extended_l2`: clusters of 32 subclusters, 16 KiB and more.
    pub extended_l2: bool,
    /// `backing_file` and `backing_fmt`.
    pub backing: Option<BackingName>,
    /// `data_file` and `data_file_raw`.
    pub data_file: Option<DataFile>,
    /// `compression_type`.
    pub compression: Compression,
    /// `preallocation`.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// A disk of `size` bytes with QEMU's defaults: version 3, clusters of 64 KiB.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            size,
            version: Version::V3,
            cluster_size: 65_536,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            backing: None,
            data_file: None,
            compression: Compression::Zlib,
            preallocation: Preallocation::Off,
        }
    }

    /// How the image's tables will be laid out; an error if the options make no sense.
    pub fn layout(&self) -> Result<Layout, ImageError> {
        self.check()?;
        Ok(Layout {
            cluster_bits: self.cluster_size.trailing_zeros(),
            refcount_order: self.refcount_bits.trailing_zeros(),
            extended: self.extended_l2,
            data_file: self.data_file.is_some(),
            version: self.version,
        })
    }

    /// Says what of the options makes no sense, alone or together.
    fn check(&self) -> Result<(), ImageError> {
        let bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&bits) {
            return invalid("cluster_size must be a power of two from 512 to 2M");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return invalid("refcount_bits must be a power of two from 1 to 64");
        }
        if self.extended_l2 && bits < EXTENDED_MIN_BITS {
            return invalid("extended_l2 needs a cluster_size of 16k or more");
        }
        let new = [
            (self.refcount_bits != 16, "refcount_bits other than 16"),
            (self.lazy_refcounts, "lazy_refcounts"),
            (self.extended_l2, "extended_l2"),
            (self.data_file.is_some(), "data_file"),
            (self.compression != Compression::Zlib, "compression_type other than zlib"),
        ];
        let new = new.iter().find(|(asked, _)| *asked && self.version == Version::V2);
        if let Some((_, what)) = new {
            return invalid(format!("{what} needs compat=1.1"));
        }
        if let Some(backing) = &self.backing {
            self.check_backing(backing)?;
        }
        match &self.data_file {
            Some(file) if file.name.is_empty() => invalid("data_file has an empty name"),
            _ => Ok(()),
        }
    }

    fn check_backing(&self, backing: &BackingName) -> Result<(), ImageError> {
        if self.is_raw() {
            return invalid("a backing file and data_file_raw exclude each other");
        }
        if self.preallocation != Preallocation::Off && !self.extended_l2 {
            return invalid("a backing file and preallocation need extended_l2");
        }
        if backing.name.is_empty() || backing.name.len() > MAX_BACKING_NAME {
            let most = MAX_BACKING_NAME;
            return invalid(format!("backing_file must have a name of 1 to {most} bytes"));
        }
        match &backing.format {
            Some(name) if name.is_empty() || name.len() > MAX_FORMAT_NAME => {
                invalid(format!("backing_fmt must have 1 to {MAX_FORMAT_NAME} bytes"))
            }
            _ => Ok(()),
        }
    }

    fn is_raw(&self) -> bool {
        self.data_file.as_ref().is_some_and(|f| f.kind == DataFileKind::Raw)
    }

    /// Whether tables and clusters have their place from the beginning.
    fn has_tables(&self) -> bool {
        // A raw data file is read by others without the tables, so they must allow all of it.
        self.preallocation != Preallocation::Off || self.is_raw()
    }

    fn header(&self, size: u64) -> Header {
        let bit = |set: bool, bit: u64| if set { bit } else { 0 };
        let other = self.compression != Compression::Zlib;
        let backing = self.backing.clone();
        Header {
            version: self.version,
            backing_format: backing.as_ref().and_then(|b| b.format.clone()),
            backing_file: backing.map(|b| b.name),
            cluster_bits: self.cluster_size.trailing_zeros(),
            size,
            l1_size: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: bit(self.data_file.is_some(), INCOMPAT_DATA_FILE)
                | bit(other, INCOMPAT_COMPRESSION)
                | bit(self.extended_l2, INCOMPAT_EXTENDED_L2),
            compatible: bit(self.lazy_refcounts, COMPAT_LAZY_REFCOUNTS),
            autoclear: bit(self.is_raw(), AUTOCLEAR_RAW_DATA),
            refcount_order: self.refcount_bits.trailing_zeros(),
            compression: self.compression,
            unknown_fields: Vec::new(),
            data_file: self.data_file.as_ref().map(|f| f.name.clone()),
            bitmaps: None,
            unknown_extensions: Vec::new(),
        }
    }
}

fn invalid<T>(text: impl Into<String>) -> Result<T, ImageError> {
    Err(ImageError::Invalid(text.into()))
}

/// Makes an empty image of whatever `storage` holds, and of `data` if the options have an
/// external data file. A file is cut to the image; a device must have room for it.
///
/// A crash leaves a file that is no image, or the whole one: the sector by which it is known is
/// written last, when all else is durable.
pub fn create(
    storage: &dyn Storage,
    data: Option<&dyn Storage>,
    options: &CreateOptions,
) -> Result<(), ImageError> {
    options.check()?;
    let plan = Plan::new(options)?;
    let header = plan.header.serialise()?;
    match (data, &options.data_file) {
        (Some(data), Some(_)) => make_data_file(data, plan.header.size, options.preallocation)?,
        (None, None) => {}
        (None, Some(_)) => return invalid("no storage for the data file"),
        (Some(_), None) => return invalid("a storage for a data file that there is not"),
    }
    blank(storage, plan.clusters << plan.layout.cluster_bits)?;
    plan.make_room(storage, options.preallocation)?;
    plan.write_tables(storage)?;
    let (first, rest) = header.split_at(SECTOR.min(header.len()));
    let used = rest.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    storage.write_at(SECTOR as u64, &rest[..used]).map_err(ImageError::io("write the header"))?;
    storage.sync().map_err(ImageError::io("flush the new image"))?;
    storage.write_at(0, first).map_err(ImageError::io("write the header"))?;
    storage.sync().map_err(ImageError::io("flush the new image"))
}

fn is_device(storage: &dyn Storage) -> bool {
    storage.engine_file().is_some_and(|f| f.kind == FileKind::Block)
}

/// Makes `bytes` of zeroes of what was there, durably.
fn blank(storage: &dyn Storage, bytes: u64) -> Result<(), ImageError> {
    let what = "empty the file";
    if is_device(storage) {
        let have = storage.size().map_err(ImageError::io("find the size of the device"))?;
        if have < bytes {
            let text = format!("the device has {have} bytes, the image {bytes}");
            return Err(ImageError::NoSpace(text));
        }
        storage.punch(0..bytes).map_err(ImageError::io(what))?;
    } else {
        storage.set_size(0).map_err(ImageError::io(what))?;
        // So that nothing of an older image comes back beside what is written now.
        storage.sync().map_err(ImageError::io(what))?;
        storage.set_size(bytes).map_err(ImageError::io(what))?;
    }
    storage.sync().map_err(ImageError::io(what))
}

fn make_data_file(
    data: &dyn Storage,
    size: u64,
    preallocation: Preallocation,
) -> Result<(), ImageError> {
    blank(data, size)?;
    take_space(data, 0, size, preallocation)?;
    data.sync().map_err(ImageError::io("flush the data file"))
}

/// Gives a stretch of blank file its space, if that is wanted.
fn take_space(
    storage: &dyn Storage,
    start: u64,
    end: u64,
    preallocation: Preallocation,
) -> Result<(), ImageError> {
    let allocated = match preallocation {
        Preallocation::Falloc if start < end => storage.allocate(start..end),
        Preallocation::Full => {
            let zeroes = vec![0; PIECE];
            let mut at = start;
            std::iter::from_fn(|| {
                let len = (end - at).min(PIECE as u64);
                let written = (len > 0).then(|| storage.write_at(at, &zeroes[..len as usize]));
                at += len;
                written
            })
            .collect()
        }
        Preallocation::Off | Preallocation::Metadata | Preallocation::Falloc => Ok(()),
    };
    allocated.map_err(ImageError::io("allocate the file's space"))
}

/// Where all is: header, refcount table, refcount blocks, L1 table, then the L2 tables and the
/// data clusters of preallocation. There is no gap, so all refcounts are 1.
struct Plan {
    header: Header,
    layout: Layout,
    /// Refcount blocks.
    blocks: u64,
    /// L2 tables.
    tables: u64,
    /// Guest clusters that have their place.
    guest: u64,
    /// Clusters of the image file.
    clusters: u64,
}

impl Plan {
    fn new(options: &CreateOptions) -> Result<Plan, ImageError> {
        let size = options.size.checked_next_multiple_of(512).unwrap_or(u64::MAX);
        let header = options.header(size);
        let layout = header.layout();
        let entries = layout.l1_entries(size);
        if entries > MAX_L1_BYTES / 8 || size > i64::MAX as u64 {
            let most = u128::from(MAX_L1_BYTES / 8) << layout.l1_bits();
            let most = most.min(i64::MAX as u128 - 511);
            let text = format!("a disk of {size} bytes: with this cluster_size at most {most}");
            return invalid(text);
        }
        let guest = size.div_ceil(layout.cluster_size());
        let (tables, guest) = if options.has_tables() { (entries, guest) } else { (0, 0) };
        let data = if options.data_file.is_some() { 0 } else { guest };
        let l1 = (entries * 8).div_ceil(layout.cluster_size());
        let (mut blocks, mut table) = (1, 1);
        let clusters = loop {
            let clusters = 1 + table + blocks + l1 + tables + data;
            let need = clusters.div_ceil(1 << layout.refblock_bits());
            let need = (need, (need * 8).div_ceil(layout.cluster_size()));
            if need == (blocks, table) {
                break clusters;
            }
            (blocks, table) = (need.0.max(blocks), need.1.max(table));
        };
        let most = MAX_REFTABLE_BYTES.max(layout.cluster_size());
        if table << layout.cluster_bits > most || clusters >= 1 << (56 - layout.cluster_bits) {
            return invalid("the disk is too large to be preallocated with this cluster_size");
        }
        let mut plan = Plan { header, layout, blocks, tables, guest, clusters };
        let header = &mut plan.header;
        header.refcount_table_offset = layout.cluster_size();
        header.refcount_table_clusters = table as u32;
        header.l1_size = entries as u32;
        header.l1_offset =
            if entries == 0 { 0 } else { (1 + table + blocks) << layout.cluster_bits };
        Ok(plan)
    }

    /// First cluster of the refcount blocks.
    fn first_block(&self) -> u64 {
        1 + u64::from(self.header.refcount_table_clusters)
    }
    /// First cluster of the L2 tables.
    fn first_table(&self) -> u64 {
        let l1 = u64::from(self.header.l1_size) * 8;
        self.first_block() + self.blocks + l1.div_ceil(self.layout.cluster_size())
    }

    fn make_room(&self, storage: &dyn Storage, how: Preallocation) -> Result<(), ImageError> {
        let bits = self.layout.cluster_bits;
        let data = (self.first_table() + self.tables) << bits;
        // The metadata are written anyway, but for the rests of their clusters.
        let start = if how == Preallocation::Falloc { 0 } else { data };
        take_space(storage, start, self.clusters << bits, how)
    }

    /// Writes everything but the header.
    fn write_tables(&self, storage: &dyn Storage) -> Result<(), ImageError> {
        let bits = self.layout.cluster_bits;
        let mut out = Stream { storage, at: 1 << bits, bytes: Vec::new() };
        (0..self.blocks).try_for_each(|n| out.put((self.first_block() + n) << bits))?;
        out.seek(self.first_block() << bits)?;
        for n in 0..self.blocks {
            out.append(&self.block(n))?;
        }
        out.seek(self.header.l1_offset)?;
        let table = self.first_table();
        (0..self.tables).try_for_each(|n| out.put((table + n) << bits | COPIED))?;
        out.seek(table << bits)?;
        let data_file = self.layout.data_file;
        let first = if data_file { 0 } else { table + self.tables };
        for n in 0..self.guest {
            out.put((first + n) << bits | COPIED)?;
            if self.layout.extended {
                // No subcluster has data yet: the backing file shows through.
                out.put(0)?;
            }
        }
        out.finish()
    }

    /// Refcount block `n`.
    fn block(&self, n: u64) -> Vec<u8> {
        let mut block = vec![0; self.layout.cluster_size() as usize];
        let per = 1 << self.layout.refblock_bits();
        for at in 0..(self.clusters - n * per).min(per) {
            entry::set_refcount(&mut block, self.layout.refcount_order, at as usize, 1);
        }
        block
    }
}

/// Writes bytes one after the other, a piece at a time.
struct Stream<'a> {
    storage: &'a dyn Storage,
    at: u64,
    bytes: Vec<u8>,
}

impl Stream<'_> {
    fn put(&mut self, word: u64) -> Result<(), ImageError> {
        self.append(&word.to_be_bytes())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() >= PIECE { self.finish() } else { Ok(()) }
    }

    /// Goes on at `offset`.
    fn seek(&mut self, offset: u64) -> Result<(), ImageError> {
        self.finish()?;
        self.at = offset;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ImageError> {
        let written = self.storage.write_at(self.at, &self.bytes);
        written.map_err(ImageError::io("write the new image's tables"))?;
        self.at += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}
