use hypervisor::xenbus::inflight::{Past, forget};
use rings::inflight::InFlight;

use super::*;
use crate::negotiate::QueueKeys;

fn id() -> DeviceId {
    DeviceId { kind: "vbd", domid: 3, devid: 51712 }
}

fn accepted() -> Accepted {
    let queue = |port, first: u32| QueueKeys { ring_refs: (first..first + 4).collect(), port };
    Accepted {
        protocol: Protocol::X86_64,
        persistent: true,
        queues: vec![queue(5, 100), queue(6, 200)],
    }
}

type Req = <X86_64 as Abi>::Req;

fn slots() -> u32 {
    rings::slot_count::<Ring<X86_64>>(4)
}

fn lost(tables: &Tables) -> &str {
    match &tables.past {
        Past::Lost(why) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_successor_finds_the_tables_of_the_same_rings() {
    let run = tempfile::tempdir().unwrap();
    let of = |accepted: &Accepted, how| tables(run.path(), &id(), accepted, how);
    let tables = of(&accepted(), Meeting::Fresh);
    assert_eq!(tables.past, Past::None);
    for (n, memory) in (0u32..).zip(&tables.memory) {
        let mut table = Table::<Req, _>::format(memory.clone(), slots()).unwrap();
        InFlight::<Req>::begin(&mut table, 1000 + n);
    }
    drop(tables);
    let tables = of(&accepted(), Meeting::Attach);
    assert_eq!(tables.past, Past::Kept);
    for (n, memory) in (0u32..).zip(&tables.memory) {
        let table = Table::<Req, _>::open(memory.clone(), slots()).unwrap();
        assert_eq!(InFlight::<Req>::taken(&table), Some(1000 + n));
    }
    // What a new connection makes is empty.
    let tables = of(&accepted(), Meeting::Fresh);
    assert!(Table::<Req, _>::open(tables.memory[0].clone(), slots()).is_err());
}

#[test]
fn those_of_other_rings_are_not_taken() {
    let run = tempfile::tempdir().unwrap();
    type Change = fn(&mut Accepted);
    let changes: [(&str, Change); 5] = [
        ("a port", |a| a.queues[1].port = 7),
        ("a page", |a| a.queues[0].ring_refs[3] = 99),
        ("a queue less", |a| drop(a.queues.pop())),
        ("smaller rings", |a| a.queues.iter_mut().for_each(|q| q.ring_refs.truncate(2))),
        ("another layout", |a| a.protocol = Protocol::X86_32),
    ];
    for (what, change) in changes {
        drop(tables(run.path(), &id(), &accepted(), Meeting::Fresh));
        let mut other = accepted();
        change(&mut other);
        let tables = tables(run.path(), &id(), &other, Meeting::Attach);
        assert!(lost(&tables).contains("is of another"), "{what}: {}", lost(&tables));
        assert_eq!(tables.memory.len(), other.queues.len());
    }
    forget(run.path(), &id());
    let tables = tables(run.path(), &id(), &accepted(), Meeting::Attach);
    assert!(lost(&tables).contains("vbd-51712.inflight is not there"), "{}", lost(&tables));
}

/// A guest is served all the same, and no older file says what is not so.
#[test]
fn where_no_file_can_be_made_the_tables_lie_on_the_heap() {
    let run = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(id().file(run.path(), "inflight").with_extension("inflight.new"))
        .unwrap();
    let tables = tables(run.path(), &id(), &accepted(), Meeting::Fresh);
    for memory in &tables.memory {
        assert!(Table::<Req, _>::format(memory.clone(), slots()).is_ok());
    }
    assert!(!id().file(run.path(), "inflight").exists());
}
