//! Batches of grant references to be mapped together.

use alloc::vec::Vec;

/// A grant reference (`grant_ref_t` in grant_table.h).
pub type GrantRef = u32;

/// What a mapping must allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Only reads; the only way to map a grant that is read-only.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// One reference of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The caller's number of the request that needs it.
    pub request: u32,
    /// The reference.
    pub gref: GrantRef,
    /// What the mapping must allow.
    pub access: Access,
}

/// No room for another reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchFull;

/// Collects references of several requests, so that they are mapped by as few calls as possible,
/// although a mapping call is all or nothing and one bad reference may fail one request only.
///
/// Its room is fixed; nothing is allocated after construction. The references of one request are
/// to be pushed one after the other.
#[derive(Debug)]
pub struct GrantBatch {
    /// One list an access, since one call maps for one.
    read_only: Vec<Wanted>,
    read_write: Vec<Wanted>,
    room: usize,
    refs: Vec<GrantRef>,
}

impl GrantBatch {
    /// A batch of up to `room` references.
    pub fn new(room: usize) -> Self {
        let [read_only, read_write] = [(); 2].map(|()| Vec::with_capacity(room));
        GrantBatch { read_only, read_write, room, refs: Vec::with_capacity(room) }
    }
    /// References in it.
    pub fn len(&self) -> usize {
        self.read_only.len() + self.read_write.len()
    }
    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Adds a reference.
    pub fn push(&mut self, wanted: Wanted) -> Result<(), BatchFull> {
        if self.len() == self.room {
            return Err(BatchFull);
        }
        match wanted.access {
            Access::ReadOnly => self.read_only.push(wanted),
            Access::ReadWrite => self.read_write.push(wanted),
        }
        Ok(())
    }

    /// Maps everything and empties the batch. `map` maps a run of references, all or nothing;
    /// `done` is told of each run what came of it, every reference exactly once.
    ///
    /// Tried first: all references of one access in one call; where that fails, those of one
    /// request; where that fails too, one at a time. So an error reaches `done` with the one
    /// reference that cannot be mapped.
    pub fn map<H, E>(
        &mut self,
        mut map: impl FnMut(&[GrantRef], Access) -> Result<H, E>,
        mut done: impl FnMut(&[Wanted], Result<H, E>),
    ) {
        let refs = &mut self.refs;
        let mut attempt = |run: &[Wanted]| {
            refs.clear();
            refs.extend(run.iter().map(|w| w.gref));
            match map(refs, run[0].access) {
                Err(_) if run.len() > 1 => Outcome::Split,
                settled => {
                    done(run, settled);
                    Outcome::Settled
                }
            }
        };
        for list in [&mut self.read_only, &mut self.read_write] {
            if !list.is_empty() && attempt(list) == Outcome::Split {
                for request in list.chunk_by(|a, b| a.request == b.request) {
                    let known_bad = request.len() == list.len();
                    if known_bad || attempt(request) == Outcome::Split {
                        request.chunks(1).for_each(|one| _ = attempt(one));
                    }
                }
            }
            list.clear();
        }
    }
}

/// What came of mapping a run.
#[derive(PartialEq, Eq)]
enum Outcome {
    Settled,
    Split,
}

#[cfg(test)]
#[path = "grants_tests.rs"]
mod tests;
