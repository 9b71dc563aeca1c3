use std::collections::HashMap;

use super::*;
use crate::proto::CTRL_STATUS_NOT_SUPPORTED;
use crate::staging::tests::{Fake, Mapped};

const QUEUES: u32 = 2;
const LIMIT: u32 = 600;
/// The page that holds the list, and one that may only be read.
const LIST: GrantRef = 77;
const READ_ONLY: GrantRef = 78;

struct Guest {
    page: Vec<GrefEntry>,
    granted: HashMap<GrantRef, Access>,
    mapped: Mapped,
    tables: Vec<Staging<Fake>>,
    left: Vec<(usize, Vec<GrantRef>)>,
}

struct Reached<'a> {
    page: &'a mut Vec<GrefEntry>,
    granted: &'a HashMap<GrantRef, Access>,
    mapped: &'a Mapped,
    left: &'a mut Vec<(usize, Vec<GrantRef>)>,
}

impl Reach for Reached<'_> {
    type Memory = Fake;
    fn read(&mut self, gref: GrantRef, into: &mut [u8]) -> bool {
        let there = gref == LIST || gref == READ_ONLY;
        if there {
            into.copy_from_slice(&self.page.as_bytes()[..into.len()]);
        }
        there
    }
    fn write(&mut self, gref: GrantRef, from: &[u8]) -> bool {
        if gref == LIST {
            self.page.as_mut_bytes()[..from.len()].copy_from_slice(from);
        }
        gref == LIST
    }
    fn map(&mut self, refs: &[GrantRef], access: Access) -> Option<Fake> {
        let may = |gref| self.granted.get(gref).is_some_and(|granted| *granted >= access);
        refs.iter().all(may).then(|| self.mapped.map(refs))
    }
    fn leaving(&mut self, queue: usize, going: &HashSet<GrantRef>) {
        let mut going: Vec<_> = going.iter().copied().collect();
        going.sort_unstable();
        self.left.push((queue, going));
    }
}

impl Guest {
    /// Whose pages 1000 to 2000 may be written and 2001 to 3000 read.
    fn new(limit: u32) -> Guest {
        let writable = (1000..=2000).map(|gref| (gref, Access::ReadWrite));
        Guest {
            page: vec![GrefEntry { gref: 9, flags: 9, status: 9 }; MAX_LIST],
            granted: writable.chain((2001..=3000).map(|gref| (gref, Access::ReadOnly))).collect(),
            mapped: Mapped::default(),
            tables: (0..QUEUES).map(|_| Staging::new(limit)).collect(),
            left: Vec::new(),
        }
    }
    fn ask(&mut self, kind: u16, data: [u32; 3]) -> (u32, u32) {
        let Guest { page, granted, mapped, tables, left } = self;
        let mut reached = Reached { page, granted, mapped, left };
        let request = CtrlRequest { id: 7, kind, data };
        let served = serve(&request, tables, &mut reached);
        let answer = served.answer;
        assert_eq!((answer.id, answer.kind), (7, kind));
        let added = (kind == CTRL_ADD_GREF_MAPPING && answer.status == CTRL_STATUS_SUCCESS)
            .then_some(data[0] as usize);
        assert_eq!(served.added, added);
        (answer.status, answer.data)
    }
    fn list(&mut self, entries: &[(GrantRef, u16)]) {
        for (place, (gref, flags)) in self.page.iter_mut().zip(entries) {
            *place = GrefEntry { gref: *gref, flags: *flags, status: 9 };
        }
    }
    fn add(&mut self, queue: u32, entries: &[(GrantRef, u16)]) -> (u32, u32) {
        self.list(entries);
        self.ask(CTRL_ADD_GREF_MAPPING, [queue, LIST, entries.len() as u32])
    }
    /// Also the entries' statuses.
    fn remove(&mut self, queue: u32, refs: &[GrantRef]) -> ((u32, u32), Vec<u16>) {
        self.list(&refs.iter().map(|gref| (*gref, 0)).collect::<Vec<_>>());
        let answer = self.ask(CTRL_DEL_GREF_MAPPING, [queue, LIST, refs.len() as u32]);
        (answer, self.page[..refs.len()].iter().map(|entry| entry.status).collect())
    }
}

const OKAY: (u32, u32) = (CTRL_STATUS_SUCCESS, 0);
const INVALID: (u32, u32) = (CTRL_STATUS_INVALID_PARAMETER, 0);

#[test]
fn how_many_pages_each_queue_keeps() {
    let mut guest = Guest::new(LIMIT);
    let size = |guest: &mut Guest, queue| guest.ask(CTRL_GET_GREF_MAPPING_SIZE, [queue, 0, 0]);
    for queue in 0..QUEUES {
        assert_eq!(size(&mut guest, queue), (CTRL_STATUS_SUCCESS, LIMIT));
    }
    assert_eq!(size(&mut guest, QUEUES), INVALID);
    assert_eq!(size(&mut guest, u32::MAX), INVALID);
    let mut none = Guest::new(0);
    for kind in CTRL_GET_GREF_MAPPING_SIZE..=CTRL_DEL_GREF_MAPPING {
        assert_eq!(none.ask(kind, [0, LIST, 0]), (CTRL_STATUS_NOT_SUPPORTED, 0));
    }
}

#[test]
fn pages_of_both_kinds_are_mapped_each_in_its_queue() {
    let mut guest = Guest::new(LIMIT);
    assert_eq!(guest.add(0, &[(1000, 0), (2500, GREF_READONLY), (1001, GREF_READONLY)]), OKAY);
    assert_eq!(guest.add(1, &[(1000, 0)]), OKAY, "another queue may have it too");
    assert_eq!(guest.mapped.sorted(), [1000, 1000, 1001, 2500]);
    assert_eq!(guest.add(0, &[]), OKAY);
    guest.tables.clear();
    assert!(guest.mapped.sorted().is_empty());
}

#[test]
fn one_bad_entry_and_none_is_mapped() {
    let mut guest = Guest::new(LIMIT);
    assert_eq!(guest.add(0, &[(1500, 0)]), OKAY);
    for (why, bad) in [
        ("it is in the table", (1500, 0)),
        ("it is in the list already", (1000, 0)),
        ("with another flag too", (1000, GREF_READONLY)),
        ("it is not granted", (5, 0)),
        ("it may only be read", (2001, 0)),
        ("a flag that nobody knows", (1001, 2)),
        ("all flags", (1001, u16::MAX)),
    ] {
        for list in [[(1000, 0), (2002, GREF_READONLY), bad], [(1000, 0), bad, (2002, 1)]] {
            assert_eq!(guest.add(0, &list), INVALID, "{why}");
            assert_eq!(guest.mapped.sorted(), [1500], "{why}");
        }
    }
    // The list itself.
    let whole: Vec<_> = (1000..1000 + MAX_LIST as u32).map(|gref| (gref, 0)).collect();
    guest.list(&whole);
    for (list, len) in [(LIST, MAX_LIST as u32 + 1), (LIST, u32::MAX), (5, 1)] {
        assert_eq!(guest.ask(CTRL_ADD_GREF_MAPPING, [0, list, len]), INVALID, "{list} {len}");
    }
    for queue in [QUEUES, u32::MAX] {
        assert_eq!(guest.add(queue, &[(1000, 0)]), INVALID);
    }
    // One is in the table, so that the last of these has no room.
    let some = |from: u32, count: u32| (from..from + count).map(|gref| (gref, 0)).collect();
    let (first, second): (Vec<_>, Vec<_>) = (some(1000, 300), some(1600, 300));
    assert_eq!(guest.add(0, &first), OKAY);
    assert_eq!(guest.add(0, &second), INVALID);
    assert_eq!(guest.add(0, &second[1..]), OKAY, "to the last place");
    assert_eq!(guest.add(0, &[(1950, 0)]), INVALID);
    assert_eq!(guest.mapped.sorted().len(), LIMIT as usize);
    // A page that may only be read will do for a list of additions.
    guest.list(&[(1000, 0)]);
    assert_eq!(guest.ask(CTRL_ADD_GREF_MAPPING, [1, READ_ONLY, 1]), OKAY);
}

#[test]
fn each_entry_of_a_removal_has_its_status() {
    let mut guest = Guest::new(LIMIT);
    assert_eq!(guest.add(0, &[(1000, 0), (1001, 0), (1002, 0), (2001, GREF_READONLY)]), OKAY);
    assert_eq!(guest.add(1, &[(1003, 0)]), OKAY);
    let (answer, statuses) = guest.remove(0, &[1001, 1003, 1001, 5, 2001]);
    assert_eq!((answer, statuses), ((CTRL_STATUS_SUCCESS, 2), vec![0, 2, 2, 2, 0]));
    assert_eq!(guest.mapped.sorted(), [1000, 1002, 1003]);
    assert_eq!(guest.left, [(0, vec![1001, 2001])]);
    // What is gone can come again.
    assert_eq!(guest.add(0, &[(1001, GREF_READONLY)]), OKAY);
    // Nothing of these is there: that is no failure.
    assert_eq!(guest.remove(1, &[1000, 4]), ((CTRL_STATUS_SUCCESS, 0), vec![2, 2]));
    assert_eq!(guest.remove(1, &[]).0, OKAY);
    assert_eq!(guest.left.len(), 1);
    // A guest that cannot be told keeps what it has.
    guest.list(&[(1000, 0)]);
    for list in [READ_ONLY, 5] {
        assert_eq!(guest.ask(CTRL_DEL_GREF_MAPPING, [0, list, 1]), INVALID);
    }
    for (queue, len) in [(QUEUES, 1), (0, MAX_LIST as u32 + 1), (0, u32::MAX)] {
        assert_eq!(guest.ask(CTRL_DEL_GREF_MAPPING, [queue, LIST, len]), INVALID);
    }
    assert_eq!(guest.mapped.sorted(), [1000, 1001, 1002, 1003]);
}

/// The page changes behind the backend's back: what it says second does not count.
#[test]
fn a_list_is_read_once() {
    struct Twice(u32, Mapped);
    impl Reach for Twice {
        type Memory = Fake;
        fn read(&mut self, _: GrantRef, into: &mut [u8]) -> bool {
            self.0 += 1;
            into.copy_from_slice(GrefEntry { gref: self.0, ..GrefEntry::default() }.as_bytes());
            true
        }
        fn write(&mut self, _: GrantRef, _: &[u8]) -> bool {
            true
        }
        fn map(&mut self, refs: &[GrantRef], _: Access) -> Option<Fake> {
            Some(self.1.map(refs))
        }
        fn leaving(&mut self, _: usize, _: &HashSet<GrantRef>) {}
    }
    let (tables, mut reach) = ([Staging::new(5)], Twice(0, Mapped::default()));
    let request = CtrlRequest { id: 0, kind: CTRL_ADD_GREF_MAPPING, data: [0, LIST, 1] };
    serve(&request, &tables, &mut reach);
    assert_eq!((reach.0, reach.1.sorted()), (1, vec![1]));
    serve(&CtrlRequest { kind: CTRL_DEL_GREF_MAPPING, ..request }, &tables, &mut reach);
    assert_eq!((reach.0, reach.1.sorted()), (2, vec![1]));
}
