//! The guest's pages: what cannot be reached costs what needs it alone, nothing else of a page is
//! touched, and nothing stays mapped. Tests are named by the advisories of other backends.

use netback::FrontOptions;
use netback::frame::{Gso, GsoKind};
use netback::proto::{Extra, ExtraInfo, RSP_ERROR, RSP_OKAY, TX_CSUM_BLANK, TX_EXTRA_INFO};
use rings::mem::SharedMem;

use crate::raw::{PAGES, Raw};
use crate::rig::{DEVID, Driver, until};
use crate::watched::{NOT_GRANTED, Watch};
use crate::xsa::{comes_back, looped, spread};
use crate::{ALL, mix, opaque, round_trip, tcp_packet};

const MTU: [(&str, &str); 1] = [("mtu", "65535")];

#[test]
fn xsa_361_the_kth_page_is_not_granted_and_only_its_packet_is_lost() {
    let (_rig, mut raw) = looped();
    let mut page = 0;
    for bad in 0..8 {
        // Eight packets at once.
        let mut slots = Vec::new();
        for n in 0..8 {
            raw.tx_pages.write(n * 4096, &opaque(n as u64, 60));
            let mut slot = raw.slot(n, 0, 60, 0);
            if n == bad {
                slot.gref = NOT_GRANTED;
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

/// Three packets of three pages each go and come back: nine pages are read, and nine written.
#[test]
fn xsa_361_the_kth_copy_fails_either_way_for_every_k() {
    let (rig, watch) = Watch::rig("loopback", &MTU);
    let mut raw = Raw::connect(&rig.guest(), DEVID, ALL);
    let packets: Vec<_> = (0..3).map(|n| opaque(n, 9000)).collect();
    let mut page = 0;
    for k in 1..=18usize {
        let lost = (k - 1) / 3;
        let slots: Vec<_> = (0..3)
            .flat_map(|n| {
                let pages: Vec<usize> = (n * 3..n * 3 + 3).collect();
                raw.tx_pages.write(pages[0] * 4096, &packets[n]);
                let slot = |(i, size, flags)| raw.slot(pages[i], 0, size, flags);
                [(0, 9000, crate::xsa::MORE), (1, 4096, crate::xsa::MORE), (2, 808, 0)].map(slot)
            })
            .collect();
        let back = if lost < 3 { 6 } else { 9 };
        raw.post(page, back);
        page += back;
        watch.fail_copy(k as u64);
        raw.send(&slots);
        for (n, answer) in raw.answers(9).iter().enumerate() {
            let status = if n / 3 == lost { RSP_ERROR } else { RSP_OKAY };
            assert_eq!((answer.id, answer.status), (n as u16, status), "copy {k}");
        }
        let received = raw.received(back);
        let came = (0..3).filter(|n| *n != lost).zip(received.chunks(3));
        for (n, slots) in came {
            let bytes: Vec<u8> = slots.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
            if n + 3 == lost {
                assert!(slots.iter().all(|(rsp, _)| rsp.status == RSP_ERROR), "copy {k}");
            } else {
                assert!(bytes == packets[n], "packet {n} at copy {k}");
            }
        }
    }
    assert_eq!(rig.counter(DEVID, "tx_dropped_copy"), 3 * 3);
    assert_eq!(rig.counter(DEVID, "rx_dropped_copy"), 3 * 3);
    raw.close();
}

#[test]
fn a_call_that_copies_fails_as_a_whole_and_ends_that_vif_alone() {
    let (rig, watch) = Watch::rig("loopback", &MTU);
    rig.attach(DEVID + 1, "loopback", &[]);
    let mut raw = Raw::connect(&rig.guest(), DEVID + 1, ALL);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    watch.fail_call();
    let slot = raw.slot(0, 0, 60, 0);
    raw.send(&[slot]);
    raw.assert_ended();
    round_trip(&mut driver, 1, 50, 1514);
}

/// Each of the eight rings of four queues in turn; the device then connects as if nothing had been.
#[test]
fn xsa_362_365_367_a_ring_that_cannot_be_mapped_leaves_nothing() {
    let (rig, watch) = Watch::rig("loopback", &MTU);
    let options = FrontOptions { max_queues: 4, ..FrontOptions::default() };
    for k in 1..=8 {
        watch.fail_map(k);
        let failed = netback::NetFront::connect(&*rig.guest(), DEVID, &options);
        assert!(failed.is_err(), "without ring {k}");
        until("what was mapped is let go", || watch.mapped() == 0);
        let error = rig.error(DEVID).expect("a reason");
        assert!(error.contains("mapping the netif-") && error.contains("grant"), "{error}");
        let front = rig.connect(&options);
        let mut driver = Driver::new(front.queue((k as usize - 1) / 2).unwrap(), 64);
        round_trip(&mut driver, k, 20, 9000);
        assert_eq!(watch.mapped(), 8);
        drop(driver);
        front.close().unwrap();
        until("all is let go", || watch.mapped() == 0);
    }
}

#[test]
fn xsa_371_after_teardown_nothing_is_mapped() {
    let (rig, watch) = Watch::rig("loopback", &MTU);
    for end in ["close", "nonsense", "abandon", "destroy"] {
        let mut raw = Raw::with_queues(&rig.guest(), DEVID, ALL, 4);
        let mut page = 0;
        for _ in 0..20 {
            comes_back(&mut raw, &opaque(1, 9000), &[4096, 4096, 808], &mut page);
            // No page of a packet ever is: the rings are.
            assert_eq!(watch.mapped(), 8, "while it works");
        }
        match end {
            "close" => raw.close(),
            "nonsense" => {
                let slot = raw.slot(0, 4000, 4000, 0);
                raw.send(&[slot]);
                raw.assert_ended();
                raw.close();
            }
            // As a guest that starts anew.
            "abandon" => rig.connect(&FrontOptions::default()).close().unwrap(),
            _ => rig.remove(DEVID),
        }
        until("all is let go", || watch.mapped() == 0);
        if end != "destroy" {
            rig.begin_anew(DEVID);
        }
    }
}

/// Once a packet is answered its pages are the guest's again, whatever becomes of the packet.
#[test]
fn xsa_396_nothing_is_read_after_the_answer() {
    let (_rig, mut raw) = looped();
    let bytes = opaque(7, 9000);
    for round in 0..20 {
        let slots = spread(&raw, &bytes, &[4096, 4096, 808]);
        raw.send(&slots);
        raw.answers(3);
        // It waits in the backend: the guest has no page for it yet.
        raw.tx_pages.write(0, &[0xee; 3 * 4096]);
        raw.post(round * 3, 3);
        let got: Vec<u8> = raw.received(3).into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert!(got == bytes, "round {round}");
    }
    raw.close();
}

/// Packets of all lengths, one of them unsegmented, into pages full of something else.
#[test]
fn xsa_403_nothing_is_touched_outside_a_packets_bytes() {
    let (_rig, mut raw) = looped();
    let gso = ExtraInfo::from(Extra::Gso(Gso { kind: GsoKind::TcpV4, size: 1448 }));
    let mut page = 0;
    for round in 0..200u64 {
        let (len, offset) = ((60 + mix(round) % 3000) as usize, (mix(!round) % 1000) as usize);
        let unsegmented = round % 4 == 0;
        let bytes = match unsegmented {
            // Of two segments: one alone needs no cutting.
            true => tcp_packet(GsoKind::TcpV4, 1449 + len % 1448).0,
            false => opaque(round, len),
        };
        let len = bytes.len();
        raw.rx_pages.write(0, &vec![0x5a; PAGES * 4096]);
        raw.tx_pages.write(0, &vec![0xa5; PAGES * 4096]);
        raw.tx_pages.write(offset, &bytes);
        let mut slots = vec![raw.slot(0, offset as u16, len as u16, 0)];
        if unsegmented {
            slots[0].flags |= TX_EXTRA_INFO | TX_CSUM_BLANK;
            slots.push(gso.into());
        }
        raw.post(page, slots.len());
        page += slots.len();
        raw.send(&slots);
        raw.answers(slots.len());
        let received = raw.received(slots.len());
        let rsp = received[0].0;
        assert_eq!((usize::from(rsp.offset), rsp.status as usize), (0, len));
        let (mut to, mut from) = (vec![0; PAGES * 4096], vec![0; PAGES * 4096]);
        raw.rx_pages.read(0, &mut to);
        raw.tx_pages.read(0, &mut from);
        let at = usize::from(rsp.id) * 4096;
        let rest = to[..at].iter().chain(&to[at + len..]);
        assert!(rest.into_iter().all(|byte| *byte == 0x5a), "round {round}");
        let rest = from[..offset].iter().chain(&from[offset + len..]);
        assert!(rest.into_iter().all(|byte| *byte == 0xa5), "round {round}");
        assert!(from[offset..offset + len] == bytes, "a packet was written");
    }
    raw.close();
}
