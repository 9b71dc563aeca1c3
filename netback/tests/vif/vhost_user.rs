//! A vif on a switch in user space: one by hand, and DPDK's own (`testpmd`).

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use netback::FrontOptions;
use netback::frame::{Checksum, Gso, GsoKind};

use crate::rig::{DEVID, Driver, Rig, until};
use crate::switch::{
    BUFFERS, CSUM, EVENT_IDX, GUEST_CSUM, GUEST_TSO4, HEADER, HOST_TSO4, MQ, PROTOCOL, RECEIVE,
    Switch, TRANSMIT, VERSION_1,
};
use crate::{is_summed, opaque, tcp_packet};

const PLAIN: u64 = VERSION_1 | EVENT_IDX | PROTOCOL | MQ;

fn socket(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("net.sock")
}

/// A vif that connects to the switch.
fn client(path: &Path) -> Rig {
    Rig::start(&format!("vhost-user:{}", path.display()), &[("mtu", "65535")])
}

/// A vif that a switch connects to.
fn server(path: &Path) -> Rig {
    // As xl passes it on.
    let bridge = format!("vhost-user-server:{}", path.display());
    Rig::start("vif", &[("bridge", bridge.as_str())])
}

fn queues(max_queues: u32) -> FrontOptions {
    FrontOptions { max_queues, ..FrontOptions::default() }
}

/// A frame to the guest, by one of the switch's rings: once it has come, its queue has the connection.
fn meet(driver: &mut Driver, switch: &mut Switch, ring: usize, bytes: &[u8]) {
    switch.put(ring, &[&[0; HEADER][..], bytes].concat());
    driver.until_got(1);
    let frame = driver.got.pop_front().unwrap();
    assert!(frame[..] == *bytes, "{} bytes have changed on their way to the guest", bytes.len());
    driver.pool.give(frame);
}

fn send(driver: &mut Driver, bytes: &[u8]) {
    let frame = driver.frame(bytes);
    driver.sent.push_back(frame);
    driver.turn();
}

/// A frame each way.
fn exchange(driver: &mut Driver, switch: &mut Switch, seed: u64, len: usize) {
    meet(driver, switch, RECEIVE, &opaque(!seed, len));
    let sent = opaque(seed, len);
    send(driver, &sent);
    let got = switch.got();
    assert_eq!(got[..HEADER], [0; HEADER], "nothing is left to do");
    assert!(got[HEADER..] == sent[..], "{len} bytes have changed on their way to the switch");
}

/// A connection like any: frames of all lengths, and over the rings' ends.
fn works(driver: &mut Driver, switch: &mut Switch) {
    for (seed, len) in [60, 61, 1514, 4096, 9014, 65_535].into_iter().enumerate() {
        exchange(driver, switch, seed as u64, len);
    }
    for seed in 0..u64::from(BUFFERS) + 10 {
        exchange(driver, switch, seed, 100);
    }
}

#[test]
fn frames_pass_whatever_the_switch_offers() {
    for offered in [
        VERSION_1,
        VERSION_1 | EVENT_IDX,
        VERSION_1 | PROTOCOL,
        PLAIN,
        // And what is not known.
        u64::MAX,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(socket(&folder)).unwrap();
        let rig = client(&socket(&folder));
        let front = rig.connect(&queues(1));
        let mut switch = Switch::new(listener.accept().unwrap().0, offered, 1);
        switch.start(2);
        // Not the guest's memory, nor this process's.
        assert_eq!(switch.len, 2 * (12_288 + 256 * 65_600));
        assert_eq!(switch.features & !offered, 0);
        let mut driver = Driver::new(front.queue(0).unwrap(), 64);
        works(&mut driver, &mut switch);
        drop(driver);
        front.close().unwrap();
        assert!(switch.is_left(), "the guest has gone, and so has the vif");
    }
}

/// A packet of 10000 bytes of payload, unsegmented; its bytes, and where its TCP header begins.
fn send_unsegmented(driver: &mut Driver) -> (Vec<u8>, usize) {
    let (bytes, start) = tcp_packet(GsoKind::TcpV4, 10_000);
    let mut frame = driver.frame(&bytes);
    frame.offload.checksum = Checksum::Blank { start: start as u16, offset: 16 };
    frame.offload.gso = Some(Gso { kind: GsoKind::TcpV4, size: 1448 });
    driver.sent.push_back(frame);
    driver.turn();
    (bytes, start)
}

#[test]
fn a_switch_is_left_what_it_does_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(socket(&folder)).unwrap();
    let rig = client(&socket(&folder));
    let front = rig.connect(&queues(1));
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    for offered in [PLAIN, PLAIN | CSUM, PLAIN | CSUM | HOST_TSO4] {
        let mut switch = Switch::new(listener.accept().unwrap().0, offered, 1);
        switch.start(2);
        meet(&mut driver, &mut switch, RECEIVE, &opaque(1, 60));
        let (bytes, start) = send_unsegmented(&mut driver);
        if offered & HOST_TSO4 != 0 {
            let got = switch.got();
            // NEEDS_CSUM, TCPV4, and the headers' length, the segments', start and offset.
            let words = [54u16, 1448, start as u16, 16, 0].map(u16::to_le_bytes).concat();
            assert_eq!(got[..HEADER], [&[1, 1][..], &words].concat());
            assert!(got[HEADER + start + 20..] == bytes[start + 20..]);
            continue;
        }
        let mut payload = Vec::new();
        while payload.len() < 10_000 {
            let got = switch.got();
            assert_eq!(got[..HEADER], [0; HEADER]);
            assert!(got.len() <= HEADER + start + 20 + 1448 && is_summed(&got[HEADER..], start));
            payload.extend_from_slice(&got[HEADER + start + 20..]);
        }
        assert!(payload == bytes[start + 20..], "the payload has changed");
    }
    drop(driver);
    front.close().unwrap();
}

#[test]
fn an_unsegmented_packet_comes_from_the_switch() {
    let folder = tempfile::tempdir().unwrap();
    let rig = server(&socket(&folder));
    let front = rig.connect(&queues(1));
    let offered = PLAIN | GUEST_CSUM | GUEST_TSO4;
    let mut switch = Switch::connect(&socket(&folder), offered, 1);
    switch.start(2);
    assert_eq!(switch.features & GUEST_TSO4, GUEST_TSO4);
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    let (bytes, start) = tcp_packet(GsoKind::TcpV4, 10_000);
    let words = |size: u16| [54, size, start as u16, 16, 1].map(u16::to_le_bytes).concat();
    // Segments of no length, none of a known kind, no checksum to be made, shorter than a header, than a
    // frame, nothing: each costs the packet alone.
    for (flags, kind, size, len) in
        [(1, 1, 0, bytes.len()), (1, 3, 1448, 100), (0, 1, 1448, 100), (0, 0, 0, 13)]
    {
        switch.put(RECEIVE, &[&[flags, kind][..], &words(size), &bytes[..len]].concat());
    }
    switch.put(RECEIVE, &[0; HEADER - 1]);
    switch.put(RECEIVE, &[]);
    switch.put(RECEIVE, &[&[1, 1][..], &words(1448), &bytes].concat());
    driver.until_got(1);
    let frame = driver.got.pop_front().unwrap();
    assert!(frame[start + 20..] == bytes[start + 20..]);
    assert_eq!(frame.offload.gso, Some(Gso { kind: GsoKind::TcpV4, size: 1448 }));
    driver.pool.give(frame);
    assert!(!driver.turn(), "one packet made sense");
    drop(driver);
    front.close().unwrap();
}

#[test]
fn more_queues_than_the_switch_has() {
    let folder = tempfile::tempdir().unwrap();
    let rig = server(&socket(&folder));
    let front = rig.connect(&queues(4));
    assert_eq!(front.queues(), 4);
    let mut drivers: Vec<_> = (0..4).map(|n| Driver::new(front.queue(n).unwrap(), 64)).collect();
    for pairs in [1, 2, 4, 128] {
        let mut switch = Switch::connect(&socket(&folder), PLAIN, pairs);
        let served = pairs.min(4) as usize;
        switch.start(2 * served);
        assert_eq!(switch.features & MQ != 0, served > 1);
        for (number, driver) in drivers.iter_mut().enumerate() {
            let (ring, len) = (2 * (number % served), 200 + number);
            if number < served {
                meet(driver, &mut switch, ring + RECEIVE, &opaque(number as u64, len));
            }
            until("it comes by a ring", || {
                // Those without a ring of their own have the connection a little later.
                send(driver, &opaque(number as u64, len));
                switch.next(ring + TRANSMIT).is_some_and(|(buffer, _, came)| {
                    switch.used(ring + TRANSMIT, buffer.into(), 0);
                    came as usize == HEADER + len
                })
            });
        }
    }
    drop(drivers);
    front.close().unwrap();
}

/// A switch that does not read holds the guest up, and loses nothing.
#[test]
fn a_full_ring_waits_for_the_switch() {
    for offered in [PLAIN, PLAIN & !EVENT_IDX] {
        let folder = tempfile::tempdir().unwrap();
        let rig = server(&socket(&folder));
        let front = rig.connect(&queues(2));
        let mut switch = Switch::connect(&socket(&folder), offered, 1);
        switch.start(2);
        let mut driver = Driver::new(front.queue(0).unwrap(), 1024);
        let mut other = Driver::new(front.queue(1).unwrap(), 64);
        meet(&mut driver, &mut switch, RECEIVE, &opaque(1, 60));
        for seed in 0..900 {
            let frame = driver.frame(&opaque(seed, 64));
            driver.sent.push_back(frame);
        }
        until("the ring is full", || {
            driver.turn();
            rig.counter(DEVID, "tx_packets") > BUFFERS.into()
        });
        std::thread::sleep(std::time::Duration::from_millis(300));
        // Another queue, which sends by the same ring, does not wait. One packet alone: a second one
        // might find room once the switch reads.
        let dropped = rig.counter(DEVID, "tx_dropped_host") + 1;
        send(&mut other, &opaque(1, 60));
        until("a packet is dropped", || {
            other.turn();
            rig.counter(DEVID, "tx_dropped_host") == dropped
        });
        for seed in 0..900 {
            driver.turn();
            let got = switch.got();
            assert!(got[HEADER..] == opaque(seed, 64)[..], "packet {seed}");
        }
        assert_eq!(rig.counter(DEVID, "tx_dropped_host"), dropped);
        drop((driver, other));
        front.close().unwrap();
    }
}

/// Packets go nowhere, and are counted.
fn drops(rig: &Rig, driver: &mut Driver) {
    let before = rig.counter(DEVID, "tx_dropped_host");
    until("a packet is dropped", || {
        send(driver, &opaque(1, 60));
        rig.counter(DEVID, "tx_dropped_host") > before
    });
}

/// One that connects and speaks well.
fn good(path: &Path, driver: &mut Driver) {
    let mut switch = Switch::connect(path, PLAIN, 1);
    switch.start(2);
    exchange(driver, &mut switch, 5, 1514);
}

#[test]
fn a_switch_whose_rings_make_no_sense_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let rig = server(&socket(&folder));
    let front = rig.connect(&queues(1));
    let mut driver = Driver::new(front.queue(0).unwrap(), 256);
    type Nonsense = fn(&mut Switch);
    let all: [Nonsense; 7] = [
        |switch| switch.index(RECEIVE, 257),
        |switch| switch.index(RECEIVE, 0xffff),
        |switch| switch.used(RECEIVE, 256, 60),
        |switch| switch.used(RECEIVE, u32::MAX, 60),
        |switch| switch.used(RECEIVE, 3, 65_566),
        |switch| {
            switch.entry(RECEIVE, 3, 60);
            switch.used(RECEIVE, 3, 60);
        },
        |switch| switch.used(TRANSMIT, 7, 0),
    ];
    const TWICE: usize = 5;
    for (number, nonsense) in all.into_iter().enumerate() {
        let mut switch = Switch::connect(&socket(&folder), PLAIN, 1);
        switch.start(2);
        exchange(&mut driver, &mut switch, 1, 100);
        nonsense(&mut switch);
        // To the transmit ring it looks when there is something to send.
        send(&mut driver, &opaque(1, 60));
        assert!(switch.is_left(), "case {number}");
        drops(&rig, &mut driver);
        // Of two entries with one number the first is a frame like any.
        driver.until_got(usize::from(number == TWICE));
        while let Some(frame) = driver.got.pop_front() {
            driver.pool.give(frame);
        }
    }
    good(&socket(&folder), &mut driver);
    assert_eq!(rig.error(DEVID), None);
    drop(driver);
    front.close().unwrap();
}

#[test]
fn a_switch_whose_messages_make_no_sense_is_left() {
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    let rig = server(&socket(&folder));
    let front = rig.connect(&queues(1));
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    drops(&rig, &mut driver);
    type Nonsense = fn(&mut Switch);
    let all: [Nonsense; 3] = [
        |switch| switch.socket.write_all(&[0xff; 4096]).unwrap(),
        // No VIRTIO_F_VERSION_1.
        |switch| {
            switch.reply(1, 0);
            switch.reply(1, 0);
        },
        // Nothing at all.
        |_| {},
    ];
    for nonsense in all {
        let mut switch = Switch::connect(&socket(&folder), 0, 1);
        nonsense(&mut switch);
        let mut heard = Vec::new();
        let end = std::io::Read::read_to_end(&mut switch.socket, &mut heard);
        // Reset where it had not read all.
        let reset = |e: &std::io::Error| e.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(end.as_ref().map_or_else(reset, |_| true), "{end:?}");
        drops(&rig, &mut driver);
    }
    good(&socket(&folder), &mut driver);
    // And one that speaks when all is said.
    let mut switch = Switch::connect(&socket(&folder), PLAIN, 1);
    switch.start(2);
    exchange(&mut driver, &mut switch, 1, 100);
    switch.reply(1, 0);
    assert!(switch.is_left());
    drop(driver);
    front.close().unwrap();
}

#[test]
fn a_path_that_is_none_is_refused() {
    let rig = Rig::start("vhost-user:relative/path", &[]);
    until("the reason is told", || {
        rig.error(DEVID).is_some_and(|text| text.contains("relative/path"))
    });
}
