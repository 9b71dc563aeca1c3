//! Requests that no honest frontend sends: each is refused by itself, and the device goes on.

use std::sync::Arc;

use blkback::proto::{
    Abi, Body, DirectOp, OP_READ, OP_WRITE, RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY, Request, Segment,
    X86_64,
};
use hypervisor::GrantedPages;
use zerocopy::FromBytes;

use crate::guest::{
    PERSISTENT, PLAIN, Queue, Raw, Wish, direct_n, indirect, put_table, read, whole, write,
};
use crate::image::patterned;
use crate::scene::{SECTORS, Scene};

/// Pages of the attacker: 32 of data, then one with a good table of 32 segments.
struct Pages {
    memory: Arc<dyn GrantedPages>,
    table: u32,
}

impl Pages {
    fn new(scene: &Scene) -> Pages {
        let memory = scene.domain.pages(33);
        let pages = Pages { table: memory.refs()[32], memory };
        pages.set_table(&pages.segments(32));
        pages
    }
    fn segments(&self, count: usize) -> Vec<Segment> {
        self.memory.refs()[..count].iter().map(|r| whole(*r)).collect()
    }
    fn set_table(&self, segments: &[Segment]) {
        for (i, s) in segments.iter().enumerate() {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&s.gref.to_le_bytes());
            (bytes[4], bytes[5]) = (s.first_sect, s.last_sect);
            self.memory.write(32 * 4096 + i * 8, &bytes);
        }
    }
}

/// A case: what it is, the request, the status that it must get.
type Case = (&'static str, Body, i16);

/// Asks each; after each, a good request of the same device must work, and nothing may have been
/// written.
fn all(cases: impl Fn(&Pages) -> Vec<Case>) {
    for wish in [PLAIN, PERSISTENT] {
        let mut scene = Scene::start();
        let mut queue = scene.connect(wish);
        let pages = Pages::new(&scene);
        pages.memory.write(0, &[0xbb; 4096]);
        scene.during(|| {
            for (what, body, status) in cases(&pages) {
                assert_eq!(queue.ask(body), status, "{what}: {body:?}");
                let zero = scene.domain.pages(1);
                assert_eq!(queue.ask(read(8, &[whole(zero.refs()[0])])), RSP_OKAY, "after {what}");
                let mut found = vec![0; 4096];
                zero.read(0, &mut found);
                assert!(found == scene.image.model()[4096..8192], "read after {what}");
            }
        });
        scene.image.verify().unwrap();
        let page = scene.domain.pages(1);
        queue.works(&*page, 16);
        scene.image.wrote(16 * 512, &patterned(16, 4096));
        drop((queue, page, pages));
        scene.finish();
    }
}

#[test]
fn unknown_operations_are_not_supported() {
    all(|_| {
        let unknown = |op| ("unknown operation", Body::Unknown(op), RSP_EOPNOTSUPP);
        [4, 7, 8, 127, 128, 255].map(unknown).to_vec()
    });
}

#[test]
fn segments_that_are_none() {
    all(|p| {
        let s = p.segments(11);
        let bounds = |first_sect, last_sect| Segment { first_sect, last_sect, ..s[0] };
        let mut cases = vec![
            ("no segments to read", read(0, &[]), RSP_ERROR),
            ("no segments to write", write(0, &[]), RSP_ERROR),
        ];
        for count in [12, 13, 127, 255] {
            cases.push(("too many to read", direct_n(DirectOp::Read, 0, &s, count), RSP_ERROR));
            cases.push(("too many to write", direct_n(DirectOp::Write, 0, &s, count), RSP_ERROR));
            cases.push(("too many to flush", direct_n(DirectOp::Flush, 0, &s, count), RSP_ERROR));
        }
        for (first, last) in [(1, 0), (7, 6), (0, 8), (8, 8), (7, 255), (255, 255), (255, 0)] {
            cases.push(("bounds of a read", read(0, &[bounds(first, last)]), RSP_ERROR));
            cases.push(("bounds of a write", write(0, &[bounds(first, last)]), RSP_ERROR));
            let last_one = [s[0], s[1], bounds(first, last)];
            cases.push(("bounds of the last one", write(0, &last_one), RSP_ERROR));
        }
        cases
    });
}

#[test]
fn ranges_beyond_the_end() {
    all(|p| {
        let s = p.segments(2);
        let discard = |sector, count| Body::Discard { sector, count, flag: 0 };
        let mut cases = Vec::new();
        for sector in
            [SECTORS, SECTORS - 7, SECTORS + 1, 1 << 55, u64::MAX - 7, u64::MAX - 15, u64::MAX]
        {
            cases.push(("a read", read(sector, &s), RSP_ERROR));
            cases.push(("a write", write(sector, &s), RSP_ERROR));
            cases.push(("a flush", direct_n(DirectOp::Flush, sector, &s, 2), RSP_ERROR));
            cases.push(("an indirect read", indirect(OP_READ, sector, 32, &[p.table]), RSP_ERROR));
            cases.push((
                "an indirect write",
                indirect(OP_WRITE, sector, 32, &[p.table]),
                RSP_ERROR,
            ));
            cases.push(("a discard", discard(sector, 8), RSP_ERROR));
        }
        for (sector, count) in [
            (0, SECTORS + 1),
            (SECTORS, 1),
            (1, u64::MAX),
            (8, u64::MAX - 7),
            (u64::MAX, u64::MAX),
            (0, 1 << 55),
        ] {
            cases.push(("a discard's length", discard(sector, count), RSP_ERROR));
        }
        cases
    });
}

#[test]
fn indirect_requests_that_lie() {
    all(|p| {
        let table = [p.table];
        let many = [p.table; 8];
        let mut cases = Vec::new();
        for inner in [2, 3, 4, 5, 6, 7, 255] {
            cases.push(("inner operation", indirect(inner, 0, 1, &table), RSP_ERROR));
        }
        cases.push(("no segments", indirect(OP_READ, 0, 0, &table), RSP_ERROR));
        for count in [257, 512, 4096, 4097, 65535] {
            cases.push(("more than offered", indirect(OP_READ, 0, count, &many), RSP_ERROR));
            cases.push(("more than offered", indirect(OP_WRITE, 0, count, &many), RSP_ERROR));
        }
        // 33 segments of which the table has 32: the 33rd is zeroes, and reference 0 is no grant.
        cases.push(("beyond the table's entries", indirect(OP_WRITE, 0, 33, &table), RSP_ERROR));
        cases.push(("no page", indirect(OP_WRITE, 0, 8, &[0]), RSP_ERROR));
        cases.push(("a page that is not granted", indirect(OP_READ, 0, 8, &[99_999]), RSP_ERROR));
        cases.push(("a page outside the table", indirect(OP_READ, 0, 8, &[u32::MAX]), RSP_ERROR));
        cases
    });
}

#[test]
fn indirect_tables_that_lie() {
    for wish in [PLAIN, PERSISTENT] {
        let scene = Scene::with(&["--set", "max_indirect_segments=1024"]);
        let mut queue = scene.connect(wish);
        let pages = Pages::new(&scene);
        // 513 segments need two pages of table; the second one is bad.
        let tables = scene.domain.pages(2);
        put_table(&*tables, &vec![whole(pages.memory.refs()[0]); 1024]);
        let bad =
            |first_sect, last_sect| Segment { gref: pages.memory.refs()[0], first_sect, last_sect };
        scene.during(|| {
            for (first, last) in [(1, 0), (0, 8), (255, 255), (7, 6)] {
                for k in [0, 1, 15, 31] {
                    let mut segments = pages.segments(32);
                    segments[k] = bad(first, last);
                    pages.set_table(&segments);
                    let body = indirect(OP_WRITE, 0, 32, &[pages.table]);
                    assert_eq!(queue.ask(body), RSP_ERROR, "segment {k}: {first} to {last}");
                }
            }
            for second in [0, 99_999, u32::MAX, u32::MAX / 2] {
                for op in [OP_READ, OP_WRITE] {
                    let body = indirect(op, 0, 513, &[tables.refs()[0], second]);
                    assert_eq!(queue.ask(body), RSP_ERROR, "second page {second}");
                }
            }
            let body = indirect(OP_READ, 0, 1024, tables.refs());
            assert_eq!(queue.ask(body), RSP_OKAY, "a good one of two pages");
            // As many segments as there are, of one sector more than the disk has.
            let body = indirect(OP_READ, SECTORS - 1024 * 8 + 1, 1024, tables.refs());
            assert_eq!(queue.ask(body), RSP_ERROR);
        });
        drop((queue, pages, tables));
        scene.finish();
    }
}

#[test]
fn what_was_not_offered_is_not_supported() {
    let scene = Scene::with(&["--set", "ordering=barrier"]);
    let mut queue = scene.connect(PLAIN);
    let pages = Pages::new(&scene);
    scene.during(|| {
        let flush = direct_n(DirectOp::Flush, 0, &[], 0);
        assert_eq!(queue.ask(flush), RSP_EOPNOTSUPP);
        assert_eq!(queue.ask(indirect(OP_READ, 0, 12, &[pages.table])), RSP_EOPNOTSUPP);
        assert_eq!(queue.ask(direct_n(DirectOp::Barrier, 0, &[], 0)), RSP_OKAY);
    });
    drop((queue, pages));
    scene.finish();
}

#[test]
fn a_read_only_disk_is_not_written() {
    let scene = Scene::start();
    let mode =
        format!("/local/domain/0/backend/vbd/{}/{}/mode", scene.domain.id, crate::scene::BAD);
    scene.rig.store.write(hypervisor::store::Tx::NONE, &mode, "r").unwrap();
    let mut queue = scene.connect(PLAIN);
    let pages = Pages::new(&scene);
    let s = pages.segments(1);
    scene.during(|| {
        assert_eq!(queue.ask(write(0, &s)), RSP_ERROR);
        assert_eq!(queue.ask(indirect(OP_WRITE, 0, 32, &[pages.table])), RSP_ERROR);
        assert_eq!(queue.ask(direct_n(DirectOp::Barrier, 0, &s, 1)), RSP_ERROR);
        assert_eq!(queue.ask(direct_n(DirectOp::Flush, 0, &s, 1)), RSP_ERROR);
        let discard = Body::Discard { sector: 0, count: 8, flag: 0 };
        assert_eq!(queue.ask(discard), RSP_EOPNOTSUPP);
        assert_eq!(queue.ask(read(0, &s)), RSP_OKAY);
    });
    drop((queue, pages));
    scene.finish();
}

/// A ring full of bad requests at once: each gets its own answer.
#[test]
fn a_ring_full_of_nonsense() {
    let scene = Scene::start();
    let wish = Wish { order: 2, ..PLAIN };
    let mut queue: Queue = scene.connect(wish);
    let slots = queue.ring.slots();
    scene.during(|| {
        for round in 0..20u64 {
            let mut open = std::collections::HashMap::new();
            for n in 0..u64::from(slots) {
                let mut raw = X86_64::encode(&Request { id: n, handle: 0, body: Body::Unknown(0) });
                let noise = patterned(round * 1000 + n, 112);
                let word = |at: usize| u64::from_le_bytes(noise[at..at + 8].try_into().unwrap());
                // Only operations that cannot write where the noise happens to be right.
                raw.operation = noise[0] | 8;
                raw.nr_segments = noise[1];
                raw.sector_number = word(16).into();
                open.insert(n, raw.operation);
                queue.ring.push(&raw).unwrap();
            }
            queue.publish();
            for _ in 0..slots {
                let answer = queue.answer();
                assert_eq!(open.remove(&answer.id), Some(answer.operation));
                assert_eq!(answer.status, RSP_EOPNOTSUPP);
            }
            assert!(open.is_empty());
        }
    });
    drop(queue);
    scene.finish();
}

/// Slots of any bytes at all: each is answered once, with its id and operation.
#[test]
fn slots_of_noise() {
    let scene = Scene::start();
    let mut queue: Queue = scene.connect(Wish { order: 2, persistent: true, ..PLAIN });
    let pages = Pages::new(&scene);
    let slots = u64::from(queue.ring.slots());
    let mut statuses = std::collections::BTreeMap::new();
    scene.during(|| {
        for round in 0..40u64 {
            let mut open = std::collections::HashMap::new();
            for n in 0..slots {
                let noise = patterned(round * 1000 + n, 112);
                let mut raw = Raw::read_from_bytes(&noise).unwrap();
                raw.id = n.into();
                // Near enough to right to get far.
                raw.operation = noise[90] % 8;
                raw.nr_segments = noise[91] % 13;
                raw.sector_number = (u64::from(noise[92]) * 40).into();
                for (s, piece) in raw.seg.iter_mut().enumerate() {
                    let page = usize::from(piece.gref.get() as u8) % 33;
                    piece.gref = pages.memory.refs()[page].into();
                    (piece.first_sect, piece.last_sect) = (noise[s] % 5, 3 + noise[s + 20] % 6);
                }
                let echo = if raw.operation == 6 { raw.nr_segments } else { raw.operation };
                open.insert(n, echo);
                queue.ring.push(&raw).unwrap();
            }
            queue.publish();
            for _ in 0..slots {
                let answer = queue.answer();
                assert_eq!(open.remove(&answer.id), Some(answer.operation), "{answer:?}");
                *statuses.entry(answer.status).or_insert(0) += 1;
            }
        }
    });
    let seen: Vec<i16> = statuses.keys().copied().collect();
    assert_eq!(seen, [RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY], "{statuses:?}");
    drop((queue, pages));
    let mut scene = scene;
    // It was its own disk to spoil.
    let now = scene.image.bytes(0..crate::scene::BYTES);
    scene.image.wrote(0, &now);
    scene.finish();
}
