//! Reading and writing an image through the resolve contract, one thing after the other.
use std::sync::Arc;

use blktap::formats::qcow2::{L2Cache, Qcow2, Qcow2Options};
use blktap::formats::{
    Change, Extent, Format, ImageError, Mailbox, Outcome, Place, Target, Waiter,
};
use blktap::storage::Storage;

use crate::bytes::Bytes;

/// An image in memory that is open for writing.
pub struct Disk {
    pub format: Qcow2,
    waiter: Waiter,
}

impl Disk {
    pub fn open(memory: &Arc<Bytes>) -> Result<Disk, ImageError> {
        let storage = Arc::clone(memory) as Arc<dyn Storage>;
        let options = Qcow2Options { l2_cache: L2Cache::Bytes(0), ..Default::default() };
        let format = Qcow2::open(storage, None, &options)?;
        let waiter = Waiter::new(Arc::new(Mailbox::new().expect("eventfd")), 0);
        Ok(Disk { format, waiter })
    }

    /// Reads `len` bytes.
    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, ImageError> {
        let (mut out, end) = (Vec::new(), offset + len);
        while offset + (out.len() as u64) < end {
            let at = offset + out.len() as u64;
            let mut extents = Vec::new();
            match self.format.resolve_read(at..end, &mut extents)? {
                Outcome::Ready(()) => {
                    assert!(!extents.is_empty(), "an answer of nothing");
                    for extent in extents {
                        self.fetch(&extent, &mut out)?;
                    }
                }
                Outcome::Miss(miss) => self.format.load(miss)?,
                Outcome::Busy => panic!("nobody else is here"),
            }
        }
        assert_eq!(out.len() as u64, len, "more than was asked for");
        Ok(out)
    }

    fn fetch(&self, extent: &Extent, out: &mut Vec<u8>) -> Result<(), ImageError> {
        let mut bytes = vec![0; extent.len as usize];
        match extent.place {
            Place::Zero | Place::Absent => {}
            Place::Data { file, offset } => {
                let file = &self.format.files()[usize::from(file)];
                file.read_at(offset, &mut bytes).map_err(ImageError::io("read data"))?;
            }
            Place::Compressed { cluster, skip } => {
                let mut whole = Vec::new();
                self.format.decompress(cluster, &mut whole)?;
                bytes.copy_from_slice(&whole[skip as usize..][..extent.len as usize]);
            }
        }
        out.extend(bytes);
        Ok(())
    }

    /// Writes `bytes`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let (mut at, end) = (offset, offset + bytes.len() as u64);
        while at < end {
            let mut pieces = Vec::new();
            let resolved =
                self.format.resolve_write(at..end, Change::Write, &self.waiter, &mut pieces)?;
            let guard = match resolved {
                Outcome::Ready(guard) => guard,
                Outcome::Miss(miss) => {
                    self.format.load(miss)?;
                    continue;
                }
                Outcome::Busy => panic!("nobody else is here"),
            };
            for piece in pieces {
                let data = &bytes[(at - offset) as usize..][..piece.len as usize];
                if let Err(e) = self.put(at, data, piece.target) {
                    guard.into_iter().for_each(|guard| self.format.abort(guard));
                    return Err(e);
                }
                at += piece.len;
            }
            guard.into_iter().for_each(|guard| self.format.commit(guard));
        }
        Ok(())
    }

    fn put(&self, at: u64, data: &[u8], target: Target) -> Result<(), ImageError> {
        let write = |file: u16, offset: u64, bytes: &[u8]| {
            let file = &self.format.files()[usize::from(file)];
            file.write_at(offset, bytes).map_err(ImageError::io("write data"))
        };
        match target {
            Target::Nothing => panic!("a write without data"),
            Target::InPlace { file, offset } => write(file, offset, data),
            Target::New { file, offset, head, tail, .. } => {
                let (head, tail) = (u64::from(head), u64::from(tail));
                let end = at + data.len() as u64;
                // What lies behind the disk's end reads as zeroes.
                let inside = tail.min(self.format.size().saturating_sub(end));
                let mut all = self.read(at - head, head)?;
                all.extend_from_slice(data);
                all.extend(self.read(end, inside)?);
                all.resize((head + tail) as usize + data.len(), 0);
                write(file, offset - head, &all)
            }
        }
    }
}
