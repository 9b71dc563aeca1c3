//! Grant references that are bad, revoked, another's, or read-only.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use blkback::proto::{Body, OP_READ, OP_WRITE, RSP_ERROR, RSP_OKAY, Segment};
use hypervisor::xenbus::State;
use hypervisor::{Access, GrantedPages, Guest};

use crate::guest::{PERSISTENT, PLAIN, Queue, Wish, at, indirect, put_table, read, whole, write};
use crate::image::patterned;
use crate::memory::RawGuest;
use crate::rig::until;
use crate::scene::{BAD, Scene};

/// A backend that maps pages for one request.
const LENT: [&str; 4] = ["--set", "grants=map", "--set", "cache=writeback"];

/// Connects with `ring-ref` set to a reference; the device must fail for this reason.
fn ring_ref(reason: &str, gref: impl FnOnce(&Scene) -> (u32, Option<Arc<dyn GrantedPages>>)) {
    let scene = Scene::start();
    let (gref, kept) = gref(&scene);
    scene.during(|| {
        scene.wait(State::InitWait);
        let queues = scene.domain.prepare(BAD, PLAIN);
        scene.domain.set(BAD, "ring-ref", &gref.to_string());
        scene.domain.set_state(BAD, State::Initialised);
        scene.fails_with(&format!(
            "{{}}.0: mapping ring-ref [{gref}]: grant reference {gref}: {reason}"
        ));
        drop(queues);
    });
    let mut queue = scene.again(PLAIN);
    let page = scene.domain.pages(1);
    assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
    drop((queue, page, kept));
    scene.finish();
}

#[test]
fn a_ring_outside_the_grant_table() {
    ring_ref("reference outside the table", |_| (4_000_000_000, None));
}

#[test]
fn a_ring_that_is_not_granted() {
    ring_ref("not granted", |_| (3, None));
}

#[test]
fn a_ring_granted_to_another_domain() {
    ring_ref("granted to another domain", |scene| {
        let pages = scene.domain.guest.grant(scene.other.id, 1, Access::ReadWrite).unwrap();
        (pages.refs()[0], Some(pages))
    });
}

#[test]
fn a_ring_granted_read_only() {
    ring_ref("granted read-only", |scene| {
        let pages = scene.domain.read_only(1);
        (pages.refs()[0], Some(pages))
    });
}

#[test]
fn a_ring_of_many_pages_one_of_them_bad() {
    let scene = Scene::start();
    let wish = Wish { order: 2, ..PLAIN };
    scene.wait(State::InitWait);
    for k in 0..4 {
        scene.during(|| {
            let queue = scene.domain.prepare(BAD, wish).remove(0);
            let mut refs = queue.memory.refs().to_vec();
            refs[k] = 3;
            scene.domain.set(BAD, &format!("ring-ref{k}"), "3");
            scene.domain.set_state(BAD, State::Initialised);
            scene.fails_with(&format!(
                "{{}}.0: mapping ring-ref {refs:?}: grant reference 3: not granted"
            ));
        });
        scene.domain.set_state(BAD, State::Closed);
        scene.wait(State::Closed);
        scene.domain.set_state(BAD, State::Initialising);
        scene.wait(State::InitWait);
    }
    scene.finish();
}

/// References that must not be used, each in a segment and in the place of a table.
#[test]
fn bad_references_fail_their_request() {
    for (wish, args) in [(PLAIN, &[][..]), (PERSISTENT, &[]), (PLAIN, &LENT)] {
        let scene = Scene::with(args);
        let mut queue = scene.connect(wish);
        let foreign = scene.domain.guest.grant(scene.other.id, 1, Access::ReadWrite).unwrap();
        let others = scene.other.pages(64);
        let unused = others.refs().iter().copied().max().unwrap() + 5000;
        let good = scene.domain.pages(1);
        scene.during(|| {
            for gref in [0, 7, unused, foreign.refs()[0], 32_767, 32_768, u32::MAX] {
                for sector in [0, 800] {
                    assert_eq!(
                        queue.ask(read(sector, &[whole(gref)])),
                        RSP_ERROR,
                        "read to {gref}"
                    );
                    assert_eq!(queue.ask(write(sector, &[whole(gref)])), RSP_ERROR, "write {gref}");
                    for op in [OP_READ, OP_WRITE] {
                        let body = indirect(op, sector, 8, &[gref]);
                        assert_eq!(queue.ask(body), RSP_ERROR, "table {gref}");
                    }
                }
                assert_eq!(queue.ask(read(0, &[whole(good.refs()[0])])), RSP_OKAY);
            }
        });
        scene.image.verify().unwrap();
        drop((queue, good, foreign));
        scene.finish();
    }
}

#[test]
fn a_read_into_a_read_only_grant_fails() {
    for wish in [PLAIN, PERSISTENT] {
        let mut scene = Scene::start();
        let mut queue = scene.connect(wish);
        let (pages, good) = (scene.domain.read_only(2), scene.domain.pages(1));
        let data = patterned(3, 4096);
        pages.write(0, &data);
        scene.during(|| {
            let s = whole(pages.refs()[0]);
            for _ in 0..3 {
                assert_eq!(queue.ask(read(80, &[s])), RSP_ERROR);
                assert_eq!(queue.ask(read(80, &[whole(good.refs()[0]), s])), RSP_ERROR);
                assert_eq!(queue.ask(write(80, &[s])), RSP_OKAY, "it may be read");
            }
            let mut found = vec![0; 4096];
            pages.read(0, &mut found);
            assert!(found == data, "a read-only page was written");
        });
        scene.image.wrote(80 * 512, &data);
        drop((queue, pages, good));
        scene.finish();
    }
}

/// The k-th reference of a request, and of a batch of requests, is bad, for every k: that
/// request fails, no other.
#[test]
fn xsa_361_the_kth_of_a_batch_fails_alone() {
    for wish in [PLAIN, PERSISTENT] {
        let scene = Scene::start();
        let mut queue = scene.connect(wish);
        let pages = scene.domain.pages(32);
        let refs = pages.refs().to_vec();
        scene.during(|| {
            for k in 0..11 {
                let mut segments: Vec<Segment> = refs[..11].iter().map(|r| whole(*r)).collect();
                segments[k].gref = 31_000;
                let bad = queue.push(read(0, &segments));
                segments[k].gref = refs[k];
                let good = queue.push(read(0, &segments));
                queue.publish();
                let mut statuses = [0, 0].map(|_: i32| queue.answer()).map(|a| (a.id, a.status));
                statuses.sort();
                assert_eq!(statuses, [(bad, RSP_ERROR), (good, RSP_OKAY)], "segment {k}");
            }
            for k in 0..32 {
                for body in [read, write] {
                    let ids: Vec<u64> = (0..32)
                        .map(|i| {
                            let gref = if i == k { 31_000 } else { refs[i] };
                            pages.write(i * 4096, &scene.image.model()[i * 4096..][..4096]);
                            queue.push(body(i as u64 * 8, &[whole(gref)]))
                        })
                        .collect();
                    queue.publish();
                    for _ in 0..32 {
                        let answer = queue.answer();
                        let wanted = if answer.id == ids[k] { RSP_ERROR } else { RSP_OKAY };
                        assert_eq!(answer.status, wanted, "{k} of the batch is bad: {answer:?}");
                    }
                }
            }
        });
        drop((queue, pages));
        scene.finish();
    }
}

/// A mapping fails at each segment of a large request; the same pages are used again at once.
#[test]
fn xsa_362_365_367_a_failed_mapping_leaves_nothing_stale() {
    for wish in [PLAIN, PERSISTENT] {
        let mut scene = Scene::start();
        let mut queue = scene.connect(wish);
        let (pages, table) = (scene.domain.pages(40), scene.domain.pages(1));
        scene.during(|| {
            for k in 0..40usize {
                let mut segments: Vec<Segment> = pages.refs().iter().map(|r| whole(*r)).collect();
                segments[k].gref = 31_000 + k as u32;
                put_table(&*table, &segments);
                let ask = |queue: &mut Queue, op| queue.ask(indirect(op, 0, 40, table.refs()));
                assert_eq!(ask(&mut queue, OP_WRITE), RSP_ERROR, "segment {k}");
                assert_eq!(ask(&mut queue, OP_READ), RSP_ERROR, "segment {k}");
                segments[k].gref = pages.refs()[k];
                put_table(&*table, &segments);
                let data = patterned(100 + k as u64, 40 * 4096);
                pages.write(0, &data);
                assert_eq!(ask(&mut queue, OP_WRITE), RSP_OKAY, "after segment {k}");
                pages.write(0, &vec![0; 40 * 4096]);
                assert_eq!(ask(&mut queue, OP_READ), RSP_OKAY, "after segment {k}");
                let mut found = vec![0; 40 * 4096];
                pages.read(0, &mut found);
                assert!(found == data, "after segment {k}");
            }
        });
        scene.image.wrote(0, &patterned(139, 40 * 4096));
        drop((queue, pages, table));
        scene.finish();
    }
}

/// Without persistent grants nothing of a request is in use once its response can be seen.
#[test]
fn xsa_396_access_ends_before_the_response() {
    for args in [&[][..], &LENT] {
        access_ends_before_the_response(Scene::with(args));
    }
}

fn access_ends_before_the_response(scene: Scene) {
    let mut queue = scene.connect(PLAIN);
    let raw = RawGuest::of(&scene.rig, scene.domain.id);
    let arena = raw.open_arena(0, Access::ReadWrite);
    scene.during(|| {
        for round in 0..300u32 {
            let refs = raw.grant(&arena, 0, 4);
            let segments: Vec<Segment> = refs[..3].iter().map(|r| whole(*r)).collect();
            let body = match round % 3 {
                0 => read(0, &segments),
                1 => read(8, &segments[..1]),
                _ => {
                    arena.write(3, &table_of(&segments));
                    indirect(OP_READ, 0, 3, &refs[3..])
                }
            };
            assert_eq!(queue.ask(body), RSP_OKAY);
            assert_eq!(raw.end_access(&refs), [0; 4], "still in use when answered: round {round}");
        }
    });
    drop(queue);
    scene.finish();
}

fn table_of(segments: &[Segment]) -> Vec<u8> {
    let entry = |s: &Segment| {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&s.gref.to_le_bytes());
        (bytes[4], bytes[5]) = (s.first_sect, s.last_sect);
        bytes
    };
    segments.iter().flat_map(entry).collect()
}

/// References are revoked and granted anew while requests use them.
#[test]
fn a_reference_revoked_during_use_fails_its_request_at_most() {
    for (wish, args) in [(PLAIN, &[][..]), (PERSISTENT, &[]), (PLAIN, &LENT)] {
        let scene = Scene::with(args);
        let mut queue = scene.connect(wish);
        let raw = RawGuest::of(&scene.rig, scene.domain.id);
        let arena = raw.open_arena(0, Access::ReadWrite);
        let mut seen = [0u32; 2];
        scene.during(|| {
            for round in 0..400u32 {
                let refs = raw.grant(&arena, 0, 8);
                let segments: Vec<Segment> = refs.iter().map(|r| whole(*r)).collect();
                for _ in 0..8 {
                    queue.push(read(u64::from(round % 50) * 8, &segments));
                }
                queue.publish();
                // At once, or when some have been answered.
                let answered = queue.memory.word(at::RSP_PROD);
                let enough = round * 8 + round % 3 * 3;
                until("some answers", || answered.load(Relaxed) >= enough);
                let ended = raw.end_access(&refs);
                for _ in 0..8 {
                    match queue.answer().status {
                        RSP_OKAY => seen[0] += 1,
                        RSP_ERROR => seen[1] += 1,
                        other => panic!("status {other}"),
                    }
                }
                // What the backend keeps mapped cannot end; without persistence all can.
                let left: Vec<u32> =
                    refs.iter().zip(&ended).filter(|(_, s)| **s != 0).map(|(r, _)| *r).collect();
                if !wish.persistent {
                    assert!(raw.end_access(&left).iter().all(|s| *s == 0), "{ended:?}");
                } else if !left.is_empty() {
                    raw.end_access(&left);
                }
            }
        });
        assert!(seen[0] > 0 && seen[1] > 0, "nothing was ever revoked in time: {seen:?}");
        scene.image.verify().unwrap();
        drop(queue);
        scene.finish();
    }
}

/// Bytes outside a segment's sectors are nobody's business.
#[test]
fn xsa_403_nothing_is_touched_outside_a_segment() {
    for wish in [PLAIN, PERSISTENT] {
        let mut scene = Scene::start();
        let mut queue = scene.connect(wish);
        let pages = scene.domain.pages(2);
        let written = 800 * 512..800 * 512 + 4096;
        let mut disk = scene.image.model()[written.clone()].to_vec();
        scene.during(|| {
            for first in 0..8u8 {
                for last in first..8 {
                    let s = Segment { gref: pages.refs()[0], first_sect: first, last_sect: last };
                    let (from, to) = (usize::from(first) * 512, usize::from(last) * 512 + 512);
                    pages.write(0, &[0xaa; 8192]);
                    assert_eq!(queue.ask(read(64, &[s])), RSP_OKAY);
                    let mut found = vec![0; 8192];
                    pages.read(0, &mut found);
                    let mut wanted = vec![0xaa; 8192];
                    wanted[from..to].copy_from_slice(&scene.image.model()[64 * 512..][..to - from]);
                    assert!(found == wanted, "sectors {first} to {last} of a read");
                    let data = patterned(u64::from(first) * 8 + u64::from(last), 4096);
                    pages.write(0, &data);
                    assert_eq!(queue.ask(write(800, &[s])), RSP_OKAY);
                    disk[..to - from].copy_from_slice(&data[from..to]);
                    assert!(
                        scene.image.bytes(written.clone()) == disk,
                        "sectors {first} to {last}"
                    );
                    scene.image.verify_but(written.clone()).unwrap();
                }
            }
        });
        scene.image.wrote(800 * 512, &disk);
        drop((queue, pages));
        scene.finish();
    }
}

/// The copy buffer and the kept mappings go with the device.
#[test]
fn xsa_371_after_teardown_nothing_is_mapped() {
    let scene = Scene::start();
    let raw = RawGuest::of(&scene.rig, scene.domain.id);
    let arena = raw.open_arena(0, Access::ReadWrite);
    for round in 0..5 {
        let mut queue =
            if round == 0 { scene.connect(PERSISTENT) } else { scene.again(PERSISTENT) };
        let refs = raw.grant(&arena, 0, 64);
        scene.during(|| {
            for some in refs.chunks(8) {
                let segments: Vec<Segment> = some.iter().map(|r| whole(*r)).collect();
                assert_eq!(queue.ask(read(0, &segments)), RSP_OKAY);
                // A failed one between them.
                let bad = Segment { gref: 31_000, ..segments[0] };
                assert_eq!(queue.ask(read(0, &[segments[0], bad])), RSP_ERROR);
            }
            // The negative control: while the device lives they are in use.
            assert_ne!(raw.end_access(&refs[..1]), [0], "a persistent grant was not in use");
            scene.domain.close(&scene.rig, BAD);
        });
        let ended = raw.end_access(&refs);
        assert!(ended.iter().all(|status| *status == 0), "round {round}: {ended:?}");
        drop(queue);
    }
    scene.finish();
}

/// A table that is fine, in a page that only may be read, or is another's: only reading is needed.
#[test]
fn a_table_may_be_read_only() {
    let scene = Scene::start();
    let mut queue = scene.connect(PERSISTENT);
    let (pages, table) = (scene.domain.pages(4), scene.domain.read_only(1));
    put_table(&*table, &pages.refs().iter().map(|r| whole(*r)).collect::<Vec<_>>());
    let body: Body = indirect(OP_READ, 0, 4, table.refs());
    scene.during(|| assert_eq!(queue.ask(body), RSP_OKAY));
    drop((queue, pages, table));
    scene.finish();
}
