//! Against the host's own TCP/IP, in a network namespace of the test's.

use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;
use crate::checksum::Layers;
use crate::checksum::tests::is_right;
use crate::frame::{Checksum, Gso, GsoKind, Offload};

const INSIDE: &str = "RINGBACK_TEST_NAMESPACE";

/// Runs the test `name` again where it may make devices; it says whether this is there.
fn in_namespace(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let me = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--net", "--user", "--map-root-user"]).arg(me);
    command.args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
    let ended = command.output().expect("unshare is needed: apt install util-linux");
    let text = String::from_utf8_lossy(&ended.stdout) + String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && text.contains("1 passed"), "{text}");
    false
}

fn ip(arguments: &str) {
    let ended = Command::new("ip").args(arguments.split(' ')).output();
    let ended = ended.expect("ip is needed: apt install iproute2");
    assert!(ended.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&ended.stderr));
}

const ACCEPTS: Accepts =
    Accepts { scatter: true, checksum4: true, checksum6: true, tso4: true, tso6: true };

fn tap() -> (Tap, Pool) {
    let tap = Tap::open("vif1.0").unwrap();
    ip("addr add 10.9.0.1/24 dev vif1.0");
    ip("link set vif1.0 up");
    ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev vif1.0");
    (tap, Pool::on_heap(16))
}

/// The kernel notes a new link a moment later, and drops what it is to send until then.
fn wait_for_link() {
    wait_until("state UP");
}

fn wait_until(shown: &str) {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let link = Command::new("ip").args(["link", "show", "vif1.0"]).output().unwrap();
        if String::from_utf8_lossy(&link.stdout).contains(shown) {
            return;
        }
        assert!(Instant::now() < until, "not {shown}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The next UDP frame.
fn next(queue: &mut dyn EndpointQueue, pool: &mut Pool) -> Frame {
    let (mut frames, until) = (VecDeque::new(), Instant::now() + Duration::from_secs(5));
    loop {
        queue.receive(&mut frames, 1, pool).unwrap();
        match frames.pop_front() {
            Some(frame) if Layers::of(&frame).is_some_and(|l| l.payload - l.start == 8) => {
                return frame;
            }
            Some(other) => pool.give(other),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
        assert!(Instant::now() < until, "no frame");
    }
}

#[test]
fn a_link_that_is_taken_down_is_seen_by_the_host() {
    if !in_namespace("endpoint::tap::tests::a_link_that_is_taken_down_is_seen_by_the_host") {
        return;
    }
    let (tap, _) = tap();
    tap.connect(1, ACCEPTS).unwrap();
    wait_for_link();
    tap.link(Carrier::Down).unwrap();
    wait_until("NO-CARRIER");
    tap.link(Carrier::Up).unwrap();
    wait_for_link();
}

#[test]
fn udp_with_blank_checksums_both_ways() {
    if !in_namespace("endpoint::tap::tests::udp_with_blank_checksums_both_ways") {
        return;
    }
    let (tap, mut pool) = tap();
    tap.connect(1, ACCEPTS).unwrap();
    let mut queue = tap.queue(0).unwrap();
    wait_for_link();
    let socket = UdpSocket::bind("10.9.0.1:5000").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.send_to(b"hello", "10.9.0.2:6000").unwrap();
    let mut frame = next(&mut *queue, &mut pool);
    let Checksum::Blank { start, offset } = frame.offload.checksum else {
        panic!("{:?}", frame.offload)
    };
    let mut summed = frame.to_vec();
    assert!(crate::checksum::complete(&mut summed, start.into(), offset.into()));
    assert!(is_right(&summed));
    // Back as it came, with the ends exchanged.
    for (a, b, len) in [(0, 6, 6), (26, 30, 4), (34, 36, 2)] {
        for n in 0..len {
            frame.swap(a + n, b + n);
        }
    }
    let mut frames = VecDeque::from([frame]);
    queue.send(&mut frames, &mut pool).unwrap();
    let mut got = [0; 16];
    let (len, from) = socket.recv_from(&mut got).unwrap();
    assert_eq!((&got[..len], from.to_string().as_str()), (&b"hello"[..], "10.9.0.2:6000"));
    assert_eq!((pool.free(), queue.take_dropped()), (16, 0));
}

#[test]
fn what_the_host_will_not_have_is_dropped_and_counted() {
    if !in_namespace("endpoint::tap::tests::what_the_host_will_not_have_is_dropped_and_counted") {
        return;
    }
    let (tap, mut pool) = tap();
    tap.connect(2, ACCEPTS).unwrap();
    let mut queue = tap.queue(1).unwrap();
    assert!(tap.queue(2).is_err());
    let mut frames = VecDeque::new();
    for (len, offload) in [
        (4, Offload::default()),
        (60, Offload { checksum: Checksum::Blank { start: 60, offset: 16 }, gso: None }),
        (
            60,
            Offload {
                checksum: Checksum::Blank { start: 34, offset: 16 },
                gso: Some(Gso { kind: GsoKind::TcpV4, size: 0 }),
            },
        ),
    ] {
        let mut frame = pool.take().unwrap();
        frame.set_len(len);
        frame.offload = offload;
        frames.push_back(frame);
    }
    queue.send(&mut frames, &mut pool).unwrap();
    assert_eq!((frames.len(), pool.free(), queue.take_dropped()), (0, 16, 3));
}

#[test]
fn a_device_stays_for_a_successor_or_goes() {
    if !in_namespace("endpoint::tap::tests::a_device_stays_for_a_successor_or_goes") {
        return;
    }
    let tap = Tap::open("vif7.1").unwrap();
    tap.connect(4, ACCEPTS).unwrap();
    tap.persist(Persistence::Stays).unwrap();
    drop(tap);
    assert!(Tap::exists("vif7.1"));
    // The name that a script gives it is found.
    ip("link set vif7.1 name lan0");
    let tap = Tap::open("lan0").unwrap();
    assert_eq!(tap.name().unwrap(), "lan0");
    ip("link set lan0 name lan1");
    tap.connect(2, ACCEPTS).unwrap();
    tap.disconnect();
    tap.persist(Persistence::Goes).unwrap();
    drop(tap);
    assert!(!Tap::exists("lan1"));
    assert!(Tap::open("a-name-that-is-too-long").is_err());
    assert!(Tap::open("vif%d").is_err());
}
