//! Compressed clusters.
use crate::formats::ImageError;

use super::Qcow2;

impl Qcow2 {
    pub(super) fn unpack(&self, cluster: u64, out: &mut Vec<u8>) -> Result<(), ImageError> {
        let range = self.layout.compressed(cluster);
        let mut packed = vec![0; (range.end - range.start) as usize];
        let read = self.file().read_at(range.start, &mut packed);
        read.map_err(ImageError::io("read a compressed cluster"))?;
        out.clear();
        out.resize(self.layout.cluster_size() as usize, 0);
        let whole = match self.compression {
            super::Compression::Zlib => inflate(&packed, out),
            super::Compression::Zstd => unzstd(&packed, out),
        };
        if whole {
            return Ok(());
        }
        let text = format!("compressed cluster at {:#x}", range.start);
        Err(ImageError::Corrupt(text))
    }
}

/// Raw deflate. Whether all of `out` was filled; what follows in `packed` is of no concern.
fn inflate(packed: &[u8], out: &mut [u8]) -> bool {
    let mut inflate = flate2::Decompress::new_with_window_bits(false, 12);
    let status = inflate.decompress(packed, out, flate2::FlushDecompress::Finish);
    status.is_ok() && inflate.total_out() == out.len() as u64
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
