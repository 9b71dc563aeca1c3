//! An image under examination: its file and header, and reading of tables.
use std::cell::Cell;
use std::ops::{ControlFlow, Range};

use super::entries;
use crate::disk::Kept;
use crate::formats::ImageError;
use crate::formats::qcow2::entry::{Layout, refcount};
use crate::formats::qcow2::header::Header;
use crate::storage::Storage;

/// How far an operation is, in bytes of the image's tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// L2 tables and refcount blocks that were looked at.
    pub tables: u64,
    /// Times that all of them are looked at, begun so far.
    pub pass: u32,
}

/// Hears of the progress; may break the operation off.
pub type OnProgress<'a> = &'a dyn Fn(Progress) -> ControlFlow<()>;

/// An image that nobody else uses meanwhile.
pub(super) struct Image<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) header: &'a Header,
    pub(super) layout: Layout,
    /// Bytes of the file.
    pub(super) file: u64,
    /// The refcount table's entries.
    pub(super) refcount_table: Vec<u64>,
    /// Bytes that counts may take.
    pub(super) memory: usize,
    progress: OnProgress<'a>,
    seen: Cell<Progress>,
}

impl<'a> Image<'a> {
    /// Reads the refcount table.
    pub(super) fn new(
        storage: &'a dyn Storage,
        header: &'a Header,
        memory: usize,
        progress: OnProgress<'a>,
    ) -> Result<Self, ImageError> {
        let file = storage.size().map_err(ImageError::io("find the size of the file"))?;
        let mut image = Image {
            storage,
            header,
            layout: header.layout(),
            file,
            refcount_table: Vec::new(),
            memory,
            progress,
            seen: Cell::default(),
        };
        let bytes = (header.refcount_table_clusters as usize) << header.cluster_bits;
        let table = image.read(header.refcount_table_offset, bytes, "read the refcount table")?;
        image.refcount_table = table.chunks_exact(8).map(entries::word).collect();
        Ok(image)
    }

    pub(super) fn bits(&self) -> u32 {
        self.layout.cluster_bits
    }
    pub(super) fn cluster(&self) -> u64 {
        self.layout.cluster_size()
    }
    pub(super) fn is_aligned(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.cluster())
    }
    /// Clusters of the file, the last one perhaps in part.
    pub(super) fn clusters(&self) -> u64 {
        self.file.div_ceil(self.cluster())
    }

    pub(super) fn read(
        &self,
        offset: u64,
        len: usize,
        what: &'static str,
    ) -> Result<Vec<u8>, ImageError> {
        let mut bytes = vec![0; len];
        self.storage.read_at(offset, &mut bytes).map_err(ImageError::io(what))?;
        Ok(bytes)
    }

    pub(super) fn write(
        &self,
        offset: u64,
        bytes: &[u8],
        what: &'static str,
    ) -> Result<(), ImageError> {
        self.storage.write_at(offset, bytes).map_err(ImageError::io(what))
    }

    pub(super) fn sync(&self) -> Result<(), ImageError> {
        self.storage.sync().map_err(ImageError::io("flush the image"))
    }

    /// Whether the file has nothing there. So a sparse file costs what it holds, not its size.
    pub(super) fn is_hole(&self, range: Range<u64>) -> Result<bool, ImageError> {
        if range.start >= self.file {
            return Ok(true);
        }
        let range = range.start..range.end.min(self.file);
        let mut regions = Vec::new();
        self.storage.map(range.clone(), &mut regions).map_err(ImageError::io("map the file"))?;
        let first = regions.first();
        Ok(first.is_some_and(|r| r.kept == Kept::Hole && r.len >= range.end - range.start))
    }

    /// One table further. Fails when the operation was interrupted.
    pub(super) fn tick(&self) -> Result<(), ImageError> {
        let mut seen = self.seen.get();
        seen.tables += 1;
        self.seen.set(seen);
        match (self.progress)(seen) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ImageError::Invalid("interrupted".to_owned())),
        }
    }

    /// All tables once more.
    pub(super) fn next_pass(&self) {
        let seen = self.seen.get();
        self.seen.set(Progress { pass: seen.pass + 1, ..seen });
    }

    /// Refcounts in one block.
    pub(super) fn per_block(&self) -> u64 {
        1 << self.layout.refblock_bits()
    }

    /// What makes an entry of the refcount table unusable.
    pub(super) fn block_fault(&self, raw: u64) -> Option<&'static str> {
        match raw {
            _ if raw & 0x1ff != 0 => Some("has reserved bits set"),
            _ if !self.is_aligned(raw) => Some("has an offset that is no multiple of the cluster"),
            _ if raw >> self.bits() >= self.clusters() => Some("lies beyond the end of the file"),
            _ => None,
        }
    }

    /// Where refcount block `index` is, if there is a usable one.
    pub(super) fn block_offset(&self, index: u64) -> Option<u64> {
        let raw = *self.refcount_table.get(usize::try_from(index).ok()?)?;
        (raw != 0 && self.block_fault(raw).is_none()).then_some(raw)
    }

    /// Reads refcount block `index`.
    pub(super) fn block(&self, index: u64) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(offset) = self.block_offset(index) else { return Ok(None) };
        self.read(offset, self.cluster() as usize, "read a refcount block").map(Some)
    }
}

/// Refcounts as the image has them, a few blocks at hand.
pub(super) struct Refcounts<'a> {
    image: &'a Image<'a>,
    blocks: Vec<Option<(u64, Option<Vec<u8>>)>>,
}

/// Bytes of blocks that are at hand.
const AT_HAND: u64 = 8 << 20;

impl<'a> Refcounts<'a> {
    pub(super) fn new(image: &'a Image<'a>) -> Self {
        let slots = (AT_HAND >> image.bits()).clamp(1, 1024);
        Refcounts { image, blocks: vec![None; slots as usize] }
    }

    /// A cluster's refcount; 0 where no block counts it.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64, ImageError> {
        let (image, per) = (self.image, self.image.per_block());
        let index = cluster / per;
        let slot = (index % self.blocks.len() as u64) as usize;
        let slot = &mut self.blocks[slot];
        if slot.as_ref().is_none_or(|(kept, _)| *kept != index) {
            *slot = Some((index, image.block(index)?));
        }
        let block = slot.as_ref().and_then(|(_, block)| block.as_deref());
        let order = image.layout.refcount_order;
        Ok(block.map_or(0, |block| refcount(block, order, (cluster % per) as usize)))
    }
}
