//! Two disks beside each other.
use std::collections::BTreeMap;
use std::io;
use std::ops::{ControlFlow, Range};
use std::time::Duration;

use super::pipe::{self, Ends, Next};
use super::reader::{Mode, Reader};
use super::runs::{Examine, is_zero};
use super::{CopyError, Part, Piece, Plan, Tick, What, plan_of};
use crate::disk::Disk;

/// How long to sleep before the caller is asked whether to go on.
const TICK: Duration = Duration::from_millis(100);

/// What a comparison has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// The same bytes; beyond the end of the shorter disk the longer one has zeroes.
    Identical,
    /// The first byte that differs.
    Differ(u64),
}

/// One disk's bytes, in order.
struct Stream {
    ends: Ends,
    /// What came before its turn.
    early: BTreeMap<u64, Piece>,
    next: u64,
    piece: Option<Piece>,
}

/// What a stream holds at some offset: bytes, or so many zeroes.
enum Held<'a> {
    Bytes(&'a [u8]),
    Zeroes(u64),
}

impl Held<'_> {
    fn len(&self) -> u64 {
        match self {
            Held::Bytes(bytes) => bytes.len() as u64,
            Held::Zeroes(len) => *len,
        }
    }
}

impl Stream {
    /// Has the piece that holds the byte at `at`.
    fn advance(
        &mut self,
        at: u64,
        check: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<(), CopyError> {
        loop {
            match &self.piece {
                Some(piece) if at < piece.offset + piece.len => return Ok(()),
                _ => {}
            }
            if let Some(old) = self.piece.take() {
                self.ends.free.send(old.buffer);
            }
            if let Some(piece) = self.early.remove(&self.next) {
                self.next += 1;
                self.piece = Some(piece);
                continue;
            }
            match self.ends.read.wait(TICK) {
                Next::Item(piece) => {
                    let piece = piece?;
                    self.early.insert(piece.number, piece);
                }
                Next::Nothing => {
                    if check() == ControlFlow::Break(()) {
                        return Err(CopyError::Stopped);
                    }
                }
                Next::End => {
                    let source = io::Error::other("the reader has ended early");
                    return Err(CopyError::Other { what: "read", source });
                }
            }
        }
    }

    /// What it holds from `at` on.
    fn held(&self, at: u64) -> Held<'_> {
        let Some(piece) = &self.piece else { return Held::Zeroes(0) };
        let skip = at - piece.offset;
        if piece.runs.iter().all(|r| r.what == What::Zero) {
            return Held::Zeroes(piece.len - skip);
        }
        Held::Bytes(&piece.buffer.bytes()[skip as usize..piece.len as usize])
    }
}

/// The first byte in which the first `len` bytes of two stretches differ.
fn difference(a: &Held<'_>, b: &Held<'_>, len: usize) -> Option<usize> {
    match (a, b) {
        (Held::Zeroes(_), Held::Zeroes(_)) => None,
        (Held::Bytes(bytes), Held::Zeroes(_)) | (Held::Zeroes(_), Held::Bytes(bytes)) => {
            let bytes = &bytes[..len];
            if is_zero(bytes) { None } else { bytes.iter().position(|b| *b != 0) }
        }
        (Held::Bytes(a), Held::Bytes(b)) => {
            let (a, b) = (&a[..len], &b[..len]);
            if a == b { None } else { a.iter().zip(b).position(|(a, b)| a != b) }
        }
    }
}

/// Compares two disks; the shorter one goes on with zeroes. `tick` gets the bytes that were
/// compared.
pub fn compare(a: &dyn Disk, b: &dyn Disk, tick: Tick<'_>) -> Result<Compared, CopyError> {
    let long = a.geometry().size.max(b.geometry().size);
    let (mut plan_a, mut plan_b) = (plan_of(a), plan_of(b));
    let (mut only_a, mut only_b) = (longer(&mut plan_a, a), longer(&mut plan_b, b));
    let mut streams = Vec::new();
    let mut readers = Vec::new();
    let plans: [(&dyn Disk, Plan<'_>); 2] = [(a, &mut only_a), (b, &mut only_b)];
    for (disk, plan) in plans {
        let (theirs, ours) =
            pipe::ends(16, 1 << 20).map_err(CopyError::other("make an eventfd"))?;
        readers
            .push((Reader::new(disk, long, 1 << 20, plan, Mode::new(Examine::Nothing))?, theirs));
        let early = BTreeMap::new();
        streams.push(Stream { ends: ours, early, next: 0, piece: None });
    }
    std::thread::scope(|scope| {
        // Dropped at the end of this closure, which ends the readers.
        let mut streams = streams;
        for (reader, ends) in readers {
            let thread = std::thread::Builder::new().name("compare".into());
            let started = thread.spawn_scoped(scope, move || reader.run(ends));
            started.map_err(CopyError::other("start a thread"))?;
        }
        let [x, y] = &mut streams[..] else { return Ok(Compared::Identical) };
        run(x, y, long, tick)
    })
}

/// A disk's plan, and zeroes beyond its end.
fn longer<'a>(
    plan: Plan<'a>,
    disk: &dyn Disk,
) -> impl FnMut(Range<u64>, &mut Vec<Part>) -> io::Result<()> + Send + use<'a> {
    let size = disk.geometry().size;
    move |range, out| {
        if range.start >= size {
            out.push(Part { len: range.end - range.start, what: What::Zero });
            return Ok(());
        }
        plan(range.start..range.end.min(size), out)
    }
}

fn run(a: &mut Stream, b: &mut Stream, len: u64, tick: Tick<'_>) -> Result<Compared, CopyError> {
    let mut at = 0;
    while at < len {
        for stream in [&mut *a, &mut *b] {
            stream.advance(at, &mut || tick(at))?;
        }
        let (x, y) = (a.held(at), b.held(at));
        let n = x.len().min(y.len());
        if let Some(first) = difference(&x, &y, usize::try_from(n).unwrap_or(usize::MAX)) {
            return Ok(Compared::Differ(at + first as u64));
        }
        at += n;
        if tick(at) == ControlFlow::Break(()) {
            return Err(CopyError::Stopped);
        }
    }
    Ok(Compared::Identical)
}
