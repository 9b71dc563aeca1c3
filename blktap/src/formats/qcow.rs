//! QCOW images of version 1: read, as images and as backing files, and [written](QcowWriter) by
//! conversion. There is no specification; QEMU's block/qcow.c is the reference.
//!
//! A table of first level (L1) names tables of second level (L2), which name clusters. A cluster
//! that nobody names is the backing file's, or zeroes. Nothing is written to an open image:
//! QCOW2 replaced the format in 2008.
mod header;
mod writer;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use flate2::{Decompress, FlushDecompress, Status};
use parking_lot::RwLock;

use self::header::Header;
pub use self::writer::{CreateOptions, Packing, QcowWriter};
use super::{
    BackingName, Change, Extent, Format, Guard, ImageError, Leases, Miss, Outcome, Piece, Place,
    Waiter,
};
use crate::disk::Region;
use crate::storage::Storage;

/// In an L2 entry: the cluster is compressed. Its length follows, then its place.
const COMPRESSED: u64 = 1 << 63;
const SHARDS: usize = 16;
/// Bytes of L2 tables that are kept in memory.
const KEPT: usize = 16 << 20;

type Table = Arc<[u64]>;

/// An open QCOW image.
pub struct Qcow {
    files: [Arc<dyn Storage>; 1],
    leases: Arc<Leases>,
    header: Header,
    backing: Option<String>,
    file_size: u64,
    l1: Vec<u64>,
    /// L2 tables in memory, by number.
    l2: Box<[RwLock<HashMap<usize, Table>>]>,
}

/// Numbers as the file has them.
fn numbers(storage: &dyn Storage, at: u64, count: usize) -> Result<Vec<u64>, ImageError> {
    let mut bytes = vec![0; count * 8];
    storage.read_at(at, &mut bytes).map_err(ImageError::io("read a table of clusters"))?;
    Ok(bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
}

impl Qcow {
    /// Opens an image.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Qcow, ImageError> {
        let header = Header::read(&*storage)?;
        let backing = header.backing(&*storage)?;
        let file_size = storage.size().map_err(ImageError::io("read the size"))?;
        let l1 = numbers(&*storage, header.l1_offset.get(), header.l1_entries() as usize)?;
        let l2 = (0..SHARDS).map(|_| RwLock::default()).collect();
        let leases = Arc::new(Leases::default());
        Ok(Qcow { files: [storage], leases, header, backing, file_size, l1, l2 })
    }

    /// What a cluster that nobody names reads as.
    fn below(&self) -> Place {
        if self.backing.is_some() { Place::Absent } else { Place::Zero }
    }

    fn shard(&self, number: usize) -> &RwLock<HashMap<usize, Table>> {
        &self.l2[number % SHARDS]
    }

    /// The L2 entry of a cluster; `None`: its table must be loaded.
    fn entry(&self, cluster: u64) -> Option<u64> {
        let number = (cluster >> self.header.l2_bits) as usize;
        if self.l1[number] == 0 {
            return Some(0);
        }
        let slot = cluster as usize & ((1 << self.header.l2_bits) - 1);
        self.shard(number).read().get(&number).map(|table| table[slot])
    }

    fn table(&self, number: usize) -> Result<(), ImageError> {
        let at = *self.l1.get(number).ok_or_else(|| no_table(number))?;
        if at == 0 || self.shard(number).read().contains_key(&number) {
            return Ok(());
        }
        let bytes = 8 << self.header.l2_bits;
        if at.checked_add(bytes).is_none_or(|end| end > self.file_size) {
            let what = format!("L2 table {number} cannot be at byte {at}");
            return Err(ImageError::Corrupt(what));
        }
        let table = numbers(&*self.files[0], at, 1 << self.header.l2_bits)?;
        let mut shard = self.shard(number).write();
        if shard.len() >= (KEPT / SHARDS / bytes as usize).max(1) {
            shard.clear();
        }
        shard.insert(number, table.into());
        Ok(())
    }

    fn place(&self, cluster: u64, entry: u64, skip: u64) -> Result<Place, ImageError> {
        if entry == 0 {
            return Ok(self.below());
        }
        if entry & COMPRESSED != 0 {
            return Ok(Place::Compressed { cluster, skip: skip as u32 });
        }
        if entry >= self.file_size || !entry.is_multiple_of(512) {
            let what = format!("cluster {cluster} cannot be at byte {entry}");
            return Err(ImageError::Corrupt(what));
        }
        Ok(Place::Data { file: 0, offset: entry + skip })
    }

    /// The bytes of a compressed cluster as the file has them.
    fn packed(&self, cluster: u64) -> Result<Vec<u8>, ImageError> {
        let number = (cluster >> self.header.l2_bits) as usize;
        let mut entry = None;
        // Others may have it dropped again before it is looked at.
        while entry.is_none() {
            self.table(number)?;
            entry = self.entry(cluster);
        }
        let entry = entry.filter(|e| e & COMPRESSED != 0);
        let entry = entry.ok_or_else(|| broken(cluster, "is not compressed"))?;
        let bits = 63 - u32::from(self.header.cluster_bits);
        let at = entry & ((1 << bits) - 1);
        let len = (entry & !COMPRESSED) >> bits;
        if len == 0 || at + len > self.file_size.next_multiple_of(512) {
            return Err(broken(cluster, "cannot be where it is said to be"));
        }
        let mut packed = vec![0; len as usize];
        let what = "read a compressed cluster";
        self.files[0].read_at(at, &mut packed).map_err(ImageError::io(what))?;
        Ok(packed)
    }
}

fn no_table(number: usize) -> ImageError {
    ImageError::Invalid(format!("no L2 table {number}"))
}

fn broken(cluster: u64, what: &str) -> ImageError {
    ImageError::Corrupt(format!("compressed cluster {cluster} {what}"))
}

fn only_read() -> ImageError {
    ImageError::Unsupported("writing to a QCOW image of version 1: convert it to qcow2".into())
}

impl Format for Qcow {
    fn name(&self) -> &'static str {
        "qcow"
    }
    fn size(&self) -> u64 {
        self.header.size.get() / 512 * 512
    }
    fn cluster(&self) -> u64 {
        self.header.cluster()
    }
    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }
    fn leases(&self) -> &Arc<Leases> {
        &self.leases
    }
    fn backing(&self) -> Option<BackingName> {
        let name = self.backing.clone()?;
        Some(BackingName { name, format: None })
    }

    fn resolve_read(
        &self,
        range: Range<u64>,
        out: &mut Vec<Extent>,
    ) -> Result<Outcome<()>, ImageError> {
        let bits = u32::from(self.header.cluster_bits);
        let (mut at, first) = (range.start, out.len());
        while at < range.end {
            let cluster = at >> bits;
            let Some(entry) = self.entry(cluster) else {
                let miss = Miss(cluster >> self.header.l2_bits);
                let told = out.len() > first;
                return Ok(if told { Outcome::Ready(()) } else { Outcome::Miss(miss) });
            };
            let skip = at - (cluster << bits);
            let len = (range.end - at).min((1 << bits) - skip);
            let place = match self.place(cluster, entry, skip) {
                // What comes before can be read.
                Err(_) if out.len() > first => return Ok(Outcome::Ready(())),
                place => place?,
            };
            push(out, first, Extent { len, place });
            at += len;
        }
        Ok(Outcome::Ready(()))
    }

    fn resolve_write(
        &self,
        _range: Range<u64>,
        _change: Change,
        _waiter: &Waiter,
        _out: &mut Vec<Piece>,
    ) -> Result<Outcome<Option<Guard>>, ImageError> {
        Err(only_read())
    }

    fn commit(&self, _guard: Guard) {}
    fn abort(&self, _guard: Guard) {}

    fn load(&self, miss: Miss) -> Result<(), ImageError> {
        self.table(miss.0 as usize)
    }

    fn decompress(&self, cluster: u64, out: &mut Vec<u8>) -> Result<(), ImageError> {
        let packed = self.packed(cluster)?;
        out.clear();
        out.resize(self.cluster() as usize, 0);
        let mut inflate = Decompress::new(false);
        // QEMU takes a stream that has no end too, once all bytes are there.
        match inflate.decompress(&packed, out, FlushDecompress::Finish) {
            Ok(Status::StreamEnd | Status::BufError | Status::Ok)
                if inflate.total_out() == self.cluster() =>
            {
                Ok(())
            }
            _ => Err(broken(cluster, "cannot be unpacked")),
        }
    }

    fn has_unflushed(&self) -> bool {
        false
    }
    fn flush(&self) -> Result<(), ImageError> {
        Ok(())
    }
    fn close(&self) -> Result<(), ImageError> {
        Ok(())
    }
    fn map_data(
        &self,
        _file: u16,
        range: Range<u64>,
        out: &mut Vec<Region>,
    ) -> std::io::Result<()> {
        self.files[0].map(range, out)
    }
}

/// Appends an extent, as part of the last one of this answer where it goes on.
fn push(out: &mut Vec<Extent>, first: usize, extent: Extent) {
    if let Some(last) = out[first..].last_mut() {
        let goes_on = match (last.place, extent.place) {
            (Place::Data { offset, .. }, Place::Data { offset: next, .. }) => {
                offset + last.len == next
            }
            (Place::Zero, Place::Zero) | (Place::Absent, Place::Absent) => true,
            _ => false,
        };
        if goes_on {
            last.len += extent.len;
            return;
        }
    }
    out.push(extent);
}
