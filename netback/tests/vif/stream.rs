//! A vif on a stream socket, with a peer written by hand.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use netback::FrontOptions;
use netback::frame::{Checksum, Gso, GsoKind};

use crate::rig::{DEVID, Driver, LIMIT, Rig, until};
use crate::{is_summed, opaque, tcp_packet};

/// The next frame behind its length.
fn read(peer: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    peer.read_exact(&mut len).unwrap();
    let mut bytes = vec![0; u32::from_be_bytes(len) as usize];
    peer.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_stream_is_one_queue_and_leaves_nothing_to_its_peer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net.sock");
    let bridge = format!("stream-server:{}", path.display());
    // As xl passes it on.
    let rig = Rig::start("vif", &[("bridge", bridge.as_str())]);
    let front = rig.connect(&FrontOptions { max_queues: 4, ..FrontOptions::default() });
    assert_eq!(front.queues(), 1);
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    for _ in 0..2 {
        let mut peer = UnixStream::connect(&path).unwrap();
        peer.set_read_timeout(Some(LIMIT)).unwrap();
        let bytes = opaque(7, 1514);
        peer.write_all(&1514u32.to_be_bytes()).unwrap();
        peer.write_all(&bytes).unwrap();
        driver.until_got(1);
        let frame = driver.got.pop_front().unwrap();
        assert!(frame[..] == bytes[..], "another frame came");
        driver.pool.give(frame);
        // An unsegmented packet arrives in segments with right checksums.
        let (bytes, start) = tcp_packet(GsoKind::TcpV4, 10_000);
        let mut frame = driver.frame(&bytes);
        frame.offload.checksum = Checksum::Blank { start: start as u16, offset: 16 };
        frame.offload.gso = Some(Gso { kind: GsoKind::TcpV4, size: 1448 });
        driver.sent.push_back(frame);
        driver.turn();
        let mut payload = Vec::new();
        while payload.len() < 10_000 {
            let segment = read(&mut peer);
            assert!(segment.len() <= start + 20 + 1448 && is_summed(&segment, start));
            payload.extend_from_slice(&segment[start + 20..]);
        }
        assert!(payload == bytes[start + 20..], "the payload has changed");
    }
    // Without a peer what the guest sends goes nowhere, and the guest goes on.
    let before = rig.counter(DEVID, "tx_dropped_host");
    until("it is dropped", || {
        let frame = driver.frame(&opaque(1, 60));
        driver.sent.push_back(frame);
        driver.turn();
        rig.counter(DEVID, "tx_dropped_host") > before
    });
    drop(driver);
    front.close().unwrap();
}

#[test]
fn an_address_that_is_none_is_refused() {
    let rig = Rig::start("stream:relative/path", &[]);
    until("the reason is told", || {
        rig.error(DEVID).is_some_and(|text| text.contains("relative/path"))
    });
}
