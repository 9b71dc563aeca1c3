//! Writing a whole image, from its start to its end, for conversion. Nobody else uses it
//! meanwhile, and it is worth nothing before [`QcowWriter::finish`] succeeds.
use std::sync::Arc;

use flate2::{Compress, Compression, FlushCompress, Status};
use zerocopy::IntoBytes;
use zerocopy::big_endian::{U32, U64};

use super::COMPRESSED;
use super::header::{HEADER, Header};
use crate::formats::ImageError;
use crate::storage::Storage;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Guest bytes, a multiple of 512.
    pub size: u64,
    /// The backing file's name, up to 1023 bytes.
    pub backing: Option<String>,
}

/// How a cluster is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// As it is.
    Plain,
    /// Compressed by zlib, if that makes it smaller.
    Compressed,
}

/// An image that is being written.
pub struct QcowWriter {
    storage: Arc<dyn Storage>,
    header: Header,
    l1: Vec<U64>,
    /// The L2 table that is being filled, and its number.
    l2: Option<(usize, Vec<U64>)>,
    /// Where the next thing goes.
    end: u64,
}

impl QcowWriter {
    /// Empties `storage` and writes an image of which nothing is allocated.
    pub fn create(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<Self, ImageError> {
        let name = options.backing.as_deref().unwrap_or_default();
        if options.size == 0 || !options.size.is_multiple_of(512) {
            let size = options.size;
            let what = format!("a disk of {size} bytes: it must be a multiple of 512 and not 0");
            return Err(ImageError::Invalid(what));
        }
        if name.len() > 1023 || name.contains('\0') {
            return Err(ImageError::Invalid(format!("a backing file's name like {name:?}")));
        }
        // As QEMU does: small clusters, so that little is copied from the backing file.
        let (cluster_bits, l2_bits) = if name.is_empty() { (12, 9) } else { (9, 12) };
        let l1_offset = (HEADER + name.len() as u64).next_multiple_of(8);
        let mut header = Header::new(options.size, cluster_bits, l2_bits, l1_offset);
        if !name.is_empty() {
            header.backing_offset = U64::new(HEADER);
            header.backing_len = U32::new(name.len() as u32);
        }
        let end = l1_offset + header.l1_entries() * 8;
        header.check(end)?;
        storage.set_size(0).map_err(ImageError::io("empty the file"))?;
        storage.set_size(end).map_err(ImageError::io("extend the file"))?;
        let what = "write the header";
        storage.write_at(0, header.as_bytes()).map_err(ImageError::io(what))?;
        storage.write_at(HEADER, name.as_bytes()).map_err(ImageError::io(what))?;
        let l1 = vec![U64::new(0); header.l1_entries() as usize];
        Ok(QcowWriter { storage, header, l1, l2: None, end })
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        self.header.cluster()
    }

    /// Writes the cluster of this number, which was not written before; the last one of the disk
    /// may be short. Clusters in ascending order are written fastest.
    pub fn write(&mut self, cluster: u64, data: &[u8], packing: Packing) -> Result<(), ImageError> {
        let size = self.cluster() as usize;
        let inside = cluster < self.header.size.get().div_ceil(self.cluster());
        if data.is_empty() || data.len() > size || !inside {
            let what = format!("{} bytes as cluster {cluster}", data.len());
            return Err(ImageError::Invalid(what));
        }
        self.turn_to((cluster >> self.header.l2_bits) as usize)?;
        let mut whole = data.to_vec();
        whole.resize(size, 0);
        let packed = match packing {
            Packing::Compressed => compress(&whole),
            Packing::Plain => None,
        };
        let entry = match &packed {
            Some(packed) => {
                let len = (packed.len() as u64) << (63 - self.header.cluster_bits);
                COMPRESSED | len | self.append(packed, 1)?
            }
            None => self.append(&whole, self.cluster())?,
        };
        let slot = cluster as usize & ((1 << self.header.l2_bits) - 1);
        match self.l2.as_mut().map(|(_, table)| &mut table[slot]) {
            Some(slot) if slot.get() == 0 => slot.set(entry),
            _ => return Err(ImageError::Invalid(format!("cluster {cluster} a second time"))),
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8], unit: u64) -> Result<u64, ImageError> {
        let at = self.end.next_multiple_of(unit);
        self.storage.write_at(at, bytes).map_err(ImageError::io("write a cluster"))?;
        self.end = at + bytes.len() as u64;
        Ok(at)
    }

    /// Makes `number` the L2 table that is being filled.
    fn turn_to(&mut self, number: usize) -> Result<(), ImageError> {
        if self.l2.as_ref().is_some_and(|(n, _)| *n == number) {
            return Ok(());
        }
        self.write_l2()?;
        let mut table = vec![U64::new(0); 1 << self.header.l2_bits];
        match self.l1[number].get() {
            0 => {
                let at = self.append(table.as_bytes(), self.cluster())?;
                self.l1[number].set(at);
            }
            at => {
                let what = "read an L2 table";
                self.storage.read_at(at, table.as_mut_bytes()).map_err(ImageError::io(what))?;
            }
        }
        self.l2 = Some((number, table));
        Ok(())
    }

    fn write_l2(&self) -> Result<(), ImageError> {
        let Some((number, table)) = &self.l2 else { return Ok(()) };
        let at = self.l1[*number].get();
        self.storage.write_at(at, table.as_bytes()).map_err(ImageError::io("write an L2 table"))
    }

    /// Writes what is still to be written and makes the image durable.
    pub fn finish(self) -> Result<(), ImageError> {
        self.write_l2()?;
        let at = self.header.l1_offset.get();
        let what = "write the L1 table";
        self.storage.write_at(at, self.l1.as_bytes()).map_err(ImageError::io(what))?;
        // Whole sectors, for those who read no others.
        let end = self.end.next_multiple_of(512);
        self.storage.set_size(end).map_err(ImageError::io("extend the file"))?;
        self.storage.sync().map_err(ImageError::io("flush the file"))
    }
}

/// A cluster as deflate's raw stream, if that is smaller. Clusters have at most 4096 bytes, so
/// the stream needs no more than the window of 4096 bytes that QEMU reads it with.
fn compress(cluster: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; cluster.len() - 1];
    let mut deflate = Compress::new(Compression::default(), false);
    match deflate.compress(cluster, &mut out, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => {
            out.truncate(deflate.total_out() as usize);
            Some(out)
        }
        _ => None,
    }
}
