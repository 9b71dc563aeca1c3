//! Our frontend against our backend, on the bundled hypervisor.

mod crossing;
mod filters;
mod grants;
mod hold;
mod lifetime;
mod live;
mod raw;
mod rig;
mod staging;
mod stream;
mod switch;
mod testpmd;
mod vhost_user;
mod watched;
mod wire;
mod xdp;
mod xsa;

use std::time::Duration;

use hypervisor::xenbus::toolstack::Detached;
use netback::endpoint::Accepts;
use netback::endpoint::user::{GATEWAY, GUEST, WEB_PORT, fill};
use netback::frame::{Checksum, Gso, GsoKind};
use netback::frontend::Split;
use netback::stack::host::Host;
use netback::stack::several::Several;
use netback::{FrontOptions, FrontQueue, Pool};
use rig::{DEVID, Driver, LIMIT, Rig, until};
use smoltcp::socket::tcp;
use smoltcp::wire::EthernetAddress;

const NONE: Accepts =
    Accepts { scatter: false, checksum4: false, checksum6: false, tso4: false, tso6: false };
const ALL: Accepts =
    Accepts { scatter: true, checksum4: true, checksum6: true, tso4: true, tso6: true };

fn mix(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (n ^ (n >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ (n >> 32)
}

/// A frame that nobody looks into: of an experimental protocol (RFC 5342).
fn opaque(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len as u64).map(|n| mix(seed ^ (n << 20)) as u8).collect();
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    bytes
}

/// Sends `count` frames of random lengths through a queue of a loopback and compares what comes.
fn round_trip(driver: &mut Driver, seed: u64, count: u64, longest: u64) {
    let mut expected = std::collections::VecDeque::new();
    let mut next = 0;
    while next < count || !expected.is_empty() {
        while next < count && expected.len() < 32 {
            let len = 60 + mix(seed ^ next) % (longest - 59);
            let bytes = opaque(seed ^ next, len as usize);
            let frame = driver.frame(&bytes);
            driver.sent.push_back(frame);
            expected.push_back(bytes);
            next += 1;
        }
        driver.until_got(1);
        for frame in driver.got.drain(..) {
            let bytes: Vec<u8> = expected.pop_front().expect("one more than was sent");
            assert_eq!(frame.len(), bytes.len());
            assert!(frame[..] == bytes[..], "a frame of {} bytes has changed", bytes.len());
            driver.pool.give(frame);
        }
    }
}

#[test]
fn every_combination_of_features_moves_the_same_bytes() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    for bits in 0..32u32 {
        let bit = |n: u32| bits & (1 << n) != 0;
        let accepts = Accepts {
            scatter: bit(0),
            checksum4: bit(1),
            checksum6: bit(2),
            tso4: bit(3),
            tso6: bit(3),
        };
        let options = FrontOptions {
            accepts,
            split: if bit(4) { Split::Offered } else { Split::Never },
            ..FrontOptions::default()
        };
        let front = rig.connect(&options);
        let mut driver = Driver::new(front.queue(0).unwrap(), 128);
        // A frontend without feature-sg takes one page.
        let longest = if accepts.scatter { 65_535 } else { 4096 };
        round_trip(&mut driver, u64::from(bits), 60, longest);
        assert_eq!(driver.queue.totals().rx_errors, 0);
        drop(driver);
        front.close().unwrap();
    }
}

#[test]
fn four_queues_each_with_its_own_packets() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    for split in [Split::Offered, Split::Never] {
        let options = FrontOptions { max_queues: 4, split, ..FrontOptions::default() };
        let front = rig.connect(&options);
        assert_eq!(front.queues(), 4);
        std::thread::scope(|scope| {
            let start = |number| {
                let queue = front.queue(number).unwrap();
                scope.spawn(move || {
                    let mut driver = Driver::new(queue, 128);
                    round_trip(&mut driver, number as u64 + 100, 500, 65_535);
                })
            };
            let threads: Vec<_> = (0..4).map(start).collect();
            for thread in threads {
                thread.join().unwrap_or_else(|_| panic!("{}", rig.counters(DEVID)));
            }
        });
        let again = front.queue(0).unwrap();
        assert!(front.queue(0).is_err(), "a queue was given out twice");
        drop(again);
        front.close().unwrap();
    }
}

#[test]
fn rings_of_several_pages() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    for order in [0, 2, 4] {
        let options = FrontOptions {
            max_ring_page_order: order,
            tx_pages: 4096,
            rx_pages: 4096,
            ..FrontOptions::default()
        };
        let front = rig.connect(&options);
        let keys = &front.chosen().queues[0];
        assert_eq!((keys.tx_refs.len(), keys.rx_refs.len()), (1 << order, 1 << order));
        let mut driver = Driver::new(front.queue(0).unwrap(), 128);
        round_trip(&mut driver, order.into(), 1000, 65_535);
        drop(driver);
        front.close().unwrap();
    }
}

/// A TCP packet of `payload` bytes; where its TCP header begins.
fn tcp_packet(kind: GsoKind, payload: usize) -> (Vec<u8>, usize) {
    let mut bytes = vec![0; 12];
    let start = match kind {
        GsoKind::TcpV4 => {
            bytes.extend_from_slice(&[8, 0, 0x45, 0]);
            bytes.extend_from_slice(&(40 + payload as u16).to_be_bytes());
            bytes.extend_from_slice(&[0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 2, 2, 10, 0, 2, 15]);
            34
        }
        GsoKind::TcpV6 => {
            bytes.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend_from_slice(&(20 + payload as u16).to_be_bytes());
            bytes.extend_from_slice(&[6, 64]);
            bytes.extend((0..32).map(|n| if n % 16 == 0 { 0xfd } else { n }));
            54
        }
    };
    assert_eq!(bytes.len(), start);
    bytes.extend_from_slice(&[
        0, 80, 0x9c, 0x40, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
    ]);
    bytes.extend((0..payload).map(|n| mix(n as u64) as u8));
    (bytes, start)
}

/// Whether a TCP packet's checksum is right.
fn is_summed(frame: &[u8], start: usize) -> bool {
    let addresses = if start == 34 { 26..34 } else { 22..54 };
    let mut sum = 6 + (frame.len() - start) as u32;
    for pair in frame[addresses].chunks(2).chain(frame[start..].chunks(2)) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum == 0xffff
}

/// Sends an unsegmented packet through a loopback to a guest that takes what `accepts` says.
fn unsegmented(rig: &Rig, kind: GsoKind, accepts: Accepts) {
    let v4 = kind == GsoKind::TcpV4;
    let (whole, blank) =
        if v4 { (accepts.tso4, accepts.checksum4) } else { (accepts.tso6, accepts.checksum6) };
    let front = rig.connect(&FrontOptions { accepts, ..FrontOptions::default() });
    let mut driver = Driver::new(front.queue(0).unwrap(), 128);
    let payload = 60_000;
    let (bytes, start) = tcp_packet(kind, payload);
    let mut frame = driver.frame(&bytes);
    frame.offload.checksum = Checksum::Blank { start: start as u16, offset: 16 };
    frame.offload.gso = Some(Gso { kind, size: 1428 });
    driver.sent.push_back(frame);
    driver.until_got(if whole { 1 } else { payload.div_ceil(1428) });
    let mut all = Vec::new();
    for frame in &driver.got {
        assert_eq!(frame.offload.gso.is_some(), whole);
        match frame.offload.checksum {
            Checksum::Blank { start: found, offset } => {
                assert!(blank, "a blank checksum for one who takes none");
                assert_eq!((usize::from(found), offset), (start, 16));
            }
            _ => assert!(is_summed(frame, start), "a wrong checksum"),
        }
        all.extend_from_slice(&frame[start + 20..]);
    }
    assert!(all == bytes[start + 20..], "the payload has changed");
    assert_eq!(driver.queue.totals().tx_gso, 1);
    drop(driver);
    front.close().unwrap();
}

#[test]
fn unsegmented_packets_come_back_whole_or_cut_with_right_checksums() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    for kind in [GsoKind::TcpV4, GsoKind::TcpV6] {
        for accepts in
            [ALL, Accepts { tso4: false, tso6: false, ..ALL }, Accepts { scatter: true, ..NONE }]
        {
            unsegmented(&rig, kind, accepts);
        }
    }
}

/// Each queue's own packets in its own counters, which `ringback stats` shows.
#[test]
fn the_stats_page_of_four_queues() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    for life in 0..2 {
        let front = rig.connect(&FrontOptions { max_queues: 4, ..FrontOptions::default() });
        for number in 0..4 {
            let mut driver = Driver::new(front.queue(number).unwrap(), 64);
            let (bytes, start) = tcp_packet(GsoKind::TcpV4, 20_000);
            for _ in 0..=number {
                let mut frame = driver.frame(&bytes);
                frame.offload.checksum = Checksum::Blank { start: start as u16, offset: 16 };
                frame.offload.gso = Some(Gso { kind: GsoKind::TcpV4, size: 1428 });
                driver.sent.push_back(frame);
            }
            driver.until_got(number + 1);
            let frame = driver.frame(&opaque(1, 60));
            driver.sent.push_back(frame);
            driver.until_got(number + 2);
        }
        let blocks = rig.stats(DEVID);
        assert_eq!(blocks.len(), 12, "{blocks:?}");
        for number in 0..4u64 {
            let value = |block: &str, name: &str| {
                let block = format!("{block}-{number}");
                let (_, values) = blocks.iter().find(|(name, _)| *name == block).expect("a block");
                values.iter().find(|(n, _)| n == name).expect("a counter").1
            };
            let gso = number + 1;
            for (block, name, wanted) in [
                ("queue", "tx_packets", gso + 1),
                ("queue", "rx_packets", gso + 1),
                ("queue", "tx_gso", gso),
                ("queue", "rx_gso", gso),
                ("queue", "tx_csum_blank", gso),
                ("queue", "tx_slots", gso * 6 + 1),
                ("queue", "rx_slots", gso * 6 + 1),
                ("tx-ring", "requests", gso * 6 + 1),
                ("rx-ring", "responses", gso * 6 + 1),
            ] {
                assert_eq!(value(block, name), wanted, "{block}-{number}: {name}, life {life}");
            }
        }
        front.close().unwrap();
        until("the page goes with the connection", || rig.stats(DEVID).is_empty());
    }
}

/// Downloads so many bytes and compares them.
fn download(host: &mut Host<Several<FrontQueue>>, len: usize) {
    let buffer = || tcp::SocketBuffer::new(vec![0; 1 << 18]);
    let handle = host.sockets.add(tcp::Socket::new(buffer(), buffer()));
    let (interface, sockets) = host.parts();
    let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
    socket.connect(interface.context(), (GATEWAY, WEB_PORT), 40_000).unwrap();
    let request = format!("GET /bytes/{len}/9 HTTP/1.1\r\n\r\n");
    let (mut asked, mut answer) = (false, Vec::new());
    let done = host.until("the end of the answer", LIMIT, |host| {
        let socket = host.sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.may_send() && !asked {
            asked = socket.send_slice(request.as_bytes()).unwrap() == request.len();
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes))).unwrap();
        }
        Ok((asked && !socket.may_recv()).then_some(()))
    });
    let state = host.sockets.get_mut::<tcp::Socket<'_>>(handle).state();
    let totals: Vec<_> = host.queue().queues().iter().map(FrontQueue::totals).collect();
    let came = answer.len();
    done.unwrap_or_else(|e| panic!("{e}; {came} bytes came; {state:?}; {totals:?}"));
    let mut expected = vec![0; len];
    fill(9, 0, &mut expected);
    assert!(answer.ends_with(&expected), "wrong bytes");
}

#[test]
fn a_stack_reaches_the_user_mode_network() {
    for (mtu, queues, split) in
        [("1500", 1, Split::Offered), ("1500", 4, Split::Never), ("9000", 4, Split::Offered)]
    {
        let rig = Rig::start("user", &[("mtu", mtu)]);
        let options = FrontOptions { max_queues: queues, split, ..FrontOptions::default() };
        let front = rig.connect(&options);
        assert_eq!(front.mac(), Some([0, 0x16, 0x3e, 0, 0, 1]));
        assert_eq!(front.link().mtu.to_string(), mtu);
        let queues = (0..front.queues()).map(|n| front.queue(n).unwrap()).collect();
        let queues = Several::new(queues).unwrap();
        let mac = EthernetAddress(front.mac().unwrap());
        let mut host = Host::new(queues, Pool::private(512), front.link(), mac, 1);
        assert_eq!(host.configure(LIMIT).unwrap(), GUEST);
        download(&mut host, 3_000_000);
        drop(host);
        front.close().unwrap();
    }
}

#[test]
fn closed_and_opened_again_it_leaves_nothing() {
    let rig = Rig::start("loopback", &[]);
    for round in 0..5 {
        let front = rig.connect(&FrontOptions { max_queues: 4, ..FrontOptions::default() });
        let mut driver = Driver::new(front.queue(round % 4).unwrap(), 64);
        round_trip(&mut driver, round as u64, 20, 1514);
        if round == 3 {
            // As a kernel that starts another: the next connection begins anew.
            drop(driver);
            front.abandon();
            continue;
        }
        drop(driver);
        front.close().unwrap();
    }
    assert_eq!(rig.detach(), Detached::Closed);
    assert_eq!(rig.back_key("state"), None);
}

#[test]
fn a_detached_device_ends_its_queues() {
    let rig = Rig::start("loopback", &[]);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    round_trip(&mut driver, 1, 20, 1514);
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| rig.detach());
        until("the backend wants to close", || rig.back_key("state").as_deref() == Some("5"));
        drop(driver);
        front.close().unwrap();
        assert_eq!(closing.join().unwrap(), Detached::Closed);
    });
}

#[test]
fn a_wrong_node_is_refused_by_name() {
    let rig = Rig::start("carrier-pigeon", &[]);
    let options = FrontOptions { patience: Duration::from_secs(2), ..FrontOptions::default() };
    let error = netback::NetFront::connect(&*rig.guest(), DEVID, &options).err().expect("refused");
    assert!(error.to_string().contains("vif/0"), "{error}");
    until("the reason is told", || {
        rig.error(DEVID).is_some_and(|text| text.contains("carrier-pigeon"))
    });
}
