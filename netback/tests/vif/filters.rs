//! Filters before an endpoint, asked for by keys and live.

use std::path::PathBuf;
use std::sync::Arc;

use netback::endpoint::loopback::Loopback;
use netback::endpoint::named::Plain;
use netback::endpoint::pcap::{Pace, Recorder, Replay};
use netback::frame::{Checksum, Gso, GsoKind};
use netback::{FrontOptions, Open};

use crate::rig::{DEVID, Driver, Rig, until};
use crate::{is_summed, opaque, tcp_packet};

const MAC: [u8; 6] = [0, 0x16, 0x3e, 0, 0, 1];

/// A frame of an experimental protocol from `mac`.
fn from(mac: [u8; 6], seed: u64) -> Vec<u8> {
    let mut bytes = opaque(seed, 60);
    bytes[6..12].copy_from_slice(&mac);
    bytes
}

fn send(driver: &mut Driver, bytes: &[u8]) {
    let frame = driver.frame(bytes);
    driver.sent.push_back(frame);
    driver.turn();
}

/// Sends a frame and waits until it is back.
fn passes(driver: &mut Driver, bytes: &[u8]) {
    send(driver, bytes);
    driver.until_got(1);
    let frame = driver.got.pop_front().unwrap();
    assert!(frame[..] == *bytes, "another frame came");
    driver.pool.give(frame);
}

#[test]
fn a_guests_addresses_are_watched_when_that_is_asked_for_and_as_long() {
    let rig = Rig::start("loopback", &[("mac", "00:16:3e:00:00:01"), ("ip", "10.0.0.5")]);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    let (own, other) = (from(MAC, 1), from([0, 0x16, 0x3e, 0, 0, 9], 2));
    passes(&mut driver, &other);
    rig.set("antispoof", "mac");
    send(&mut driver, &other);
    until("it is dropped", || rig.counter(DEVID, "tx_dropped_spoofed") == 1);
    passes(&mut driver, &own);
    rig.set("antispoof", "ip");
    send(&mut driver, &own);
    until("another protocol is dropped", || rig.counter(DEVID, "tx_dropped_spoofed") == 2);
    rig.set("antispoof", "off");
    passes(&mut driver, &other);
    let refused = rig.try_set("antispoof", "on").unwrap_err();
    assert!(refused.contains("off, mac, ip"), "{refused}");
    drop(driver);
    front.close().unwrap();
}

#[test]
fn a_node_may_ask_for_it_and_without_addresses_it_is_refused() {
    let rig = Rig::start("loopback", &[("mac", "00:16:3e:00:00:01"), ("antispoof", "mac")]);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    send(&mut driver, &from([2; 6], 1));
    passes(&mut driver, &from(MAC, 2));
    assert_eq!(rig.counter(DEVID, "tx_dropped_spoofed"), 1);
    let refused = rig.try_set("antispoof", "ip").unwrap_err();
    assert!(refused.contains("key ip"), "{refused}");
    // What was asked for before is still in force.
    send(&mut driver, &from([2; 6], 3));
    passes(&mut driver, &from(MAC, 4));
    assert_eq!(rig.counter(DEVID, "tx_dropped_spoofed"), 2);
}

/// Vifs with a loopback that records what passes.
fn recorded(path: PathBuf) -> Arc<Open> {
    Arc::new(move |_| {
        let recorder = Recorder::new(Loopback::new(65_535), &path, 1 << 24)?;
        Ok(Box::new(Plain(recorder)))
    })
}

#[test]
fn outside_there_is_the_vlans_tag_and_offsets_point_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pcap");
    let keys = [("vlan", "100"), ("mtu", "65535")];
    let rig = Rig::with(recorded(path.clone()), |seen| seen, "loopback", &keys);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    passes(&mut driver, &from(MAC, 1));
    // Unsegmented with a blank checksum, there and back.
    let (bytes, start) = tcp_packet(GsoKind::TcpV4, 30_000);
    let mut frame = driver.frame(&bytes);
    let blank = Checksum::Blank { start: start as u16, offset: 16 };
    let gso = Some(Gso { kind: GsoKind::TcpV4, size: 1448 });
    (frame.offload.checksum, frame.offload.gso) = (blank, gso);
    driver.sent.push_back(frame);
    driver.until_got(1);
    let frame = driver.got.pop_front().unwrap();
    assert_eq!((frame.offload.checksum, frame.offload.gso), (blank, gso));
    assert!(frame.len() == bytes.len() && frame[start + 20..] == bytes[start + 20..]);
    driver.pool.give(frame);
    // A tag of the guest's own goes nowhere.
    let mut hop = from(MAC, 2);
    hop[12..16].copy_from_slice(&[0x81, 0, 0, 5]);
    send(&mut driver, &hop);
    until("it is dropped", || rig.counter(DEVID, "tx_dropped_vlan") == 1);
    drop(driver);
    front.close().unwrap();
    drop(rig);
    let record = Replay::open(&path, Pace::AtOnce, 1 << 24).unwrap();
    let packets = record.packets();
    assert_eq!(packets.len(), 4, "two frames, each out and in");
    for packet in packets {
        assert_eq!(packet.bytes[12..16], [0x81, 0, 0, 100]);
    }
    assert_eq!(packets[2].bytes.len(), bytes.len() + 4);
    assert!(!is_summed(&packets[2].bytes[4..], start), "the checksum was left to others");
}

#[test]
fn frames_of_another_vlan_do_not_come_in() {
    let rig = Rig::start("loopback", &[]);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    let mut tagged = from(MAC, 1);
    tagged[12..16].copy_from_slice(&[0x81, 0, 0, 100]);
    // Without the knob tags pass as they are.
    passes(&mut driver, &tagged);
    rig.set("vlan", "100");
    passes(&mut driver, &from(MAC, 2));
    let refused = rig.try_set("vlan", "4095").unwrap_err();
    assert!(refused.contains("4094"), "{refused}");
    rig.set("vlan", "0");
    passes(&mut driver, &tagged);
}
