//! Changes to an image that nobody has open, one after the other: allocation and refcounts on the
//! file itself, without caches that outlive the call.
//!
//! What is changed is durable after [`Offline::sync`], and in any order before it. So a caller
//! allocates, syncs, names what it allocated, syncs, and frees what is no longer named: each crash
//! leaves leaks at worst.
mod blocks;
mod extension;
mod grow;

use crate::formats::ImageError;
use crate::storage::{Access, Storage};

use super::entry::Layout;
use super::header::Header;
use blocks::Blocks;

/// An image under change.
pub struct Offline<'a> {
    storage: &'a dyn Storage,
    header: Header,
    layout: Layout,
    blocks: Blocks,
    /// No cluster before this one is free.
    first_free: u64,
    /// To be freed once nothing names them any more.
    deferred: Vec<(u64, u64)>,
}

/// Where the refcount table's place is in the header: offset, clusters.
const TABLE_IN_HEADER: u64 = 48;

impl<'a> Offline<'a> {
    /// For an image whose refcounts can be relied on: neither dirty nor corrupt.
    pub fn open(storage: &'a dyn Storage) -> Result<Self, ImageError> {
        if storage.access() == Access::ReadOnly {
            return Err(ImageError::ReadOnly);
        }
        let header = Header::read(storage)?;
        header.check_tables()?;
        if header.is_dirty() || header.is_corrupt() {
            let text = "the image was not closed properly, or is corrupt: check and repair it";
            return Err(ImageError::Invalid(text.to_owned()));
        }
        let layout = header.layout();
        let blocks = Blocks::read(storage, &header)?;
        Ok(Offline { storage, header, layout, blocks, first_free: 1, deferred: Vec::new() })
    }

    /// The file.
    pub fn storage(&self) -> &'a dyn Storage {
        self.storage
    }
    /// The header, as it is in the file.
    pub fn header(&self) -> &Header {
        &self.header
    }
    /// How tables and entries are laid out.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// A cluster's refcount.
    pub fn refcount(&mut self, cluster: u64) -> Result<u64, ImageError> {
        self.blocks.get(self.storage, cluster)
    }

    /// Sets a cluster's refcount. A cluster that no block counts can only be 0.
    fn set_refcount(&mut self, cluster: u64, count: u64) -> Result<(), ImageError> {
        if count > self.layout.max_refcount() {
            let text = format!("cluster {cluster} would have {count} users");
            return Err(ImageError::NoSpace(text));
        }
        self.blocks.set(self.storage, cluster, count)
    }

    /// One user more of a cluster that is in use.
    pub fn take(&mut self, cluster: u64) -> Result<(), ImageError> {
        self.add_users(cluster, 1)
    }

    /// So many users more of a cluster that is in use.
    pub fn add_users(&mut self, cluster: u64, users: u64) -> Result<(), ImageError> {
        match self.refcount(cluster)? {
            0 => Err(unused(cluster)),
            count => self.set_refcount(cluster, count.saturating_add(users)),
        }
    }

    /// One user less of a cluster.
    pub fn drop_one(&mut self, cluster: u64) -> Result<(), ImageError> {
        self.drop_users(cluster, 1).map(|_| ())
    }

    /// So many users less of a cluster. Gives how many are left.
    pub fn drop_users(&mut self, cluster: u64, users: u64) -> Result<u64, ImageError> {
        let left = self.refcount(cluster)?.checked_sub(users).ok_or_else(|| unused(cluster))?;
        if left == 0 {
            self.first_free = self.first_free.min(cluster);
        }
        self.set_refcount(cluster, left)?;
        Ok(left)
    }

    /// One user less of all clusters that `len` bytes from `offset` on lie in.
    pub fn free(&mut self, offset: u64, len: u64) -> Result<(), ImageError> {
        let Some(last) = len.checked_sub(1).and_then(|n| offset.checked_add(n)) else {
            return Ok(());
        };
        let bits = self.layout.cluster_bits;
        (offset >> bits..=last >> bits).try_for_each(|cluster| self.drop_one(cluster))
    }

    /// Takes note of (offset, length) that are to be freed once nothing names them.
    pub(super) fn defer_free(&mut self, freed: impl IntoIterator<Item = (u64, u64)>) {
        self.deferred.extend(freed);
    }

    /// Frees what waits for it: what named it was changed durably.
    pub(super) fn free_deferred(&mut self) -> Result<(), ImageError> {
        std::mem::take(&mut self.deferred).into_iter().try_for_each(|(at, len)| self.free(at, len))
    }

    /// Clusters next to each other that nobody uses, for `len` bytes; their refcounts are 1
    /// afterwards. Gives the offset. What they hold is anything.
    pub fn allocate(&mut self, len: u64) -> Result<u64, ImageError> {
        let clusters = len.div_ceil(self.layout.cluster_size()).max(1);
        loop {
            let start = self.find(clusters)?;
            if self.cover(start, start + clusters)? {
                for cluster in start..start + clusters {
                    self.set_refcount(cluster, 1)?;
                }
                if start == self.first_free {
                    self.first_free = start + clusters;
                }
                return Ok(start << self.layout.cluster_bits);
            }
        }
    }

    /// The first `clusters` free clusters in a row.
    fn find(&mut self, clusters: u64) -> Result<u64, ImageError> {
        let (mut start, mut at, mut first) = (self.first_free, self.first_free, None);
        while at - start < clusters {
            if self.refcount(at)? == 0 {
                first.get_or_insert(at);
                at += 1;
            } else {
                at += 1;
                start = at;
            }
        }
        self.first_free = first.unwrap_or(at);
        Ok(start)
    }

    /// Reads `entries` words of a table.
    pub fn read_table(
        &self,
        offset: u64,
        entries: usize,
        what: &'static str,
    ) -> Result<Vec<u64>, ImageError> {
        let mut bytes = vec![0; entries * 8];
        self.storage.read_at(offset, &mut bytes).map_err(ImageError::io(what))?;
        let word = |b: &[u8]| u64::from_be_bytes(b.try_into().unwrap_or_default());
        Ok(bytes.chunks_exact(8).map(word).collect())
    }

    /// Writes words of a table.
    pub fn write_table(
        &self,
        offset: u64,
        table: &[u64],
        what: &'static str,
    ) -> Result<(), ImageError> {
        let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.write(offset, &bytes, what)
    }

    /// Writes bytes.
    pub fn write(&self, offset: u64, bytes: &[u8], what: &'static str) -> Result<(), ImageError> {
        self.storage.write_at(offset, bytes).map_err(ImageError::io(what))
    }

    /// Makes everything durable that was changed.
    pub fn sync(&mut self) -> Result<(), ImageError> {
        self.blocks.write(self.storage)?;
        self.storage.sync().map_err(ImageError::io("flush the image"))
    }

    /// Changes bytes of the header, all in one sector, as one durable step. Everything that was
    /// changed before is durable before it.
    pub fn switch(&mut self, at: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let last = at + (bytes.len() as u64).max(1) - 1;
        if at / 512 != last / 512 {
            return Err(ImageError::Invalid("a header field on two sectors".to_owned()));
        }
        self.sync()?;
        self.write(at, bytes, "write the header")?;
        self.sync()?;
        self.header = Header::read(self.storage)?;
        Ok(())
    }
}

fn unused(cluster: u64) -> ImageError {
    ImageError::Corrupt(format!("cluster {cluster} is used and has refcount 0"))
}
