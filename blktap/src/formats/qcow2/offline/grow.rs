//! More refcount blocks, and a longer refcount table.
use crate::formats::ImageError;
use crate::formats::qcow2::entry::set_refcount;
use crate::formats::qcow2::header::MAX_REFTABLE_BYTES;

use super::{Offline, TABLE_IN_HEADER};

impl Offline<'_> {
    /// Makes refcount blocks for the clusters from `start` to `end`, which are free. Says whether
    /// they all had one; if not, some are in use by blocks now.
    pub(super) fn cover(&mut self, start: u64, end: u64) -> Result<bool, ImageError> {
        let per = self.blocks.per_block();
        for index in start / per..=(end - 1) / per {
            if index >= self.blocks.table().len() as u64 {
                self.longer_table(start, index)?;
                return Ok(false);
            }
            if self.blocks.offset(index)?.is_none() {
                // At the start of the run, so that it does not cut it in two.
                self.new_block(index, start)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Block `index` in `cluster`, which a block counts already or this one will.
    fn new_block(&mut self, index: u64, cluster: u64) -> Result<(), ImageError> {
        if cluster / self.blocks.per_block() != index {
            self.set_refcount(cluster, 1)?;
        }
        self.write_block(index, cluster, cluster..cluster + 1)?;
        self.sync()?;
        let mut table = self.blocks.table().to_vec();
        table[index as usize] = cluster << self.layout.cluster_bits;
        let at = self.header.refcount_table_offset + index * 8;
        self.write(at, &table[index as usize].to_be_bytes(), "write the refcount table")?;
        self.sync()?;
        self.blocks.set_table(table);
        Ok(())
    }

    /// Writes a fresh block into `cluster`, with refcount 1 for those of `used` that it counts.
    fn write_block(
        &self,
        index: u64,
        cluster: u64,
        used: std::ops::Range<u64>,
    ) -> Result<(), ImageError> {
        let (per, order) = (self.blocks.per_block(), self.layout.refcount_order);
        let mut block = vec![0; self.layout.cluster_size() as usize];
        for one in used.start.max(index * per)..used.end.min((index + 1) * per) {
            set_refcount(&mut block, order, (one - index * per) as usize, 1);
        }
        self.write(cluster << self.layout.cluster_bits, &block, "write a refcount block")
    }

    /// A table with room for block `index` and more, behind all that is in use, with the blocks
    /// that count it. The header switches to it in one step.
    fn longer_table(&mut self, start: u64, index: u64) -> Result<(), ImageError> {
        let (per, bits) = (self.blocks.per_block(), self.layout.cluster_bits);
        let old = self.blocks.table().to_vec();
        // The first cluster that the old table cannot count.
        let first = start.max(old.len() as u64 * per);
        let entries = (index + 1).max(old.len() as u64 + old.len() as u64 / 2);
        let table_clusters = (entries * 8).div_ceil(1 << bits);
        let mut blocks = 1;
        while (first + blocks + table_clusters - 1) / per - first / per >= blocks {
            blocks += 1;
        }
        let end = first + blocks + table_clusters;
        let mut table = old;
        table.resize(((table_clusters << bits) / 8) as usize, 0);
        if table.len() as u64 * 8 > MAX_REFTABLE_BYTES.max(1 << bits)
            || (end - 1) / per >= table.len() as u64
        {
            return Err(ImageError::NoSpace("the refcount table is full".to_owned()));
        }
        for n in 0..blocks {
            let index = first / per + n;
            self.write_block(index, first + n, first..end)?;
            table[index as usize] = (first + n) << bits;
        }
        let offset = (first + blocks) << bits;
        self.write_table(offset, &table, "write the refcount table")?;
        let old_offset = self.header.refcount_table_offset;
        let old_bytes = u64::from(self.header.refcount_table_clusters) << bits;
        let mut fields = offset.to_be_bytes().to_vec();
        fields.extend_from_slice(&(table_clusters as u32).to_be_bytes());
        self.switch(TABLE_IN_HEADER, &fields)?;
        self.blocks.set_table(table);
        self.free(old_offset, old_bytes)
    }
}
