//! The in-flight tables of a vif's rings, and what lies beside them.

use std::fmt::Write;
use std::path::Path;

use hypervisor::xenbus::inflight::{Past, TableMemory, Tables};
use hypervisor::xenbus::{DeviceId, Meeting};
use rings::{PAGE_SIZE, Protocol, Table};

use crate::kept;
use crate::negotiate::Accepted;
use crate::proto::{Ctrl, Rx, Tx};
use crate::staging::noted;

/// Bytes of the table of a ring of `pages` pages, in whole pages.
fn table_bytes<P: Protocol>(pages: usize) -> usize {
    Table::<P::Req>::bytes(rings::slot_count::<P>(pages)).next_multiple_of(PAGE_SIZE)
}

/// Memory that outlives the process.
pub(crate) struct Lasting {
    /// What is in it.
    pub past: Past,
    /// Of each queue's rings: of packets from the guest, and to it.
    pub queues: Vec<[TableMemory; 2]>,
    /// Of the control ring.
    pub ctrl: TableMemory,
    /// Of what the guest has said through its rings.
    pub kept: TableMemory,
    /// Of each queue's pages that are kept mapped; only where there is a control ring to ask for any.
    pub noted: Vec<TableMemory>,
}

/// A vif's.
pub(crate) fn tables(run_dir: &Path, id: &DeviceId, accepted: &Accepted, how: Meeting) -> Lasting {
    let mut identity = format!("{id}\n");
    // The control ring's has its place even if there is none.
    let mut lens = vec![table_bytes::<Ctrl>(1), kept::BYTES];
    if let Some(ctrl) = accepted.ctrl {
        // Into a string it cannot fail.
        let _ = writeln!(identity, "ctrl ref {} port {}", ctrl.ring_ref, ctrl.port);
    }
    for queue in &accepted.queues {
        let _ = writeln!(
            identity,
            "{:?} tx refs {:?} rx refs {:?}",
            queue.ports, queue.tx_refs, queue.rx_refs
        );
        lens.push(table_bytes::<Tx>(queue.tx_refs.len()));
        lens.push(table_bytes::<Rx>(queue.rx_refs.len()));
    }
    let noted = if accepted.ctrl.is_some() { accepted.queues.len() } else { 0 };
    lens.extend(std::iter::repeat_n(noted::BYTES, noted));
    let Tables { mut memory, past } = Tables::of(run_dir, id, &identity, &lens, how);
    let noted = memory.split_off(memory.len() - noted);
    let (pairs, _) = memory.as_chunks();
    let [ctrl, kept] = pairs[0].clone();
    Lasting { past, queues: pairs[1..].to_vec(), ctrl, kept, noted }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
