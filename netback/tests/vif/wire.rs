//! A vif on an interface of the host, with the kernel's TCP/IP at the other end of the wire: a veth
//! pair in a network namespace of the test's.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;

use netback::endpoint::packet::Packet;
use netback::endpoint::user::fill;
use netback::frame::{Checksum, Gso, GsoKind, Offload};
use netback::stack::host::Host;
use netback::stack::several::Several;
use netback::{Endpoint, EndpointQueue, FrontOptions, FrontQueue, NetFront, Pool};
use smoltcp::socket::{icmp, tcp};
use smoltcp::wire::{EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpCidr, Ipv4Address};

use crate::rig::{DEVID, Driver, LIMIT, Rig, until};
use crate::{ALL, tcp_packet};

const INSIDE: &str = "RINGBACK_TEST_NAMESPACE";
const BYTES: usize = 6_000_000;

pub(crate) type Stack = Host<Several<FrontQueue>>;

/// Runs the test `name` again where it may make devices; it says whether this is there.
pub(crate) fn in_namespace(name: &str) -> bool {
    again(name, &["--net", "--user", "--map-root-user"])
}

/// Runs the test `name` again in namespaces of its own; it says whether this is there.
pub(crate) fn again(name: &str, namespaces: &[&str]) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let me = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(namespaces).arg(me);
    command.args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
    let ended = command.output().expect("unshare is needed: apt install util-linux");
    let text = String::from_utf8_lossy(&ended.stdout) + String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && text.contains("1 passed"), "{text}");
    false
}

pub(crate) fn ip(arguments: &str) {
    let ended = Command::new("ip").args(arguments.split(' ')).output();
    let ended = ended.expect("ip is needed: apt install iproute2");
    assert!(ended.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&ended.stderr));
}

/// A wire from `host0`, which has the address 10.9.0.1, to `wire0`.
pub(crate) fn wire() {
    ip("link add host0 type veth peer name wire0");
    ip("addr add 10.9.0.1/24 dev host0");
    ip("link set host0 up");
    ip("link set wire0 up");
}

/// A guest's stack, with the address 10.9.0.2.
pub(crate) fn stack(front: &NetFront) -> Stack {
    let queues = (0..front.queues()).map(|n| front.queue(n).unwrap()).collect();
    let mac = EthernetAddress(front.mac().unwrap());
    let queues = Several::new(queues).unwrap();
    let mut host = Host::new(queues, Pool::private(512), front.link(), mac, 1);
    host.set_address(IpCidr::new(Ipv4Address::new(10, 9, 0, 2).into(), 24));
    host
}

/// A ping of so many bytes, byte by byte the same.
pub(crate) fn ping(host: &mut Stack, to: Ipv4Address, len: usize) {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 1 << 18]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(7)).unwrap();
    let handle = host.sockets.add(socket);
    let mut data = vec![0; len];
    fill(3, 0, &mut data);
    let sums = smoltcp::phy::ChecksumCapabilities::default();
    let request = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 1, data: &data };
    let socket = host.sockets.get_mut::<icmp::Socket<'_>>(handle);
    let room = socket.send(request.buffer_len(), to.into()).unwrap();
    request.emit(&mut Icmpv4Packet::new_unchecked(room), &sums);
    let answer = host.until("the answer to a ping", LIMIT, |host| {
        let socket = host.sockets.get_mut::<icmp::Socket<'_>>(handle);
        Ok(socket.recv().ok().map(|(bytes, _)| bytes.to_vec()))
    });
    let answer = answer.unwrap();
    let packet = Icmpv4Packet::new_checked(&answer[..]).unwrap();
    let expected = Icmpv4Repr::EchoReply { ident: 7, seq_no: 1, data: &data };
    assert_eq!(Icmpv4Repr::parse(&packet, &sums).unwrap(), expected);
    host.sockets.remove(handle);
}

/// Takes what a client sends up to its end, compares it, and sends as much back.
pub(crate) fn echo(listener: &TcpListener) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut got = Vec::new();
    let mut expected = vec![0; BYTES];
    fill(5, 0, &mut expected);
    (&mut stream).take(BYTES as u64).read_to_end(&mut got).unwrap();
    assert!(got == expected, "the kernel got other bytes, {} of them", got.len());
    stream.write_all(&got).unwrap();
}

/// Sends bytes over TCP and takes them back.
pub(crate) fn transfer(host: &mut Stack, to: Ipv4Address, port: u16) {
    let buffer = || tcp::SocketBuffer::new(vec![0; 1 << 18]);
    let handle = host.sockets.add(tcp::Socket::new(buffer(), buffer()));
    let (interface, sockets) = host.parts();
    let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
    socket.connect(interface.context(), (to, 7000), port).unwrap();
    let mut bytes = vec![0; BYTES];
    fill(5, 0, &mut bytes);
    let (mut sent, mut back) = (0, Vec::new());
    let done = host.until("the bytes are back", LIMIT, |host| {
        let socket = host.sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.may_send() && sent < BYTES {
            sent += socket.send_slice(&bytes[sent..]).unwrap();
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
        }
        Ok((back.len() == BYTES).then_some(()))
    });
    done.unwrap_or_else(|e| panic!("{e}: {sent} bytes went, {} came back", back.len()));
    assert!(back == bytes, "other bytes came back");
    host.sockets.get_mut::<tcp::Socket<'_>>(handle).close();
}

#[test]
fn the_hosts_own_stack_over_a_packet_socket() {
    if !in_namespace("wire::the_hosts_own_stack_over_a_packet_socket") {
        return;
    }
    wire();
    let listener = TcpListener::bind("10.9.0.1:7000").unwrap();
    let rig = Rig::start("packet:wire0", &[]);
    for queues in [1usize, 4] {
        let front =
            rig.connect(&FrontOptions { max_queues: queues as u32, ..FrontOptions::default() });
        assert_eq!(front.queues(), queues);
        let mut host = stack(&front);
        let to = Ipv4Address::new(10, 9, 0, 1);
        for len in [56, 1472, 9000] {
            ping(&mut host, to, len);
        }
        std::thread::scope(|scope| {
            scope.spawn(|| echo(&listener));
            transfer(&mut host, to, 40_000 + queues as u16);
        });
        // Unsegmented and with blank checksums, both ways.
        for name in ["tx_gso", "rx_gso", "tx_csum_blank", "rx_csum_blank"] {
            assert!(rig.counter(DEVID, name) > 0, "{name}: {}", rig.counters(DEVID));
        }
        drop(host);
        front.close().unwrap();
    }
}

/// The other end of the wire, with frames of its own.
struct Peer {
    queue: Box<dyn EndpointQueue>,
    pool: Pool,
}

impl Peer {
    fn at(name: &str) -> (Packet, Peer) {
        let packet = Packet::open(name).unwrap();
        packet.connect(1, ALL).unwrap();
        let queue = packet.queue(0).unwrap();
        (packet, Peer { queue, pool: Pool::private(64) })
    }
    fn send(&mut self, bytes: &[u8], offload: Offload) {
        let mut frame = self.pool.take().unwrap();
        frame.set_len(bytes.len());
        frame.copy_from_slice(bytes);
        frame.offload = offload;
        let mut frames = VecDeque::from([frame]);
        self.queue.send(&mut frames, &mut self.pool).unwrap();
        assert_eq!((frames.len(), self.queue.take_dropped()), (0, 0));
    }
    /// The next frame with a tag; the kernel sends some of its own without.
    fn tagged(&mut self, driver: &mut Driver) -> (Vec<u8>, Offload) {
        let mut frames = VecDeque::new();
        let mut found = None;
        until("a tagged frame", || {
            driver.turn();
            self.queue.receive(&mut frames, 8, &mut self.pool).unwrap();
            for frame in frames.drain(..) {
                if frame[12..14] == [0x81, 0] {
                    found = Some((frame.to_vec(), frame.offload));
                }
                self.pool.give(frame);
            }
            found.is_some()
        });
        found.unwrap()
    }
}

#[test]
fn on_the_wire_there_is_the_vlans_tag_whatever_the_kernel_does_with_it() {
    if !in_namespace("wire::on_the_wire_there_is_the_vlans_tag_whatever_the_kernel_does_with_it") {
        return;
    }
    wire();
    let keys =
        [("vlan", "7"), ("antispoof", "ip"), ("mac", "00:16:3e:00:00:01"), ("ip", "10.0.2.2")];
    let rig = Rig::start("packet:wire0", &keys);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    let (_packet, mut peer) = Peer::at("host0");
    let tag = |bytes: &[u8], vid: u8| [&bytes[..12], &[0x81, 0, 0, vid], &bytes[12..]].concat();
    // Unsegmented, with a blank checksum: the kernel takes the tag out and puts it beside the frame.
    let (mut bytes, start) = tcp_packet(GsoKind::TcpV4, 30_000);
    bytes[6..12].copy_from_slice(&[0, 0x16, 0x3e, 0, 0, 1]);
    let gso = Some(Gso { kind: GsoKind::TcpV4, size: 1448 });
    let blank = |start: usize| Checksum::Blank { start: start as u16, offset: 16 };
    let mut frame = driver.frame(&bytes);
    (frame.offload.checksum, frame.offload.gso) = (blank(start), gso);
    driver.sent.push_back(frame);
    let (came, offload) = peer.tagged(&mut driver);
    assert_eq!(
        (came.len(), offload),
        (bytes.len() + 4, Offload { checksum: blank(start + 4), gso })
    );
    assert_eq!(came[..18], tag(&bytes, 7)[..18]);
    assert!(came[start + 24..] == bytes[start + 20..], "the payload has changed");
    // And back: first what is not of this VLAN.
    let dropped = rig.counter(DEVID, "rx_dropped_vlan");
    peer.send(&tag(&bytes[..60], 8), Offload::default());
    peer.send(&came, offload);
    driver.until_got(1);
    let frame = driver.got.pop_front().unwrap();
    assert_eq!(
        (frame.len(), frame.offload),
        (bytes.len(), Offload { checksum: blank(start), gso })
    );
    assert!(frame[start + 20..] == bytes[start + 20..], "the payload has changed");
    assert!(rig.counter(DEVID, "rx_dropped_vlan") > dropped);
    assert_eq!(
        (rig.counter(DEVID, "tx_dropped_spoofed"), rig.counter(DEVID, "tx_dropped_vlan")),
        (0, 0)
    );
    driver.pool.give(frame);
    drop(driver);
    front.close().unwrap();
}

#[test]
fn an_interface_that_is_not_there_is_named() {
    let error = Packet::open("no-such-wire").err().unwrap();
    assert!(error.to_string().contains("no-such-wire"), "{error}");
}
