//! DPDK's own vhost-user back-end, which Open vSwitch has too: `dpdk-testpmd`, without huge pages.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use netback::FrontOptions;
use netback::frame::{Checksum, Gso, GsoKind};
use parking_lot::Mutex;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv4Packet, Icmpv4Repr,
    IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr,
};

use crate::rig::{DEVID, Driver, LIMIT, Rig, until};
use crate::{is_summed, opaque, tcp_packet};

/// Each has a processor to itself: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

const NEEDS: &str = "are dpdk-dev, librte-net-vhost23 and librte-mempool-ring23 installed?";

struct TestPmd {
    child: Child,
    lines: Receiver<String>,
    _stdin: Option<ChildStdin>,
}

impl TestPmd {
    /// Forwards by `mode` what comes, back to where it comes from. `device`: more of the device's options.
    fn start(path: &Path, queues: usize, device: &str, mode: &str) -> TestPmd {
        let _ = std::fs::remove_file(path);
        TestPmd::join(path, queues, device, mode)
    }

    /// The same with a socket that is there.
    fn join(path: &Path, queues: usize, device: &str, mode: &str) -> TestPmd {
        let last = std::thread::available_parallelism().map_or(0, |n| n.get() - 1);
        let device = format!("net_vhost0,iface={},queues={queues}{device}", path.display());
        // What it says to a pipe would stay with it otherwise.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "dpdk-testpmd", "--no-huge", "-m", "256", "--no-pci", "--no-shconf"]);
        command.arg("--no-telemetry");
        command.args(["--iova-mode=va", "--lcores", &format!("0@(0-{last}),1@(0-{last})")]);
        command.args(["--vdev", &device, "--", "--total-num-mbufs=8192", "--nb-cores=1"]);
        command.args(["--port-topology=loop", "--disable-link-check"]);
        command.args([&format!("--rxq={queues}"), &format!("--txq={queues}")]);
        command.arg(format!("--forward-mode={mode}"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("stdbuf, of coreutils");
        let (out, stdin) = (child.stdout.take().unwrap(), child.stdin.take());
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        let pmd = TestPmd { child, lines, _stdin: stdin };
        pmd.until_says("Press enter to exit");
        pmd
    }

    fn until_says(&self, what: &str) {
        let (end, mut said) = (Instant::now() + LIMIT, Vec::new());
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|e| panic!("dpdk-testpmd: {e}: {NEEDS}: {said:#?}"));
            if line.contains(what) {
                return;
            }
            said.push(line);
        }
    }
}

impl Drop for TestPmd {
    /// By SIGKILL.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A frame as `macswap` sends it back.
fn swapped(bytes: &[u8]) -> Vec<u8> {
    [&bytes[6..12], &bytes[..6], &bytes[12..]].concat()
}

fn give_all(driver: &mut Driver) {
    while let Some(frame) = driver.got.pop_front() {
        driver.pool.give(frame);
    }
}

/// Sends until something comes back: what was sent before there was a connection is dropped.
fn until_connected(driver: &mut Driver) {
    until("the switch answers", || {
        if driver.pool.free() > 8 {
            let frame = driver.frame(&opaque(1, 77));
            driver.sent.push_back(frame);
        }
        driver.turn();
        !driver.got.is_empty()
    });
    // The last of these.
    let end = Instant::now() + std::time::Duration::from_millis(100);
    while Instant::now() < end {
        driver.turn();
        give_all(driver);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Frames that come back with their addresses swapped, in order.
fn echoes(driver: &mut Driver, seed: u64, lengths: impl Iterator<Item = usize>) {
    for (number, len) in lengths.enumerate() {
        let bytes = opaque(seed ^ number as u64, len);
        let frame = driver.frame(&bytes);
        driver.sent.push_back(frame);
        driver.until_got(1);
        let frame = driver.got.pop_front().unwrap();
        assert!(frame[..] == swapped(&bytes)[..], "{len} bytes, {} came", frame.len());
        driver.pool.give(frame);
    }
}

/// Many at once, of which none is lost or changed.
fn flood(driver: &mut Driver, count: usize) {
    let (mut sent, mut came) = (0, 0);
    while came < count {
        while sent < count && sent - came < 32 {
            let frame = driver.frame(&opaque(sent as u64, 60 + sent % 1455));
            driver.sent.push_back(frame);
            sent += 1;
        }
        driver.until_got(1);
        while let Some(frame) = driver.got.pop_front() {
            let wanted = swapped(&opaque(came as u64, 60 + came % 1455));
            assert!(frame[..] == wanted[..], "frame {came}");
            driver.pool.give(frame);
            came += 1;
        }
    }
}

fn options(max_queues: u32) -> FrontOptions {
    FrontOptions { max_queues, ..FrontOptions::default() }
}

#[test]
fn frames_come_back_from_dpdk_by_several_queues() {
    let _alone = ALONE.lock();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vhost.sock");
    let _pmd = TestPmd::start(&path, 2, "", "macswap");
    let rig = Rig::start(&format!("vhost-user:{}", path.display()), &[("mtu", "9000")]);
    let front = rig.connect(&options(2));
    assert_eq!(front.queues(), 2);
    for number in 0..2 {
        let mut driver = Driver::new(front.queue(number).unwrap(), 128);
        until_connected(&mut driver);
        echoes(&mut driver, number as u64, [60, 61, 64, 100, 1500, 1514, 9014].into_iter());
        flood(&mut driver, 2000);
        assert_eq!(driver.queue.totals().rx_errors, 0);
    }
    front.close().unwrap();
}

#[test]
fn dpdk_is_killed_and_started_again_under_traffic() {
    let _alone = ALONE.lock();
    for server in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vhost.sock");
        let kind = if server { "vhost-user-server" } else { "vhost-user" };
        let rig = Rig::start(&format!("{kind}:{}", path.display()), &[]);
        let front = rig.connect(&options(1));
        let mut driver = Driver::new(front.queue(0).unwrap(), 256);
        for life in 0..3 {
            let pmd = match server {
                true => TestPmd::join(&path, 1, ",client=1", "macswap"),
                false => TestPmd::start(&path, 1, "", "macswap"),
            };
            until_connected(&mut driver);
            flood(&mut driver, 500);
            // It ends with frames on their way.
            for seed in 0..32 {
                let frame = driver.frame(&opaque(seed, 1000));
                driver.sent.push_back(frame);
            }
            driver.turn();
            drop(pmd);
            let before = rig.counter(DEVID, "tx_dropped_host");
            until("packets are dropped", || {
                let frame = driver.frame(&opaque(life, 60));
                driver.sent.push_back(frame);
                driver.turn();
                give_all(&mut driver);
                rig.counter(DEVID, "tx_dropped_host") > before
            });
            assert_eq!(rig.error(DEVID), None);
        }
        drop(driver);
        front.close().unwrap();
    }
}

/// An ICMP echo request of so many bytes of payload, from 10.0.0.2 to 10.0.0.1.
fn ping(payload: &[u8]) -> Vec<u8> {
    let ethernet = EthernetRepr {
        src_addr: EthernetAddress([0, 0x16, 0x3e, 0, 0, 1]),
        dst_addr: EthernetAddress([2, 0, 0, 0, 0, 1]),
        ethertype: EthernetProtocol::Ipv4,
    };
    let icmp = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 9, data: payload };
    let ip = Ipv4Repr {
        src_addr: Ipv4Address::new(10, 0, 0, 2),
        dst_addr: Ipv4Address::new(10, 0, 0, 1),
        next_header: IpProtocol::Icmp,
        payload_len: icmp.buffer_len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; 14 + ip.buffer_len() + icmp.buffer_len()];
    let sums = ChecksumCapabilities::default();
    ethernet.emit(&mut EthernetFrame::new_unchecked(&mut bytes[..]));
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[14..]), &sums);
    icmp.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[34..]), &sums);
    bytes
}

#[test]
fn dpdk_answers_pings() {
    let _alone = ALONE.lock();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vhost.sock");
    let _pmd = TestPmd::start(&path, 1, "", "icmpecho");
    let rig = Rig::start(&format!("vhost-user:{}", path.display()), &[]);
    let front = rig.connect(&options(1));
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    for len in [18, 56, 1472] {
        let payload = opaque(len as u64, len);
        until("an answer comes", || {
            let frame = driver.frame(&ping(&payload));
            driver.sent.push_back(frame);
            driver.turn();
            !driver.got.is_empty()
        });
        let frame = driver.got.pop_front().unwrap();
        let sums = ChecksumCapabilities::default();
        let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
        assert_eq!(ip.dst_addr(), Ipv4Address::new(10, 0, 0, 2));
        let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        let answer = Icmpv4Repr::parse(&icmp, &sums).unwrap();
        assert_eq!(answer, Icmpv4Repr::EchoReply { ident: 7, seq_no: 9, data: &payload });
        driver.pool.give(frame);
        // Answers to what was sent meanwhile.
        std::thread::sleep(std::time::Duration::from_millis(20));
        driver.turn();
        give_all(&mut driver);
    }
    drop(driver);
    front.close().unwrap();
}

/// What the guest leaves to do is done: here where the device does not cut (`tso=0`), and by DPDK.
#[test]
fn dpdk_gets_packets_with_checksums_or_makes_them() {
    let _alone = ALONE.lock();
    for (kind, device) in [(GsoKind::TcpV4, ""), (GsoKind::TcpV6, ""), (GsoKind::TcpV4, ",tso=1")] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vhost.sock");
        let _pmd = TestPmd::start(&path, 1, device, "macswap");
        let rig = Rig::start(&format!("vhost-user:{}", path.display()), &[]);
        let front = rig.connect(&options(1));
        let mut driver = Driver::new(front.queue(0).unwrap(), 128);
        until_connected(&mut driver);
        let (bytes, start) = tcp_packet(kind, 30_000);
        let mut frame = driver.frame(&bytes);
        frame.offload.checksum = Checksum::Blank { start: start as u16, offset: 16 };
        frame.offload.gso = Some(Gso { kind, size: 1428 });
        driver.sent.push_back(frame);
        let whole = device.contains("tso");
        driver.until_got(if whole { 1 } else { 30_000_usize.div_ceil(1428) });
        let mut payload = Vec::new();
        for frame in &driver.got {
            assert!(is_summed(frame, start), "a wrong checksum");
            payload.extend_from_slice(&frame[start + 20..]);
        }
        assert!(payload == bytes[start + 20..], "the payload has changed");
        drop(driver);
        front.close().unwrap();
    }
}
