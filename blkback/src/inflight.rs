//! The in-flight tables of a disk's queues.

use std::fmt::Write;
use std::path::Path;

use hypervisor::xenbus::inflight::Tables;
use hypervisor::xenbus::{DeviceId, Meeting};
use rings::{PAGE_SIZE, Table};

use crate::negotiate::{Accepted, Protocol};
use crate::proto::{Abi, Native, Ring, X86_32, X86_64};

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

/// One for each queue, in their order.
pub(crate) fn tables(run_dir: &Path, id: &DeviceId, accepted: &Accepted, how: Meeting) -> Tables {
    let bytes = |pages| table_bytes(accepted.protocol, pages);
    let lens: Vec<usize> = accepted.queues.iter().map(|q| bytes(q.ring_refs.len())).collect();
    Tables::of(run_dir, id, &identity(id, accepted), &lens, how)
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
