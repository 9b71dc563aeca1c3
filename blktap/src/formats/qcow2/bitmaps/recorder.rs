//! Bitmaps of an image that is open.
use std::ops::Range;
use std::sync::Arc;

use crate::formats::qcow2::header::Header;
use crate::formats::qcow2::offline::Offline;
use crate::formats::{BitmapInfo, ImageError};
use crate::storage::{Access, Storage};

use super::bits::DirtyBits;
use super::directory::{AUTO, Entry, IN_USE};
use super::{edit, info, list, table};

/// Most bytes of bits that recording may take, of all bitmaps together.
const MAX_MEMORY: u64 = 512 << 20;

/// A bitmap, with its bits where it records.
struct Bitmap {
    entry: Entry,
    bits: Option<DirtyBits>,
}

/// The bitmaps of an open image. Recording takes no lock.
pub struct Recorder {
    storage: Arc<dyn Storage>,
    header: Header,
    bitmaps: Vec<Bitmap>,
}

impl Recorder {
    /// Of the image in `storage`, whose header is `header`. If it is open for writing, bitmaps
    /// that record are loaded and marked in use, durably.
    pub fn open(storage: &Arc<dyn Storage>, header: &Header) -> Result<Self, ImageError> {
        let entries = list(&**storage, header)?;
        let (cluster, disk) = (1 << header.cluster_bits, header.disk_size());
        let mut bitmaps = Vec::with_capacity(entries.len());
        let mut memory = 0;
        for entry in entries {
            let records = entry.flags & (AUTO | IN_USE) == AUTO;
            let load = records && storage.access() == Access::ReadWrite;
            if load {
                memory += u64::from(entry.table_size) * cluster;
                if memory > MAX_MEMORY {
                    let text = "the bitmaps that record need too much memory";
                    return Err(ImageError::NoSpace(text.to_owned()));
                }
            }
            let bits = load.then(|| table::load(&**storage, cluster, disk, &entry)).transpose()?;
            bitmaps.push(Bitmap { entry, bits });
        }
        let recorder = Recorder { storage: Arc::clone(storage), header: header.clone(), bitmaps };
        if storage.access() == Access::ReadWrite && recorder.has_marks() {
            recorder.mark_in_use()?;
        }
        Ok(recorder)
    }

    /// Whether there is a bitmap that is in use from now on, or that says so already: that mark
    /// is perhaps only in the page cache, left by one who ended before it was durable.
    fn has_marks(&self) -> bool {
        self.bitmaps.iter().any(|b| b.entry.flags & AUTO != 0)
    }

    fn mark_in_use(&self) -> Result<(), ImageError> {
        let flags = |b: &Bitmap| b.entry.flags | if b.bits.is_some() { IN_USE } else { 0 };
        let entries: Vec<Entry> =
            self.bitmaps.iter().map(|b| Entry { flags: flags(b), ..b.entry.clone() }).collect();
        edit::write_flags(&mut Offline::open(&*self.storage)?, &entries)
    }

    /// Records a change of bytes of the disk. Does not wait for anybody.
    pub fn record(&self, bytes: &Range<u64>) {
        for bits in self.bitmaps.iter().filter_map(|b| b.bits.as_ref()) {
            bits.mark(bytes.clone());
        }
    }

    /// What users are told.
    pub fn infos(&self) -> Vec<BitmapInfo> {
        self.bitmaps.iter().map(|b| info(&b.entry)).collect()
    }

    /// Appends `range` in stretches of (bytes, whether dirty).
    pub fn stretches(
        &self,
        name: &str,
        range: Range<u64>,
        out: &mut Vec<(u64, bool)>,
    ) -> Result<(), ImageError> {
        match self.bitmaps.iter().find(|b| b.entry.name == name) {
            Some(Bitmap { bits: Some(bits), .. }) => bits.stretches(range, out),
            // What does not record stays as it is in the file.
            _ => super::read(&*self.storage, &self.header, name)?.stretches(range, out),
        }
        Ok(())
    }

    /// Stores what was recorded; the bitmaps can be trusted then. Everything else of the image
    /// was written before, and nobody changes it meanwhile.
    pub fn close(&self) -> Result<(), ImageError> {
        let bits: Vec<_> = self
            .bitmaps
            .iter()
            .filter_map(|b| Some((b.entry.name.clone(), b.bits.as_ref()?)))
            .collect();
        if bits.is_empty() {
            return Ok(());
        }
        edit::store_all(&mut Offline::open(&*self.storage)?, &bits)
    }
}
