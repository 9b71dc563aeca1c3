//! XSA-155: a second thread rewrites what the backend is reading. Each field of a request is
//! one of several versions at any time, so every request is some mixture of versions; whatever
//! the backend took, it must have taken once, judged that, and acted on that.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use blkback::proto::{OP_READ, OP_WRITE, RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY, Segment};
use hypervisor::GrantedPages;

use crate::guest::{PERSISTENT, PLAIN, Queue, Raw, Wish, at, indirect, put_table, whole, write};
use crate::image::patterned;
use crate::rig::PATIENCE;
use crate::scene::{SECTORS, Scene};

/// A word of shared memory and the values that it takes in turn.
struct Flip {
    memory: Arc<dyn GrantedPages>,
    offset: usize,
    values: Vec<u32>,
}

/// Rewrites words as fast as it can until told to stop; says how often it went round.
fn rewrite(flips: Vec<Flip>, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let stop = stop.clone();
    std::thread::spawn(move || {
        let mut round = 0u64;
        while !stop.load(Relaxed) {
            for (n, flip) in flips.iter().enumerate() {
                // Not in step, so that all mixtures occur.
                let mixed = (round * 8 + n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
                let value = flip.values[(mixed as usize) % flip.values.len()];
                flip.memory.word(flip.offset).store(value, Relaxed);
            }
            round += 1;
        }
        round
    })
}

/// What came of a race, by status.
#[derive(Debug, Default)]
struct Tally {
    okay: u32,
    error: u32,
    unsupported: u32,
}

impl Tally {
    fn lacks_any(&self) -> bool {
        !self.is_mixed() || self.unsupported == 0
    }
    fn is_mixed(&self) -> bool {
        self.okay > 0 && self.error > 0
    }
    fn count(&mut self, status: i16) {
        match status {
            RSP_OKAY => self.okay += 1,
            RSP_ERROR => self.error += 1,
            RSP_EOPNOTSUPP => self.unsupported += 1,
            other => panic!("status {other}"),
        }
    }
}

const FIRST: u64 = 100;
const SECOND: u64 = 2000;

/// Every word of a slot that decides anything, with good and bad values.
fn slot_versions(memory: &Arc<dyn GrantedPages>, slot: usize, grefs: [u32; 2]) -> Vec<Flip> {
    let base = at::HEADER + slot * at::SLOT;
    let flip = |offset: usize, values: Vec<u32>| Flip {
        memory: memory.clone(),
        offset: base + offset,
        values,
    };
    let head = |operation: u32, segments: u32| operation | segments << 8;
    let (read, write) = (u32::from(OP_READ), u32::from(OP_WRITE));
    let bounds = |first: u32, last: u32| first | last << 8;
    vec![
        flip(
            0,
            vec![
                head(write, 1),
                head(write, 1),
                head(read, 1),
                head(write, 200),
                head(77, 1),
                head(write, 0),
            ],
        ),
        flip(at::SECTOR, vec![FIRST as u32, SECOND as u32, SECTORS as u32, u32::MAX]),
        flip(at::SECTOR + 4, vec![0, 0, 0, u32::MAX]),
        flip(at::SEGMENTS, vec![grefs[0], grefs[1], 31_000]),
        flip(at::SEGMENTS + 4, vec![bounds(0, 7), bounds(2, 5), bounds(7, 0), bounds(0, 255)]),
    ]
}

/// Each sector of a range must be what it was, or the same sector of one of the pages (which a
/// segment may start anywhere in).
fn made_of(scene: &Scene, range: Range<usize>, pages: &[Vec<u8>]) {
    let found = scene.image.bytes(range.clone());
    for (i, sector) in found.chunks(512).enumerate() {
        let was = &scene.image.model()[range.start + i * 512..][..512];
        let from = |page: &Vec<u8>| page.chunks(512).any(|s| s == sector);
        assert!(
            sector == was || pages.iter().any(from),
            "sector {} is from nowhere",
            range.start / 512 + i
        );
    }
}

fn ranges() -> [Range<usize>; 2] {
    [FIRST, SECOND].map(|s| s as usize * 512..s as usize * 512 + 4096)
}

fn race(wish: Wish) {
    let scene = Scene::start();
    let mut queue: Queue = scene.connect(wish);
    let data = scene.domain.pages(3);
    let contents: Vec<Vec<u8>> = (0..2).map(|n| patterned(50 + n, 4096)).collect();
    let fill = || (0..2).for_each(|n| data.write(n * 4096, &contents[n]));
    fill();
    let stop = Arc::new(AtomicBool::new(false));
    let grefs = [data.refs()[0], data.refs()[1]];
    let mut flips = Vec::new();
    for slot in 0..32 {
        flips.extend(slot_versions(&queue.memory, slot, grefs));
    }
    let mut tally = Tally::default();
    scene.during(|| {
        let rewriter = rewrite(flips, &stop);
        let start = Instant::now();
        let mut rounds = 0;
        while rounds < 400 || tally.lacks_any() && start.elapsed() < PATIENCE {
            rounds += 1;
            for id in 0..16u64 {
                let mut raw: Raw = zerocopy::FromZeros::new_zeroed();
                raw.operation = OP_WRITE;
                raw.nr_segments = 1;
                raw.id = id.into();
                raw.sector_number = FIRST.into();
                raw.seg[0].gref = grefs[0].into();
                raw.seg[0].last_sect = 7;
                queue.ring.push(&raw).unwrap();
            }
            queue.publish();
            for _ in 0..16 {
                // The first word of a response, half of its id, is rewritten with the request's;
                // its operation and status are not.
                let answer = queue.answer();
                assert!([OP_READ, OP_WRITE, 77].contains(&answer.operation), "{answer:?}");
                let unknown = answer.operation == 77;
                assert_eq!(unknown, answer.status == RSP_EOPNOTSUPP, "two copies: {answer:?}");
                tally.count(answer.status);
            }
            fill();
        }
        stop.store(true, Relaxed);
        assert!(rewriter.join().unwrap() > 100, "the rewriter hardly ran");
    });
    assert!(!tally.lacks_any(), "{tally:?}");
    scene.image.verify_except(&ranges()).unwrap();
    // Reads go into the same pages, so what is written may also be what was read.
    let read = ranges().map(|range| scene.image.model()[range].to_vec());
    let sources = [contents, read.to_vec()].concat();
    ranges().into_iter().for_each(|range| made_of(&scene, range, &sources));
    drop((queue, data));
    let mut scene = scene;
    for range in ranges() {
        let now = scene.image.bytes(range.clone());
        scene.image.wrote(range.start, &now);
    }
    scene.finish();
}

#[test]
fn xsa_155_double_fetch_of_slots() {
    race(PLAIN);
}

#[test]
fn xsa_155_double_fetch_of_slots_with_persistent_grants() {
    race(PERSISTENT);
}

/// The table of an indirect request: each entry good or bad, changing all the while.
#[test]
fn xsa_155_double_fetch_of_indirect_pages() {
    for wish in [PLAIN, PERSISTENT] {
        let scene = Scene::start();
        let mut queue = scene.connect(wish);
        let (data, table) = (scene.domain.pages(16), scene.domain.pages(1));
        let contents: Vec<Vec<u8>> = (0..16).map(|n| patterned(80 + n, 4096)).collect();
        contents.iter().enumerate().for_each(|(n, page)| data.write(n * 4096, page));
        let segments: Vec<Segment> = data.refs().iter().map(|r| whole(*r)).collect();
        put_table(&*table, &segments);
        let flips = [3usize, 9, 15]
            .iter()
            .flat_map(|n| {
                let flip = |offset: usize, values: Vec<u32>| Flip {
                    memory: table.clone(),
                    offset,
                    values,
                };
                [
                    flip(n * 8, vec![data.refs()[*n], data.refs()[0], data.refs()[*n], 31_000]),
                    flip(n * 8 + 4, vec![7 << 8, 7 << 8, 7 << 8, 7, 255 << 8]),
                ]
            })
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let mut tally = Tally::default();
        scene.during(|| {
            let rewriter = rewrite(flips, &stop);
            let start = Instant::now();
            let mut rounds = 0;
            // On a busy machine the rewriter may be held up for long.
            while rounds < 375 || !tally.is_mixed() && start.elapsed() < PATIENCE {
                (0..8).for_each(|_| _ = queue.push(indirect(OP_WRITE, FIRST, 16, table.refs())));
                queue.publish();
                for _ in 0..8 {
                    let answer = queue.answer();
                    assert_eq!(answer.operation, OP_WRITE);
                    tally.count(answer.status);
                }
                rounds += 1;
            }
            stop.store(true, Relaxed);
            assert!(rewriter.join().unwrap() > 100);
        });
        assert!(tally.is_mixed() && tally.unsupported == 0, "{tally:?}");
        let range = FIRST as usize * 512..FIRST as usize * 512 + 16 * 4096;
        scene.image.verify_but(range.clone()).unwrap();
        made_of(&scene, range.clone(), &contents);
        drop((queue, data, table));
        let mut scene = scene;
        let now = scene.image.bytes(range.clone());
        scene.image.wrote(range.start, &now);
        scene.finish();
    }
}

/// The payload of a write changes while it is written: any mixture may arrive, but only there.
#[test]
fn a_payload_that_changes_stays_in_its_range() {
    let scene = Scene::start();
    let mut queue = scene.connect(PERSISTENT);
    let data = scene.domain.pages(4);
    let stop = Arc::new(AtomicBool::new(false));
    let flips = (0..4 * 1024)
        .step_by(16)
        .map(|n| Flip { memory: data.clone(), offset: n * 4, values: vec![0, u32::MAX, n as u32] })
        .collect();
    scene.during(|| {
        let rewriter = rewrite(flips, &stop);
        let segments: Vec<Segment> = data.refs().iter().map(|r| whole(*r)).collect();
        for _ in 0..1000 {
            assert_eq!(queue.ask(write(SECOND, &segments)), RSP_OKAY);
        }
        stop.store(true, Relaxed);
        rewriter.join().unwrap();
    });
    let range = SECOND as usize * 512..SECOND as usize * 512 + 4 * 4096;
    scene.image.verify_but(range.clone()).unwrap();
    drop((queue, data));
    let mut scene = scene;
    let now = scene.image.bytes(range.clone());
    scene.image.wrote(range.start, &now);
    scene.finish();
}
