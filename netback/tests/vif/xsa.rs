//! Frontends that do what went wrong in other backends: each test is named by its advisory.

use std::sync::atomic::{AtomicBool, Ordering};

use hypervisor::xenbus::State;
use netback::FrontOptions;
use netback::proto::{
    EXTRA_TYPE_GSO, ExtraInfo, RSP_ERROR, RSP_NULL, RSP_OKAY, TX_CSUM_BLANK, TX_EXTRA_INFO,
    TX_MORE_DATA, TxRequest,
};

use crate::raw::Raw;
use crate::rig::{DEVID, Driver, Rig};
use crate::{ALL, opaque, round_trip};

const MORE: u16 = TX_MORE_DATA;

fn looped() -> (Rig, Raw) {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    let raw = Raw::connect(&rig.guest(), DEVID, ALL);
    (rig, raw)
}

/// Writes a packet's bytes into pages, `pieces` of them, and gives its slots.
fn spread(raw: &Raw, bytes: &[u8], pieces: &[usize]) -> Vec<TxRequest> {
    let mut at = 0;
    let mut slots = Vec::new();
    for (page, len) in pieces.iter().enumerate() {
        // Somewhere in the page, but within it.
        let offset = (page * 37) % (4096 - len + 1);
        raw.tx_pages.write(page * 4096 + offset, &bytes[at..at + len]);
        let last = page + 1 == pieces.len();
        let size = if page == 0 { bytes.len() } else { *len };
        slots.push(raw.slot(page, offset as u16, size as u16, if last { 0 } else { MORE }));
        at += len;
    }
    assert_eq!(at, bytes.len());
    slots
}

/// Sends a packet in these pieces, and compares what comes back.
fn comes_back(raw: &mut Raw, bytes: &[u8], pieces: &[usize], page: &mut usize) {
    let slots = spread(raw, bytes, pieces);
    let back = bytes.len().div_ceil(4096);
    raw.post(*page, back);
    *page += back;
    raw.send(&slots);
    for (answer, slot) in raw.answers(slots.len()).iter().zip(&slots) {
        assert_eq!((answer.id, answer.status), (slot.id, RSP_OKAY), "{pieces:?}");
    }
    let got: Vec<u8> = raw.received(back).into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert!(got == bytes, "pieces of {pieces:?}");
}

#[test]
fn xsa_423_a_packet_split_at_every_byte_of_its_headers() {
    let (_rig, mut raw) = looped();
    let (bytes, mut page) = (opaque(1, 200), 0);
    for at in 1..120 {
        comes_back(&mut raw, &bytes, &[at, 200 - at], &mut page);
    }
    raw.close();
}

#[test]
fn xsa_432_slots_of_one_byte() {
    let (_rig, mut raw) = looped();
    let (bytes, mut page) = (opaque(2, 18), 0);
    comes_back(&mut raw, &bytes, &[1; 18], &mut page);
    let bytes = opaque(3, 4096 + 17);
    let pieces: Vec<usize> = std::iter::once(4096).chain([1; 17]).collect();
    comes_back(&mut raw, &bytes, &pieces, &mut page);
    raw.close();
}

#[test]
fn xsa_448_slots_without_bytes() {
    let (_rig, mut raw) = looped();
    let (bytes, mut page) = (opaque(4, 60), 0);
    for pieces in [&[0, 60][..], &[60, 0], &[30, 0, 30], &[0, 0, 60, 0, 0], &[20, 0, 20, 0, 20]] {
        comes_back(&mut raw, &bytes, pieces, &mut page);
    }
    // A packet of nothing at all is none.
    let slots = [raw.slot(0, 0, 0, MORE), raw.slot(1, 0, 0, 0)];
    raw.send(&slots);
    assert!(raw.answers(2).iter().all(|answer| answer.status == RSP_ERROR));
    comes_back(&mut raw, &bytes, &[60], &mut page);
    raw.close();
}

#[test]
fn xsa_90_a_malformed_packet_ends_that_vif_alone() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    let gso = |kind, size: u16| {
        let [a, b] = size.to_ne_bytes();
        ExtraInfo { kind: EXTRA_TYPE_GSO, flags: 0, data: [a, b, kind, 0, 0, 0] }
    };
    let more = ExtraInfo { kind: EXTRA_TYPE_GSO, flags: 1, data: [1, 0, 1, 0, 0, 0] };
    type Make<'a> = &'a dyn Fn(&Raw) -> Vec<TxRequest>;
    let with_extra = |raw: &Raw, extra: ExtraInfo| {
        vec![raw.slot(0, 0, 60, TX_EXTRA_INFO | TX_CSUM_BLANK), extra.into()]
    };
    let cases: [(&str, Make<'_>); 6] = [
        ("past the page", &|raw| vec![raw.slot(0, 4000, 97, 0)]),
        ("past the page, later", &|raw| vec![raw.slot(0, 0, 200, MORE), raw.slot(1, 4090, 7, 0)]),
        ("an overlong chain", &|raw| {
            (0..24).map(|n| raw.slot(n, 0, if n == 0 { 2400 } else { 100 }, MORE)).collect()
        }),
        ("segments of nothing", &|raw| with_extra(raw, gso(1, 0))),
        ("an unknown extra info", &|raw| with_extra(raw, ExtraInfo { kind: 77, ..gso(1, 1) })),
        ("endless extra infos", &|raw| {
            let first = raw.slot(0, 0, 60, TX_EXTRA_INFO);
            std::iter::once(first).chain((0..100).map(|_| more.into())).collect()
        }),
    ];
    let front = rig.connect(&FrontOptions::default());
    let mut other = Driver::new(front.queue(0).unwrap(), 64);
    for (number, (name, make)) in (DEVID + 1..).zip(cases) {
        rig.attach(number, "loopback", &[]);
        let mut raw = Raw::connect(&rig.guest(), number, ALL);
        let slots = make(&raw);
        raw.send(&slots);
        raw.assert_ended();
        // The other vif does not notice.
        round_trip(&mut other, number.into(), 50, 9000);
        assert_eq!(front.fault(), None, "{name}");
    }
}

#[test]
fn a_packet_of_too_many_slots_is_dropped_and_the_vif_lives() {
    let (_rig, mut raw) = looped();
    let slots: Vec<TxRequest> = (0..20)
        .map(|n| {
            let size = if n == 0 { 2000 } else { 100 };
            raw.slot(n, 0, size, if n == 19 { 0 } else { MORE })
        })
        .collect();
    raw.send(&slots);
    assert!(raw.answers(20).iter().all(|answer| answer.status == RSP_ERROR));
    let mut page = 0;
    comes_back(&mut raw, &opaque(5, 60), &[60], &mut page);
    raw.close();
}

#[test]
fn xsa_361_the_kth_copy_fails_and_only_its_packet() {
    let (_rig, mut raw) = looped();
    let mut page = 0;
    for bad in 0..8 {
        // Eight packets at once, of which one names a page that is not granted.
        let mut slots = Vec::new();
        for n in 0..8 {
            raw.tx_pages.write(n * 4096, &opaque(n as u64, 60));
            let mut slot = raw.slot(n, 0, 60, 0);
            if n == bad {
                slot.gref = u32::MAX - 1;
            }
            slots.push(slot);
        }
        raw.post(page, 7);
        page += 7;
        raw.send(&slots);
        let answers = raw.answers(8);
        for (n, answer) in answers.iter().enumerate() {
            let status = if n == bad { RSP_ERROR } else { RSP_OKAY };
            assert_eq!((answer.id, answer.status), (n as u16, status));
        }
        let good = (0..8).filter(|n| *n != bad);
        for ((_, bytes), n) in raw.received(7).into_iter().zip(good) {
            assert!(bytes == opaque(n as u64, 60), "packet {n}");
        }
    }
    raw.close();
}

#[test]
fn xsa_392_one_free_page_and_packets_that_need_more() {
    let (_rig, mut raw) = looped();
    // Unsegmented packets come back; the guest has one page for them.
    let bytes = opaque(6, 9000);
    let slots = spread(&raw, &bytes, &[4096, 4096, 808]);
    raw.post(0, 1);
    for _ in 0..40 {
        raw.send(&slots);
        assert!(raw.answers(3).iter().all(|answer| answer.status == RSP_OKAY));
    }
    assert!(raw.is_quiet(), "half a packet has come");
    assert_eq!(raw.backend_state(), State::Connected);
    // With pages it goes on.
    raw.post(1, 2);
    let got: Vec<u8> = raw.received(3).into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert!(got == bytes);
    raw.close();
}

#[test]
fn xsa_391_a_frontend_that_wants_no_events_gets_none() {
    let (_rig, mut raw) = looped();
    // `rsp_event` is where it was: one event for the first answer, none for the others.
    raw.post(0, 32);
    raw.tx_pages.write(0, &opaque(7, 60));
    let slot = raw.slot(0, 0, 60, 0);
    raw.send(&[slot]);
    raw.answers(1);
    raw.received(1);
    crate::rig::until("the event for the first", || raw.channel.acknowledge().unwrap());
    for _ in 0..20 {
        raw.send(&[slot]);
        raw.answers(1);
        raw.received(1);
    }
    assert!(raw.is_quiet());
    assert!(!raw.channel.acknowledge().unwrap(), "an event that nobody asked for");
    raw.close();
}

#[test]
fn xsa_155_slots_that_change_meanwhile() {
    let (rig, mut raw) = looped();
    let stop = AtomicBool::new(false);
    let slots = raw.tx.slots() as usize;
    let memory = raw.tx.memory().clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Sizes and offsets change all the time; whatever is taken is one of them. (Responses
            // lie over the rest of a slot.)
            let mut n = 0u32;
            while !stop.load(Ordering::Relaxed) {
                n = n.wrapping_mul(0x9e37_79b9).wrapping_add(12345);
                let slot = 64 + (n >> 8) as usize % slots * 12;
                memory.write(slot + 10, &60u16.to_ne_bytes());
                memory.write(slot + 4, &(n as u16 % 4000).to_ne_bytes());
            }
        });
        for round in 0..500 {
            raw.post(round, 1);
            let slot = raw.slot(round % 8, 0, 60, 0);
            raw.send(&[slot]);
            let answer = raw.answers(1)[0];
            assert!([RSP_OKAY, RSP_ERROR].contains(&answer.status), "{answer:?}");
            if answer.status == RSP_OKAY {
                assert_eq!(raw.received(1)[0].1.len(), 60);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(raw.backend_state(), State::Connected);
    drop(rig);
}

#[test]
fn xsa_332_a_storm_of_events_while_a_second_vif_works() {
    let (rig, raw) = looped();
    rig.attach(DEVID + 1, "loopback", &[]);
    let front = netback::NetFront::connect(&*rig.guest(), DEVID + 1, &FrontOptions::default());
    let front = front.unwrap();
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    let other = std::thread::spawn(move || {
        round_trip(&mut driver, 9, 2000, 1514);
        driver
    });
    while !other.is_finished() {
        raw.channel.notify().unwrap();
    }
    let driver = other.join().unwrap();
    assert_eq!(driver.queue.totals().rx_errors, 0);
    assert_eq!(raw.backend_state(), State::Connected);
    drop(driver);
    front.close().unwrap();
    raw.close();
}

#[test]
fn an_answer_to_extra_information_says_that_it_is_none() {
    let (_rig, mut raw) = looped();
    raw.tx_pages.write(0, &opaque(1, 60));
    // A hint that the backend has no use for.
    let hash =
        ExtraInfo { kind: netback::proto::EXTRA_TYPE_HASH, flags: 0, data: [1, 1, 0, 0, 0, 0] };
    raw.post(0, 1);
    let slot = raw.slot(0, 0, 60, TX_EXTRA_INFO);
    raw.send(&[slot, hash.into()]);
    let answers = raw.answers(2);
    assert_eq!((answers[0].status, answers[1].status), (RSP_OKAY, RSP_NULL));
    assert!(raw.received(1)[0].1 == opaque(1, 60));
    raw.close();
}
