//! Compressed clusters: read for whoever comes across one, written for conversions.
use std::ops::Range;
use std::sync::Arc;

use crate::formats::ImageError;
use crate::storage::Access;

use super::entry::{COPIED, SubBits};
use super::publish::Action;
use super::space::{Space, Want};
use super::{Compression, Qcow2, Slice};

impl Qcow2 {
    /// Reads and unpacks the cluster with this descriptor.
    pub(super) fn unpack(&self, cluster: u64, out: &mut Vec<u8>) -> Result<(), ImageError> {
        let range = self.layout.compressed(cluster);
        let mut packed = vec![0; (range.end - range.start) as usize];
        let read = self.file().read_at(range.start, &mut packed);
        read.map_err(ImageError::io("read a compressed cluster"))?;
        out.clear();
        out.resize(self.layout.cluster_size() as usize, 0);
        if unpack(self.compression, &packed, out) {
            return Ok(());
        }
        Err(ImageError::Corrupt(format!("compressed cluster at {:#x}", range.start)))
    }

    /// Writes a whole cluster, compressed if that makes it smaller. `offset` is that of a
    /// cluster; bytes that are missing at its end are zeroes. For conversions: nothing else
    /// uses the image meanwhile but calls of this for other clusters, from any thread. Blocks.
    pub fn write_compressed(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        if self.access == Access::ReadOnly {
            return Err(ImageError::ReadOnly);
        }
        if self.layout.data_file {
            let text = "compressed clusters with an external data file";
            return Err(ImageError::Unsupported(text.into()));
        }
        let cluster = self.layout.cluster_size();
        let fits = offset.is_multiple_of(cluster) && offset < self.size;
        if !fits || bytes.len() as u64 > cluster {
            return Err(ImageError::Invalid(format!("no cluster at {offset:#x}")));
        }
        let mut whole = bytes.to_vec();
        whole.resize(cluster as usize, 0);
        let packed = match self.compression {
            Compression::Zlib => deflate(&whole),
            Compression::Zstd => to_zstd(&whole),
        };
        let slice = self.slice_to_write(offset)?;
        let placed = match packed {
            Some(packed) => self.place_packed(&packed)?,
            None => None,
        };
        let words = match placed {
            Some(word) => (word, 0),
            None => self.place_whole(&whole)?,
        };
        self.put(&slice, offset, words);
        Ok(())
    }

    fn slice_to_write(&self, offset: u64) -> Result<Arc<Slice>, ImageError> {
        loop {
            if let Some(table) = self.table_missing(offset) {
                self.judge(self.load_missing(table.into()))?;
                continue;
            }
            let number = self.slice_of(offset);
            match self.cache.get(number) {
                Some(slice) => return Ok(slice),
                None => self.judge(self.load_slice(number))?,
            }
        }
    }

    /// Writes packed bytes next to others; the L2 word. `None` if they cannot be named.
    fn place_packed(&self, packed: &[u8]) -> Result<Option<u64>, ImageError> {
        let at = self.judge(self.space.lock().take_packed(packed.len() as u64))?;
        let Some(word) = self.layout.compressed_word(at.clone()) else { return Ok(None) };
        let written = self.file().write_at(at.start, packed);
        written.map_err(ImageError::io("write a compressed cluster"))?;
        Ok(Some(word))
    }

    fn place_whole(&self, bytes: &[u8]) -> Result<(u64, u64), ImageError> {
        let run = self.judge(self.space.lock().reserve(Want::UpTo(1)))?;
        let host = run.clusters.start << self.layout.cluster_bits;
        self.file().write_at(host, bytes).map_err(ImageError::io("write a cluster"))?;
        let bits = SubBits::default().with_data(0..32).0;
        Ok((host | COPIED, if self.layout.extended { bits } else { 0 }))
    }

    /// Sets an entry, whose data are written.
    fn put(&self, slice: &Arc<Slice>, offset: u64, new: (u64, u64)) {
        let index = self.index_of(offset);
        let freed = {
            let changing = slice.change();
            let old = slice.entry(index);
            changing.set(index, new);
            if slice.soil() {
                self.pending.slice(slice);
            }
            let range = offset..offset + self.layout.cluster_size();
            self.dropped(old, new, &Action::Zero { range })
        };
        if let Some(freed) = freed {
            self.pending.free(freed);
        }
        self.pending.note();
    }
}

impl Space {
    /// Takes bytes for a packed cluster, behind those of the one before where that is possible.
    /// Each cluster that they touch counts them.
    pub(super) fn take_packed(&mut self, len: u64) -> Result<Range<u64>, ImageError> {
        let bits = self.layout.cluster_bits;
        let last = self.packed.end.saturating_sub(1) >> bits;
        let full = self.packed.is_empty()
            || self.refcounts.get(last)? >= self.layout.max_refcount().min(1 << 15);
        if full {
            self.packed = 0..0;
        }
        let rest = self.packed.clone();
        let joins = !rest.is_empty();
        if rest.end - rest.start < len {
            let run = self.reserve(Want::UpTo(1))?.clusters;
            let start = run.start << bits;
            let spans = joins && start == rest.end;
            self.packed = if spans { rest.start } else { start }..run.end << bits;
            if spans {
                self.refcounts.change(last, 1)?;
            }
        } else {
            self.refcounts.change(last, 1)?;
        }
        let at = self.packed.start..self.packed.start + len;
        self.packed.start = at.end;
        Ok(at)
    }
}

/// Fills `out`, a cluster, from what is packed. Says whether it did.
pub(super) fn unpack(compression: Compression, packed: &[u8], out: &mut [u8]) -> bool {
    match compression {
        Compression::Zlib => inflate(packed, out),
        Compression::Zstd => unzstd(packed, out),
    }
}

/// Raw deflate. Whether all of `out` was filled; what follows in `packed` is of no concern.
fn inflate(packed: &[u8], out: &mut [u8]) -> bool {
    let mut inflate = flate2::Decompress::new_with_window_bits(false, 12);
    let status = inflate.decompress(packed, out, flate2::FlushDecompress::Finish);
    status.is_ok() && inflate.total_out() == out.len() as u64
}

/// Raw deflate with a window of 4 KiB, if that is smaller.
fn deflate(bytes: &[u8]) -> Option<Vec<u8>> {
    let level = flate2::Compression::default();
    let mut deflate = flate2::Compress::new_with_window_bits(level, false, 12);
    let mut out = vec![0; bytes.len() - 1];
    let status = deflate.compress(bytes, &mut out, flate2::FlushCompress::Finish).ok()?;
    out.truncate(deflate.total_out() as usize);
    (status == flate2::Status::StreamEnd).then_some(out)
}

/// Zstandard, one frame or several.
fn unzstd(packed: &[u8], out: &mut [u8]) -> bool {
    let Some(mut context) = zstd::zstd_safe::DCtx::try_create() else { return false };
    let mut input = zstd::zstd_safe::InBuffer::around(packed);
    let len = out.len();
    let mut output = zstd::zstd_safe::OutBuffer::around(out);
    while output.pos() < len {
        let before = (input.pos(), output.pos());
        if context.decompress_stream(&mut output, &mut input).is_err()
            || (input.pos(), output.pos()) == before
        {
            return false;
        }
    }
    true
}

/// A Zstandard frame, if that is smaller.
fn to_zstd(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; bytes.len() - 1];
    let level = zstd::DEFAULT_COMPRESSION_LEVEL;
    let len = zstd::bulk::compress_to_buffer(bytes, &mut out, level).ok()?;
    out.truncate(len);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_is_unpacked_and_garbage_is_refused() {
        let bytes: Vec<u8> = (0..65536u32).map(|i| (i / 7 % 251) as u8).collect();
        for (pack, unpack) in [
            (deflate as fn(&[u8]) -> Option<Vec<u8>>, inflate as fn(&[u8], &mut [u8]) -> bool),
            (to_zstd, unzstd),
        ] {
            let mut packed = pack(&bytes).expect("it gets smaller");
            packed.resize(packed.len().next_multiple_of(512), 0xa5);
            let mut out = vec![0; bytes.len()];
            assert!(unpack(&packed, &mut out) && out == bytes);
            assert!(!unpack(&packed[..100], &mut out));
            assert!(!unpack(&[0x5a; 512], &mut out));
            let mut longer = vec![0; bytes.len() + 1];
            assert!(!unpack(&packed[..packed.len() - 512], &mut longer));
        }
    }
}
