//! A log in use. Its thread makes claims durable; queues wait for these, and for nothing else.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::super::amount;
use super::super::bells::Bells;
use super::file::{self, Frozen, Header, Left, LogError, LogFile, PAGE};
use crate::formats::qcow2::bitmaps::bits::DirtyBits;
use crate::storage::{self, Access, Cache, OpenOptions, Storage};

/// A first write claims so many blocks, of which its own is one: so most first writes find their
/// block claimed. What was claimed and not written is given back when the log is closed.
const AHEAD: u64 = 16;

/// How to make a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// As what it is shown, and by which it is asked for.
    pub name: String,
    /// A bit stands for 2 to the power of this many bytes, 9 to 31; 16 is 64 KiB.
    pub granularity_bits: u8,
}

impl LogOptions {
    /// 64 KiB a block, with the name of the file, without its ending, as the name.
    pub fn of(path: &Path) -> LogOptions {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        LogOptions { name, granularity_bits: 16 }
    }

    /// With blocks of so many bytes: a power of two from 512 to 2 GiB, also with K, M or G.
    /// `None`: it is none of these.
    pub fn granularity(mut self, text: &str) -> Option<LogOptions> {
        let bytes = amount(text).filter(|b| b.is_power_of_two())?;
        self.granularity_bits = bytes.trailing_zeros() as u8;
        (9..=31).contains(&self.granularity_bits).then_some(self)
    }
}

#[derive(Default)]
struct Wanted {
    ranges: Vec<Range<u64>>,
    ended: bool,
}

/// What queues and the log's thread share.
struct Claims {
    file: LogFile,
    /// Blocks that were written.
    exact: DirtyBits,
    /// Blocks whose bits are durable.
    durable: DirtyBits,
    wanted: Mutex<Wanted>,
    work: Condvar,
    /// Counts what the thread did: who waits looks again when it has changed.
    rounds: AtomicU64,
    /// Why the last claims could not be made durable, as an errno, or 0.
    failed: AtomicI32,
    bells: Arc<Bells>,
}

/// See the module.
pub struct Log {
    header: Header,
    claims: Arc<Claims>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Log {
    /// Makes a log in the new file `path`, for a disk of `size` bytes.
    pub(super) fn create(
        path: &Path,
        options: &LogOptions,
        size: u64,
        bells: &Arc<Bells>,
    ) -> Result<Log, LogError> {
        file::create(path)?;
        let made = Self::open_file(path).and_then(|s| Self::format(s, options, size, bells));
        if made.is_err() {
            // It is this call's own, and nothing is in it.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// Makes a log in an empty storage.
    pub(super) fn format(
        storage: Arc<dyn Storage>,
        options: &LogOptions,
        size: u64,
        bells: &Arc<Bells>,
    ) -> Result<Log, LogError> {
        let LogOptions { name, granularity_bits } = options.clone();
        let header = Header { name, granularity_bits, disk_size: size, left: Left::Claims };
        let file = LogFile { storage };
        if !(9..=31).contains(&granularity_bits) {
            let (name, why) = (file.storage.name(), "a granularity of 512 bytes to 2 GiB".into());
            return Err(LogError::Invalid { name, why });
        }
        file.format(&header)?;
        let bits = || DirtyBits::new(size, granularity_bits);
        Self::start(file, header, bits(), bits(), bells)
    }

    /// Goes on with the log in `path`.
    pub(super) fn open(path: &Path, size: u64, bells: &Arc<Bells>) -> Result<Log, LogError> {
        Self::resume(Self::open_file(path)?, size, bells)
    }

    /// Goes on with a log.
    pub(super) fn resume(
        storage: Arc<dyn Storage>,
        size: u64,
        bells: &Arc<Bells>,
    ) -> Result<Log, LogError> {
        let file = LogFile { storage };
        let (mut header, bits) = file.read()?;
        if header.left == Left::Claims {
            tracing::warn!("{}: was not closed: it claims too much", file.storage.name());
        }
        if size < header.disk_size {
            let why = format!("is of a disk of {} bytes, and not of {size}", header.disk_size);
            return Err(LogError::Invalid { name: file.storage.name(), why });
        }
        let grown = header.disk_size..size;
        (header.left, header.disk_size) = (Left::Claims, size);
        let [exact, durable] = [(); 2].map(|()| DirtyBits::new(size, header.granularity_bits));
        exact.merge(&bits);
        durable.merge(&bits);
        if !grown.is_empty() {
            // What is new counts as changed.
            file.grow(&header)?;
            exact.mark(grown.clone());
            durable.mark(grown.clone());
            let per_page = (PAGE * 8) << header.granularity_bits;
            for page in grown.start / per_page..size.div_ceil(per_page) {
                file.write_page(page, &durable)?;
            }
            file.sync()?;
        }
        file.put(&header)?;
        Self::start(file, header, exact, durable, bells)
    }

    fn open_file(path: &Path) -> Result<Arc<dyn Storage>, LogError> {
        let options = OpenOptions::new(path).access(Access::ReadWrite).cache(Cache::Writeback);
        Ok(Arc::new(storage::open(&options)?))
    }

    fn start(
        file: LogFile,
        header: Header,
        exact: DirtyBits,
        durable: DirtyBits,
        bells: &Arc<Bells>,
    ) -> Result<Log, LogError> {
        let name = file.storage.name();
        let claims = Arc::new(Claims {
            file,
            exact,
            durable,
            wanted: Mutex::default(),
            work: Condvar::new(),
            rounds: AtomicU64::new(0),
            failed: AtomicI32::new(0),
            bells: Arc::clone(bells),
        });
        let shared = Arc::clone(&claims);
        let thread = std::thread::Builder::new().name("changed-blocks".into());
        let thread = thread.spawn(move || shared.serve());
        let thread =
            thread.map_err(|source| LogError::Io { name, what: "start a thread for", source })?;
        Ok(Log { header, claims, thread: Mutex::new(Some(thread)) })
    }

    /// What it says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What it is in.
    pub(super) fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.claims.file.storage)
    }

    /// Whether a write may go, and counts it as written if so.
    pub(super) fn admits(&self, bytes: &Range<u64>) -> bool {
        let bits = self.header.granularity_bits;
        let blocks = bytes.start >> bits..bytes.end.div_ceil(1 << bits);
        let durable = self.claims.durable.all_set(blocks);
        if durable {
            self.claims.exact.mark(bytes.clone());
        }
        durable
    }

    /// Asks for the claims that these writes need, with one sync for all.
    pub(super) fn want(&self, ranges: impl Iterator<Item = Range<u64>>) {
        let mut wanted = self.claims.wanted.lock();
        if wanted.ended {
            drop(wanted);
            return self.claims.tell(libc::EIO);
        }
        wanted.ranges.extend(ranges);
        self.claims.work.notify_one();
    }

    /// A number that changes when claims became durable, or could not.
    pub(super) fn rounds(&self) -> u64 {
        self.claims.rounds.load(Ordering::Acquire)
    }

    /// Why claims cannot be made durable, if that is so.
    pub(super) fn failed(&self) -> Option<i32> {
        Some(self.claims.failed.load(Ordering::Acquire)).filter(|errno| *errno != 0)
    }

    /// Appends `range` in stretches of (bytes, whether changed).
    pub fn stretches(&self, range: Range<u64>, out: &mut Vec<(u64, bool)>) {
        self.claims.exact.stretches(range, out);
    }

    /// Ends it: the file has exactly what was written, and no write comes any more.
    pub(super) fn close(&self) -> Result<Frozen, LogError> {
        let thread = self.thread.lock().take();
        let header = Header { left: Left::Exact, ..self.header.clone() };
        let bits = DirtyBits::new(header.disk_size, header.granularity_bits);
        bits.merge(&self.claims.exact);
        let Some(thread) = thread else { return Ok(Frozen::new(header, bits)) };
        self.claims.wanted.lock().ended = true;
        self.claims.work.notify_one();
        let file = &self.claims.file;
        if thread.join().is_err() || self.failed().is_some() {
            let why = "could not be written; it stays as one that was not closed".into();
            return Err(LogError::Invalid { name: file.storage.name(), why });
        }
        for page in 0..header.bytes_of_bits().div_ceil(PAGE) {
            file.write_page(page, &bits)?;
        }
        file.sync()?;
        file.put(&header)?;
        Ok(Frozen::new(header, bits))
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            tracing::error!("{e}");
        }
    }
}

impl Claims {
    /// The thread: all that was asked for meanwhile becomes durable by one sync.
    fn serve(&self) {
        let mut ranges = Vec::new();
        loop {
            ranges.clear();
            {
                let mut wanted = self.wanted.lock();
                while wanted.ranges.is_empty() && !wanted.ended {
                    self.work.wait(&mut wanted);
                }
                if wanted.ranges.is_empty() {
                    return;
                }
                std::mem::swap(&mut wanted.ranges, &mut ranges);
            }
            let errno = match self.claim(&ranges) {
                Ok(()) => 0,
                Err(e) => {
                    tracing::error!("{e}");
                    match e {
                        LogError::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
                        _ => libc::EIO,
                    }
                }
            };
            self.tell(errno);
        }
    }

    /// Has the queues look again.
    fn tell(&self, errno: i32) {
        self.failed.store(errno, Ordering::Release);
        self.rounds.fetch_add(1, Ordering::Release);
        self.bells.ring();
    }

    fn claim(&self, ranges: &[Range<u64>]) -> Result<(), LogError> {
        let bits = self.durable.granularity_bits();
        // Whole groups of blocks, each once.
        let group = AHEAD << bits;
        let mut groups: Vec<u64> =
            ranges.iter().flat_map(|r| r.start / group..r.end.div_ceil(group)).collect();
        groups.sort_unstable();
        groups.dedup();
        let fresh = |g: &u64| {
            let blocks = g * AHEAD..((g + 1) * AHEAD).min(self.durable.len());
            !self.durable.all_set(blocks)
        };
        groups.retain(fresh);
        // The file gets the bits first, and then those in memory that queues look at.
        let per_page = PAGE * 8 / AHEAD;
        for page in groups.chunk_by(|a, b| a / per_page == b / per_page) {
            let Some(first) = page.first() else { continue };
            self.write_claims(first / per_page, page)?;
        }
        if !groups.is_empty() {
            self.file.sync()?;
        }
        for g in &groups {
            self.durable.mark(g * group..(g + 1).saturating_mul(group));
        }
        Ok(())
    }

    /// Writes a page of bits with the claims of these groups, which lie in it.
    fn write_claims(&self, page: u64, groups: &[u64]) -> Result<(), LogError> {
        // Of the page alone, with room for as many bits as it has.
        let mut bytes = vec![0; PAGE as usize];
        self.durable.bytes(page * PAGE, &mut bytes);
        for g in groups {
            let end = ((g + 1) * AHEAD).min(self.durable.len());
            for block in g * AHEAD..end {
                let bit = block - page * PAGE * 8;
                bytes[(bit / 8) as usize] |= 1 << (bit % 8);
            }
        }
        self.file.write_bytes(page, &bytes)
    }
}

/// As [`io::Error`], for those who know no logs.
impl From<LogError> for io::Error {
    fn from(e: LogError) -> io::Error {
        io::Error::other(e.to_string())
    }
}
