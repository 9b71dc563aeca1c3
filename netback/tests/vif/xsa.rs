//! Packets that went wrong in other backends: each test is named by its advisory.

use std::sync::atomic::{AtomicBool, Ordering};

use hypervisor::xenbus::State;
use netback::FrontOptions;
use netback::endpoint::Accepts;
use netback::frame::{Gso, GsoKind};
use netback::proto::{
    EXTRA_TYPE_GSO, Extra, ExtraInfo, RSP_ERROR, RSP_NULL, RSP_OKAY, RX_CSUM_BLANK,
    RX_DATA_VALIDATED, RX_EXTRA_INFO, RX_MORE_DATA, RxResponse, TX_CSUM_BLANK, TX_EXTRA_INFO,
    TX_MORE_DATA, TxRequest,
};
use rings::mem::SharedMem;
use zerocopy::IntoBytes;

use crate::raw::{PAGES, Raw};
use crate::rig::{DEVID, Driver, Rig};
use crate::{ALL, NONE, is_summed, opaque, round_trip, tcp_packet};

pub(crate) const MORE: u16 = TX_MORE_DATA;

pub(crate) fn looped() -> (Rig, Raw) {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    let raw = Raw::connect(&rig.guest(), DEVID, ALL);
    (rig, raw)
}

/// Writes a packet's bytes into pages, `pieces` of them, and gives its slots.
pub(crate) fn spread(raw: &Raw, bytes: &[u8], pieces: &[usize]) -> Vec<TxRequest> {
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

/// Sends a packet in these pieces, and gives what comes back.
fn loop_back(raw: &mut Raw, bytes: &[u8], pieces: &[usize], flags: u16, page: &mut usize) -> Bytes {
    let mut slots = spread(raw, bytes, pieces);
    slots[0].flags |= flags;
    let back = bytes.len().div_ceil(4096);
    raw.post(*page, back);
    *page += back;
    raw.send(&slots);
    for (answer, slot) in raw.answers(slots.len()).iter().zip(&slots) {
        assert_eq!((answer.id, answer.status), (slot.id, RSP_OKAY), "{pieces:?}");
    }
    raw.received(back).into_iter().flat_map(|(_, bytes)| bytes).collect()
}

type Bytes = Vec<u8>;

/// The same, compared.
pub(crate) fn comes_back(raw: &mut Raw, bytes: &[u8], pieces: &[usize], page: &mut usize) {
    assert!(loop_back(raw, bytes, pieces, 0, page) == bytes, "pieces of {pieces:?}");
}

/// Three slots, cut at every two places of the headers. The guest takes no blank checksum, so that
/// the backend has to find all headers to compute it.
#[test]
fn xsa_423_every_split_of_the_headers_over_slots() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    let mut raw = Raw::connect(&rig.guest(), DEVID, Accepts { scatter: true, ..NONE });
    for kind in [GsoKind::TcpV4, GsoKind::TcpV6] {
        let ((bytes, start), mut page) = (tcp_packet(kind, 50), 0);
        let (len, headers) = (bytes.len(), start + 20);
        let whole = loop_back(&mut raw, &bytes, &[len], TX_CSUM_BLANK, &mut page);
        assert!(is_summed(&whole, start) && whole[start + 20..] == bytes[start + 20..]);
        for first in 0..=headers {
            for second in first..=headers {
                let pieces = [first, second - first, len - second];
                let got = loop_back(&mut raw, &bytes, &pieces, TX_CSUM_BLANK, &mut page);
                assert!(got == whole, "{kind:?} in pieces of {pieces:?}");
            }
        }
    }
    raw.close();
}

#[test]
fn xsa_432_slots_of_one_byte() {
    let (_rig, mut raw) = looped();
    let mut page = 0;
    // As many as are allowed, alone and behind a full one.
    for count in [18, 19] {
        comes_back(&mut raw, &opaque(2, count), &vec![1; count], &mut page);
    }
    let bytes = opaque(3, 4096 + 18);
    let pieces: Vec<usize> = std::iter::once(4096).chain([1; 18]).collect();
    comes_back(&mut raw, &bytes, &pieces, &mut page);
    raw.close();
}

#[test]
fn xsa_448_slots_without_bytes_anywhere() {
    let (_rig, mut raw) = looped();
    let (bytes, mut page) = (opaque(4, 60), 0);
    for empty in 0..(1 << 6) - 1u32 {
        let has = |n: &usize| empty & (1 << n) == 0;
        let full = (0..6).filter(has).count();
        let last = (0..6).rfind(has).expect("one is not empty");
        let size = |n| match has(&n) {
            false => 0,
            true if n == last => 60 - 60 / full * (full - 1),
            true => 60 / full,
        };
        comes_back(&mut raw, &bytes, &(0..6).map(size).collect::<Vec<_>>(), &mut page);
    }
    // A packet of nothing at all is none.
    let slots = [raw.slot(0, 0, 0, MORE), raw.slot(1, 0, 0, 0)];
    raw.send(&slots);
    assert!(raw.answers(2).iter().all(|answer| answer.status == RSP_ERROR));
    comes_back(&mut raw, &bytes, &[60], &mut page);
    raw.close();
}

/// Each byte of an answer is what the backend means to say, the rest of its slot what the guest put
/// there, and the ring's header has its indices alone.
#[test]
fn xsa_216_every_byte_of_an_answer_is_defined() {
    let (_rig, mut raw) = looped();
    let (bytes, _) = tcp_packet(GsoKind::TcpV4, 5000);
    let gso = Gso { kind: GsoKind::TcpV4, size: 1448 };
    for round in 0..40usize {
        let mut slots = spread(&raw, &bytes, &[4096, bytes.len() - 4096]);
        slots[0].flags |= TX_CSUM_BLANK | TX_EXTRA_INFO;
        slots.insert(1, ExtraInfo::from(Extra::Gso(gso)).into());
        raw.post(round * 3, 3);
        raw.send(&slots);
        let (answers, received) = (raw.answers(3), raw.received(3));
        for (n, (slot, answer)) in slots.iter().zip(&answers).enumerate() {
            let wanted = if n == 1 { (0, RSP_NULL) } else { (slot.id, RSP_OKAY) };
            assert_eq!((answer.id, answer.status), wanted);
            let mut found = [0; 12];
            raw.tx.memory().read(64 + (round * 3 + n) % 256 * 12, &mut found);
            assert_eq!((&found[..4], &found[4..]), (answer.as_bytes(), &slot.as_bytes()[4..]));
        }
        let extra = ExtraInfo::from(Extra::Gso(gso));
        assert_eq!(received[1].0.as_extra().as_bytes(), extra.as_bytes());
        let flags = RX_CSUM_BLANK | RX_DATA_VALIDATED | RX_EXTRA_INFO | RX_MORE_DATA;
        let page = |n: usize| ((round * 3 + n) % PAGES) as u16;
        let rest = (bytes.len() - 4096) as i16;
        for (n, flags, status) in [(0, flags, 4096), (2, 0, rest)] {
            let wanted = RxResponse { id: page(n), offset: 0, flags, status };
            assert_eq!(received[n].0, wanted);
        }
        for memory in [raw.tx.memory(), raw.rx.memory()] {
            let mut header = [0xff; 48];
            memory.read(16, &mut header);
            assert_eq!(header, [0; 48]);
        }
    }
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
