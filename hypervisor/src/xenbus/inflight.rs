//! Where a device's queues note what they have taken and not answered: memory that outlives the
//! process, so that a successor serves it again.

use std::path::Path;
use std::sync::Arc;

use rings::PAGE_SIZE;
use rings::mem::{HeapPages, SharedMem};

use super::lasting::{Lasting, LastingError};
use super::{DeviceId, Meeting};

/// The memory of a ring's table.
pub type TableMemory = Arc<dyn SharedMem + Send + Sync>;

/// What is known of requests that a predecessor has taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Past {
    /// There was no predecessor: the rings are new.
    None,
    /// Its tables are here.
    Kept,
    /// Nothing, for the reason that is named: what is unanswered on a ring is not known.
    Lost(String),
}

/// The in-flight tables of a device's rings, in the order of their lengths.
pub struct Tables {
    /// One for each ring.
    pub memory: Vec<TableMemory>,
    /// What is in them.
    pub past: Past,
}

impl Tables {
    /// Those that a predecessor left, where the frontend goes on with its rings; otherwise new
    /// ones. `identity` says what the rings of this connection are: those of another have other
    /// pages or ports. `lens` are the tables' lengths in bytes, whole pages. Where no file can be
    /// made they lie on the heap, and one log line says so.
    pub fn of(
        run_dir: &Path,
        id: &DeviceId,
        identity: &str,
        lens: &[usize],
        how: Meeting,
    ) -> Tables {
        let path = id.file(run_dir, "inflight");
        let total = lens.iter().sum();
        let past = match how {
            Meeting::Fresh => Past::None,
            Meeting::Attach => match Lasting::open(&path, identity.as_bytes(), total) {
                Ok(lasting) => return Tables { memory: parts(&lasting, lens), past: Past::Kept },
                Err(e) => Past::Lost(lost(id, &e)),
            },
        };
        let memory = match Lasting::create(&path, identity.as_bytes(), total) {
            Ok(lasting) => parts(&lasting, lens),
            Err(e) => {
                tracing::warn!(
                    "{id}: {}: {e}: if this process is killed under load, its successor does not \
                     know what is unanswered",
                    path.display()
                );
                forget(run_dir, id);
                lens.iter().map(|len| Arc::new(HeapPages::new(len / PAGE_SIZE)) as _).collect()
            }
        };
        Tables { memory, past }
    }
}

fn lost(id: &DeviceId, e: &LastingError) -> String {
    if !matches!(e, LastingError::Missing(_)) {
        tracing::warn!("{id}: the record of what is unanswered is of no use: {e}");
    }
    e.to_string()
}

fn parts(lasting: &Lasting, lens: &[usize]) -> Vec<TableMemory> {
    let mut end = 0;
    let part = |len: &usize| {
        let start = end;
        end += len;
        Arc::new(lasting.part(start..end)) as TableMemory
    };
    lens.iter().map(part).collect()
}

/// Removes the tables of a device that is done with its frontend.
pub fn forget(run_dir: &Path, id: &DeviceId) {
    let path = id.file(run_dir, "inflight");
    if let Err(e) = Lasting::remove(&path) {
        tracing::warn!("{id}: cannot remove {}: {e}", path.display());
    }
}
