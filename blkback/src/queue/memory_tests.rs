//! The pool of mapped pages, over grants that are plain memory.
// Mappings name memory by address.
#![allow(unsafe_code, clippy::unwrap_used)]

use std::alloc::{Layout, alloc_zeroed, dealloc};

use hypervisor::{GrantRef, Transfer};

use super::*;
use crate::proto::Segment;

struct Plain;

impl Grants for Plain {
    fn map(&self, _: DomId, refs: &[GrantRef], access: Access) -> io::Result<Mapping> {
        let layout = Layout::from_size_align(refs.len() * PAGE_SIZE, PAGE_SIZE).unwrap();
        // SAFETY: not empty, for no request is without segments.
        let base = unsafe { alloc_zeroed(layout) };
        let at = base as usize;
        let unmap = move || {
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
    let mut memory = Memory::new(1, Box::new(Plain), mode, &config, queue, counters.clone());
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
    let mut memory = Memory::new(1, Box::new(Plain), mode, &config, queue, counters.clone());
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
