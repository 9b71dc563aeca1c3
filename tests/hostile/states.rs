//! Frontends that say anything about their state.

use std::time::{Duration, Instant};

use blkback::proto::RSP_OKAY;
use hypervisor::store::Tx;
use hypervisor::xenbus::State;

use crate::guest::{PLAIN, read, whole};
use crate::scene::{BAD, Scene};

const LONG: Duration = Duration::from_millis(2000);
/// Lines that a guest may cause in a log within [`LONG`], and some for the start.
const LINES: usize = 60;

/// Writes states in a tight loop, with good ring keys in place.
fn flap(states: &[&str]) {
    let scene = Scene::start();
    scene.wait(State::InitWait);
    let queues = scene.domain.prepare(BAD, PLAIN);
    let mut threads = 0;
    let mut writes = 0u64;
    let lines = || scene.rig.log().lines().count();
    let before = lines();
    scene.during(|| {
        let start = Instant::now();
        while start.elapsed() < LONG {
            for state in states {
                scene.domain.set(BAD, "state", state);
                writes += 1;
            }
            threads = threads.max(scene.threads().len());
        }
    });
    let logged = lines() - before;
    eprintln!("{writes} writes, {logged} lines in the log");
    assert!(threads <= 2, "{threads} threads of one device with one queue");
    assert!(logged < LINES, "{logged} lines in the log by one guest");
    drop(queues);
    let mut queue = scene.again(PLAIN);
    scene.rig.clear_error(scene.domain.id, BAD);
    let page = scene.domain.pages(1);
    for _ in 0..50 {
        assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
    }
    assert_eq!(scene.rig.error(scene.domain.id, BAD), None);
    drop((queue, page));
    scene.finish();
}

#[test]
fn states_in_a_tight_loop() {
    flap(&["1", "2", "3", "4", "5", "6"]);
}

#[test]
fn states_backwards() {
    flap(&["6", "5", "4", "3", "2", "1"]);
}

#[test]
fn connect_and_vanish() {
    flap(&["1", "3", "4", "1", "4", "6"]);
}

#[test]
fn states_that_are_none() {
    flap(&[
        "",
        "4",
        "99",
        "-1",
        "connected",
        "3",
        "4294967300",
        "0",
        "7",
        "8",
        "9",
        " 4 ",
        "4.0",
        "1",
    ]);
}

/// Bytes that are no text, and no node at all.
#[test]
fn a_state_that_cannot_be_read() {
    let scene = Scene::start();
    let page = scene.domain.pages(1);
    let mut queue = scene.connect(PLAIN);
    let path = format!("device/vbd/{BAD}/state");
    scene.during(|| {
        for gone in [true, false, true, false] {
            match gone {
                true => scene.domain.unset(BAD, "state"),
                false => scene.domain.store.write(Tx::NONE, &path, [0xff, 0x34]).unwrap(),
            }
            scene.wait(State::Closed);
            queue = scene.again(PLAIN);
            assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
        }
    });
    drop((queue, page));
    scene.finish();
}
