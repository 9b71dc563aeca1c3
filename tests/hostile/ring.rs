//! The ring's own words: corrupt indices, what responses hold, when the backend notifies.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use blkback::proto::{Body, RSP_EOPNOTSUPP, RSP_OKAY};
use hypervisor::xenbus::State;

use crate::guest::{PLAIN, Queue, Raw, Wish, at, read, whole};
use crate::rig::until;
use crate::scene::{BAD, Scene};

/// Sets the producer index to what no frontend may, and wakes the backend.
fn lie(queue: &Queue, req_prod: u32) {
    queue.memory.word(at::REQ_PROD).store(req_prod, SeqCst);
    queue.channel.notify().unwrap();
}

#[test]
fn a_corrupt_producer_index_ends_the_device() {
    let scene = Scene::start();
    let page = scene.domain.pages(1);
    let mut queue = scene.connect(PLAIN);
    for (good, found) in [
        (0u32, 33u32),
        (0, u32::MAX),
        (5, 4),
        (5, 38),
        (40, 39),
        (3, 0x8000_0003),
        (2, 0x7fff_ffff),
    ] {
        scene.during(|| {
            for _ in 0..good {
                assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
            }
            lie(&queue, found);
            scene.fails_with(&format!(
                "{{}}.0: corrupt blkif ring: req_prod is {found}, possible is {good} to {}",
                good + 32
            ));
        });
        queue = scene.again(PLAIN);
    }
    queue.works(&*page, 0);
    drop((queue, page));
    let mut scene = scene;
    scene.image.wrote(0, &crate::image::patterned(0, 4096));
    scene.finish();
}

/// The ring as a predecessor left it after many requests: its indices wrap.
#[test]
fn an_index_that_wraps_is_judged_right() {
    let scene = Scene::start();
    scene.rig.wait(scene.domain.id, BAD, State::InitWait);
    let queue = scene.domain.prepare(BAD, PLAIN).remove(0);
    // No honest frontend starts here, but the backend takes it as it is.
    let start = u32::MAX - 10;
    for word in [at::REQ_PROD, at::RSP_PROD] {
        queue.memory.word(word).store(start, Relaxed);
    }
    scene.domain.set_state(BAD, State::Initialised);
    scene.wait(State::Connected);
    scene.during(|| {
        // 20 requests of zeroed slots: reads without a segment, all refused.
        queue.memory.word(at::REQ_PROD).store(start.wrapping_add(20), SeqCst);
        queue.channel.notify().unwrap();
        until("20 answers", || queue.memory.word(at::RSP_PROD).load(SeqCst) == 9);
        lie(&queue, 9 + 33);
        scene.fails_with("{}.0: corrupt blkif ring: req_prod is 42, possible is 9 to 41");
    });
    drop(queue);
    scene.finish();
}

/// Two queues fail at once: the device fails once, and is good again after a restart.
#[test]
fn both_queues_corrupt_are_one_fault() {
    let scene = Scene::with(&["--set", "max_queues=2"]);
    let wish = Wish { queues: 2, ..PLAIN };
    let mut queues = scene.connect_all(wish);
    for asked in [0, 1, 1, 1, 1] {
        scene.during(|| {
            queues.iter().for_each(|q| lie(q, 1000));
            scene.wait(State::Closing);
        });
        let error = scene.rig.error(scene.domain.id, BAD).unwrap();
        let wanted = [(0, 0), (1, asked)].map(|(queue, least)| {
            let name = format!("vbd-{}-{BAD}.{queue}", scene.domain.id);
            let most = least + 32;
            format!("{name}: corrupt blkif ring: req_prod is 1000, possible is {least} to {most}")
        });
        assert!(wanted.contains(&error), "{error}");
        scene.rig.clear_error(scene.domain.id, BAD);
        queues = scene.domain.again(&scene.rig, BAD, wish);
        let page = scene.domain.pages(1);
        assert_eq!(queues[1].ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
        assert_eq!(scene.rig.error(scene.domain.id, BAD), None, "a stale fault");
    }
    drop(queues);
    scene.finish();
}

#[test]
fn xsa_216_every_byte_of_a_response_is_defined() {
    let scene = Scene::start();
    let mut queue = scene.connect(PLAIN);
    let page = scene.domain.pages(1);
    scene.during(|| {
        for n in 0..200u32 {
            let slot = at::HEADER + (n % 32) as usize * at::SLOT;
            let good = n % 2 == 0;
            let id = 0x1122_3344_5566_7700 + u64::from(n);
            // A slot whose every byte is set, so that what was not written shows.
            let mut raw: Raw = zerocopy::FromZeros::new_zeroed();
            zerocopy::IntoBytes::as_mut_bytes(&mut raw).fill(0xff);
            raw.id = id.into();
            if good {
                raw.operation = 0;
                raw.nr_segments = 1;
                raw.sector_number = 0.into();
                raw.seg[0].gref = page.refs()[0].into();
                (raw.seg[0].first_sect, raw.seg[0].last_sect) = (0, 0);
            }
            queue.send_raw(&raw);
            let status = if good { RSP_OKAY } else { RSP_EOPNOTSUPP };
            assert_eq!(queue.answer().status, status);
            let mut found = [0; at::SLOT];
            queue.memory.read(slot, &mut found);
            let mut wanted = [0; 16];
            wanted[..8].copy_from_slice(&id.to_le_bytes());
            wanted[8] = raw.operation;
            wanted[10..12].copy_from_slice(&status.to_le_bytes());
            assert_eq!(found[..16], wanted, "bytes of response {n}");
            // Nothing behind the response but what this guest put there itself.
            assert_eq!(found[16..], zerocopy::IntoBytes::as_bytes(&raw)[16..]);
        }
        // Nothing was written into the ring's header beside its indices.
        let mut header = [0; 48];
        queue.memory.read(16, &mut header);
        assert_eq!(header, [0; 48]);
    });
    drop((queue, page));
    scene.finish();
}

#[test]
fn xsa_391_it_notifies_only_as_rsp_event_asks() {
    let scene = Scene::start();
    let mut queue = scene.connect(PLAIN);
    let rsp_event = |queue: &Queue, at_response: u32| {
        queue.memory.word(at::RSP_EVENT).store(at_response, SeqCst);
    };
    let mut answered = 0u32;
    let mut ask = |queue: &mut Queue, count: u32| {
        for _ in 0..count {
            queue.send(Body::Unknown(9));
            answered += 1;
            until("an answer", || queue.memory.word(at::RSP_PROD).load(SeqCst) == answered);
            assert!(queue.ring.take().unwrap().is_some());
        }
        answered
    };
    scene.during(|| {
        ask(&mut queue, 1);
        // Whatever came so far; the backend's own start may have notified.
        std::thread::sleep(std::time::Duration::from_millis(50));
        queue.channel.acknowledge().unwrap();
        rsp_event(&queue, 1 + 500);
        let done = ask(&mut queue, 499);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(done, 500);
        assert!(!queue.channel.acknowledge().unwrap(), "an event that nobody asked for");
        ask(&mut queue, 1);
        until("the event that was asked for", || queue.channel.acknowledge().unwrap());
        // In the past, or far away: none.
        for event in [0, 501, 501u32.wrapping_sub(100_000), 0x8000_0000] {
            rsp_event(&queue, event);
            ask(&mut queue, 20);
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!queue.channel.acknowledge().unwrap(), "an event for rsp_event {event}");
        }
    });
    drop(queue);
    scene.finish();
}
