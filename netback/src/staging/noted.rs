//! Which pages a queue keeps mapped, for a successor of this process: the guest does not ask again.
//!
//! It is a hint as the table itself is: what is not noted is copied by the hypervisor, and what is
//! noted wrongly is a page that this guest has granted, or none.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use hypervisor::xenbus::inflight::TableMemory;
use hypervisor::{Access, GrantRef};
use rings::PAGE_SIZE;
use rings::mem::SharedMem;
use zerocopy::IntoBytes;

use super::{Run, Staging};
use crate::config::MAX_STAGING_GRANTS;
use crate::ctrl::lists::MAX_LIST;
use crate::proto::{GREF_READONLY, GrefEntry};

const MOST: usize = MAX_STAGING_GRANTS as usize;
/// How many there are, alone in its word; then they.
const COUNT: usize = 0;
const FIRST: usize = size_of::<GrefEntry>();
/// Bytes of the memory.
pub(crate) const BYTES: usize = (FIRST + MOST * size_of::<GrefEntry>()).next_multiple_of(PAGE_SIZE);

/// See the module.
pub(crate) struct Noted(TableMemory);

impl Noted {
    pub(crate) fn new(memory: TableMemory) -> Noted {
        Noted(memory)
    }

    /// Writes down the pages of these runs but those of `going`. A process that is killed meanwhile
    /// has noted none.
    pub(crate) fn save<M>(&self, runs: &[Arc<Run<M>>], going: &HashSet<GrantRef>) {
        let all = runs.iter().flat_map(|run| {
            let flags = match run.access() {
                Access::ReadOnly => GREF_READONLY,
                Access::ReadWrite => 0,
            };
            let stays = run.refs().iter().filter(|gref| !going.contains(gref));
            stays.map(move |gref| GrefEntry { gref: *gref, flags, status: 0 })
        });
        let entries: Vec<_> = all.take(MOST).collect();
        let count = self.0.word(COUNT);
        count.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        self.0.write(FIRST, entries.as_bytes());
        count.store(entries.len() as u32, Ordering::Release);
    }

    /// Puts into the table what a predecessor has noted, as far as it takes them and `map` can.
    pub(crate) fn restore<M>(
        &self,
        table: &Staging<M>,
        mut map: impl FnMut(&[GrantRef], Access) -> Option<M>,
    ) {
        let count = self.0.word(COUNT).load(Ordering::Acquire) as usize;
        let most = MOST.min(table.limit() as usize);
        let mut entries = vec![GrefEntry::default(); count.min(most)];
        self.0.read(FIRST, entries.as_mut_bytes());
        for (flags, access) in [(GREF_READONLY, Access::ReadOnly), (0, Access::ReadWrite)] {
            let some = entries.iter().filter(|entry| entry.flags == flags);
            let some: Vec<_> = some.map(|entry| entry.gref).collect();
            for refs in some.chunks(MAX_LIST) {
                if table.takes(refs)
                    && let Some(memory) = map(refs, access)
                {
                    table.add(vec![Run::new(refs.to_vec(), access, memory)]);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "noted_tests.rs"]
mod tests;
