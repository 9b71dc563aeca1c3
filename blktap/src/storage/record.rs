//! Storages that remember each write, and what a power cut may leave of them: how a test proves
//! that an image format loses nothing.
//!
//! A [`Journal`] holds the files of one image. Its [`RecordingStorage`]s are used like any other;
//! afterwards [`Journal::recording`] gives what happened, and [`Recording::cuts`] goes through it:
//! after each entry, the states that [`Storage`]'s durability contract allows.
mod cut;
mod sparse;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

pub use cut::{Choice, Cuts, Effort};
pub use sparse::SparseBytes;

use super::{Access, Storage};

/// What is lost or kept as one.
pub const SECTOR: u64 = 512;

/// What was done to a file. Offsets and lengths are whole sectors; a write of parts of a sector
/// is recorded with the rest of it as it was.
#[derive(Clone, Debug)]
pub enum Action {
    /// Bytes were written.
    Write {
        /// First byte.
        offset: u64,
        /// Whole sectors.
        bytes: Arc<[u8]>,
        /// The file's size afterwards.
        size: u64,
    },
    /// Bytes became zeroes.
    Zero {
        /// Which.
        range: Range<u64>,
    },
    /// The file was cut or grown.
    Size {
        /// To so many bytes.
        size: u64,
    },
    /// All entries of the file before this one are durable.
    Sync,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Entry {
    /// To which file.
    pub file: usize,
    /// What.
    pub action: Action,
}

/// What happened to some files, in order.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The files' bytes at the beginning. They count as durable.
    pub initial: Vec<SparseBytes>,
    /// What happened then.
    pub entries: Vec<Entry>,
}

impl Recording {
    /// Goes through the points in time at which the power may be cut.
    pub fn cuts(&self) -> Cuts<'_> {
        Cuts::new(self)
    }
}

#[derive(Debug)]
struct Files {
    now: Vec<SparseBytes>,
    recording: Recording,
}

impl Files {
    fn record(&mut self, file: usize, action: Action) {
        self.recording.entries.push(Entry { file, action });
    }

    fn write(&mut self, file: usize, offset: u64, from: &[u8]) -> io::Result<()> {
        let now = &mut self.now[file];
        now.write(offset, from)?;
        let sectors = sectors_around(offset..offset + from.len() as u64);
        let mut bytes = vec![0; (sectors.end - sectors.start) as usize];
        now.read(sectors.start, &mut bytes);
        let size = now.len();
        let write = Action::Write { offset: sectors.start, bytes: bytes.into(), size };
        self.record(file, write);
        Ok(())
    }

    fn zero(&mut self, file: usize, range: Range<u64>) -> io::Result<()> {
        let range = range.start..range.end.min(self.now[file].len());
        let inner = range.start.next_multiple_of(SECTOR)..range.end - range.end % SECTOR;
        if inner.start >= inner.end {
            let zeroes = vec![0; range.end.saturating_sub(range.start) as usize];
            return if zeroes.is_empty() { Ok(()) } else { self.write(file, range.start, &zeroes) };
        }
        for edge in [range.start..inner.start, inner.end..range.end] {
            if !edge.is_empty() {
                self.write(file, edge.start, &vec![0; (edge.end - edge.start) as usize])?;
            }
        }
        self.now[file].zero(inner.start, inner.end - inner.start);
        self.record(file, Action::Zero { range: inner });
        Ok(())
    }

    fn set_size(&mut self, file: usize, size: u64) -> io::Result<()> {
        if size != self.now[file].len() {
            self.now[file].set_len(size)?;
            self.record(file, Action::Size { size });
        }
        Ok(())
    }
}

fn sectors_around(bytes: Range<u64>) -> Range<u64> {
    bytes.start - bytes.start % SECTOR..bytes.end.next_multiple_of(SECTOR)
}

/// Files in memory that remember what happens to them.
#[derive(Debug)]
pub struct Journal {
    files: Mutex<Files>,
}

impl Journal {
    /// Files with these bytes.
    pub fn new(initial: Vec<SparseBytes>) -> Arc<Self> {
        let recording = Recording { initial: initial.clone(), entries: Vec::new() };
        Arc::new(Journal { files: Mutex::new(Files { now: initial, recording }) })
    }
    /// The files, to be used.
    pub fn storages(self: &Arc<Self>) -> Vec<Arc<dyn Storage>> {
        let storage = |file| -> Arc<dyn Storage> {
            Arc::new(RecordingStorage { journal: Arc::clone(self), file })
        };
        (0..self.files.lock().now.len()).map(storage).collect()
    }
    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.files.lock().recording.entries.len()
    }
    /// Whether nothing happened yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// What happened so far.
    pub fn recording(&self) -> Recording {
        self.files.lock().recording.clone()
    }
    /// The files' bytes as they are now.
    pub fn now(&self) -> Vec<SparseBytes> {
        self.files.lock().now.clone()
    }
}

/// One file of a [`Journal`].
#[derive(Debug)]
pub struct RecordingStorage {
    journal: Arc<Journal>,
    file: usize,
}

impl Storage for RecordingStorage {
    fn size(&self) -> io::Result<u64> {
        Ok(self.journal.files.lock().now[self.file].len())
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.journal.files.lock().now[self.file].read(offset, into);
        Ok(())
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.journal.files.lock().write(self.file, offset, from)
    }
    fn sync(&self) -> io::Result<()> {
        self.journal.files.lock().record(self.file, Action::Sync);
        Ok(())
    }
    fn set_size(&self, size: u64) -> io::Result<()> {
        self.journal.files.lock().set_size(self.file, size)
    }
    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.journal.files.lock().zero(self.file, range)
    }
    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        let mut files = self.journal.files.lock();
        let size = files.now[self.file].len().max(range.end);
        files.set_size(self.file, size)
    }
    fn access(&self) -> Access {
        Access::ReadWrite
    }
    fn is_memory(&self) -> bool {
        true
    }
    fn name(&self) -> String {
        format!("recorded file {}", self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_whole_sectors() {
        let journal = Journal::new(vec![SparseBytes::of(&[9; 2000]), SparseBytes::default()]);
        let files = journal.storages();
        files[0].write_at(510, &[1; 4]).expect("write");
        files[1].write_at(0, &[2; 512]).expect("write");
        files[0].punch(500..1600).expect("punch");
        files[0].sync().expect("sync");
        files[0].set_size(2000).expect("no change");
        let recording = journal.recording();
        let texts: Vec<_> = recording.entries.iter().map(|e| (e.file, text(&e.action))).collect();
        let expected = [
            (0, "write 0..1024 of 0x09, to 2000"),
            (1, "write 0..512 of 0x02, to 512"),
            (0, "write 0..512 of 0x09, to 2000"),
            (0, "write 1536..2048 of 0x00, to 2000"),
            (0, "zero 512..1536"),
            (0, "sync"),
        ];
        assert_eq!(texts, expected.map(|(file, text)| (file, text.to_owned())));
        assert_eq!(journal.now()[0].to_vec()[500..1601], [&[0; 1100][..], &[9]].concat());
    }

    fn text(action: &Action) -> String {
        match action {
            Action::Write { offset, bytes, size } => {
                let end = offset + bytes.len() as u64;
                format!("write {offset}..{end} of {:#04x}, to {size}", bytes[0])
            }
            Action::Zero { range } => format!("zero {range:?}"),
            Action::Size { size } => format!("size {size}"),
            Action::Sync => "sync".to_owned(),
        }
    }
}
