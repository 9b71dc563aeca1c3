//! Pages that a guest has its vif keep mapped (netif.h, "Static Grants"): bytes of slots in them go by
//! a copy in this process, those of others by grant copy. The list of such pages is a hint: a page that
//! is not in it, or no longer, costs a grant copy and nothing else.
//!
//! The thread of the control ring alone changes a table; a queue's thread has its lock while it copies
//! a batch, so that what was taken from a table is in nobody's hands any more.

mod copy;
pub(crate) mod noted;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hypervisor::{Access, GrantRef};
use parking_lot::Mutex;

pub(crate) use copy::{Copied, Memory, Split};

/// Pages that were mapped together; `M` is their memory, unmapped when it is dropped.
pub struct Run<M> {
    refs: Box<[GrantRef]>,
    access: Access,
    memory: M,
}

impl<M> Run<M> {
    /// `memory` has a page for each of `refs`, in their order.
    pub fn new(refs: Vec<GrantRef>, access: Access, memory: M) -> Run<M> {
        Run { refs: refs.into(), access, memory }
    }
    /// Which pages.
    pub fn refs(&self) -> &[GrantRef] {
        &self.refs
    }
    /// What they may be used for.
    pub fn access(&self) -> Access {
        self.access
    }
}

/// Where a page is.
struct Place<M> {
    run: Arc<Run<M>>,
    page: usize,
}

/// By grant reference. Keyed anew in each process: the guest chooses the references.
type Places<M> = HashMap<GrantRef, Place<M>>;

/// The table of one queue.
pub struct Staging<M> {
    limit: u32,
    /// Pages in the table, for who need not look further where there are none.
    pages: AtomicUsize,
    places: Mutex<Places<M>>,
}

impl<M> Staging<M> {
    /// An empty table for at most `limit` pages.
    pub fn new(limit: u32) -> Staging<M> {
        Staging { limit, pages: AtomicUsize::new(0), places: Mutex::default() }
    }
    /// Most pages.
    pub fn limit(&self) -> u32 {
        self.limit
    }
    /// Whether no page is in it.
    pub fn is_empty(&self) -> bool {
        self.pages.load(Ordering::Relaxed) == 0
    }
    /// Whether these pages can be added: each is named once and is not in it, and there is room.
    pub fn takes(&self, refs: &[GrantRef]) -> bool {
        let places = self.places.lock();
        let mut seen = HashSet::with_capacity(refs.len());
        let room = (self.limit as usize).saturating_sub(places.len());
        refs.len() <= room && refs.iter().all(|r| seen.insert(*r) && !places.contains_key(r))
    }
    /// Adds pages that it takes.
    pub fn add(&self, runs: Vec<Run<M>>) {
        let mut places = self.places.lock();
        runs.into_iter().for_each(|run| put(&mut places, run));
        self.pages.store(places.len(), Ordering::Relaxed);
    }
    /// Of each page whether it is in it and was not named before.
    pub fn known(&self, refs: impl Iterator<Item = GrantRef>) -> Vec<bool> {
        let places = self.places.lock();
        let mut seen = HashSet::new();
        refs.map(|gref| places.contains_key(&gref) && seen.insert(gref)).collect()
    }
    /// All runs, in no order.
    pub fn runs(&self) -> Vec<Arc<Run<M>>> {
        let places = self.places.lock();
        // Each has a first page.
        let first = places.values().filter(|place| place.page == 0);
        first.map(|place| place.run.clone()).collect()
    }
    /// Takes out these pages of it. The other pages of their runs, which end with them, are mapped
    /// once more by `map` before; where that cannot be they are taken out as well. On return none
    /// of the old runs is mapped.
    pub fn remove(
        &self,
        going: &HashSet<GrantRef>,
        mut map: impl FnMut(&[GrantRef], Access) -> Option<M>,
    ) {
        let stays = |gref: &GrantRef| !going.contains(gref);
        let mut broken = self.runs();
        broken.retain(|run| !run.refs.iter().all(stays));
        let anew = broken.iter().filter_map(|run| {
            let rest: Vec<_> = run.refs.iter().copied().filter(stays).collect();
            let memory = if rest.is_empty() { None } else { map(&rest, run.access) };
            memory.map(|memory| Run::new(rest, run.access, memory))
        });
        let anew: Vec<_> = anew.collect();
        let mut places = self.places.lock();
        for gref in broken.iter().flat_map(|run| &run.refs) {
            places.remove(gref);
        }
        anew.into_iter().for_each(|run| put(&mut places, run));
        self.pages.store(places.len(), Ordering::Relaxed);
        // No queue waits for what follows: the last of `broken` goes.
        drop(places);
    }
}

fn put<M>(places: &mut Places<M>, run: Run<M>) {
    let run = Arc::new(run);
    for (page, gref) in run.refs.iter().enumerate() {
        places.insert(*gref, Place { run: run.clone(), page });
    }
}

#[cfg(test)]
#[path = "staging_tests.rs"]
pub(crate) mod tests;
