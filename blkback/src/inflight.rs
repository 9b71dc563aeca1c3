//! Where a device's queues note what they have taken and not answered: memory that outlives the
//! process, so that a successor serves it again.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypervisor::xenbus::lasting::{Lasting, LastingError};
use hypervisor::xenbus::{DeviceId, Meeting};
use rings::mem::{HeapPages, SharedMem};
use rings::{PAGE_SIZE, Table};

use crate::negotiate::{Accepted, Protocol};
use crate::proto::{Abi, Native, Ring, X86_32, X86_64};

/// The memory of a queue's table.
pub(crate) type TableMemory = Arc<dyn SharedMem + Send + Sync>;

/// What is known of requests that a predecessor has taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Past {
    /// There was no predecessor: the rings are new.
    None,
    /// Its tables are here.
    Kept,
    /// Nothing, for the reason that is named. A ring on which something is unanswered cannot be
    /// taken over.
    Lost(String),
}

/// The in-flight tables of a device's queues, in their order.
pub(crate) struct Tables {
    pub memory: Vec<TableMemory>,
    pub past: Past,
}

/// The file beside a device's stats page and control socket.
pub(crate) fn path(run_dir: &Path, id: &DeviceId) -> PathBuf {
    run_dir.join(id.domid.to_string()).join(format!("{}-{}.inflight", id.kind, id.devid))
}

/// Bytes of the table of a ring of `pages` pages, in whole pages.
fn table_bytes(protocol: Protocol, pages: usize) -> usize {
    fn of<A: Abi>(pages: usize) -> usize {
        Table::<A::Req>::bytes(rings::slot_count::<Ring<A>>(pages))
    }
    let bytes = match protocol {
        Protocol::X86_64 => of::<X86_64>(pages),
        Protocol::X86_32 => of::<X86_32>(pages),
        Protocol::Native => of::<Native>(pages),
    };
    bytes.next_multiple_of(PAGE_SIZE)
}

/// What the rings of one connection are: those of another have other pages or ports.
fn identity(id: &DeviceId, accepted: &Accepted) -> String {
    let mut text = format!("{id} {:?}\n", accepted.protocol);
    for queue in &accepted.queues {
        // Into a string it cannot fail.
        let _ = writeln!(text, "port {} refs {:?}", queue.port, queue.ring_refs);
    }
    text
}

impl Tables {
    /// Those that a predecessor left, where the frontend goes on with its rings; otherwise new
    /// ones. Where no file can be made they lie on the heap, and one log line says so.
    pub(crate) fn of(run_dir: &Path, id: &DeviceId, accepted: &Accepted, how: Meeting) -> Tables {
        let path = path(run_dir, id);
        let identity = identity(id, accepted);
        let lens: Vec<usize> = accepted
            .queues
            .iter()
            .map(|queue| table_bytes(accepted.protocol, queue.ring_refs.len()))
            .collect();
        let total = lens.iter().sum();
        let past = match how {
            Meeting::Fresh => Past::None,
            Meeting::Attach => match Lasting::open(&path, identity.as_bytes(), total) {
                Ok(lasting) => return Tables { memory: parts(&lasting, &lens), past: Past::Kept },
                Err(e) => Past::Lost(lost(id, &e)),
            },
        };
        let memory = match Lasting::create(&path, identity.as_bytes(), total) {
            Ok(lasting) => parts(&lasting, &lens),
            Err(e) => {
                tracing::warn!(
                    "{id}: {}: {e}: if this process is killed under load, the guest loses its disk",
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
pub(crate) fn forget(run_dir: &Path, id: &DeviceId) {
    let path = path(run_dir, id);
    if let Err(e) = Lasting::remove(&path) {
        tracing::warn!("{id}: cannot remove {}: {e}", path.display());
    }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
