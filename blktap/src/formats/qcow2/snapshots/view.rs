//! A snapshot as an image of its own, for reading.
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::{Snapshot, Which, list};
use crate::engine::EngineFile;
use crate::formats::ImageError;
use crate::formats::qcow2::header::Header;
use crate::storage::{Access, Storage};

/// The header's fields that say what the disk is: size, encryption, L1 entries, L1 offset.
const AT: u64 = 24;

/// The file of an image, with a header that names a snapshot's table as the disk's. Read-only.
pub struct SnapshotView {
    file: Arc<dyn Storage>,
    /// What the header has at [`AT`].
    fields: [u8; 24],
}

impl SnapshotView {
    /// Of the image in `file`, which nobody changes meanwhile.
    pub fn new(file: Arc<dyn Storage>, which: Which<'_>) -> Result<Self, ImageError> {
        let header = Header::read(&*file)?;
        if header.has_data_file() {
            let text = "snapshots of an image with an external data file";
            return Err(ImageError::Unsupported(text.into()));
        }
        let snapshot = find(&list(&*file)?, which)?;
        let mut fields = [0; 24];
        fields[..8].copy_from_slice(&snapshot.disk_size.to_be_bytes());
        // From 8 on no encryption.
        fields[12..16].copy_from_slice(&snapshot.l1_entries.to_be_bytes());
        fields[16..].copy_from_slice(&snapshot.l1_offset.to_be_bytes());
        Ok(SnapshotView { file, fields })
    }
}

fn find(all: &[Snapshot], which: Which<'_>) -> Result<Snapshot, ImageError> {
    let by_id = |id: &str| all.iter().find(|s| s.id == id);
    let by_name = |name: &str| all.iter().find(|s| s.name == name);
    let (found, what) = match which {
        Which::Id(id) => (by_id(id), id),
        Which::Name(name) => (by_name(name), name),
        Which::IdOrName(text) => (by_id(text).or_else(|| by_name(text)), text),
    };
    let found = found.cloned();
    found.ok_or_else(|| ImageError::Invalid(format!("there is no snapshot {what:?}")))
}

fn refused<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Storage for SnapshotView {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, into)?;
        let (start, end) = (offset, offset.saturating_add(into.len() as u64));
        for (at, byte) in (AT..).zip(self.fields) {
            if (start..end).contains(&at) {
                into[(at - start) as usize] = byte;
            }
        }
        Ok(())
    }
    fn write_at(&self, _offset: u64, _from: &[u8]) -> io::Result<()> {
        refused()
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_size(&self, _size: u64) -> io::Result<()> {
        refused()
    }
    fn punch(&self, _range: Range<u64>) -> io::Result<()> {
        refused()
    }
    fn allocate(&self, _range: Range<u64>) -> io::Result<()> {
        refused()
    }
    fn access(&self) -> Access {
        Access::ReadOnly
    }
    fn engine_file(&self) -> Option<EngineFile> {
        // No cluster of the disk lies in the header's.
        self.file.engine_file()
    }
    fn needs_sync(&self) -> bool {
        false
    }
    fn is_memory(&self) -> bool {
        self.file.is_memory()
    }
    fn name(&self) -> String {
        self.file.name()
    }
    fn map(&self, range: Range<u64>, out: &mut Vec<crate::Region>) -> io::Result<()> {
        self.file.map(range, out)
    }
}
