//! The requests by which a guest has its pages kept mapped (netif.h, "Static Grants"). What a list
//! says is copied once and only the copy counts.

use std::collections::HashSet;

use hypervisor::{Access, GrantRef};
use rings::PAGE_SIZE;
use zerocopy::IntoBytes;

use super::Refusal::{self, InvalidParameter, NotSupported};
use crate::proto::{
    CTRL_ADD_GREF_MAPPING, CTRL_DEL_GREF_MAPPING, CTRL_GET_GREF_MAPPING_SIZE,
    CTRL_STATUS_INVALID_PARAMETER, CTRL_STATUS_SUCCESS, CtrlRequest, CtrlResponse, GREF_READONLY,
    GrefEntry,
};
use crate::staging::{Run, Staging};

/// Most entries of one list: it lies in one page.
pub const MAX_LIST: usize = PAGE_SIZE / size_of::<GrefEntry>();

/// What can be done with a guest's pages.
pub trait Reach {
    /// Mapped pages, unmapped when dropped.
    type Memory;
    /// Copies the first bytes of a page of the guest's, at most a page; whether it could.
    fn read(&mut self, gref: GrantRef, into: &mut [u8]) -> bool;
    /// Overwrites the first bytes of one; whether it could.
    fn write(&mut self, gref: GrantRef, from: &[u8]) -> bool;
    /// Maps pages, all or none.
    fn map(&mut self, refs: &[GrantRef], access: Access) -> Option<Self::Memory>;
    /// Pages are about to leave the table of a queue.
    fn leaving(&mut self, queue: usize, going: &HashSet<GrantRef>);
}

/// What is there once a request was carried out.
pub struct Served {
    /// For the guest.
    pub answer: CtrlResponse,
    /// The queue whose table has more pages now.
    pub added: Option<usize>,
}

/// Whether a request is one of these.
pub fn is_one(request: &CtrlRequest) -> bool {
    (CTRL_GET_GREF_MAPPING_SIZE..=CTRL_DEL_GREF_MAPPING).contains(&request.kind)
}

/// Carries out one of these requests; there is a table for each of the guest's queues, which nobody
/// else changes.
pub fn serve<R: Reach>(
    request: &CtrlRequest,
    tables: &[Staging<R::Memory>],
    reach: &mut R,
) -> Served {
    let (status, data, added) = match act(request, tables, reach) {
        Ok(Done::Says(data)) => (CTRL_STATUS_SUCCESS, data, None),
        Ok(Done::Added(queue)) => (CTRL_STATUS_SUCCESS, 0, Some(queue)),
        Err(refusal) => (refusal.status(), 0, None),
    };
    let answer = CtrlResponse { id: request.id, kind: request.kind, status, data };
    Served { answer, added }
}

enum Done {
    Says(u32),
    Added(usize),
}

fn act<R: Reach>(
    request: &CtrlRequest,
    tables: &[Staging<R::Memory>],
    reach: &mut R,
) -> Result<Done, Refusal> {
    let [queue, list, len] = request.data;
    if tables.iter().all(|table| table.limit() == 0) {
        return Err(NotSupported);
    }
    let queue = usize::try_from(queue).map_err(|_| InvalidParameter)?;
    let table = tables.get(queue).ok_or(InvalidParameter)?;
    match request.kind {
        // netif.h: how many there can be; the design's text has it say how many more.
        CTRL_GET_GREF_MAPPING_SIZE => Ok(Done::Says(table.limit())),
        CTRL_ADD_GREF_MAPPING => {
            add(table, &fetch(list, len, reach)?, reach)?;
            Ok(Done::Added(queue))
        }
        CTRL_DEL_GREF_MAPPING => {
            let mut entries = fetch(list, len, reach)?;
            let going = mark(table, &mut entries);
            // A guest that cannot be told is not served: nothing has changed yet.
            if !entries.is_empty() && !reach.write(list, entries.as_bytes()) {
                return Err(InvalidParameter);
            }
            if !going.is_empty() {
                reach.leaving(queue, &going);
                table.remove(&going, |refs, access| reach.map(refs, access));
            }
            Ok(Done::Says(going.len() as u32))
        }
        _ => Err(NotSupported),
    }
}

fn fetch<R: Reach>(list: GrantRef, len: u32, reach: &mut R) -> Result<Vec<GrefEntry>, Refusal> {
    let len = usize::try_from(len).ok().filter(|len| *len <= MAX_LIST);
    let mut entries = vec![GrefEntry::default(); len.ok_or(InvalidParameter)?];
    let there = entries.is_empty() || reach.read(list, entries.as_mut_bytes());
    if there { Ok(entries) } else { Err(InvalidParameter) }
}

/// Adds all pages or none.
fn add<R: Reach>(
    table: &Staging<R::Memory>,
    entries: &[GrefEntry],
    reach: &mut R,
) -> Result<(), Refusal> {
    let refs: Vec<_> = entries.iter().map(|entry| entry.gref).collect();
    if entries.iter().any(|entry| entry.flags & !GREF_READONLY != 0) || !table.takes(&refs) {
        return Err(InvalidParameter);
    }
    let mut runs = Vec::new();
    for (flags, access) in [(GREF_READONLY, Access::ReadOnly), (0, Access::ReadWrite)] {
        let some = entries.iter().filter(|entry| entry.flags == flags);
        let some: Vec<_> = some.map(|entry| entry.gref).collect();
        if !some.is_empty() {
            // What was mapped before goes again.
            let memory = reach.map(&some, access).ok_or(InvalidParameter)?;
            runs.push(Run::new(some, access, memory));
        }
    }
    table.add(runs);
    Ok(())
}

/// Writes into a list what will become of its entries; which pages will go.
fn mark<M>(table: &Staging<M>, entries: &mut [GrefEntry]) -> HashSet<GrantRef> {
    let known = table.known(entries.iter().map(|entry| entry.gref));
    let mut going = HashSet::new();
    for (entry, known) in entries.iter_mut().zip(known) {
        let status = if known { CTRL_STATUS_SUCCESS } else { CTRL_STATUS_INVALID_PARAMETER };
        entry.status = status as u16;
        if known {
            going.insert(entry.gref);
        }
    }
    going
}

#[cfg(test)]
#[path = "lists_tests.rs"]
mod tests;
