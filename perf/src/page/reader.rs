//! The reader's side. The file is read with `read_at` into private memory, never mapped, and
//! every offset and length in it is checked: a page that lies gives an error, not a fault.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::layout::{self, ENTRY, HEADER, at, entry};
use super::{Device, process};
use crate::snapshot::{BlockValues, Number, SCHEMA, Snapshot, Value};
use crate::{BUCKETS, HistogramSnapshot, Kind};

/// Most values of one page.
const MAX_VALUES: usize = 1 << 17;

/// Why a page cannot be read.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReadError {
    /// The file cannot be opened or read.
    Io(io::Error),
    /// It is not a stats page.
    NotStats,
    /// It is a stats page of a version that this reader does not know.
    Version(u32),
    /// It is shorter than it says, or what it says is impossible.
    Corrupt(&'static str),
}

impl std::fmt::Display for ReadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ReadError::Io(e) => e.fmt(f),
            ReadError::NotStats => f.write_str("not a stats page"),
            ReadError::Version(v) => write!(f, "stats page of unknown version {v}"),
            ReadError::Corrupt(what) => write!(f, "corrupt stats page: {what}"),
        }
    }
}

impl std::error::Error for ReadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ReadError::Io(e) => Some(e),
            _ => None,
        }
    }
}

impl From<io::Error> for ReadError {
    fn from(e: io::Error) -> Self {
        ReadError::Io(e)
    }
}

/// All stats pages below `run` (`$RINGBACK_RUN`), that is `run/DOMID/*.stats`, sorted. A folder
/// that is not there has none.
pub fn find(run: &Path) -> io::Result<Vec<PathBuf>> {
    let mut pages = Vec::new();
    for folder in entries(run)? {
        let domid = folder.file_name().and_then(|n| n.to_str()).map(str::parse::<u16>);
        if !matches!(domid, Some(Ok(_))) {
            continue;
        }
        pages.extend(
            entries(&folder)?.into_iter().filter(|p| p.extension() == Some("stats".as_ref())),
        );
    }
    pages.sort();
    Ok(pages)
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(all) => all.map(|e| Ok(e?.path())).collect(),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}

/// A page of another process.
#[derive(Debug)]
pub struct Reader {
    file: File,
    contents: Vec<u8>,
}

impl Reader {
    /// Opens the page at `path` and checks its header.
    pub fn open(path: impl AsRef<Path>) -> Result<Reader, ReadError> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(ReadError::NotStats);
        }
        let mut reader = Reader { file, contents: Vec::new() };
        reader.snapshot()?;
        Ok(reader)
    }

    /// Reads all values. Each value is one word and whole; two values may be some requests
    /// apart, since the writer does not stop.
    pub fn snapshot(&mut self) -> Result<Snapshot, ReadError> {
        self.load()?;
        let at = Instant::now();
        let page = &self.contents[..];
        let pid = field(layout::u32_at(page, at::PID))?;
        let started = field(layout::u64_at(page, at::START_TIME))?;
        let device = Device {
            kind: field(layout::text_at(page, at::KIND, layout::KIND_LEN))?,
            name: field(layout::text_at(page, at::NAME, layout::NAME_LEN))?,
            domid: u16::try_from(field(layout::u32_at(page, at::DOMID))?)
                .map_err(|_| ReadError::Corrupt("domid"))?,
            devid: field(layout::u64_at(page, at::DEVID))?,
        };
        let writer = process::state(pid, started);
        let unshown = field(layout::u64_at(page, at::UNSHOWN))?;
        Ok(Snapshot { schema: SCHEMA, device, pid, writer, unshown, blocks: blocks(page)?, at })
    }

    fn load(&mut self) -> Result<(), ReadError> {
        let mut header = [0; HEADER];
        self.file.read_exact_at(&mut header, 0).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => ReadError::NotStats,
            _ => ReadError::Io(e),
        })?;
        if layout::u64_at(&header, at::MAGIC) != Some(layout::MAGIC) {
            return Err(ReadError::NotStats);
        }
        match layout::u32_at(&header, at::VERSION) {
            Some(layout::VERSION) => {}
            other => return Err(ReadError::Version(other.unwrap_or(0))),
        }
        if layout::u32_at(&header, at::HEADER_LEN) != Some(HEADER as u32) {
            return Err(ReadError::Corrupt("header length"));
        }
        let length = field(layout::u64_at(&header, at::FILE_LEN))?;
        if length < HEADER as u64
            || length > layout::MAX_FILE
            || length > self.file.metadata()?.len()
        {
            return Err(ReadError::Corrupt("file length"));
        }
        self.contents.resize(length as usize, 0);
        self.file.read_exact_at(&mut self.contents, 0).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => ReadError::Corrupt("file length"),
            _ => ReadError::Io(e),
        })
    }
}

fn field<T>(found: Option<T>) -> Result<T, ReadError> {
    found.ok_or(ReadError::Corrupt("header"))
}

fn blocks(page: &[u8]) -> Result<Vec<BlockValues>, ReadError> {
    let count = field(layout::u32_at(page, at::BLOCKS))?;
    let room = field(layout::u32_at(page, at::ROOM))?;
    if count > room || room > layout::MAX_BLOCKS {
        return Err(ReadError::Corrupt("block count"));
    }
    let directory = layout::bytes(page, HEADER as u64, u64::from(count) * ENTRY as u64)
        .ok_or(ReadError::Corrupt("directory"))?;
    let mut left = MAX_VALUES;
    directory.chunks_exact(ENTRY).map(|e| block(page, e, &mut left)).collect()
}

fn block(page: &[u8], e: &[u8], left: &mut usize) -> Result<BlockValues, ReadError> {
    const BAD: ReadError = ReadError::Corrupt("directory entry");
    let range = |offset, len| {
        let (offset, len) = (layout::u64_at(e, offset)?, layout::u64_at(e, len)?);
        layout::bytes(page, offset, len)
    };
    let schema = range(entry::SCHEMA, entry::SCHEMA_LEN).ok_or(BAD)?;
    let values = range(entry::VALUES, entry::VALUES_LEN).ok_or(BAD)?;
    let schema = std::str::from_utf8(schema).map_err(|_| ReadError::Corrupt("schema"))?;
    // Blocks may share a schema, so a small file could otherwise ask for a lot of memory.
    *left =
        left.checked_sub(schema.lines().count()).ok_or(ReadError::Corrupt("too many values"))?;
    Ok(BlockValues {
        name: layout::text_at(e, entry::NAME, layout::BLOCK_NAME_LEN).ok_or(BAD)?,
        kind: layout::text_at(e, entry::TYPE, layout::TYPE_LEN).ok_or(BAD)?,
        values: schema
            .lines()
            .map(|line| value(line, values).ok_or(ReadError::Corrupt("schema")))
            .collect::<Result<_, _>>()?,
    })
}

fn value(line: &str, values: &[u8]) -> Option<Value> {
    let mut parts = line.splitn(5, '\t');
    let name = layout::printable(parts.next()?);
    let kind = Kind::by_name(parts.next()?)?;
    let unit = layout::printable(parts.next()?);
    let offset: u64 = parts.next()?.parse().ok()?;
    let help = layout::printable(parts.next()?);
    let bytes = layout::bytes(values, offset, kind.size() as u64)?;
    let number = match kind {
        Kind::Counter | Kind::Gauge => Number::Value { value: layout::u64_at(bytes, 0)? },
        Kind::Histogram => Number::Distribution(Box::new(histogram(bytes)?.into())),
    };
    Some(Value { name, kind, unit, help, number })
}

fn histogram(bytes: &[u8]) -> Option<HistogramSnapshot> {
    let mut buckets = [0; BUCKETS];
    for (k, bucket) in buckets.iter_mut().enumerate() {
        *bucket = layout::u64_at(bytes, 16 + 8 * k)?;
    }
    Some(HistogramSnapshot {
        count: layout::u64_at(bytes, 0)?,
        sum: layout::u64_at(bytes, 8)?,
        buckets,
    })
}
