//! Floods: of events, of changes in the store.

use std::time::{Duration, Instant};

use blkback::proto::RSP_OKAY;
use hypervisor::store::Tx;
use hypervisor::xenbus::State;

use crate::guest::{PLAIN, read, whole};
use crate::scene::{BAD, Scene};

/// How long a storm lasts.
const STORM: Duration = Duration::from_millis(1500);

/// A share of one processor in percent.
fn share(cpu: Duration, of: Duration) -> u128 {
    cpu.as_micros() * 100 / of.as_micros().max(1)
}

#[test]
fn xsa_332_an_event_storm_costs_the_backend_little() {
    let scene = Scene::start();
    let queue = scene.connect(PLAIN);
    let name = format!("vbd-{}-{BAD}.0", scene.domain.id);
    let mut events = 0u64;
    let percent = scene.during(|| {
        let (start, before) = (Instant::now(), scene.rig.process().cpu(&name));
        while start.elapsed() < STORM {
            for _ in 0..64 {
                queue.channel.notify().unwrap();
            }
            events += 64;
        }
        share(scene.rig.process().cpu(&name) - before, start.elapsed())
    });
    eprintln!("{events} events, the queue's thread took {percent} % of a processor");
    assert!(events > 10_000, "no storm: {events} events");
    assert!(percent < 10, "the queue's thread took {percent} % of a processor");
    let mut queue = queue;
    let page = scene.domain.pages(1);
    // It is served, if late.
    let start = Instant::now();
    assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
    assert!(start.elapsed() < Duration::from_secs(1));
    drop((queue, page));
    scene.finish();
}

/// The storm goes on while its own device does I/O.
#[test]
fn xsa_332_a_device_works_during_its_own_storm() {
    let scene = Scene::start();
    let mut queue = scene.connect(PLAIN);
    let page = scene.domain.pages(1);
    let (mut done, start) = (0, Instant::now());
    scene.during(|| {
        while start.elapsed() < STORM {
            for _ in 0..200 {
                queue.channel.notify().unwrap();
            }
            assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
            done += 1;
        }
    });
    assert!(done > 20, "{done} requests");
    drop((queue, page));
    scene.finish();
}

/// A guest that writes its keys as fast as it can: the backend's memory stays bounded.
#[test]
fn xsa_349_a_flood_of_watch_events_costs_no_memory() {
    let scene = Scene::start();
    let mut queue = scene.connect(PLAIN);
    let page = scene.domain.pages(1);
    assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
    let before = scene.rig.process().resident();
    let (mut written, mut most) = (0u64, 0);
    scene.during(|| {
        let start = Instant::now();
        while start.elapsed() < STORM * 2 {
            for n in 0..50 {
                // Below the watched node too: each event has a path of its own.
                let path = format!("device/vbd/{BAD}/state/{}", written % 600);
                scene.domain.store.write(Tx::NONE, &path, "x").unwrap();
                scene.domain.set(BAD, "state", if n % 2 == 0 { "4" } else { "4 " });
                written += 2;
            }
            most = most.max(scene.rig.process().resident());
        }
    });
    eprintln!("{written} writes, {before} KiB before, {most} KiB at most");
    assert!(written > 500, "no flood: {written} writes");
    assert!(most < before + 8 * 1024, "from {before} to {most} KiB by {written} writes");
    assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY, "the device went on");
    scene.domain.unset(BAD, "state");
    scene.domain.set_state(BAD, State::Closed);
    scene.wait(State::Closed);
    drop((queue, page));
    scene.finish();
}
