use std::time::Duration;

use sha2::{Digest, Sha256};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::{icmp, tcp, udp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr};

use super::*;
use crate::stack::host::Host;
use crate::stack::several::Several;

type Guest = Host<Box<dyn EndpointQueue>>;

const ALL: Accepts =
    Accepts { scatter: true, checksum4: true, checksum6: true, tso4: true, tso6: true };
const LIMIT: Duration = Duration::from_secs(20);
const FRAMES: usize = 512;

/// A guest that is connected to a network of its own and has its address.
fn configured(mtu: u16, accepts: Accepts) -> Guest {
    let net = UserNet::new(mtu);
    net.connect(1, accepts).expect("a network");
    let queue = net.queue(0).expect("a queue");
    let mac = EthernetAddress([2, 0, 0, 0, 0, 1]);
    let mut guest = Host::new(queue, Pool::private(FRAMES), Link::new(mtu, accepts), mac, 1);
    assert_eq!(guest.configure(LIMIT).expect("an address"), GUEST);
    guest
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 + n / 251) as u8).collect()
}

fn ping(guest: &mut Guest, handle: SocketHandle, number: u16, len: usize) {
    let data = pattern(len);
    let request = Icmpv4Repr::EchoRequest { ident: 7, seq_no: number, data: &data };
    let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
    let room = socket.send(request.buffer_len(), GATEWAY.into()).expect("room");
    let sums = smoltcp::phy::ChecksumCapabilities::default();
    request.emit(&mut Icmpv4Packet::new_unchecked(room), &sums);
    let answer = guest.until("an answer", LIMIT, |guest| {
        let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
        Ok(socket.recv().ok().map(|(bytes, _)| bytes.to_vec()))
    });
    let answer = answer.unwrap_or_else(|e| panic!("{len} bytes: {e}"));
    let packet = Icmpv4Packet::new_checked(&answer[..]).expect("a packet");
    let found = Icmpv4Repr::parse(&packet, &sums).expect("an answer");
    assert_eq!(found, Icmpv4Repr::EchoReply { ident: 7, seq_no: number, data: &data });
}

fn icmp_socket(guest: &mut Guest) -> SocketHandle {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 1 << 18]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(7)).expect("an identity");
    guest.sockets.add(socket)
}

#[test]
fn pings_of_every_size_come_back() {
    for (mtu, accepts) in [(1500, Accepts::default()), (1500, ALL), (9000, ALL)] {
        let mut guest = configured(mtu, accepts);
        let handle = icmp_socket(&mut guest);
        let sizes = [0, 1, 56, 1472, 1473, 2000, 8972, 8973, 30_000, 65_000, 65_506, 65_507];
        for (number, len) in sizes.into_iter().enumerate() {
            ping(&mut guest, handle, number as u16, len);
        }
        assert_eq!(guest.take_dropped(), 0);
    }
}

/// Says `request`, which `body` follows, to the HTTP server, and gives its answer.
fn talk<Q: EndpointQueue>(
    guest: &mut Host<Q>,
    to: IpAddress,
    request: &str,
    body: &[u8],
) -> Vec<u8> {
    let buffer = || tcp::SocketBuffer::new(vec![0; 1 << 18]);
    let handle = guest.sockets.add(tcp::Socket::new(buffer(), buffer()));
    let (interface, sockets) = guest.parts();
    let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
    static PORT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(40_000);
    let port = PORT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    socket.connect(interface.context(), (to, WEB_PORT), port).expect("a connection");
    let message = [format!("{request}\r\n\r\n").as_bytes(), body].concat();
    let (mut sent, mut answer) = (0, Vec::new());
    let done = guest.until("the end of the answer", LIMIT, |guest| {
        let socket = guest.sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.may_send() && sent < message.len() {
            sent += socket.send_slice(&message[sent..]).expect("sent");
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes))).expect("bytes");
        }
        Ok((sent > 0 && !socket.may_recv()).then_some(()))
    });
    done.unwrap_or_else(|e| panic!("{request}: {e}, {} bytes came", answer.len()));
    guest.sockets.get_mut::<tcp::Socket<'_>>(handle).close();
    guest.turn().expect("a turn");
    guest.sockets.remove(handle);
    answer
}

fn body(answer: &[u8]) -> &[u8] {
    let at = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("a head");
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{:?}", String::from_utf8_lossy(answer));
    &answer[at + 4..]
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn what_is_downloaded_and_uploaded_is_what_was_meant() {
    let checksums = Accepts { checksum4: true, checksum6: true, ..Accepts::default() };
    for (mtu, accepts) in [(1500, Accepts::default()), (1500, checksums), (9000, ALL)] {
        let mut guest = configured(mtu, accepts);
        guest.set_address(IpCidr::new(Ipv6Address::new(0xfec0, 0, 0, 0, 0, 0, 0, 15).into(), 64));
        for to in [IpAddress::from(GATEWAY), IpAddress::from(GATEWAY6)] {
            let len = 3_000_001;
            let answer = talk(&mut guest, to, &format!("GET /bytes/{len}/9 HTTP/1.1"), &[]);
            let mut expected = vec![0; len];
            fill(9, 0, &mut expected);
            assert!(body(&answer) == expected, "{mtu} {to}: wrong bytes");
            let answer = talk(&mut guest, to, &format!("GET /sha256/{len}/9 HTTP/1.1"), &[]);
            let told = format!("{}  {len}\n", sum(&expected));
            assert_eq!(String::from_utf8_lossy(body(&answer)), told);
            let request = format!("PUT /x HTTP/1.1\r\nContent-Length: {len}");
            let answer = talk(&mut guest, to, &request, &expected);
            assert_eq!(String::from_utf8_lossy(body(&answer)), told);
        }
        assert_eq!(guest.take_dropped(), 0);
    }
}

#[test]
fn the_connections_do_not_run_out() {
    let mut guest = configured(1500, ALL);
    for _ in 0..50 {
        let answer = talk(&mut guest, GATEWAY.into(), "GET /bytes/10 HTTP/1.1", &[]);
        assert_eq!(body(&answer).len(), 10);
    }
}

#[test]
fn datagrams_are_echoed() {
    for accepts in [Accepts::default(), ALL] {
        let mut guest = configured(1500, accepts);
        let list = || vec![udp::PacketMetadata::EMPTY; 4];
        let buffer = || udp::PacketBuffer::new(list(), vec![0; 1 << 18]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(5000).expect("a port");
        let handle = guest.sockets.add(socket);
        for len in [1, 1472, 1473, 10_000, 65_507] {
            let data = pattern(len);
            let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
            socket.send_slice(&data, (GATEWAY, ECHO_PORT)).expect("room");
            let answer = guest.until("an echo", LIMIT, |guest| {
                let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
                Ok(socket.recv().ok().map(|(bytes, _)| bytes.to_vec()))
            });
            assert!(answer.unwrap_or_else(|e| panic!("{len} bytes: {e}")) == data, "{len} bytes");
        }
    }
}

#[test]
fn several_queues_reach_one_network() {
    let net = UserNet::new(1500);
    net.connect(4, ALL).expect("a network");
    let queues = (0..4).map(|number| net.queue(number).expect("a queue")).collect();
    let several = Several::new(queues).expect("one of several");
    let mac = EthernetAddress([2, 0, 0, 0, 0, 1]);
    let mut guest = Host::new(several, Pool::private(FRAMES), Link::new(1500, ALL), mac, 1);
    guest.configure(LIMIT).expect("an address");
    for _ in 0..8 {
        // Each connection has ports of its own, and so its queue.
        let answer = talk(&mut guest, GATEWAY.into(), "GET /bytes/500000/3 HTTP/1.1", &[]);
        assert_eq!(body(&answer).len(), 500_000);
    }
}

#[test]
fn a_queue_is_had_once_a_connection() {
    let net = UserNet::new(1500);
    assert!(net.queue(0).is_err(), "there is none yet");
    net.connect(1, ALL).expect("a network");
    assert!(net.queue(0).is_ok());
    assert!(net.queue(0).is_err() && net.queue(1).is_err());
    net.disconnect();
    net.connect(2, ALL).expect("a network");
    assert!(net.queue(0).is_ok() && net.queue(1).is_ok());
}

#[test]
fn a_guest_that_takes_nothing_costs_no_more_than_its_frames() {
    let net = UserNet::new(1500);
    net.connect(1, ALL).expect("a network");
    let (mut queue, mut pool) = (net.queue(0).expect("a queue"), Pool::private(64));
    let mut frames = VecDeque::new();
    for round in 0..1000u32 {
        // Questions for the gateway's address, each of which is answered.
        let mut frame = pool.take().expect("all but what waits has come back");
        frame.set_len(42);
        frame.fill(0);
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame[22..28].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        frame[28..32].copy_from_slice(&GUEST.octets());
        frame[38..42].copy_from_slice(&GATEWAY.octets());
        frames.push_back(frame);
        queue.send(&mut frames, &mut pool).expect("sent");
        assert!(frames.is_empty(), "round {round}: it was not taken");
    }
    assert!(queue.take_dropped() >= 1000 - 64);
    let mut got = VecDeque::new();
    queue.receive(&mut got, 1000, &mut pool).expect("received");
    assert_eq!(got.len() + pool.free(), 64);
}

/// A frame to the gateway: headers that make it as far as possible, and then whatever `bytes` say.
fn strange(bytes: &[u8], kind: u8, protocol: u8, fragment: u16) -> Vec<u8> {
    let mut frame = GATEWAY_MAC.0.to_vec();
    frame.extend_from_slice(&[2, 0, 0, 0, 0, 1]);
    match kind % 4 {
        0 | 1 => {
            frame.extend_from_slice(&[8, 0, 0x45, 0]);
            frame.extend_from_slice(&(20 + bytes.len() as u16).to_be_bytes());
            frame.extend_from_slice(&[0, 7]);
            frame.extend_from_slice(&fragment.to_be_bytes());
            frame.extend_from_slice(&[64, protocol, 0, 0]);
            // From the guest, from nobody, from all.
            let from = [GUEST.octets(), [0; 4], [255; 4], [10, 0, 2, 255]];
            frame.extend_from_slice(&from[usize::from(kind / 4) % 4]);
            frame.extend_from_slice(&GATEWAY.octets());
            let sum = !crate::checksum::fold(crate::checksum::sum(&frame[14..34]));
            frame[24..26].copy_from_slice(&sum.to_ne_bytes());
        }
        2 => {
            frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend_from_slice(&(bytes.len() as u16).to_be_bytes());
            frame.extend_from_slice(&[protocol, 255]);
            frame.extend_from_slice(&Ipv6Address::new(0xfec0, 0, 0, 0, 0, 0, 0, 15).octets());
            frame.extend_from_slice(&GATEWAY6.octets());
        }
        _ => frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]),
    }
    frame.extend_from_slice(bytes);
    frame
}

proptest::proptest! {
    #[test]
    fn no_guest_is_too_strange(
        packets in proptest::collection::vec(
            (
                proptest::collection::vec(proptest::num::u8::ANY, 0..120),
                proptest::num::u8::ANY,
                proptest::sample::select(vec![1u8, 2, 6, 17, 58, 0, 43, 44, 60, 41]),
                proptest::sample::select(vec![0u16, 0, 0, 0x2000, 0x2001, 1, 0x1fff, 0x3fff]),
                proptest::sample::select(vec![0u16, 80, 7, 67]),
            ),
            1..60,
        ),
    ) {
        let net = UserNet::new(1500);
        net.connect(1, ALL).expect("a network");
        let (mut queue, mut pool) = (net.queue(0).expect("a queue"), Pool::private(64));
        for (mut bytes, kind, protocol, fragment, port) in packets {
            if let Some(to) = bytes.get_mut(2..4) {
                to.copy_from_slice(&port.to_be_bytes());
            }
            let bytes = strange(&bytes, kind, protocol, fragment);
            let mut frame = pool.take().expect("a frame");
            frame.set_len(bytes.len());
            frame.copy_from_slice(&bytes);
            // As a guest says that leaves its checksums to others.
            frame.offload.checksum = crate::frame::Checksum::Valid;
            let mut frames = VecDeque::from([frame]);
            queue.send(&mut frames, &mut pool).expect("sent");
            let mut got = VecDeque::new();
            queue.receive(&mut got, 32, &mut pool).expect("received");
            got.drain(..).for_each(|frame| pool.give(frame));
        }
    }
}
