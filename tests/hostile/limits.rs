//! Requests that exhaust something: pages of the buffer, places of the pool, patience.

use std::sync::Arc;

use blkback::proto::{DirectOp, OP_READ, OP_WRITE, RSP_ERROR, RSP_OKAY, Segment};
use hypervisor::{Access, GrantedPages};

use crate::guest::{PERSISTENT, PLAIN, Queue, Wish, direct_n, indirect, put_table, read, whole};
use crate::image::patterned;
use crate::memory::RawGuest;
use crate::scene::{BAD, Scene};

/// A ring of 512 slots.
const LARGE: Wish = Wish { order: 4, ..PLAIN };

fn segments(pages: &Arc<dyn GrantedPages>) -> Vec<Segment> {
    pages.refs().iter().map(|r| whole(*r)).collect()
}

fn answers(queue: &mut Queue, count: usize, mut wanted: impl FnMut(u64) -> i16) {
    for n in 0..count {
        let answer = queue.answer();
        assert_eq!(answer.status, wanted(answer.id), "answer {n} of {count}: {answer:?}");
    }
}

/// Each of many requests needs an eighth of the buffer: they wait for one another.
#[test]
fn more_payload_at_once_than_the_buffer_holds() {
    let scene = Scene::start();
    let mut queue = scene.connect(LARGE);
    let (pages, table) = (scene.domain.pages(256), scene.domain.pages(1));
    put_table(&*table, &segments(&pages));
    scene.during(|| {
        (0..64).for_each(|_| _ = queue.push(indirect(OP_READ, 0, 256, table.refs())));
        queue.publish();
        answers(&mut queue, 64, |_| RSP_OKAY);
        let mut found = vec![0; 1 << 20];
        pages.read(0, &mut found);
        assert!(found == scene.image.model()[..1 << 20]);
    });
    drop((queue, pages, table));
    scene.finish();
}

/// Requests that fail without ever having reached the disk free their places for the next.
#[test]
fn failures_in_a_row_do_not_stall_the_queue() {
    for wish in [LARGE, Wish { persistent: true, ..LARGE }] {
        let scene = Scene::start();
        let mut queue = scene.connect(wish);
        let (pages, bad) = (scene.domain.pages(256), scene.domain.pages(1));
        let mut list = segments(&pages);
        list[255].gref = 31_000;
        put_table(&*bad, &list);
        let good = [whole(pages.refs()[0])];
        scene.during(|| {
            for _ in 0..5 {
                (0..40).for_each(|_| _ = queue.push(indirect(OP_WRITE, 0, 256, bad.refs())));
                let last = queue.push(read(0, &good));
                queue.publish();
                answers(&mut queue, 41, |id| if id == last { RSP_OKAY } else { RSP_ERROR });
            }
        });
        drop((queue, pages, bad));
        scene.finish();
    }
}

/// A barrier that fails holds nobody up.
#[test]
fn barriers_that_fail_do_not_stall_the_queue() {
    let scene = Scene::start();
    let mut queue = scene.connect(LARGE);
    let page = scene.domain.pages(1);
    let (bad, good) = ([whole(31_000)], [whole(page.refs()[0])]);
    scene.during(|| {
        for _ in 0..20 {
            let barrier = direct_n(DirectOp::Barrier, 0, &bad, 1);
            (0..5).for_each(|_| _ = queue.push(barrier));
            let first = queue.push(read(0, &good));
            (0..5).for_each(|_| _ = queue.push(barrier));
            let second = queue.push(direct_n(DirectOp::Barrier, 0, &[], 0));
            queue.publish();
            let right = |id| if id == first || id == second { RSP_OKAY } else { RSP_ERROR };
            answers(&mut queue, 12, right);
        }
    });
    drop((queue, page));
    scene.finish();
}

/// One page in all segments of a request, and of all requests at once.
#[test]
fn the_same_page_everywhere() {
    for wish in [PLAIN, PERSISTENT] {
        let scene = Scene::start();
        let mut queue = scene.connect(wish);
        let raw = RawGuest::of(&scene.rig, scene.domain.id);
        let arena = raw.open_arena(0, Access::ReadWrite);
        let refs = raw.grant(&arena, 0, 3);
        let same = [whole(refs[0]); 11];
        let entry = [&refs[1].to_le_bytes()[..], &[0, 7, 0, 0]].concat();
        arena.write(2, &entry.repeat(256));
        scene.during(|| {
            for _ in 0..20 {
                (0..16).for_each(|n| _ = queue.push(read(n * 88, &same)));
                (0..8).for_each(|n| _ = queue.push(indirect(OP_READ, n * 8, 256, &refs[2..])));
                queue.publish();
                answers(&mut queue, 24, |_| RSP_OKAY);
            }
            scene.domain.close(&scene.rig, BAD);
        });
        assert_eq!(raw.end_access(&refs), [0; 3], "something is still mapped");
        drop(queue);
        scene.finish();
    }
}

/// The pool of kept mappings is far too small for the guest's pages.
#[test]
fn more_pages_than_the_pool_keeps() {
    for limit in ["max_persistent_grants=1", "max_persistent_grants=7", "max_persistent_grants=40"]
    {
        let mut scene = Scene::with(&["--set", limit]);
        let mut queue = scene.connect(PERSISTENT);
        let (pages, tables) = (scene.domain.pages(96), scene.domain.pages(3));
        let all = segments(&pages);
        let data = patterned(5, 96 * 4096);
        let mut list = vec![0; 3 * 4096];
        for (n, some) in all.chunks(32).enumerate() {
            for (i, s) in some.iter().enumerate() {
                list[n * 4096 + i * 8..][..4].copy_from_slice(&s.gref.to_le_bytes());
                list[n * 4096 + i * 8 + 5] = 7;
            }
        }
        tables.write(0, &list);
        let each = |queue: &mut Queue, op| {
            for (n, table) in tables.refs().iter().enumerate() {
                queue.push(indirect(op, n as u64 * 256, 32, &[*table]));
            }
            queue.publish();
            answers(queue, 3, |_| RSP_OKAY);
        };
        scene.during(|| {
            for _ in 0..30 {
                pages.write(0, &data);
                each(&mut queue, OP_WRITE);
                pages.write(0, &vec![0; data.len()]);
                each(&mut queue, OP_READ);
                let mut found = vec![0; data.len()];
                pages.read(0, &mut found);
                assert!(found == data, "{limit}");
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
        scene.image.wrote(0, &data);
        drop((queue, pages, tables));
        scene.finish();
    }
}
