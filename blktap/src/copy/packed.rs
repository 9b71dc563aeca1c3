//! Copying into compressed clusters: packing costs more than reading, so it is done on several
//! threads.
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::pipe::{self, Ends, Next};
use super::reader::{Mode, Reader};
use super::runs::{Examine, is_zero};
use super::{Before, Copied, CopyError, CopyOptions, Part, Piece, Plan, Tick, What};
use crate::disk::Disk;
use crate::formats::ImageError;

/// How long to sleep before the caller is asked whether to go on.
const TICK: Duration = Duration::from_millis(100);

/// Who packs a cluster and writes it: (guest offset, its bytes, which end early only where the
/// disk does). Called on several threads.
pub type Pack<'a> = &'a (dyn Fn(u64, &[u8]) -> Result<(), ImageError> + Sync);

/// What the threads share.
struct Shared {
    before: Before,
    written: AtomicU64,
    sparse: AtomicU64,
    done: AtomicU64,
    stopped: AtomicBool,
    failed: Mutex<Option<CopyError>>,
}

impl Shared {
    fn fail(&self, error: CopyError) {
        self.failed.lock().get_or_insert(error);
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// Copies `source` as `plan` says into a new target, in clusters of [`CopyOptions::piece`] bytes
/// which `pack` writes. What is skipped, and zeroes where the target [reads as
/// zeroes](Before::Zeroes), are left out. The target is not flushed.
pub fn copy_packed(
    source: &dyn Disk,
    pack: Pack<'_>,
    options: &CopyOptions,
    plan: Plan<'_>,
    tick: Tick<'_>,
) -> Result<Copied, CopyError> {
    let cluster = options.piece as u64;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(16);
    let (theirs, ours) = pipe::ends(2 * threads as u32 + options.depth.min(64), options.piece)
        .map_err(CopyError::other("make an eventfd"))?;
    let mut whole = whole_clusters(plan, cluster, options);
    let reader =
        Reader::new(source, options.len, options.piece, &mut whole, Mode::new(Examine::Nothing))?;
    let shared = Shared {
        before: options.before,
        written: AtomicU64::new(0),
        sparse: AtomicU64::new(0),
        done: AtomicU64::new(0),
        stopped: AtomicBool::new(false),
        failed: Mutex::new(None),
    };
    std::thread::scope(|scope| {
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let ours = Arc::new(ours);
        let mut running = Vec::new();
        for _ in 0..threads {
            let (ours, shared) = (Arc::clone(&ours), &shared);
            let started = thread("pack").spawn_scoped(scope, move || work(&ours, pack, shared));
            running.push(started.map_err(CopyError::other("start a thread"))?);
        }
        drop(ours);
        thread("copy")
            .spawn_scoped(scope, move || reader.run(theirs))
            .map_err(CopyError::other("start a thread"))?;
        while running.iter().any(|r| !r.is_finished()) {
            std::thread::park_timeout(TICK / 10);
            if tick(shared.done.load(Ordering::Relaxed)) == ControlFlow::Break(()) {
                shared.fail(CopyError::Stopped);
            }
        }
        Ok::<(), CopyError>(())
    })?;
    match shared.failed.into_inner() {
        Some(error) => Err(error),
        None => {
            Ok(Copied { written: shared.written.into_inner(), sparse: shared.sparse.into_inner() })
        }
    }
}

/// Packs what is read until there is no more.
fn work(ends: &Ends, pack: Pack<'_>, shared: &Shared) {
    while !shared.stopped.load(Ordering::Relaxed) {
        let piece = match ends.read.wait(TICK) {
            Next::Item(Ok(piece)) => piece,
            Next::Item(Err(e)) => return shared.fail(e),
            Next::Nothing => continue,
            Next::End => return,
        };
        if let Err(e) = write(&piece, pack, shared) {
            return shared.fail(e);
        }
        shared.done.fetch_add(piece.len, Ordering::Relaxed);
        ends.free.send(piece.buffer);
    }
}

fn write(piece: &Piece, pack: Pack<'_>, shared: &Shared) -> Result<(), CopyError> {
    let has_data = piece.runs.iter().any(|r| r.what == What::Data);
    let bytes = if has_data { &piece.buffer.bytes()[..piece.len as usize] } else { &[] };
    if !has_data || (shared.before == Before::Zeroes && is_zero(bytes)) {
        shared.sparse.fetch_add(piece.len, Ordering::Relaxed);
        return Ok(());
    }
    shared.written.fetch_add(piece.len, Ordering::Relaxed);
    let (offset, len) = (piece.offset, piece.len);
    pack(offset, bytes).map_err(|e| {
        let source = match e {
            ImageError::Io { source, .. } => source,
            e => std::io::Error::other(e.to_string()),
        };
        CopyError::Write { offset, len, source }
    })
}

/// A plan whose parts begin and end at clusters: a cluster with any data is data.
fn whole_clusters<'a>(
    plan: Plan<'a>,
    cluster: u64,
    options: &CopyOptions,
) -> impl FnMut(std::ops::Range<u64>, &mut Vec<Part>) -> std::io::Result<()> + Send + use<'a> {
    let (end, before) = (options.len, options.before);
    move |range, out| {
        let mut parts = Vec::new();
        plan(range.clone(), &mut parts)?;
        let Some(first) = parts.first().copied() else { return Ok(()) };
        // All of this begins at a cluster: `range` does, and so does what was answered before.
        let whole = first.len - first.len % cluster;
        let to_end = range.start + first.len >= end;
        match first.what {
            // Zeroes that must be written are data.
            what if what == What::Data || (what == What::Zero && before == Before::Unknown) => {
                let len = first.len.next_multiple_of(cluster).min(end - range.start);
                out.push(Part { len, what: What::Data });
            }
            _ if to_end => out.push(first),
            _ if whole > 0 => out.push(Part { len: whole, ..first }),
            // It ends inside its first cluster.
            _ => {
                let len = cluster.min(end - range.start);
                out.push(Part { len, what: What::Data });
            }
        }
        Ok(())
    }
}
