use super::*;
use crate::proto::{
    CTRL_ADD_GREF_MAPPING, CTRL_DEL_GREF_MAPPING, CTRL_GET_GREF_MAPPING_SIZE,
    HASH_ALGORITHM_TOEPLITZ, HASH_TYPE_IPV4, HASH_TYPE_IPV4_TCP,
};

const QUEUES: usize = 4;
/// The page that the guest has granted, and what lies in it.
const PAGE: u32 = 77;

struct Guest {
    spread: Arc<Spread>,
    page: [u8; MAX_READ],
    reads: usize,
}

fn guest() -> Guest {
    Guest { spread: Arc::default(), page: [0; MAX_READ], reads: 0 }
}

impl Guest {
    fn ask(&mut self, kind: u16, data: [u32; 3]) -> (u32, u32) {
        let request = CtrlRequest { id: 0xbeef, kind, data };
        let served = serve(&request, &self.spread, QUEUES, |gref, into| {
            self.reads += 1;
            let there = gref == PAGE;
            if there {
                into.copy_from_slice(&self.page[..into.len()]);
            }
            there
        });
        let answer = served.answer;
        assert_eq!((answer.id, answer.kind), (0xbeef, kind));
        if let Some(spread) = served.spread {
            assert_eq!(answer.status, CTRL_STATUS_SUCCESS, "a refused request changes something");
            self.spread = Arc::new(spread);
        }
        (answer.status, answer.data)
    }
    fn table(&mut self, queues: &[u32]) {
        for (to, queue) in self.page.chunks_mut(4).zip(queues) {
            to.copy_from_slice(&queue.to_ne_bytes());
        }
    }
    /// With an algorithm, and a table of so many entries.
    fn hashing(entries: u32) -> Guest {
        let mut guest = guest();
        assert_eq!(guest.ask(CTRL_SET_HASH_ALGORITHM, [HASH_ALGORITHM_TOEPLITZ, 0, 0]), OKAY);
        assert_eq!(guest.ask(CTRL_SET_HASH_FLAGS, [HASH_TYPE_IPV4, 0, 0]), OKAY);
        assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING_SIZE, [entries, 0, 0]), OKAY);
        guest
    }
}

const OKAY: (u32, u32) = (CTRL_STATUS_SUCCESS, 0);
const INVALID: (u32, u32) = (CTRL_STATUS_INVALID_PARAMETER, 0);
const UNSUPPORTED: (u32, u32) = (CTRL_STATUS_NOT_SUPPORTED, 0);

#[test]
fn an_algorithm_comes_before_what_it_works_on() {
    let mut guest = guest();
    assert_eq!(guest.ask(CTRL_GET_HASH_FLAGS, [0; 3]), UNSUPPORTED);
    assert_eq!(guest.ask(CTRL_SET_HASH_FLAGS, [HASH_TYPE_IPV4, 0, 0]), INVALID);
    assert_eq!(guest.ask(CTRL_SET_HASH_ALGORITHM, [2, 0, 0]), INVALID);
    assert!(!guest.spread.is_on());
    assert_eq!(guest.ask(CTRL_SET_HASH_ALGORITHM, [HASH_ALGORITHM_TOEPLITZ, 0, 0]), OKAY);
    assert_eq!(guest.ask(CTRL_GET_HASH_FLAGS, [0; 3]), (CTRL_STATUS_SUCCESS, HASH_TYPES));
    assert!(!guest.spread.is_on(), "without a kind of packets there is nothing to hash");
    for wrong in [HASH_TYPES + 1, 1 << 31, u32::MAX] {
        assert_eq!(guest.ask(CTRL_SET_HASH_FLAGS, [wrong, 0, 0]), INVALID);
    }
    assert_eq!(guest.ask(CTRL_SET_HASH_FLAGS, [HASH_TYPE_IPV4_TCP, 0, 0]), OKAY);
    assert!(guest.spread.is_on());
    // Either ends it.
    assert_eq!(guest.ask(CTRL_SET_HASH_FLAGS, [0, 0, 0]), OKAY);
    assert!(!guest.spread.is_on());
    assert_eq!(guest.ask(CTRL_SET_HASH_FLAGS, [HASH_TYPES, 0, 0]), OKAY);
    assert_eq!(guest.ask(CTRL_SET_HASH_ALGORITHM, [0, 0, 0]), OKAY);
    assert!(!guest.spread.is_on());
}

#[test]
fn a_key_comes_from_the_guests_page() {
    let mut guest = guest();
    guest.page.fill(9);
    assert_eq!(guest.ask(CTRL_SET_HASH_KEY, [PAGE, 3, 0]), OKAY);
    assert_eq!((guest.spread.key()[..4].to_vec(), guest.reads), (vec![9, 9, 9, 0], 1));
    assert_eq!(guest.ask(CTRL_SET_HASH_KEY, [PAGE, MAX_KEY as u32, 0]), OKAY);
    assert_eq!(guest.spread.key(), &[9; MAX_KEY]);
    for long in [MAX_KEY as u32 + 1, 4096, 4097, u32::MAX] {
        let overflow = (CTRL_STATUS_BUFFER_OVERFLOW, 0);
        assert_eq!(guest.ask(CTRL_SET_HASH_KEY, [PAGE, long, 0]), overflow);
    }
    assert_eq!(guest.ask(CTRL_SET_HASH_KEY, [PAGE + 1, 8, 0]), INVALID, "no such page");
    assert_eq!(guest.spread.key(), &[9; MAX_KEY]);
    // One without bytes needs no page.
    let reads = guest.reads;
    assert_eq!(guest.ask(CTRL_SET_HASH_KEY, [PAGE + 1, 0, 0]), OKAY);
    assert_eq!((guest.spread.key(), guest.reads), (&[0; MAX_KEY], reads));
}

#[test]
fn a_table_is_set_in_parts_each_wholly_or_not_at_all() {
    let mut guest = Guest::hashing(8);
    assert_eq!(guest.spread.mapping, [0; 8]);
    guest.table(&[3, 2, 1]);
    assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING, [PAGE, 3, 5]), OKAY);
    assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING, [PAGE, 2, 0]), OKAY);
    assert_eq!(guest.spread.mapping, [3, 2, 0, 0, 0, 3, 2, 1]);
    guest.table(&[1, 1, QUEUES as u32]);
    assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING, [PAGE, 3, 0]), INVALID, "no such queue");
    assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING, [PAGE + 1, 1, 0]), INVALID, "no such page");
    assert_eq!(guest.spread.mapping, [3, 2, 0, 0, 0, 3, 2, 1]);
    let reads = guest.reads;
    assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING, [PAGE, 0, 8]), OKAY);
    assert_eq!(guest.reads, reads);
    // A new size forgets the table.
    assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING_SIZE, [2, 0, 0]), OKAY);
    assert_eq!(guest.spread.mapping, [0; 2]);
}

#[test]
fn xsa_270_a_part_that_ends_beyond_the_table_or_wraps() {
    let most = MAX_MAPPING as u32;
    let mut guest = Guest::hashing(most);
    assert_eq!(guest.ask(CTRL_GET_HASH_MAPPING_SIZE, [0; 3]), (CTRL_STATUS_SUCCESS, most));
    for (len, offset) in [
        (1, most),
        (most, 1),
        (most + 1, 0),
        (0, most + 1),
        (1, u32::MAX),
        (2, u32::MAX),
        (u32::MAX, 1),
        (u32::MAX, 2),
        (u32::MAX, u32::MAX),
        (most, u32::MAX - most + 1),
        (1 << 30, 0),
        (0x4000_0001, 0),
        (0x8000_0000, 0x8000_0000),
    ] {
        assert_eq!(
            guest.ask(CTRL_SET_HASH_MAPPING, [PAGE, len, offset]),
            INVALID,
            "{len} {offset}"
        );
    }
    assert_eq!(guest.reads, 0);
    assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING, [PAGE, most, 0]), OKAY);
    for wrong in [most + 1, 1 << 30, u32::MAX] {
        assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING_SIZE, [wrong, 0, 0]), INVALID);
    }
    // Without a table there is no part of it.
    let mut guest = Guest::hashing(0);
    assert_eq!(guest.ask(CTRL_SET_HASH_MAPPING, [PAGE, 1, 0]), INVALID);
}

#[test]
fn what_nobody_knows_is_not_supported() {
    let known = CTRL_GET_HASH_FLAGS..=CTRL_SET_HASH_ALGORITHM;
    let mut guest = Guest::hashing(4);
    for kind in (0..=300).chain([0x8000, u16::MAX]).filter(|kind| !known.contains(kind)) {
        assert_eq!(guest.ask(kind, [PAGE, 1, 0]), UNSUPPORTED, "{kind}");
    }
    for kind in [CTRL_GET_GREF_MAPPING_SIZE, CTRL_ADD_GREF_MAPPING, CTRL_DEL_GREF_MAPPING] {
        assert!(!known.contains(&kind));
    }
}
