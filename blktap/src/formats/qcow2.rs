//! QCOW2, versions 2 and 3, after QEMU's docs/interop/qcow2.rst.
//!
//! Guest offsets are looked up in the L1 table, which is kept whole, and in slices of L2 tables,
//! which are cached ([`cache`]). New clusters come from a pool that is reserved ahead, so that
//! resolving a write only takes from it; what a guard publishes changes slices in memory, and
//! [`flush`] brings them to the file in an order in which each crash leaves at worst clusters
//! that nobody uses.
pub mod bitmaps;
mod cache;
pub mod check;
mod compressed;
pub mod create;
pub mod entry;
pub mod extension;
mod flush;
pub mod header;
mod load;
pub mod measure;
mod metadata;
pub mod offline;
mod pool;
mod publish;
mod read;
pub mod rebase;
mod refcounts;
pub mod resize;
pub mod snapshots;
mod space;
mod write;
mod zero;

use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::{
    BackingName, BitmapInfo, Change, ClusterGuards, Extent, Format, Guard, ImageError, Leases,
    Miss, Outcome, Piece, Waiter,
};
use crate::storage::{Access, Storage};
use bitmaps::Recorder;
use cache::{SLICE_BYTES, Slice, SliceCache};
use entry::Layout;
use flush::Pending;
use header::{Compression, Header, Version};
use metadata::MetadataMap;
use pool::Pool;
use publish::Changes;
use refcounts::Refcounts;
use space::Space;

/// How much of the L2 tables is kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Cache {
    /// At most so many bytes, at least one slice of 4 KiB.
    Bytes(u64),
    /// As many as the whole disk needs: 1 MiB for 8 GiB with clusters of 64 KiB.
    All,
}

impl Default for L2Cache {
    /// 32 MiB, as QEMU.
    fn default() -> Self {
        L2Cache::Bytes(32 << 20)
    }
}

/// A number of bytes, with K, M or G behind it if wanted, or `all`.
impl FromStr for L2Cache {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "all" {
            return Ok(L2Cache::All);
        }
        let (digits, shift) = match text.as_bytes().last() {
            Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
            Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
            Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
            _ => (text, 0),
        };
        let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
        let wanted = bytes.filter(|bytes| (4096..=1 << 40).contains(bytes));
        wanted.map(L2Cache::Bytes).ok_or("write a number of bytes (4K to 1024G), or all")
    }
}

/// Makes the refcounts of an image right that was not closed, and clears its dirty bit.
pub type Repair = fn(&Arc<dyn Storage>) -> Result<(), ImageError>;

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub struct Qcow2Options {
    /// L2 tables in memory.
    pub l2_cache: L2Cache,
    /// Most bytes of refcount blocks in memory, at least four slices of 4 KiB.
    pub refcount_cache: u64,
    /// What is called when an image with the dirty bit is opened for writing, by default
    /// [`check::repair_dirty`]; without, that fails.
    pub repair: Option<Repair>,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        let l2_cache = L2Cache::default();
        Qcow2Options { l2_cache, refcount_cache: 1 << 20, repair: Some(check::repair_dirty) }
    }
}

/// An open QCOW2 image.
pub struct Qcow2 {
    /// The image, and the external data file where there is one.
    files: Vec<Arc<dyn Storage>>,
    layout: Layout,
    size: u64,
    access: Access,
    compression: Compression,
    backing: Option<BackingName>,
    /// Whether the data file has to read as the disk by itself.
    raw_data: bool,
    /// Whether refcounts are written late.
    lazy: bool,
    l1: Box<[AtomicU64]>,
    cache: SliceCache,
    guards: ClusterGuards,
    leases: Arc<Leases>,
    changes: Changes,
    pool: Pool,
    pending: Pending,
    space: Mutex<Space>,
    /// Corruption was come across: nothing is written any more.
    corrupt: AtomicBool,
    /// One table is made at a time.
    making_table: Mutex<()>,
    bitmaps: Option<Recorder>,
}

impl Qcow2 {
    /// Opens the image `file`; `data_file` is the external data file that
    /// [`Header::data_file`] names, if [`Header::has_data_file`] says that there is one.
    pub fn open(
        file: Arc<dyn Storage>,
        data_file: Option<Arc<dyn Storage>>,
        options: &Qcow2Options,
    ) -> Result<Self, ImageError> {
        let mut header = Header::read(&*file)?;
        header.check_tables()?;
        let access = file.access();
        if access == Access::ReadWrite {
            prepare_header(&mut header, &file, options)?;
        }
        let bitmaps = open_bitmaps(&mut header, &file)?;
        let mut files = vec![Arc::clone(&file)];
        match (header.has_data_file(), data_file) {
            (true, Some(data)) => files.push(data),
            (true, None) => {
                return Err(ImageError::Invalid("its external data file is needed".into()));
            }
            (false, Some(_)) => {
                return Err(ImageError::Invalid("it has no external data file".into()));
            }
            (false, None) => {}
        }
        let l1 = read_l1(&header, &*file)?;
        let at = (header.refcount_table_offset, header.refcount_table_clusters);
        let layout = header.layout();
        let limit = options.refcount_cache;
        let refcounts = Refcounts::read(Arc::clone(&file), layout, at, limit)?;
        let map = match access {
            Access::ReadWrite => MetadataMap::of(&*file, &header, &l1, refcounts.table())?,
            Access::ReadOnly => MetadataMap::default(),
        };
        let slices = slices(&layout, header.disk_size(), options.l2_cache);
        Ok(Qcow2 {
            files,
            layout,
            size: header.disk_size(),
            access,
            compression: header.compression,
            backing: header.backing(),
            raw_data: header.has_raw_data(),
            lazy: header.has_lazy_refcounts(),
            l1: l1.into_iter().map(AtomicU64::new).collect(),
            cache: SliceCache::new(slices),
            guards: ClusterGuards::default(),
            leases: Arc::default(),
            changes: Changes::default(),
            pool: Pool::default(),
            pending: Pending::default(),
            space: Mutex::new(Space::new(file, header, refcounts, map)?),
            corrupt: AtomicBool::new(false),
            making_table: Mutex::new(()),
            bitmaps,
        })
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.space.lock().header.clone()
    }

    /// The image's own file.
    fn file(&self) -> &Arc<dyn Storage> {
        &self.files[0]
    }
    /// The number of the file with the guest's data.
    fn data_file(&self) -> u16 {
        u16::from(self.layout.data_file)
    }
    fn slice_bytes(&self) -> u64 {
        SLICE_BYTES.min(self.layout.cluster_size())
    }
    /// Entries of a slice, as bits.
    fn slice_bits(&self) -> u32 {
        self.slice_bytes().trailing_zeros() - self.layout.entry_bits()
    }
    /// Guest bytes of a slice, as bits.
    fn slice_guest_bits(&self) -> u32 {
        self.slice_bits() + self.layout.cluster_bits
    }
    /// The slice with the entry of a guest offset.
    fn slice_of(&self, offset: u64) -> u32 {
        (offset >> self.slice_guest_bits()) as u32
    }
    /// The place of a guest offset's entry in its slice.
    fn index_of(&self, offset: u64) -> usize {
        (offset >> self.layout.cluster_bits) as usize & ((1 << self.slice_bits()) - 1)
    }
    /// The L1 entry of a guest offset.
    fn l1_entry(&self, offset: u64) -> u64 {
        let index = (offset >> self.layout.l1_bits()) as usize;
        self.l1.get(index).map_or(0, |e| e.load(Ordering::Acquire))
    }
    /// First guest byte behind those of `offset`'s L1 entry.
    fn l1_end(&self, offset: u64) -> u64 {
        let bits = self.layout.l1_bits();
        ((offset >> bits) + 1) << bits
    }

    /// The error of something in the image that cannot be; from then on it is not written.
    fn found_corrupt(&self, what: String) -> ImageError {
        if self.access == Access::ReadWrite {
            self.corrupt.store(true, Ordering::Release);
        }
        ImageError::Corrupt(what)
    }

    /// Takes note if an error says that the image is corrupt.
    fn judge<T>(&self, result: Result<T, ImageError>) -> Result<T, ImageError> {
        result.map_err(|e| match e {
            ImageError::Corrupt(what) => self.found_corrupt(what),
            other => other,
        })
    }
}

/// What opening for writing does to the header first.
fn prepare_header(
    header: &mut Header,
    file: &Arc<dyn Storage>,
    options: &Qcow2Options,
) -> Result<(), ImageError> {
    if header.is_corrupt() {
        let text = "it is marked corrupt and can only be read until it was repaired";
        return Err(ImageError::Corrupt(text.into()));
    }
    if header.is_dirty() {
        let Some(repair) = options.repair else {
            let text = "it was not closed properly and must be repaired before it is written";
            return Err(ImageError::Invalid(text.into()));
        };
        repair(file)?;
        *header = Header::read(&**file)?;
        header.check_tables()?;
    }
    let before = header.autoclear;
    header.clear_unknown_autoclear();
    if header.autoclear != before {
        write_header(header, file)?;
    }
    Ok(())
}

fn write_header(header: &Header, file: &Arc<dyn Storage>) -> Result<(), ImageError> {
    header.write_fields(&**file)?;
    file.sync().map_err(ImageError::io("flush the header"))
}

/// The bitmaps. If they are broken the image is used without, and from the first writer on they
/// no longer count.
fn open_bitmaps(
    header: &mut Header,
    file: &Arc<dyn Storage>,
) -> Result<Option<Recorder>, ImageError> {
    match Recorder::open(file, header) {
        Ok(bitmaps) => Ok(Some(bitmaps)),
        Err(e @ ImageError::Io { .. }) => Err(e),
        Err(e) => {
            tracing::warn!("{}: the bitmaps cannot be used: {e}", file.name());
            if file.access() == Access::ReadWrite {
                header.autoclear &= !header::AUTOCLEAR_BITMAPS;
                write_header(header, file)?;
            }
            Ok(None)
        }
    }
}

fn read_l1(header: &Header, file: &dyn Storage) -> Result<Vec<u64>, ImageError> {
    let mut bytes = vec![0; header.l1_size as usize * 8];
    file.read_at(header.l1_offset, &mut bytes).map_err(ImageError::io("read the L1 table"))?;
    Ok(bytes.chunks_exact(8).map(|b| header::be64(b, 0)).collect())
}

/// How many slices are cached.
fn slices(layout: &Layout, size: u64, cache: L2Cache) -> u64 {
    let slice = SLICE_BYTES.min(layout.cluster_size());
    let entries = size.div_ceil(layout.cluster_size());
    let all = (entries << layout.entry_bits()).div_ceil(slice).next_multiple_of(8);
    match cache {
        L2Cache::Bytes(bytes) => (bytes / slice).min(all),
        L2Cache::All => all,
    }
}

impl Format for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn cluster(&self) -> u64 {
        self.layout.cluster_size()
    }
    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }
    fn leases(&self) -> &Arc<Leases> {
        &self.leases
    }
    fn backing(&self) -> Option<BackingName> {
        self.backing.clone()
    }
    fn resolve_read(
        &self,
        range: Range<u64>,
        out: &mut Vec<Extent>,
    ) -> Result<Outcome<()>, ImageError> {
        self.read(range, out)
    }
    fn resolve_write(
        &self,
        range: Range<u64>,
        change: Change,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Outcome<Option<Guard>>, ImageError> {
        self.change(range, change, waiter, out)
    }
    fn commit(&self, guard: Guard) {
        self.publish(guard);
    }
    fn abort(&self, guard: Guard) {
        self.give_up(guard);
    }
    fn load(&self, miss: Miss) -> Result<(), ImageError> {
        self.judge(self.load_missing(miss))
    }
    fn decompress(&self, cluster: u64, out: &mut Vec<u8>) -> Result<(), ImageError> {
        self.unpack(cluster, out)
    }
    fn has_unflushed(&self) -> bool {
        self.pending.any() || self.corrupt.load(Ordering::Acquire)
    }
    fn flush(&self) -> Result<(), ImageError> {
        self.flush_all()
    }
    fn close(&self) -> Result<(), ImageError> {
        self.close_image()
    }
    fn bitmaps(&self) -> Vec<BitmapInfo> {
        self.bitmaps.as_ref().map_or_else(Vec::new, Recorder::infos)
    }
    fn bitmap(
        &self,
        name: &str,
        range: Range<u64>,
        out: &mut Vec<(u64, bool)>,
    ) -> Result<(), ImageError> {
        match &self.bitmaps {
            Some(bitmaps) => bitmaps.stretches(name, range, out),
            None => Err(ImageError::Invalid(format!("no bitmap {name:?}"))),
        }
    }
}
