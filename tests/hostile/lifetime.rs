//! Devices and guests that end, or start again, at the worst moment.

use std::sync::atomic::Ordering::SeqCst;

use blkback::proto::{RSP_OKAY, Segment};
use hypervisor::xenbus::State;

use crate::guest::{Domain, PERSISTENT, PLAIN, Queue, at, read, whole, write};
use crate::image::patterned;
use crate::rig::until;
use crate::scene::{BAD, GOOD, Scene};

fn corrupt(queue: &Queue) {
    queue.memory.word(at::REQ_PROD).store(99_999, SeqCst);
    queue.channel.notify().unwrap();
}

/// A bad packet, and the domain is destroyed before, while and after the backend sees it.
#[test]
fn xsa_374_a_bad_packet_then_destroy() {
    let scene = Scene::start();
    for round in 0..12u64 {
        let doomed = Domain::new(&scene.rig.toolstack, "doomed");
        let image = scene.rig.image("doomed.img", 1 << 20);
        scene.rig.attach(doomed.id, GOOD, image.path(), "");
        let mut queue = doomed.connect(&scene.rig, GOOD, PERSISTENT).remove(0);
        let pages = doomed.pages(8);
        let segments: Vec<Segment> = pages.refs().iter().map(|r| whole(*r)).collect();
        (0..16).for_each(|n| _ = queue.push(read(n * 8, &segments)));
        queue.publish();
        scene.during(|| {
            corrupt(&queue);
            std::thread::sleep(std::time::Duration::from_micros(round * 300));
            scene.rig.toolstack.destroy_domain(doomed.id).unwrap();
            gone(&scene, doomed.id);
        });
        image.verify().unwrap();
    }
    scene.finish();
}

/// Waits until nothing of a domain is left in the backend or the store.
pub fn gone(scene: &Scene, domid: u16) {
    until("the node goes", || scene.rig.state(domid, GOOD).is_none());
    let prefix = format!("vbd-{domid}-");
    until("its threads end", || {
        !scene.rig.process().threads().iter().any(|(name, _)| name.starts_with(&prefix))
    });
    until("its memory is unmapped", || scene.rig.process().mappings(Some(domid)).is_empty());
}

/// The frontend starts anew without a word, as after suspend or kexec, with requests in flight.
#[test]
fn xsa_465_a_frontend_that_resumes() {
    let mut scene = Scene::start();
    for wish in [PLAIN, PERSISTENT] {
        let mut queue = scene.connect(wish);
        for round in 0..10u64 {
            let pages = scene.domain.pages(8);
            let data = patterned(round, 8 * 4096);
            pages.write(0, &data);
            let segments: Vec<Segment> = pages.refs().iter().map(|r| whole(*r)).collect();
            queue = scene.during(|| {
                (0..16).for_each(|n| _ = queue.push(write(n * 64, &segments)));
                queue.publish();
                scene.domain.set_state(BAD, State::Initialising);
                scene.rig.wait(scene.domain.id, BAD, State::InitWait);
                let mut queue = scene.connect(wish);
                // What the old ring was given is done or not, but nothing is done later.
                (0..16).for_each(|n| assert_eq!(queue.ask(write(n * 64, &segments)), RSP_OKAY));
                queue
            });
            (0..16).for_each(|n| scene.image.wrote(n * 64 * 512, &data));
            scene.image.verify().unwrap();
            assert_eq!(scene.rig.error(scene.domain.id, BAD), None);
        }
        scene.domain.close(&scene.rig, BAD);
        drop(queue);
        scene.domain.set_state(BAD, State::Initialising);
    }
    scene.finish();
}

/// The old ring's memory holds something else by the time that the new one is announced: the
/// fault of the old one must not hit the new one.
#[test]
fn xsa_465_a_ring_overwritten_before_the_restart() {
    let scene = Scene::start();
    let page = scene.domain.pages(1);
    let mut queue = scene.connect(PLAIN);
    for round in 0..30u64 {
        queue = scene.during(|| {
            corrupt(&queue);
            std::thread::sleep(std::time::Duration::from_micros(round * 100));
            scene.domain.set_state(BAD, State::Initialising);
            scene.rig.wait(scene.domain.id, BAD, State::InitWait);
            let mut queue = scene.connect(PLAIN);
            for _ in 0..20 {
                assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
            }
            assert_eq!(scene.state(), Some(State::Connected), "a stale fault");
            queue
        });
    }
    drop((queue, page));
    scene.finish();
}

/// A close with a full ring: everything that was asked is answered before the end.
#[test]
fn a_close_answers_what_is_in_flight() {
    for wish in [PLAIN, PERSISTENT] {
        let scene = Scene::start();
        let mut queue = scene.connect(wish);
        for round in 0..5 {
            let pages = scene.domain.pages(8);
            let segments: Vec<Segment> = pages.refs().iter().map(|r| whole(*r)).collect();
            scene.during(|| {
                (0..32).for_each(|n| _ = queue.push(read(n * 64, &segments)));
                queue.publish();
                scene.domain.set_state(BAD, State::Closing);
                scene.wait(State::Closing);
                for _ in 0..32 {
                    assert_eq!(queue.answer().status, RSP_OKAY, "round {round}");
                }
                scene.domain.set_state(BAD, State::Closed);
                scene.wait(State::Closed);
            });
            scene.domain.set_state(BAD, State::Initialising);
            queue = scene.connect(wish);
        }
        drop(queue);
        scene.finish();
    }
}
