//! The writer's side: the file is filled with zeroes, mapped, and only then given its name.
// Blocks are references into a mapping that this module keeps at a fixed address.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapRaw;

use super::layout::{self, ENTRY, HEADER, at, entry};
use super::{Device, process};
use crate::{Block, Handle};

/// How large a page will be. Room is fixed when the page is created.
#[derive(Clone, Debug)]
pub struct Builder {
    device: Device,
    blocks: u32,
    bytes: usize,
}

impl Builder {
    /// A page about `device` with room for 64 blocks and 256 KiB.
    pub fn new(device: Device) -> Self {
        Builder { device, blocks: 64, bytes: 256 << 10 }
    }
    /// Room for `blocks` blocks (1 to 4096).
    pub fn blocks(mut self, blocks: u32) -> Self {
        self.blocks = blocks.clamp(1, layout::MAX_BLOCKS);
        self
    }
    /// Room for `bytes` bytes of schemas and values (rounded up to 4096, at most 32 MiB). A
    /// schema is kept once per type, a histogram takes 528 bytes, a counter 8.
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes.min(32 << 20);
        self
    }
    /// Creates the file at `path` and the folders above it. Readers see a whole page or none: it
    /// is made under another name and renamed. A page that a predecessor left is replaced.
    pub fn create(self, path: impl AsRef<Path>) -> io::Result<StatsPage> {
        let path = path.as_ref().to_owned();
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(name);
        let made = self.create_at(&temporary).and_then(|(map, file)| {
            fs::rename(&temporary, &path)?;
            Ok((map, file))
        });
        let (map, identity) = made.inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })?;
        let start = HEADER + self.blocks as usize * ENTRY;
        let room = Mutex::new(Room { next: start, room: self.blocks, made: Vec::new() });
        Ok(StatsPage { map: Arc::new(map), path, identity, room })
    }

    fn create_at(&self, path: &Path) -> io::Result<(MmapRaw, (u64, u64))> {
        let _ = fs::remove_file(path);
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        let header = self.header()?;
        let length = (HEADER + self.blocks as usize * ENTRY + self.bytes).next_multiple_of(4096);
        // Written, not left sparse: a full file system is an error here, not a SIGBUS later.
        let mut contents = vec![0; length];
        contents[..HEADER].copy_from_slice(&header);
        contents[at::FILE_LEN..][..8].copy_from_slice(&(length as u64).to_le_bytes());
        file.write_all(&contents)?;
        let meta = file.metadata()?;
        Ok((map(&file)?, (meta.dev(), meta.ino())))
    }

    fn header(&self) -> io::Result<[u8; HEADER]> {
        let pid = std::process::id();
        let started = process::start_time(pid)
            .ok_or_else(|| io::Error::other("/proc/self/stat has no start time"))?;
        let mut h = [0; HEADER];
        let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
        put(at::MAGIC, &layout::MAGIC.to_le_bytes());
        put(at::VERSION, &layout::VERSION.to_le_bytes());
        put(at::HEADER_LEN, &(HEADER as u32).to_le_bytes());
        put(at::PID, &pid.to_le_bytes());
        put(at::DOMID, &u32::from(self.device.domid).to_le_bytes());
        put(at::DEVID, &self.device.devid.to_le_bytes());
        put(at::START_TIME, &started.to_le_bytes());
        put(at::ROOM, &self.blocks.to_le_bytes());
        put(at::KIND, layout::fit(&self.device.kind, layout::KIND_LEN).as_bytes());
        put(at::NAME, layout::fit(&self.device.name, layout::NAME_LEN).as_bytes());
        Ok(h)
    }
}

fn map(file: &File) -> io::Result<MmapRaw> {
    memmap2::MmapOptions::new().map_raw(file)
}

/// A device's stats page. The file is removed when this is dropped; handles stay valid.
#[derive(Debug)]
pub struct StatsPage {
    map: Arc<MmapRaw>,
    path: PathBuf,
    /// Device and inode of the file, so that a successor's page is not removed.
    identity: (u64, u64),
    room: Mutex<Room>,
}

#[derive(Debug)]
struct Room {
    next: usize,
    room: u32,
    made: Vec<Made>,
}

#[derive(Debug)]
struct Made {
    name: String,
    kind: &'static str,
    schema: (usize, usize),
    values: usize,
}

impl StatsPage {
    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The block of type `T` that is called `name` (at most 47 bytes are kept). Asked again, it
    /// is the same block, still counting: a queue that reconnects goes on where it was.
    ///
    /// Never fails: where the page has no room left, the block is on the heap, readers do not
    /// see it, and the page says how many such blocks there are.
    pub fn block<T: Block>(&self, name: &str) -> Handle<T> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let name = layout::fit(name, layout::BLOCK_NAME_LEN);
        let known = room.made.iter().find(|m| m.name == name && m.kind == T::NAME);
        match known.map(|m| m.values).or_else(|| self.make::<T>(&mut room, name)) {
            Some(values) => self.handle(values),
            None => {
                let unshown = self.word64(at::UNSHOWN);
                unshown.store(unshown.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                Handle::default()
            }
        }
    }

    fn make<T: Block>(&self, room: &mut Room, name: &str) -> Option<usize> {
        let count = room.made.len();
        let same_type = room.made.iter().find(|m| m.kind == T::NAME).map(|m| m.schema);
        let text = layout::schema_text(T::FIELDS);
        let schema = same_type.unwrap_or((room.next, text.len()));
        let after = if same_type.is_some() { room.next } else { room.next + text.len() };
        // A cache line of its own: blocks of two threads never share one.
        let values = after.next_multiple_of(64);
        let end = values.checked_add(size_of::<T>())?;
        if end > self.map.len() || count >= room.room as usize {
            return None;
        }
        if same_type.is_none() {
            self.write(schema.0, text.as_bytes());
        }
        self.write_entry::<T>(count, name, schema, values);
        room.next = end;
        room.made.push(Made { name: name.to_owned(), kind: T::NAME, schema, values });
        self.word32(at::BLOCKS).store(count as u32 + 1, Ordering::Release);
        Some(values)
    }

    fn write_entry<T: Block>(&self, i: usize, name: &str, schema: (usize, usize), values: usize) {
        let at = HEADER + i * ENTRY;
        self.write(at + entry::NAME, name.as_bytes());
        self.write(at + entry::TYPE, layout::fit(T::NAME, layout::TYPE_LEN).as_bytes());
        self.write(at + entry::SCHEMA, &(schema.0 as u64).to_le_bytes());
        self.write(at + entry::SCHEMA_LEN, &(schema.1 as u64).to_le_bytes());
        self.write(at + entry::VALUES, &(values as u64).to_le_bytes());
        self.write(at + entry::VALUES_LEN, &(size_of::<T>() as u64).to_le_bytes());
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.map.len());
        // SAFETY: within the mapping; no reference to these bytes exists, as they are in no
        // block, and the lock of `room` keeps other writers out.
        unsafe {
            let to = self.map.as_mut_ptr().add(at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    fn word64(&self, at: usize) -> &AtomicU64 {
        assert!(at + 8 <= HEADER && at.is_multiple_of(8));
        // SAFETY: aligned and within the mapping, and only ever used as an atomic.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }

    fn word32(&self, at: usize) -> &AtomicU32 {
        assert!(at + 4 <= HEADER && at.is_multiple_of(4));
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }

    fn handle<T: Block>(&self, values: usize) -> Handle<T> {
        assert!(values.is_multiple_of(64) && values + size_of::<T>() <= self.map.len());
        // SAFETY: aligned (a mapping is page-aligned) and within the mapping, which the handle
        // keeps alive; `make` gives each range to one (name, type) only, and T is all atomics.
        unsafe {
            let block = NonNull::new_unchecked(self.map.as_mut_ptr().add(values).cast::<T>());
            Handle::within(block, self.map.clone())
        }
    }
}

impl Drop for StatsPage {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}
