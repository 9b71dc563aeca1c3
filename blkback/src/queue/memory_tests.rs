//! The pool of mapped pages, over grants that are plain memory.
// Mappings name memory by address.
#![allow(unsafe_code, clippy::unwrap_used)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use hypervisor::{GrantRef, Transfer};

use super::*;
use crate::proto::Segment;

/// Counts the pages that were unmapped.
#[derive(Default)]
struct Plain(Arc<AtomicUsize>);

impl Grants for Plain {
    fn map(&self, _: DomId, refs: &[GrantRef], access: Access) -> io::Result<Mapping> {
        let layout = Layout::from_size_align(refs.len() * PAGE_SIZE, PAGE_SIZE).unwrap();
        // SAFETY: not empty, for no request is without segments.
        let base = unsafe { alloc_zeroed(layout) };
        let (at, pages, unmapped) = (base as usize, refs.len(), self.0.clone());
        let unmap = move || {
            unmapped.fetch_add(pages, Relaxed);
            // SAFETY: allocated above with this layout, and freed once.
            unsafe { dealloc(at as *mut u8, layout) };
            Ok(())
        };
        // SAFETY: page-aligned memory of that many pages, which the closure frees.
        Ok(unsafe { Mapping::new(base, refs.len(), access, Box::new(unmap)) })
    }
    fn copy(&self, _: DomId, _: &Buffer, _: &mut [CopyOp]) -> io::Result<()> {
        Ok(())
    }
    fn transfer(&self, _: DomId, _: &Buffer, _: &mut [Transfer]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn buffer(&self, _: usize) -> io::Result<Buffer> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A guest goes round so many pages, 32 a request; the part that was mapped already, in the last
/// rounds.
fn hits(pages: u32, limit: u32) -> f64 {
    let config = Config { max_persistent_grants: limit, ..Config::default() };
    let counters = Handle::<PoolCounters>::default();
    let (mode, queue) = (GrantMode::Persistent, Handle::default());
    let mut memory =
        Memory::new(1, Box::new(Plain::default()), mode, &config, queue, counters.clone());
    let mut before = 0;
    for round in 0..20 {
        if round == 10 {
            before = counters.hits.get();
        }
        for first in (0..pages).step_by(32) {
            let piece = |gref| {
                let segment = Segment { gref, first_sect: 0, last_sect: 7 };
                Piece { segment, place: Place::Nowhere }
            };
            let mut pieces: Vec<Piece> = (first..(first + 32).min(pages)).map(piece).collect();
            assert!(memory.place(0, &mut pieces, Direction::ToGrant, false, 0).is_ok());
            assert!(memory.pool.len() <= limit as usize);
            memory.release(&mut pieces, 0);
        }
    }
    let hits = counters.hits.get() - before;
    memory.close();
    hits as f64 / (10.0 * f64::from(pages))
}

#[test]
fn pages_that_fit_are_mapped_once() {
    assert!(hits(1056, 1056) > 0.999);
    assert!(hits(1, 1) > 0.999);
}

#[test]
fn a_round_of_more_pages_than_the_pool_has_still_finds_most() {
    let found = hits(1500, 1056);
    assert!(found > 0.6, "{found}");
    let found = hits(4096, 1056);
    assert!(found > 0.2, "{found}");
}

#[test]
fn pages_that_are_not_used_any_more_give_way() {
    let config = Config { max_persistent_grants: 64, ..Config::default() };
    let counters = Handle::<PoolCounters>::default();
    let (mode, queue) = (GrantMode::Persistent, Handle::default());
    let mut memory =
        Memory::new(1, Box::new(Plain::default()), mode, &config, queue, counters.clone());
    let mut rounds_to_move = 0;
    for first in [0, 1000] {
        for round in 0..200 {
            let before = counters.hits.get();
            let piece = |gref| Piece {
                segment: Segment { gref, first_sect: 0, last_sect: 7 },
                place: Place::Nowhere,
            };
            let mut pieces: Vec<Piece> = (first..first + 64).map(piece).collect();
            assert!(memory.place(0, &mut pieces, Direction::ToGrant, false, round).is_ok());
            memory.release(&mut pieces, round);
            if counters.hits.get() - before == 64 {
                rounds_to_move = round;
                break;
            }
        }
    }
    assert!((1..=64).contains(&rounds_to_move), "{rounds_to_move}");
    memory.close();
}

#[test]
fn what_leaves_the_pool_is_unmapped_a_moment_later() {
    let config = Config { max_persistent_grants: 64, ..Config::default() };
    let unmapped = Arc::new(AtomicUsize::new(0));
    let (grants, mode) = (Box::new(Plain(unmapped.clone())), GrantMode::Persistent);
    let mut memory = Memory::new(1, grants, mode, &config, Handle::default(), Handle::default());
    let used = |memory: &mut Memory, first: u32, now| {
        let piece = |gref| Piece {
            segment: Segment { gref, first_sect: 0, last_sect: 7 },
            place: Place::Nowhere,
        };
        let mut pieces: Vec<Piece> = (first..first + 32).map(piece).collect();
        assert!(memory.place(0, &mut pieces, Direction::ToGrant, false, now).is_ok());
        memory.release(&mut pieces, now);
    };
    used(&mut memory, 0, 0);
    used(&mut memory, 32, 0);
    // The pool is full: of so many others some come into it.
    let (start, wait) = (7_000_000, LET_GO.as_nanos() as u64);
    for n in 0..ADMITTED as u32 / 32 {
        used(&mut memory, 100 + 32 * n, start);
    }
    assert_eq!((memory.leaving.len(), unmapped.load(Relaxed)), (CHUNK, 0));
    assert_eq!(memory.patience(), Some(LET_GO));
    memory.expire(start + wait - 1);
    assert_eq!(unmapped.load(Relaxed), 0);
    memory.expire(start + wait);
    assert_eq!((memory.leaving.len(), unmapped.load(Relaxed)), (0, CHUNK));
    assert_ne!(memory.patience(), Some(LET_GO));
    // A smaller limit, and a busy queue, which never sleeps.
    memory.set_limits(&Config { max_persistent_grants: 16, ..config });
    assert_eq!(unmapped.load(Relaxed), CHUNK);
    used(&mut memory, 5000, start + 3 * wait);
    assert!(unmapped.load(Relaxed) >= 64 - 16);
    memory.close();
    assert!(unmapped.load(Relaxed) > 64);
}
