//! Refcount blocks, some of them in memory.
use std::collections::BTreeMap;

use crate::formats::ImageError;
use crate::formats::qcow2::entry::{Layout, refcount, set_refcount};
use crate::formats::qcow2::header::Header;
use crate::storage::Storage;

/// Bytes of blocks that are kept.
const KEPT: usize = 8 << 20;

struct Block {
    bytes: Vec<u8>,
    dirty: bool,
}

/// The refcount table and the blocks that were used last.
pub(super) struct Blocks {
    layout: Layout,
    table: Vec<u64>,
    kept: BTreeMap<u64, Block>,
}

impl Blocks {
    pub(super) fn read(storage: &dyn Storage, header: &Header) -> Result<Self, ImageError> {
        let mut bytes = vec![0; (header.refcount_table_clusters as usize) << header.cluster_bits];
        storage
            .read_at(header.refcount_table_offset, &mut bytes)
            .map_err(ImageError::io("read the refcount table"))?;
        let word = |b: &[u8]| u64::from_be_bytes(b.try_into().unwrap_or_default());
        let table = bytes.chunks_exact(8).map(word).collect();
        Ok(Blocks { layout: header.layout(), table, kept: BTreeMap::new() })
    }

    pub(super) fn table(&self) -> &[u64] {
        &self.table
    }

    pub(super) fn set_table(&mut self, table: Vec<u64>) {
        self.table = table;
    }

    /// Refcounts in a block.
    pub(super) fn per_block(&self) -> u64 {
        1 << self.layout.refblock_bits()
    }

    fn place(&self, cluster: u64) -> (u64, usize) {
        (cluster / self.per_block(), (cluster % self.per_block()) as usize)
    }

    /// Where block `index` is; `None`: it does not exist.
    pub(super) fn offset(&self, index: u64) -> Result<Option<u64>, ImageError> {
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i)).copied();
        match entry.unwrap_or(0) {
            0 => Ok(None),
            offset if offset.is_multiple_of(self.layout.cluster_size()) => Ok(Some(offset)),
            entry => Err(ImageError::Corrupt(format!("refcount block {index} at {entry:#x}"))),
        }
    }

    fn load(
        &mut self,
        storage: &dyn Storage,
        index: u64,
    ) -> Result<Option<&mut Block>, ImageError> {
        if !self.kept.contains_key(&index) {
            let Some(offset) = self.offset(index)? else { return Ok(None) };
            if (self.kept.len() + 1) << self.layout.cluster_bits > KEPT {
                self.write(storage)?;
                self.kept.clear();
            }
            let mut bytes = vec![0; self.layout.cluster_size() as usize];
            storage.read_at(offset, &mut bytes).map_err(ImageError::io("read a refcount block"))?;
            self.kept.insert(index, Block { bytes, dirty: false });
        }
        Ok(self.kept.get_mut(&index))
    }

    pub(super) fn get(&mut self, storage: &dyn Storage, cluster: u64) -> Result<u64, ImageError> {
        let ((index, at), order) = (self.place(cluster), self.layout.refcount_order);
        Ok(self.load(storage, index)?.map_or(0, |block| refcount(&block.bytes, order, at)))
    }

    pub(super) fn set(
        &mut self,
        storage: &dyn Storage,
        cluster: u64,
        count: u64,
    ) -> Result<(), ImageError> {
        let ((index, at), order) = (self.place(cluster), self.layout.refcount_order);
        let Some(block) = self.load(storage, index)? else {
            return Err(ImageError::Corrupt(format!("cluster {cluster} has no refcount block")));
        };
        set_refcount(&mut block.bytes, order, at, count);
        block.dirty = true;
        Ok(())
    }

    /// Writes what was changed.
    pub(super) fn write(&mut self, storage: &dyn Storage) -> Result<(), ImageError> {
        for (index, block) in self.kept.iter_mut().filter(|(_, block)| block.dirty) {
            let offset = self.table[*index as usize];
            storage
                .write_at(offset, &block.bytes)
                .map_err(ImageError::io("write a refcount block"))?;
            block.dirty = false;
        }
        Ok(())
    }
}
