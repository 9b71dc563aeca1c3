//! What a guest changes while its vif works: the control ring, group addresses, headroom; and what
//! an operator does.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use netback::frontend::{CtrlUse, HashChoice};
use netback::hash::{Algorithm, Hash, MAX_MAPPING, Spread};
use netback::negotiate::Multicast;
use netback::proto::{
    CTRL_GET_HASH_FLAGS, CTRL_SET_HASH_ALGORITHM, CTRL_SET_HASH_FLAGS, CTRL_SET_HASH_KEY,
    CTRL_SET_HASH_MAPPING, CTRL_SET_HASH_MAPPING_SIZE, CTRL_STATUS_BUFFER_OVERFLOW,
    CTRL_STATUS_INVALID_PARAMETER, CTRL_STATUS_NOT_SUPPORTED, CTRL_STATUS_SUCCESS, CtrlRequest,
    Extra, HASH_TYPE_IPV4_TCP, HASH_TYPE_IPV6, RX_EXTRA_INFO, TX_EXTRA_INFO,
};
use netback::{FrontOptions, NetFront};

use crate::raw::Raw;
use crate::rig::{DEVID, Driver, LIMIT, Rig, until};
use crate::{ALL, GsoKind, mix, opaque, round_trip, tcp_packet};

const KEY: [u8; 40] = [0x5a; 40];

fn options(queues: u32) -> FrontOptions {
    FrontOptions { max_queues: queues, ctrl: CtrlUse::Offered, ..FrontOptions::default() }
}

/// A TCP packet of the flow `flow`.
fn packet(kind: GsoKind, flow: u64) -> Vec<u8> {
    let (mut bytes, start) = tcp_packet(kind, 100);
    bytes[start..start + 2].copy_from_slice(&(mix(flow) as u16).to_be_bytes());
    bytes
}

fn spread() -> Spread {
    let mut spread = Spread::default();
    spread.algorithm = Algorithm::Toeplitz;
    spread.types = HASH_TYPE_IPV4_TCP | HASH_TYPE_IPV6;
    // No bit pattern that repeats each byte: such a key has one value for all.
    spread.set_key(&key());
    spread.mapping = (0..MAX_MAPPING as u32).map(|n| (n / 3) % 4).collect();
    spread
}

fn key() -> Vec<u8> {
    KEY.iter().enumerate().map(|(n, byte)| byte ^ mix(n as u64) as u8).collect()
}

fn choice() -> HashChoice {
    let spread = spread();
    HashChoice { types: spread.types, key: key(), mapping: spread.mapping }
}

/// Sends packets from the first queue and says in which they came back, with which hash.
fn where_they_come(drivers: &mut [Driver], packets: &[Vec<u8>]) -> Vec<(usize, Option<Hash>)> {
    let mut came = vec![None; packets.len()];
    for (number, bytes) in packets.iter().enumerate() {
        let frame = drivers[0].frame(bytes);
        drivers[0].sent.push_back(frame);
        let end = Instant::now() + LIMIT;
        while came[number].is_none() {
            assert!(Instant::now() < end, "packet {number} has not come");
            for (queue, driver) in drivers.iter_mut().enumerate() {
                driver.turn();
                for frame in driver.got.drain(..) {
                    assert!(frame[..] == bytes[..], "another packet than was sent");
                    came[number] = Some((queue, frame.hash));
                    driver.pool.give(frame);
                }
            }
            std::thread::yield_now();
        }
    }
    came.into_iter().flatten().collect()
}

fn drivers(front: &NetFront) -> Vec<Driver> {
    (0..front.queues()).map(|n| Driver::new(front.queue(n).unwrap(), 64)).collect()
}

#[test]
fn packets_come_in_the_queue_that_the_guests_hash_says_with_the_hash() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    let front = rig.connect(&options(4));
    let mut all = drivers(&front);
    let kinds = [GsoKind::TcpV4, GsoKind::TcpV6];
    let packets: Vec<_> = (0..60).map(|n| packet(kinds[n % 2], n as u64)).collect();
    // Without a hash they stay where they are.
    assert!(where_they_come(&mut all, &packets).iter().all(|came| *came == (0, None)));
    front.spread(&choice()).unwrap();
    let spread = spread();
    let wanted: Vec<_> = packets
        .iter()
        .map(|bytes| (spread.queue(spread.hash(bytes), 4), spread.hash(bytes)))
        .collect();
    assert!((0..4).all(|queue| wanted.iter().any(|(to, _)| *to == queue)), "{wanted:?}");
    assert!(wanted.iter().all(|(_, hash)| hash.is_some()));
    assert_eq!(where_they_come(&mut all, &packets), wanted);
    // Outside they have a tag then, and the guest's hash is of what the guest sees.
    rig.set("vlan", "100");
    assert_eq!(where_they_come(&mut all, &packets), wanted);
    rig.set("vlan", "0");
    // What is no IP counts as 0.
    let plain = [opaque(1, 60)];
    assert_eq!(where_they_come(&mut all, &plain), [(spread.queue(None, 4), None)]);
    // And without an algorithm it is as before.
    let answer = front.control(CTRL_SET_HASH_ALGORITHM, [0; 3]).unwrap();
    assert_eq!(answer.status, CTRL_STATUS_SUCCESS);
    assert!(where_they_come(&mut all, &packets).iter().all(|came| *came == (0, None)));
    drop(all);
    front.close().unwrap();
}

#[test]
fn xsa_270_hostile_control_requests_get_a_status_and_the_vif_lives() {
    let rig = Rig::start("loopback", &[]);
    let front = rig.connect(&options(4));
    let gref = front.control_page().unwrap().refs()[0];
    let ask = |kind, data| front.control(kind, data).unwrap().status;
    let (invalid, unsupported) = (CTRL_STATUS_INVALID_PARAMETER, CTRL_STATUS_NOT_SUPPORTED);
    assert_eq!(ask(CTRL_GET_HASH_FLAGS, [0; 3]), unsupported);
    front.spread(&choice()).unwrap();
    for kind in [0, 11, u16::MAX] {
        assert_eq!(ask(kind, [gref, u32::MAX, u32::MAX]), unsupported, "{kind}");
    }
    for kind in [8, 9, 10] {
        assert_eq!(ask(kind, [gref, u32::MAX, u32::MAX]), invalid, "{kind}: a queue that is not");
    }
    for data in [[gref, 1, u32::MAX], [gref, u32::MAX, 1], [gref, 129, 0], [gref, 1, 128]] {
        assert_eq!(ask(CTRL_SET_HASH_MAPPING, data), invalid, "{data:?}");
    }
    for nobodys in [0, gref ^ 0xffff, u32::MAX] {
        assert_eq!(ask(CTRL_SET_HASH_MAPPING, [nobodys, 1, 0]), invalid);
        assert_eq!(ask(CTRL_SET_HASH_KEY, [nobodys, 40, 0]), invalid);
    }
    assert_eq!(ask(CTRL_SET_HASH_KEY, [gref, 41, 0]), CTRL_STATUS_BUFFER_OVERFLOW);
    assert_eq!(ask(CTRL_SET_HASH_FLAGS, [16, 0, 0]), invalid);
    assert_eq!(ask(CTRL_SET_HASH_MAPPING_SIZE, [129, 0, 0]), invalid);
    front.control_page().unwrap().write(0, &4u32.to_ne_bytes());
    assert_eq!(ask(CTRL_SET_HASH_MAPPING, [gref, 1, 0]), invalid, "a queue that is not there");
    // More of them than the ring has slots, and the packets pass all the same.
    let mut all = drivers(&front);
    for n in 0..400 {
        assert_eq!(ask(n % 7 + 20, [n.into(), 0, 0]), unsupported);
    }
    let bytes = packet(GsoKind::TcpV4, 5);
    let hash = spread().hash(&bytes);
    assert_eq!(where_they_come(&mut all, &[bytes]), [(spread().queue(hash, 4), hash)]);
    drop(all);
    front.close().unwrap();
}

#[test]
fn a_control_ring_whose_index_lies_ends_that_vif_alone() {
    let rig = Rig::start("loopback", &[]);
    rig.attach(DEVID + 1, "loopback", &[]);
    let other = NetFront::connect(&*rig.guest(), DEVID + 1, &FrontOptions::default()).unwrap();
    let mut driver = Driver::new(other.queue(0).unwrap(), 64);
    let raw = Raw::with_ctrl(&rig.guest(), DEVID, ALL);
    let ctrl = raw.ctrl.as_ref().unwrap();
    // `req_prod` is the ring's first word.
    ctrl.ring.memory().write(0, &1000u32.to_ne_bytes());
    ctrl.channel.notify().unwrap();
    raw.assert_ended();
    round_trip(&mut driver, 1, 50, 1514);
    drop(driver);
    other.close().unwrap();
}

#[test]
fn xsa_332_a_storm_on_the_control_rings_port_while_packets_pass() {
    let rig = Rig::start("loopback", &[]);
    let mut raw = Raw::with_ctrl(&rig.guest(), DEVID, ALL);
    let mut ctrl = raw.ctrl.take().unwrap();
    let bytes = opaque(1, 60);
    raw.tx_pages.write(0, &bytes);
    let slot = raw.slot(0, 0, 60, 0);
    for round in 0..500 {
        (0..20).for_each(|_| ctrl.channel.notify().unwrap());
        raw.post(round, 1);
        raw.send(&[slot]);
        assert_eq!(raw.answers(1)[0].status, 0);
        assert!(raw.received(1)[0].1 == bytes);
    }
    // A whole ring of requests at once is answered too, each once.
    let slots = ctrl.ring.slots() as u16;
    for id in 0..slots {
        ctrl.ring.push(&CtrlRequest { id, kind: 99, data: [0; 3] }).unwrap();
    }
    let _ = ctrl.ring.publish();
    ctrl.channel.notify().unwrap();
    for id in 0..slots {
        let mut answer = None;
        until("an answer", || {
            answer = ctrl.ring.take().unwrap();
            answer.is_some()
        });
        let answer = answer.unwrap();
        let wanted = (id, 99, CTRL_STATUS_NOT_SUPPORTED, 0);
        assert_eq!((answer.id, answer.kind, answer.status, answer.data), wanted);
    }
    // Its channel closes before the device does: that is the vif's end.
    drop(ctrl);
    raw.assert_ended();
}

#[test]
fn without_a_control_ring_there_is_nothing_to_ask() {
    let rig = Rig::start("loopback", &[]);
    let front = rig.connect(&FrontOptions::default());
    assert_eq!(front.control(1, [0; 3]).unwrap_err().kind(), std::io::ErrorKind::Unsupported);
    front.close().unwrap();
}

fn to(group: [u8; 6], seed: u64) -> Vec<u8> {
    let mut bytes = opaque(seed, 60);
    bytes[..6].copy_from_slice(&group);
    bytes
}

/// Which of these frames come back.
fn come_back(driver: &mut Driver, frames: &[[u8; 6]]) -> Vec<[u8; 6]> {
    // The last one always does.
    let own = [2, 0, 0, 0, 0, 1];
    for (n, group) in frames.iter().chain([&own]).enumerate() {
        let frame = driver.frame(&to(*group, n as u64));
        driver.sent.push_back(frame);
    }
    let mut came = Vec::new();
    while came.last() != Some(&own) {
        driver.until_got(1);
        for frame in driver.got.drain(..) {
            came.push(*frame.first_chunk().unwrap());
            driver.pool.give(frame);
        }
    }
    came.pop();
    came
}

const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
const OTHER: [u8; 6] = [0x33, 0x33, 0, 0, 0, 2];
const ALL_OF_THEM: [u8; 6] = [0xff; 6];

#[test]
fn a_guest_gets_the_groups_that_it_has_named() {
    let rig = Rig::start("loopback", &[]);
    let options = FrontOptions { multicast: Multicast::Listed, ..FrontOptions::default() };
    let mut front = rig.connect(&options);
    let mut driver = Driver::new(front.queue(0).unwrap(), 128);
    let sent = [GROUP, OTHER, ALL_OF_THEM];
    assert_eq!(come_back(&mut driver, &sent), [ALL_OF_THEM]);
    driver.queue.multicast(Extra::McastAdd(GROUP)).unwrap();
    assert_eq!(come_back(&mut driver, &sent), [GROUP, ALL_OF_THEM]);
    driver.queue.multicast(Extra::McastAdd(OTHER)).unwrap();
    driver.queue.multicast(Extra::McastDel(GROUP)).unwrap();
    assert_eq!(come_back(&mut driver, &sent), [OTHER, ALL_OF_THEM]);
    assert_eq!(driver.queue.totals().tx_errors, 0);
    // The list has an end, and it is told of.
    for n in 0..64 {
        driver.queue.multicast(Extra::McastAdd([1, 1, 1, 1, 1, n])).unwrap();
    }
    until("all are answered", || driver.queue.is_idle().unwrap());
    assert_eq!(driver.queue.totals().tx_errors, 1, "64 and one were taken");
    // feature-dynamic-multicast-control: it may change its mind.
    front.set_multicast(Multicast::Flood).unwrap();
    until("all come", || come_back(&mut driver, &sent).len() == 3);
    front.set_multicast(Multicast::Listed).unwrap();
    until("the list counts again", || come_back(&mut driver, &sent) == [OTHER, ALL_OF_THEM]);
    drop(driver);
    front.close().unwrap();
}

#[test]
fn who_asks_for_no_list_gets_all_groups_and_an_answer() {
    let rig = Rig::start("loopback", &[]);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    driver.queue.multicast(Extra::McastAdd(GROUP)).unwrap();
    assert_eq!(come_back(&mut driver, &[OTHER, GROUP]), [OTHER, GROUP]);
    assert_eq!(driver.queue.totals().tx_errors, 0);
    drop(driver);
    front.close().unwrap();
}

#[test]
fn headroom_is_left_from_one_packet_to_the_next_without_a_new_connection() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    let mut front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 128);
    for (round, bytes) in [256, 0, 64, 256, 256, 0].into_iter().enumerate() {
        front.set_headroom(bytes).unwrap();
        assert_eq!(rig.back_key("state").as_deref(), Some("4"));
        round_trip(&mut driver, round as u64, 100, 65_535);
    }
    // While packets pass.
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| round_trip(&mut driver, 9, 3000, 9000));
        while !busy.is_finished() {
            for bytes in [256, 0] {
                front.set_headroom(bytes).unwrap();
            }
        }
    });
    assert_eq!(driver.queue.totals().rx_errors, 0);
    drop(driver);
    front.close().unwrap();
}

#[test]
fn headroom_lies_before_each_packet() {
    let rig = Rig::start("loopback", &[]);
    let mut raw = Raw::connect(&rig.guest(), DEVID, ALL);
    let bytes = opaque(3, 60);
    raw.tx_pages.write(0, &bytes);
    let slot = raw.slot(0, 0, 60, 0);
    raw.post(0, 6);
    raw.send(&[slot]);
    let (first, _) = raw.received(1).remove(0);
    assert_eq!((first.offset, first.has(RX_EXTRA_INFO)), (0, false));
    raw.set_key("xdp-headroom", "192");
    raw.set_state(7);
    until("the backend has followed", || rig.back_key("state").as_deref() == Some("8"));
    raw.send(&[slot]);
    let got = raw.received(2);
    assert_eq!((got[0].0.offset, got[0].0.status, got[0].0.has(RX_EXTRA_INFO)), (192, 60, true));
    assert!(got[0].1 == bytes);
    assert_eq!(got[1].0.as_extra().parse(), Ok(Extra::Xdp { headroom: 192 }));
    raw.set_state(4);
    until("the backend goes on", || rig.back_key("state").as_deref() == Some("4"));
    raw.close();
}

#[test]
fn senseless_live_keys_end_that_vif_by_name() {
    for (key, value) in [("xdp-headroom", "257"), ("request-multicast-control", "maybe")] {
        let rig = Rig::start("loopback", &[]);
        rig.attach(DEVID + 1, "loopback", &[]);
        let other = NetFront::connect(&*rig.guest(), DEVID + 1, &FrontOptions::default()).unwrap();
        let mut driver = Driver::new(other.queue(0).unwrap(), 64);
        let raw = Raw::connect(&rig.guest(), DEVID, ALL);
        raw.set_key(key, value);
        raw.assert_ended();
        let path = format!("/local/domain/0/error/backend/{}/error", rig.id(DEVID));
        let told = rig.toolstack.store().unwrap().get(&path).unwrap().unwrap();
        assert!(told.contains(key), "{told}");
        round_trip(&mut driver, 1, 50, 1514);
        drop(driver);
        other.close().unwrap();
    }
}

#[test]
fn a_frontend_that_reconfigures_without_end_and_goes_in_the_middle() {
    let rig = Rig::start("loopback", &[]);
    let raw = Raw::connect(&rig.guest(), DEVID, ALL);
    for n in 0..200 {
        raw.set_key("xdp-headroom", if n % 2 == 0 { "256" } else { "0" });
        raw.set_state(if n % 3 == 0 { 4 } else { 7 });
    }
    raw.set_state(7);
    until("the backend has followed", || rig.back_key("state").as_deref() == Some("8"));
    raw.close();
    // The next connection is as any.
    raw_again(&rig);
}

fn raw_again(rig: &Rig) {
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    round_trip(&mut driver, 3, 50, 1514);
    drop(driver);
    front.close().unwrap();
}

#[test]
fn an_operator_takes_the_link_down_and_up_again() {
    let rig = Rig::start("loopback", &[]);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    assert!(front.carrier());
    assert!(rig.try_set("carrier", "sideways").unwrap_err().contains("up or down"));
    rig.set("carrier", "down");
    assert!(!front.carrier());
    let frame = driver.frame(&opaque(1, 60));
    driver.sent.push_back(frame);
    driver.turn();
    until("it is dropped", || driver.queue.is_idle().unwrap());
    assert_eq!(driver.queue.totals().tx_dropped, 1);
    std::thread::sleep(Duration::from_millis(20));
    assert!(!driver.turn(), "a packet over a link that is down");
    // It stays down for the next connection too.
    drop(driver);
    front.close().unwrap();
    let front = rig.connect(&FrontOptions::default());
    assert!(!front.carrier());
    rig.set("carrier", "up");
    assert!(front.carrier());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    round_trip(&mut driver, 2, 20, 1514);
    drop(driver);
    front.close().unwrap();
}

#[test]
fn a_hash_that_the_guest_tells_passes_and_a_senseless_one_costs_nothing() {
    let rig = Rig::start("loopback", &[]);
    let mut raw = Raw::connect(&rig.guest(), DEVID, ALL);
    let bytes = opaque(3, 60);
    raw.tx_pages.write(0, &bytes);
    raw.post(0, 4);
    for (kind, algorithm) in [(1, 1), (9, 1), (1, 7)] {
        let slot = raw.slot(0, 0, 60, TX_EXTRA_INFO);
        let hash = Extra::Hash { kind, algorithm, value: 5 };
        raw.send(&[slot, netback::proto::ExtraInfo::from(hash).into()]);
        assert_eq!(raw.answers(2)[0].status, 0);
        // A guest that has asked for no hash gets none.
        let (answer, got) = raw.received(1).remove(0);
        assert!(!answer.has(RX_EXTRA_INFO) && got == bytes);
    }
    raw.close();
}

#[test]
fn a_successor_of_the_backend_knows_what_the_guest_has_said() {
    let mut rig = Rig::start("loopback", &[]);
    let listed = FrontOptions { multicast: Multicast::Listed, ..options(4) };
    let mut front = rig.connect(&listed);
    let mut all = drivers(&front);
    front.spread(&choice()).unwrap();
    front.set_headroom(128).unwrap();
    all[0].queue.multicast(Extra::McastAdd(GROUP)).unwrap();
    until("it is answered", || all[0].queue.is_idle().unwrap());
    rig.set("carrier", "down");
    rig.restart();
    until("the successor listens", || UnixStream::connect(rig.socket(DEVID)).is_ok());
    assert!(!front.carrier());
    until("the link is up again", || rig.try_set("carrier", "up").is_ok());
    let packets: Vec<_> = (0..20).map(|n| packet(GsoKind::TcpV4, n)).collect();
    let spread = spread();
    let wanted = packets.iter().map(|p| (spread.queue(spread.hash(p), 4), spread.hash(p)));
    assert_eq!(where_they_come(&mut all, &packets), wanted.collect::<Vec<_>>());
    // Other frames than IP come in the queue of entry 0.
    assert_eq!(spread.queue(None, 4), 0);
    assert_eq!(come_back(&mut all[0], &[OTHER, GROUP]), [GROUP]);
    // The control ring goes on too.
    assert_eq!(front.control(CTRL_GET_HASH_FLAGS, [0; 3]).unwrap().status, CTRL_STATUS_SUCCESS);
    drop(all);
    front.close().unwrap();
}

#[test]
fn a_successor_that_knows_nothing_keeps_no_group_from_the_guest() {
    let mut rig = Rig::start("loopback", &[]);
    let listed = FrontOptions { multicast: Multicast::Listed, ..FrontOptions::default() };
    let front = rig.connect(&listed);
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    driver.queue.multicast(Extra::McastAdd(GROUP)).unwrap();
    assert_eq!(come_back(&mut driver, &[OTHER, GROUP]), [GROUP]);
    rig.lose_what_is_left();
    rig.restart();
    assert_eq!(come_back(&mut driver, &[OTHER, GROUP]), [OTHER, GROUP]);
    drop(driver);
    front.close().unwrap();
}
