//! Two vifs on a switch: packets go from page to page by the sender's thread, or the long way, and the
//! same bytes come in the same order.

use netback::endpoint::Accepts;
use netback::frame::{Checksum, Gso, GsoKind};
use netback::proto::{RSP_ERROR, RSP_OKAY, RxRequest, TX_CSUM_BLANK};
use netback::{FrontOptions, NetFront};
use rings::mem::SharedMem;
use serde_json::json;

use crate::raw::Raw;
use crate::rig::{DEVID, Driver, Rig, until};
use crate::watched::{NOT_GRANTED, Watch};
use crate::xsa::{MORE, spread};
use crate::{ALL, NONE, is_summed, mix, opaque, tcp_packet};

const OTHER: u32 = DEVID + 1;
const KEYS: [(&str, &str); 1] = [("mtu", "65535")];

fn mac(devid: u32) -> [u8; 6] {
    [2, 0, 0, 0, 0, devid as u8]
}

/// Bytes from one vif to another.
fn from_to(from: u32, to: u32, mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[..6].copy_from_slice(&mac(to));
    bytes[6..12].copy_from_slice(&mac(from));
    bytes
}

/// A guest's end of a vif.
struct End {
    front: NetFront,
    driver: Driver,
    devid: u32,
}

impl End {
    fn connect(rig: &Rig, devid: u32, accepts: Accepts) -> End {
        let options = FrontOptions { accepts, ..FrontOptions::default() };
        let front = NetFront::connect(&*rig.guest(), devid, &options).unwrap();
        let driver = Driver::new(front.queue(0).unwrap(), 128);
        End { front, driver, devid }
    }
    fn send(&mut self, to: u32, bytes: Vec<u8>) {
        let bytes = from_to(self.devid, to, bytes);
        let frame = self.driver.frame(&bytes);
        self.driver.sent.push_back(frame);
        self.driver.turn();
    }
    fn expect(&mut self, from: u32, bytes: Vec<u8>) {
        self.driver.until_got(1);
        let frame = self.driver.got.pop_front().unwrap();
        let wanted = from_to(from, self.devid, bytes);
        assert_eq!(frame.len(), wanted.len());
        assert!(frame[..] == wanted[..], "a packet of {} bytes has changed", wanted.len());
        self.driver.pool.give(frame);
    }
}

/// Both ends, of whose addresses the switch knows where they are.
fn ends(rig: &Rig, accepts: Accepts) -> [End; 2] {
    rig.attach(OTHER, "switch:lab", &KEYS);
    let mut ends = [End::connect(rig, DEVID, ALL), End::connect(rig, OTHER, accepts)];
    let [one, two] = &mut ends;
    one.send(OTHER, opaque(1, 60));
    two.expect(DEVID, opaque(1, 60));
    two.send(DEVID, opaque(2, 60));
    one.expect(OTHER, opaque(2, 60));
    ends
}

/// Tells the switch, and this end, where the other one is.
fn hello(raw: &mut Raw, one: &mut End) {
    raw.tx_pages.write(0, &from_to(OTHER, DEVID, opaque(0, 60)));
    let slot = raw.slot(0, 0, 60, 0);
    raw.send(&[slot]);
    one.expect(OTHER, opaque(0, 60));
}

/// A sender, and a receiver whose slots are written one by one.
fn sender_and_raw(rig: &Rig) -> (End, Raw) {
    rig.attach(OTHER, "switch:lab", &KEYS);
    let mut one = End::connect(rig, DEVID, ALL);
    let mut raw = Raw::connect(&rig.guest(), OTHER, ALL);
    hello(&mut raw, &mut one);
    (one, raw)
}

#[test]
fn packets_of_all_lengths_go_from_page_to_page() {
    let rig = Rig::start("switch:lab", &KEYS);
    let [mut one, mut two] = ends(&rig, ALL);
    for n in 0..300u64 {
        let len = [60, 255, 256, 257, 4096, 4097, 4352, 65_535]
            .get(n as usize)
            .map_or(60 + (mix(n) % 65_476) as usize, |len| *len);
        one.send(OTHER, opaque(n, len));
        two.expect(DEVID, opaque(n, len));
        two.send(DEVID, opaque(!n, len));
        one.expect(OTHER, opaque(!n, len));
    }
    for devid in [DEVID, OTHER] {
        let [sent, came] = ["tx_crossed", "rx_crossed"].map(|name| rig.counter(devid, name));
        assert!(sent >= 295 && came >= 295, "{sent} {came} of {}", rig.counters(devid));
        assert_eq!(
            rig.counter(devid, "tx_dropped_copy") + rig.counter(devid, "rx_dropped_copy"),
            0
        );
    }
    for end in [one, two] {
        drop(end.driver);
        end.front.close().unwrap();
    }
}

/// What is left to do is told to the receiver as it stands; one who cannot do it gets it done.
#[test]
fn unsegmented_packets_cross_to_who_takes_them() {
    for (accepts, crosses) in [(ALL, true), (Accepts { scatter: true, ..NONE }, false)] {
        let rig = Rig::start("switch:lab", &KEYS);
        let [mut one, mut two] = ends(&rig, accepts);
        let before = rig.counter(DEVID, "tx_crossed");
        for kind in [GsoKind::TcpV4, GsoKind::TcpV6] {
            let payload = 60_000;
            let (bytes, start) = tcp_packet(kind, payload);
            let bytes = from_to(DEVID, OTHER, bytes);
            let mut frame = one.driver.frame(&bytes);
            frame.offload.checksum = Checksum::Blank { start: start as u16, offset: 16 };
            frame.offload.gso = Some(Gso { kind, size: 1428 });
            one.driver.sent.push_back(frame);
            one.driver.turn();
            let pieces = if crosses { 1 } else { payload.div_ceil(1428) };
            two.driver.until_got(pieces);
            let mut all = Vec::new();
            for frame in two.driver.got.drain(..) {
                assert_eq!(frame.offload.gso.is_some(), crosses);
                assert!(crosses || is_summed(&frame, start), "a wrong checksum");
                all.extend_from_slice(&frame[start + 20..]);
                two.driver.pool.give(frame);
            }
            assert!(all == bytes[start + 20..], "the payload has changed");
        }
        assert_eq!(rig.counter(DEVID, "tx_crossed") - before, if crosses { 2 } else { 0 });
    }
}

/// A blank checksum in a packet with padding: what is to be summed ends before the packet does, so it
/// takes all bytes before anything can be said of it.
#[test]
fn a_packet_whose_head_does_not_tell_all_is_read_first() {
    let rig = Rig::start("switch:lab", &KEYS);
    let [one, mut two] = ends(&rig, ALL);
    drop(one.driver);
    one.front.close().unwrap();
    rig.begin_anew(DEVID);
    let mut raw = Raw::connect(&rig.guest(), DEVID, ALL);
    let (bytes, start) = tcp_packet(GsoKind::TcpV4, 5000);
    let mut bytes = from_to(DEVID, OTHER, bytes);
    let summed = bytes.len();
    bytes.resize(summed + 300, 0xab);
    // The first tells the switch where the sender is now.
    for _ in 0..2 {
        let mut slots = spread(&raw, &bytes, &[100, 4096, bytes.len() - 4196]);
        slots[0].flags |= TX_CSUM_BLANK;
        raw.send(&slots);
        assert!(raw.answers(3).iter().all(|answer| answer.status == RSP_OKAY));
        two.driver.until_got(1);
        let frame = two.driver.got.pop_front().unwrap();
        assert_eq!(frame.len(), bytes.len());
        assert!(is_summed(&frame[..summed], start) && frame[start + 20..] == bytes[start + 20..]);
        two.driver.pool.give(frame);
    }
    assert!(rig.counter(DEVID, "tx_crossed") > 0);
    raw.close();
}

/// A guest without pages stops nobody: what is for it waits in the switch and comes later, in order.
#[test]
fn who_gives_no_pages_gets_its_packets_the_long_way() {
    let rig = Rig::start("switch:lab", &KEYS);
    let (mut one, mut raw) = sender_and_raw(&rig);
    let (mut page, mut sent) = (0, 0);
    for round in 0..30u64 {
        let burst = 1 + mix(round) % 12;
        for n in sent..sent + burst {
            one.send(OTHER, opaque(n, 5000));
        }
        sent += burst;
        // Two pages each: some before they come, some after.
        until("all is read", || {
            one.driver.turn();
            rig.counter(DEVID, "tx_packets") == sent
        });
        for n in sent - burst..sent {
            raw.post(page, 2);
            page += 2;
            let bytes: Vec<u8> = raw.received(2).into_iter().flat_map(|(_, b)| b).collect();
            assert!(bytes == from_to(DEVID, OTHER, opaque(n, 5000)), "packet {n}");
        }
        // With pages there before.
        raw.post(page, 2);
        page += 2;
        one.send(OTHER, opaque(sent, 5000));
        let bytes: Vec<u8> = raw.received(2).into_iter().flat_map(|(_, b)| b).collect();
        assert!(bytes == from_to(DEVID, OTHER, opaque(sent, 5000)), "packet {sent}");
        sent += 1;
    }
    let crossed = rig.counter(OTHER, "rx_crossed");
    assert!((30..sent).contains(&crossed), "{crossed} of {sent}");
    raw.close();
}

/// A page of the sender, or of the receiver, that cannot be reached costs its packet and no other.
#[test]
fn xsa_361_the_kth_copy_between_guests_fails_for_every_k() {
    let (rig, watch) = Watch::rig("switch:lab", &KEYS);
    let [mut one, mut two] = ends(&rig, ALL);
    // The head; the first page from the head and from the sender's; two more.
    for k in 1..=5u64 {
        watch.fail_copy(k);
        one.send(OTHER, opaque(k, 9000));
        let lost = |id, name| rig.counter(id, name);
        until("it is lost", || lost(DEVID, "tx_dropped_copy") == k);
        assert_eq!(lost(OTHER, "rx_dropped_copy"), k - 1, "copy {k}");
        one.send(OTHER, opaque(100 + k, 9000));
        two.expect(DEVID, opaque(100 + k, 9000));
    }
}

#[test]
fn xsa_361_a_reference_behind_the_head_that_was_not_granted() {
    let rig = Rig::start("switch:lab", &KEYS);
    let [one, mut two] = ends(&rig, ALL);
    drop(one.driver);
    one.front.close().unwrap();
    rig.begin_anew(DEVID);
    let mut raw = Raw::connect(&rig.guest(), DEVID, ALL);
    let bytes = from_to(DEVID, OTHER, opaque(5, 9000));
    for bad in [0, 1, 2, 3] {
        let mut slots = spread(&raw, &bytes, &[4096, 4096, 808]);
        assert!(slots[0].flags & MORE != 0);
        if let Some(slot) = slots.get_mut(bad) {
            slot.gref = NOT_GRANTED;
        }
        raw.send(&slots);
        let status = if bad < 3 { RSP_ERROR } else { RSP_OKAY };
        assert!(raw.answers(3).iter().all(|answer| answer.status == status), "slot {bad}");
    }
    two.expect(DEVID, opaque(5, 9000));
    assert_eq!(two.driver.queue.totals().rx_errors, rig.counter(OTHER, "rx_dropped_copy"));
    raw.close();
}

/// What is held for a checkpoint crosses no more than it goes any other way.
#[test]
fn what_is_held_crosses_when_it_is_released() {
    let rig = Rig::start("switch:lab", &KEYS);
    let [mut one, mut two] = ends(&rig, ALL);
    rig.ask(&json!({"command": "hold-output"}));
    for n in 0..5 {
        one.send(OTHER, opaque(n, 9000));
    }
    until("all are held", || rig.counter(DEVID, "tx_held") == 5);
    assert!(!two.driver.turn());
    rig.ask(&json!({"command": "release-output"}));
    for n in 0..5 {
        two.expect(DEVID, opaque(n, 9000));
    }
    one.send(OTHER, opaque(9, 9000));
    two.expect(DEVID, opaque(9, 9000));
}

/// A vif that goes and comes while another one sends to it: nothing of it stays mapped, and the sender's
/// packets go on.
#[test]
fn a_receiver_that_comes_and_goes_leaves_nothing() {
    let (rig, watch) = Watch::rig("switch:lab", &KEYS);
    rig.attach(OTHER, "switch:lab", &KEYS);
    let mut one = End::connect(&rig, DEVID, ALL);
    until("one is mapped", || watch.mapped() == 2);
    for life in 0..10u64 {
        let mut two = End::connect(&rig, OTHER, ALL);
        two.send(DEVID, opaque(life, 60));
        one.expect(OTHER, opaque(life, 60));
        for n in 0..20 {
            one.send(OTHER, opaque(n, 9000));
            two.expect(DEVID, opaque(n, 9000));
        }
        for n in 0..20 {
            one.send(OTHER, opaque(n, 9000));
        }
        drop(two.driver);
        two.front.close().unwrap();
        until("what it had mapped is let go", || watch.mapped() == 2);
        rig.begin_anew(OTHER);
    }
    assert!(rig.counter(DEVID, "tx_crossed") >= 200);
}

/// The sender's thread is the first to see it, and has no part in it: the receiver's vif ends, with the
/// cause, and the sender's goes on.
#[test]
fn a_receiver_whose_index_lies_ends_its_own_vif() {
    let rig = Rig::start("switch:lab", &KEYS);
    rig.attach(OTHER, "switch:lab", &KEYS);
    rig.attach(OTHER + 1, "switch:lab", &KEYS);
    let mut one = End::connect(&rig, DEVID, ALL);
    let mut third = End::connect(&rig, OTHER + 1, ALL);
    one.send(OTHER + 1, opaque(3, 60));
    third.expect(DEVID, opaque(3, 60));
    third.send(DEVID, opaque(3, 60));
    one.expect(OTHER + 1, opaque(3, 60));
    for life in 0..3u64 {
        let mut raw = Raw::connect(&rig.guest(), OTHER, ALL);
        hello(&mut raw, &mut one);
        raw.post(0, 3);
        one.send(OTHER, opaque(life, 9000));
        let bytes: Vec<u8> = raw.received(3).into_iter().flat_map(|(_, b)| b).collect();
        assert!(bytes == from_to(DEVID, OTHER, opaque(life, 9000)));
        assert_eq!(rig.counter(OTHER, "rx_crossed"), 1);
        // `req_prod` is the ring's first word. Nobody is told: who comes next with a packet reads it.
        raw.rx.memory().write(0, &(1000 + life as u32).to_ne_bytes());
        one.send(OTHER, opaque(life, 9000));
        raw.assert_ended();
        let error = rig.error(OTHER).unwrap();
        assert!(error.contains("req_prod"), "{error}");
        for n in 0..20 {
            one.send(OTHER + 1, opaque(n, 9000));
            third.expect(DEVID, opaque(n, 9000));
            third.send(DEVID, opaque(n, 9000));
            one.expect(OTHER + 1, opaque(n, 9000));
        }
        raw.close();
        rig.begin_anew(OTHER);
    }
    assert!(rig.counter(DEVID, "tx_crossed") >= 60);
}

/// A page that the receiver has not granted takes no byte of anybody, and no other packet with it.
#[test]
fn xsa_361_a_receivers_page_that_was_not_granted() {
    let rig = Rig::start("switch:lab", &KEYS);
    let (mut one, mut raw) = sender_and_raw(&rig);
    for bad in 0..3 {
        for page in 0..3 {
            let granted = raw.rx_pages.refs()[page];
            let gref = if page == bad { NOT_GRANTED } else { granted };
            raw.rx.push(&RxRequest { id: page as u16, pad: 0, gref }).unwrap();
        }
        raw.post(3, 3);
        one.send(OTHER, opaque(1, 9000));
        one.send(OTHER, opaque(2, 9000));
        let slots = raw.received(6);
        assert!(slots[..3].iter().any(|(slot, _)| slot.status == RSP_ERROR), "page {bad}");
        let bytes: Vec<u8> = slots[3..].iter().flat_map(|(_, b)| b.clone()).collect();
        assert!(bytes == from_to(DEVID, OTHER, opaque(2, 9000)), "page {bad}");
        let rounds = bad as u64 + 1;
        assert_eq!(rig.counter(OTHER, "rx_dropped_copy"), rounds);
        assert_eq!(rig.counter(OTHER, "rx_crossed"), 2 * rounds);
    }
    raw.close();
}
