//! A vif on an interface of the host by AF_XDP, with the kernel's TCP/IP at the other end of the wire,
//! and what becomes of it where AF_XDP is not possible.

use std::collections::VecDeque;
use std::fmt::{Debug, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::Command;
use std::sync::Mutex;

use netback::checksum::{Layers, Transport, fold, sum};
use netback::endpoint::packet::Packet;
use netback::endpoint::xdp::Xdp;
use netback::endpoint::{Abilities, Accepts};
use netback::frame::{Checksum, GsoKind};
use netback::{Endpoint, FrontOptions, NetFront, Pool};
use smoltcp::wire::Ipv4Address;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::rig::{DEVID, Driver, Rig, until};
use crate::wire::{again, echo, in_namespace, ip, ping, stack, transfer};
use crate::{opaque, tcp_packet};

const HOST: Ipv4Address = Ipv4Address::new(10, 9, 0, 1);

/// As [`in_namespace`], with the capabilities that the kernel wants for programs: those of the
/// machine's own user namespace.
fn as_root(name: &str) -> bool {
    assert!(rustix::process::geteuid().is_root(), "root is needed: bpf(2) takes no less");
    again(name, &["--net"])
}

/// What a command says.
fn said(program: &str, arguments: &str) -> String {
    let ended = Command::new(program).args(arguments.split(' ')).output();
    let ended = ended.unwrap_or_else(|e| panic!("{program} is needed: apt install {program}: {e}"));
    let error = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{program} {arguments}: {error}");
    String::from_utf8_lossy(&ended.stdout).into_owned()
}

/// A wire from `host0`, which has the address 10.9.0.1, to `wire0`, with so many hardware queues.
fn wire(host: usize, own: usize) {
    let size = |queues| format!("numtxqueues {queues} numrxqueues {queues}");
    ip(&format!("link add host0 {} type veth peer name wire0 {}", size(host), size(own)));
    ip("addr add 10.9.0.1/24 dev host0");
    ip("link set host0 up");
    ip("link set wire0 up");
    said("ethtool", "-K wire0 rxvlan off");
}

/// Whether the interface has a program, and whether it is promiscuous.
fn link() -> (bool, bool) {
    let text = said("ip", "-d link show wire0");
    (text.contains("prog/xdp"), !text.contains("promiscuity 0"))
}

/// Descriptors of this process, and those of bpf(2) among them. Memory of the guest's is not counted:
/// it stays.
fn descriptors() -> (usize, usize) {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let open = open.filter_map(|e| std::fs::read_link(e.path()).ok());
    let open = open.map(|to| to.to_string_lossy().into_owned());
    let open: Vec<_> = open.filter(|to| !to.starts_with("/memfd:")).collect();
    (open.len(), open.iter().filter(|to| to.contains("bpf")).count())
}

fn options(queues: usize) -> FrontOptions {
    FrontOptions { max_queues: queues as u32, ..FrontOptions::default() }
}

/// Pings and a transfer both ways with the kernel.
fn traffic(front: &NetFront, port: u16) {
    let listener = TcpListener::bind("10.9.0.1:7000").unwrap();
    let mut host = stack(front);
    for len in [56, 1472, 9000] {
        ping(&mut host, HOST, len);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| echo(&listener));
        transfer(&mut host, HOST, port);
    });
}

#[test]
fn the_hosts_own_stack_over_af_xdp() {
    if !as_root("xdp::the_hosts_own_stack_over_af_xdp") {
        return;
    }
    wire(4, 4);
    let mut rig = Rig::start("vif", &[("bridge", "xdp:wire0")]);
    until("the vif is offered", || rig.back_key("state").as_deref() == Some("2"));
    for queues in [1usize, 2, 4] {
        assert_eq!((link(), descriptors().1), ((false, false), 0));
        let before = descriptors().0;
        let front = rig.connect(&options(queues));
        assert_eq!(front.queues(), queues);
        assert_eq!((link(), descriptors().1), ((true, true), 1));
        traffic(&front, 40_000 + queues as u16);
        // Segments were made here; what the kernel had left to do with checksums was found.
        for (name, some) in
            [("tx_gso", true), ("rx_gso", false), ("tx_csum_blank", true), ("rx_csum_blank", true)]
        {
            let text = rig.counters(DEVID);
            assert_eq!(rig.counter(DEVID, name) > 0, some, "{name}: {text}");
        }
        if queues == 4 {
            // A successor takes over under the guest.
            rig.restart();
            until("a program again", || link() == (true, true));
            traffic(&front, 40_009);
        }
        front.close().unwrap();
        until("nothing is left", || (link(), descriptors()) == ((false, false), (before, 0)));
    }
}

/// How many packets came through each hardware queue.
fn by_hardware_queue() -> Vec<u64> {
    let text = said("ethtool", "-S wire0");
    let counters = text.lines().filter(|line| line.contains("_xdp_packets:"));
    let counters = counters.filter(|line| line.contains("rx_queue_"));
    counters.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect()
}

/// Datagrams of the kernel's from so many ports; all arrive, right or blank as is said.
fn datagrams(drivers: &mut [Driver], ports: u16, is_blank: bool) {
    for port in 0..ports {
        let socket = UdpSocket::bind(("10.9.0.1", 20_000 + port)).unwrap();
        socket.send_to(&opaque(port.into(), 700), "10.9.0.2:9").unwrap();
    }
    let mut came = vec![false; ports.into()];
    until("all datagrams", || {
        for driver in &mut *drivers {
            driver.turn();
            for frame in std::mem::take(&mut driver.got) {
                // The kernel sends some of its own besides.
                let layers = Layers::of(&frame).filter(|of| of.transport == Transport::Udp);
                let Some(of) = layers.filter(|_| frame.ends_with(&opaque(port(&frame), 700)))
                else {
                    driver.pool.give(frame);
                    continue;
                };
                let pseudo = of.pseudo(&frame, of.end - of.start);
                let is_right = fold(pseudo + sum(&frame[of.start..])) == u16::MAX;
                let claimed = matches!(frame.offload.checksum, Checksum::Blank { .. });
                assert_eq!((is_right, claimed), (!is_blank, is_blank));
                came[port(&frame) as usize] = true;
                driver.pool.give(frame);
            }
        }
        came.iter().all(|came| *came)
    });
}

/// The number of the port that a datagram is from.
fn port(frame: &[u8]) -> u64 {
    let port = u16::from_be_bytes([frame[34], frame[35]]);
    u64::from(port.saturating_sub(20_000))
}

#[test]
fn each_hardware_queue_is_served_and_checksums_are_made_where_they_are_missing() {
    let name = "xdp::each_hardware_queue_is_served_and_checksums_are_made_where_they_are_missing";
    if !as_root(name) {
        return;
    }
    wire(4, 4);
    ip("neigh add 10.9.0.2 lladdr 00:16:3e:00:00:01 dev host0");
    let rig = Rig::start("xdp:wire0", &[]);
    // Who takes blank checksums gets them; who does not gets them finished.
    let nothing = Accepts { scatter: true, ..Accepts::default() };
    for (accepts, is_blank) in [(FrontOptions::default().accepts, true), (nothing, false)] {
        let front = rig.connect(&FrontOptions { accepts, ..options(3) });
        let mut drivers: Vec<_> =
            (0..3).map(|n| Driver::new(front.queue(n).unwrap(), 128)).collect();
        datagrams(&mut drivers, 64, is_blank);
        let each = by_hardware_queue();
        assert_eq!(each.len(), 4, "{each:?}");
        assert!(each.iter().all(|packets| *packets > 0), "{each:?}");
        // A sender that makes them itself.
        said("ethtool", "-K host0 tx off");
        datagrams(&mut drivers, 64, false);
        said("ethtool", "-K host0 tx on");
        drop(drivers);
        front.close().unwrap();
    }
}

#[test]
fn vlan_tags_stay_in_packets() {
    if !as_root("xdp::vlan_tags_stay_in_packets") {
        return;
    }
    wire(1, 1);
    // A tagged packet with a checksum that is left to the other end.
    let far = Packet::open("host0").unwrap();
    far.connect(1, Accepts::default()).unwrap();
    let (mut sender, mut pool) = (far.queue(0).unwrap(), Pool::private(4));
    let (mut bytes, start) = tcp_packet(GsoKind::TcpV4, 700);
    bytes.splice(12..12, [0x81, 0, 0, 7]);
    Layers::of(&bytes).unwrap().prepare(&mut bytes);
    let blank = |start: usize| Checksum::Blank { start: start as u16, offset: 16 };
    let rig = Rig::start("xdp:wire0", &[]);
    let front = rig.connect(&options(1));
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    let mut packet = || {
        let mut frame = pool.take().unwrap();
        frame.set_len(bytes.len());
        frame.copy_from_slice(&bytes);
        frame.offload.checksum = blank(start + 4);
        sender.send(&mut VecDeque::from([frame]), &mut pool).unwrap();
        let mut found = None;
        until("the packet", || {
            driver.turn();
            for frame in std::mem::take(&mut driver.got) {
                if frame.ends_with(&bytes[start + 24..]) {
                    found = Some((frame[12..18].to_vec(), frame.offload.checksum));
                }
                driver.pool.give(frame);
            }
            found.is_some()
        });
        found.unwrap()
    };
    assert_eq!(packet(), (vec![0x81, 0, 0, 7, 8, 0], blank(start + 4)));
    // Taken out where the vif is in this VLAN.
    rig.set("vlan", "7");
    until("there is no tag", || packet().0[..2] == [8, 0]);
    assert_eq!(packet().1, blank(start));
}

#[test]
fn more_than_the_ring_holds_goes_in_order() {
    if !as_root("xdp::more_than_the_ring_holds_goes_in_order") {
        return;
    }
    wire(1, 1);
    let (near, far) = (Xdp::open("wire0").unwrap(), Packet::open("host0").unwrap());
    let mut pool = Pool::private(2048);
    near.connect(1, Accepts::default()).unwrap();
    far.connect(1, Accepts::default()).unwrap();
    assert_eq!(near.abilities(), Abilities { mtu: 1500, ..Abilities::default() });
    let (mut sender, mut receiver) = (near.queue(0).unwrap(), far.queue(0).unwrap());
    let mut frames: VecDeque<_> = (0..1500u32)
        .map(|number| {
            let mut frame = pool.take().unwrap();
            frame.set_len(1400);
            frame.copy_from_slice(&opaque(number.into(), 1400));
            frame
        })
        .collect();
    sender.send(&mut frames, &mut pool).unwrap();
    // The send ring's places; the rest is to be offered again soon.
    assert_eq!(frames.len(), 1500 - 512);
    assert!(sender.waits().deadline.is_some());
    let (mut got, mut next) = (VecDeque::new(), 0);
    until("all frames", || {
        sender.send(&mut frames, &mut pool).unwrap();
        receiver.receive(&mut got, 256, &mut pool).unwrap();
        for frame in got.drain(..) {
            if frame[12..14] == [0x88, 0xb5] {
                assert!(frame[..] == opaque(next, 1400)[..], "frame {next}");
                next += 1;
            }
            pool.give(frame);
        }
        next == 1500
    });
    assert!(frames.is_empty() && sender.waits().deadline.is_none());
    // What no wire takes is dropped.
    for len in [13, 1523] {
        let mut frame = pool.take().unwrap();
        frame.set_len(len);
        frames.push_back(frame);
        sender.send(&mut frames, &mut pool).unwrap();
        assert_eq!((frames.len(), sender.take_dropped()), (0, 1), "{len} bytes");
    }
    // Long ones, short ones and nonsense the other way.
    for len in [14usize, 60, 1514] {
        let mut frame = pool.take().unwrap();
        frame.set_len(len);
        frame.copy_from_slice(&opaque(len as u64, len));
        frames.push_back(frame);
    }
    receiver.send(&mut frames, &mut pool).unwrap();
    let mut came = Vec::new();
    until("frames the other way", || {
        sender.receive(&mut got, 64, &mut pool).unwrap();
        for frame in got.drain(..) {
            if frame[12..14] == [0x88, 0xb5] {
                assert!(frame[..] == opaque(frame.len() as u64, frame.len())[..]);
                came.push(frame.len());
            }
            pool.give(frame);
        }
        came.len() == 3
    });
    assert_eq!(came, [14, 60, 1514]);
}

#[test]
fn an_interface_that_is_down_costs_packets_and_one_that_goes_ends_the_vif() {
    let name = "xdp::an_interface_that_is_down_costs_packets_and_one_that_goes_ends_the_vif";
    if !as_root(name) {
        return;
    }
    wire(1, 1);
    let rig = Rig::start("xdp:wire0", &[]);
    let front = rig.connect(&options(1));
    ping(&mut stack(&front), HOST, 56);
    ip("link set wire0 down");
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    let push = |driver: &mut Driver| {
        for number in 0..16 {
            let Some(mut frame) = driver.pool.take() else { break };
            frame.set_len(1000);
            frame.copy_from_slice(&opaque(number, 1000));
            driver.sent.push_back(frame);
        }
        driver.turn();
    };
    until("packets are dropped", || {
        push(&mut driver);
        rig.counter(DEVID, "tx_dropped_host") > 100
    });
    drop(driver);
    ip("link set wire0 up");
    ping(&mut stack(&front), HOST, 1472);
    // A second one cannot have the same queue.
    rig.attach(1, "xdp:wire0", &[]);
    assert!(NetFront::connect(&*rig.guest(), 1, &options(1)).is_err());
    until("it is told", || {
        rig.error(1).is_some_and(|text| text.contains("wire0") && text.contains("queue 0"))
    });
    ping(&mut stack(&front), HOST, 1472);
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    for round in 0..200 {
        push(&mut driver);
        if round == 100 {
            ip("link del host0");
        }
        if rig.error(DEVID).is_some() {
            break;
        }
    }
    until("its end is told", || {
        rig.error(DEVID).is_some_and(|text| text.contains("interface wire0 is gone"))
    });
    assert_eq!(descriptors().1, 0);
}

/// Takes down what is warned of.
#[derive(Clone, Copy)]
struct Warnings;

static WARNED: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, _: &Field, value: &dyn Debug) {
        write!(self.0, "{value:?}").unwrap();
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        WARNED.lock().unwrap().push(text.0);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// A vif on `wire0` works without AF_XDP, with up to so many queues, and says once why it is without.
fn without(reason: &str, most: usize) {
    let before = WARNED.lock().unwrap().len();
    let rig = Rig::start("xdp:wire0", &[]);
    for queues in [1, 3] {
        let front = rig.connect(&options(queues));
        assert_eq!(front.queues(), queues.min(most));
        assert!(!link().0, "{}", said("ip", "-d link show wire0"));
        traffic(&front, 40_000 + queues as u16);
        for name in ["tx_gso", "rx_gso", "tx_csum_blank", "rx_csum_blank"] {
            assert!(rig.counter(DEVID, name) > 0, "{name}: {}", rig.counters(DEVID));
        }
        front.close().unwrap();
    }
    let warned = WARNED.lock().unwrap()[before..].to_vec();
    let ours: Vec<_> = warned.iter().filter(|text| text.contains("AF_XDP")).collect();
    assert!(ours.len() == 1 && ours[0].contains(reason), "{warned:?}");
}

#[test]
fn where_it_cannot_be_there_is_a_packet_socket() {
    if !as_root("xdp::where_it_cannot_be_there_is_a_packet_socket") {
        return;
    }
    tracing::subscriber::set_global_default(Warnings).unwrap();
    wire(1, 1);
    ip("link set host0 mtu 9000");
    ip("link set wire0 mtu 9000");
    // The hardware's queues do not limit a packet socket's.
    without("its MTU is 9000, and a frame has room for 3818", 3);
    ip("link set host0 mtu 1500");
    ip("link set wire0 mtu 1500");
    said("ethtool", "-K wire0 rxvlan on");
    without("ethtool -K wire0 rxvlan off", 3);
    said("ethtool", "-K wire0 rxvlan off");
    // The driver's own reason: here, that the peer has more queues.
    ip("link del host0");
    wire(2, 1);
    without("its driver takes no program", 1);
}

#[test]
fn without_the_machines_privileges_there_is_a_packet_socket() {
    if !in_namespace("xdp::without_the_machines_privileges_there_is_a_packet_socket") {
        return;
    }
    tracing::subscriber::set_global_default(Warnings).unwrap();
    wire(1, 1);
    without("the kernel takes no program", 3);
}

#[test]
fn an_interface_that_is_not_there_is_refused() {
    let rig = Rig::start("xdp:none0", &[]);
    until("the reason is told", || rig.error(DEVID).is_some_and(|text| text.contains("none0")));
}
