use rings::mem::HeapPages;

use super::super::tests::{Fake, Mapped};
use super::*;

fn memory() -> TableMemory {
    Arc::new(HeapPages::new(BYTES / PAGE_SIZE))
}

fn sorted(table: &Staging<Fake>) -> Vec<(GrantRef, Access)> {
    let runs = table.runs();
    let pages = runs.iter().flat_map(|run| run.refs().iter().map(|gref| (*gref, run.access())));
    let mut all: Vec<_> = pages.collect();
    all.sort_unstable();
    all
}

/// A table with two pages to be read and so many to be written.
fn table(limit: u32, writable: u32) -> Staging<Fake> {
    let (table, mapped) = (Staging::new(limit), Mapped::default());
    let run = |refs: Vec<_>, access| {
        let memory = mapped.map(&refs);
        Run::new(refs, access, memory)
    };
    table.add(vec![run(vec![7, 8], Access::ReadOnly)]);
    table.add(vec![run((100..100 + writable).collect(), Access::ReadWrite)]);
    table
}

#[test]
fn a_successor_maps_what_was_noted_but_what_was_leaving() {
    let memory = memory();
    let before = table(2000, 1100);
    Noted::new(memory.clone()).save(&before.runs(), &HashSet::new());
    let (after, mapped) = (Staging::new(2000), Mapped::default());
    let mut calls = 0;
    Noted::new(memory.clone()).restore(&after, |refs, _| {
        calls += 1;
        assert!(refs.len() <= MAX_LIST);
        Some(mapped.map(refs))
    });
    assert_eq!((sorted(&after), calls), (sorted(&before), 4));
    Noted::new(memory.clone()).save(&before.runs(), &(100..1199).chain([8]).collect());
    let after = Staging::new(2000);
    Noted::new(memory).restore(&after, |refs, _| Some(mapped.map(refs)));
    assert_eq!(sorted(&after), [(7, Access::ReadOnly), (1199, Access::ReadWrite)]);
}

#[test]
fn what_cannot_be_mapped_or_has_no_room_is_left() {
    let memory = memory();
    Noted::new(memory.clone()).save(&table(2000, 5).runs(), &HashSet::new());
    let mapped = Mapped::default();
    let after = Staging::new(2000);
    Noted::new(memory.clone())
        .restore(&after, |refs, access| (access == Access::ReadOnly).then(|| mapped.map(refs)));
    assert_eq!(sorted(&after), [(7, Access::ReadOnly), (8, Access::ReadOnly)]);
    let (less, none) = (Staging::new(3), Staging::new(0));
    Noted::new(memory.clone()).restore(&less, |refs, _| Some(mapped.map(refs)));
    assert_eq!(less.runs().iter().map(|run| run.refs().len()).sum::<usize>(), 3);
    Noted::new(memory.clone()).restore(&none, |refs, _| Some(mapped.map(refs)));
    assert!(none.is_empty());
    // One that was killed while it wrote has noted none; nonsense is none.
    memory.word(COUNT).store(0, Ordering::Relaxed);
    let after = Staging::new(2000);
    Noted::new(memory.clone()).restore(&after, |refs, _| Some(mapped.map(refs)));
    assert!(after.is_empty());
    memory.write(0, &[0xff; 64]);
    Noted::new(memory).restore(&after, |refs, _| Some(mapped.map(refs)));
    // A page that is named twice: its part of the list is not taken.
    assert!(after.runs().iter().all(|run| run.refs().len() == 1 || !run.refs().contains(&!0)));
}
