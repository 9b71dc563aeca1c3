//! The in-flight tables of a vif's rings.

use std::fmt::Write;
use std::path::Path;

use hypervisor::xenbus::inflight::Tables;
use hypervisor::xenbus::{DeviceId, Meeting};
use rings::{PAGE_SIZE, Protocol, Table};

use crate::negotiate::Accepted;
use crate::proto::{Rx, Tx};

/// Bytes of the table of a ring of `pages` pages, in whole pages.
fn table_bytes<P: Protocol>(pages: usize) -> usize {
    Table::<P::Req>::bytes(rings::slot_count::<P>(pages)).next_multiple_of(PAGE_SIZE)
}

/// Two for each queue: of packets from the guest, and to it.
pub(crate) fn tables(run_dir: &Path, id: &DeviceId, accepted: &Accepted, how: Meeting) -> Tables {
    let mut identity = format!("{id}\n");
    let mut lens = Vec::new();
    for queue in &accepted.queues {
        // Into a string it cannot fail.
        let _ = writeln!(
            identity,
            "{:?} tx refs {:?} rx refs {:?}",
            queue.ports, queue.tx_refs, queue.rx_refs
        );
        lens.push(table_bytes::<Tx>(queue.tx_refs.len()));
        lens.push(table_bytes::<Rx>(queue.rx_refs.len()));
    }
    Tables::of(run_dir, id, &identity, &lens, how)
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
