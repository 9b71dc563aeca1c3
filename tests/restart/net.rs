//! A vif's backend killed under traffic: the guest's link stays, and a TCP connection with the
//! host's own stack goes on, every byte of it right. In a network namespace of the test's.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hypervisor::core::domains::Kind;
use hypervisor::embedded::{Frontend, HYPERVISOR_SOCKET, Link, Toolstack};
use hypervisor::store::Client;
use hypervisor::xenbus::DeviceId;
use hypervisor::xenbus::keys::key;
use hypervisor::xenbus::toolstack::{self, Device};
use netback::endpoint::user::fill;
use netback::stack::host::Host;
use netback::stack::several::Several;
use netback::{FrontOptions, FrontQueue, NetFront, Pool};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

use crate::rig::{RINGBACK, Running, until};

const INSIDE: &str = "RINGBACK_TEST_NAMESPACE";
const MAC: &str = "00:16:3e:00:00:01";
const HOST: Ipv4Address = Ipv4Address::new(10, 9, 0, 1);
const GUEST: Ipv4Address = Ipv4Address::new(10, 9, 0, 2);
const PORT: u16 = 5001;
/// How long a killed backend may be missed on a busy machine, TCP's timers included.
const PATIENCE: Duration = Duration::from_secs(20);
const KILLS: usize = 10;
/// The sequences of bytes, to the guest and from it.
const DOWN: u64 = 1;
const UP: u64 = 2;

/// Runs the test `name` again where it may make devices; it says whether this is there.
fn in_namespace(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let me = std::env::current_exe().expect("this test");
    let mut command = Command::new("unshare");
    command.args(["--net", "--user", "--map-root-user"]).arg(me);
    command.args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
    let ended = command.output().expect("unshare is needed: apt install util-linux");
    let text = String::from_utf8_lossy(&ended.stdout) + String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && text.contains("1 passed"), "{text}");
    eprint!("{text}");
    false
}

fn ip(arguments: &str) {
    let ended = Command::new("ip").args(arguments.split(' ')).output();
    let ended = ended.expect("ip is needed: apt install iproute2");
    assert!(ended.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&ended.stderr));
}

/// The number of the vif's TAP device, and how often its link has gone and come.
fn tap() -> (u64, u64) {
    let told = Command::new("ip").args(["-j", "-s", "-s", "link", "show", "vif1.0"]).output();
    let told = told.expect("ip is needed: apt install iproute2").stdout;
    let link: serde_json::Value = serde_json::from_slice(&told).expect("JSON");
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or_else(|| panic!("{link}"));
    (number(&link[0]["ifindex"]), number(&link[0]["stats64"]["tx"]["carrier_changes"]))
}

/// A hypervisor with a guest's vif, and one backend after the other.
struct Rig {
    dir: tempfile::TempDir,
    store: Client,
    guest: Frontend,
    _toolstack: Toolstack,
    _hypervisor: Running,
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the backends' log:\n{}", self.log());
        }
    }
}

impl Rig {
    fn start() -> Rig {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let run = dir.path().join("run");
        let mut hypervisor = Command::new(RINGBACK);
        hypervisor.env("RINGBACK_LOG", "warn").stdin(Stdio::null());
        hypervisor.arg("--run-dir").arg(&run).arg("hypervisor");
        let hypervisor = Running(hypervisor.spawn().expect("the hypervisor"));
        let socket = run.join(HYPERVISOR_SOCKET);
        let toolstack = until("the hypervisor listens", || Toolstack::connect(&socket).ok());
        let store = toolstack.store().expect("a store");
        let domid = toolstack.create_domain(None, Kind::Guest, "guest").expect("a domain");
        let identity = toolstack.connect_domain(domid).expect("an identity");
        let guest = Frontend::new(Link::new(identity).expect("a link"));
        let device = Device {
            id: DeviceId { kind: "vif", domid, devid: 0 },
            backend: 0,
            backend_keys: vec![
                key("script", netback::SCRIPT),
                key("hotplug-status", "connected"),
                key("options", "max_queues=2"),
            ],
            frontend_keys: vec![key("mac", MAC)],
        };
        toolstack::attach(&store, &device).expect("attach");
        Rig { dir, store, guest, _toolstack: toolstack, _hypervisor: hypervisor }
    }

    fn backend(&self) -> Running {
        let log = std::fs::File::options().create(true).append(true).open(self.log_file());
        let mut command = Command::new(RINGBACK);
        command.arg("--run-dir").arg(self.dir.path().join("backends"));
        command.arg("--hypervisor").arg(self.dir.path().join("run").join(HYPERVISOR_SOCKET));
        command.args(["backend", "net", "--domid", "1"]);
        command.env("RINGBACK_LOG", "info").env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stderr(log.expect("a log"));
        Running(command.spawn().expect("a backend"))
    }
    fn log_file(&self) -> std::path::PathBuf {
        self.dir.path().join("log")
    }
    fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }
    /// How often a backend has begun to serve the guest's rings.
    fn begins(&self) -> usize {
        let log = self.log();
        log.matches(": connected with ").count() + log.matches(": attached with ").count()
    }
    /// A key of the backend's directory, as the guest sees it.
    fn key(&self, name: &str) -> Option<String> {
        self.store.get(&format!("/local/domain/0/backend/vif/1/0/{name}")).expect("the store")
    }

    /// Kills one backend after the other, each some time after it has begun.
    fn kill_all(&self, mut backend: Running) -> Running {
        for kill in 0..KILLS {
            until("a backend serves the guest", || (self.begins() > kill).then_some(()));
            std::thread::sleep(Duration::from_millis(150 + 37 * kill as u64 % 200));
            backend.kill();
            // What the guest sees while nobody is there.
            assert_eq!(self.key("state").as_deref(), Some("4"));
            assert_ne!(self.key("carrier").as_deref(), Some("0"));
            backend = self.backend();
        }
        until("the last backend serves the guest", || (self.begins() > KILLS).then_some(()));
        std::thread::sleep(Duration::from_millis(300));
        backend
    }
}

/// The host's end: the sequences of bytes by TCP, and a datagram each millisecond.
struct Peer {
    over: AtomicBool,
    sent: AtomicU64,
    taken: AtomicU64,
}

impl Peer {
    /// In threads that a failed test leaves behind.
    fn serve(listener: TcpListener) -> Arc<Peer> {
        let (sent, taken) = (AtomicU64::new(0), AtomicU64::new(0));
        let peer = Arc::new(Peer { over: AtomicBool::new(false), sent, taken });
        let (sending, ticking, taking) = (peer.clone(), peer.clone(), peer.clone());
        std::thread::spawn(move || ticking.tick());
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a connection");
            let other = stream.try_clone().expect("a descriptor");
            std::thread::spawn(move || sending.send(&other));
            taking.take(&stream);
        });
        peer
    }
    fn send(&self, mut stream: &TcpStream) {
        let mut piece = vec![0; 32 << 10];
        while !self.over.load(Relaxed) {
            fill(DOWN, self.sent.load(Relaxed), &mut piece);
            stream.write_all(&piece).expect("sent");
            self.sent.fetch_add(piece.len() as u64, Relaxed);
        }
        stream.shutdown(std::net::Shutdown::Write).expect("shut down");
    }
    fn take(&self, mut stream: &TcpStream) {
        let mut piece = vec![0; 32 << 10];
        loop {
            let len = stream.read(&mut piece).expect("received");
            if len == 0 {
                return;
            }
            compare(UP, self.taken.fetch_add(len as u64, Relaxed), &piece[..len]);
        }
    }
    fn tick(&self) {
        let socket = UdpSocket::bind((HOST, 0)).expect("a socket");
        while !self.over.load(Relaxed) {
            // While the device has no link the kernel may refuse.
            let _ = socket.send_to(b"tick", (GUEST, PORT));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn compare(seed: u64, at: u64, found: &[u8]) {
    let mut expected = vec![0; found.len()];
    fill(seed, at, &mut expected);
    assert!(found == expected, "wrong bytes within {} from {at} on", found.len());
}

/// The longest time without something.
struct Gap {
    last: Instant,
    longest: Duration,
}

impl Gap {
    fn begin() -> Gap {
        Gap { last: Instant::now(), longest: Duration::ZERO }
    }
    fn came(&mut self) {
        let now = Instant::now();
        self.longest = self.longest.max(now - self.last);
        self.last = now;
    }
}

type Stack = Host<Several<FrontQueue>>;

/// The guest's end.
struct Guest {
    stack: Stack,
    tcp: SocketHandle,
    udp: SocketHandle,
    sent: u64,
    taken: u64,
    stream: Gap,
    ticks: Gap,
}

impl Guest {
    fn connect(front: &NetFront) -> Guest {
        let queues = (0..front.queues()).map(|n| front.queue(n).expect("a queue")).collect();
        let mac = EthernetAddress(front.mac().expect("an address"));
        let queues = Several::new(queues).expect("queues");
        let mut stack = Host::new(queues, Pool::private(512), front.link(), mac, 1);
        stack.set_address(IpCidr::new(GUEST.into(), 24));
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        let tcp = stack.sockets.add(tcp::Socket::new(buffer(), buffer()));
        let packets =
            || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 4096]);
        let udp = stack.sockets.add(udp::Socket::new(packets(), packets()));
        stack.sockets.get_mut::<udp::Socket<'_>>(udp).bind(PORT).expect("a port");
        let (interface, sockets) = stack.parts();
        let socket = sockets.get_mut::<tcp::Socket<'_>>(tcp);
        socket.connect(interface.context(), (HOST, PORT), 40_000).expect("a connection");
        let (stream, ticks) = (Gap::begin(), Gap::begin());
        let mut guest = Guest { stack, tcp, udp, sent: 0, taken: 0, stream, ticks };
        guest.until("a connection", |guest| guest.socket().may_send() && guest.taken > 0);
        (guest.stream, guest.ticks) = (Gap::begin(), Gap::begin());
        guest
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.stack.sockets.get_mut(self.tcp)
    }

    /// Takes what has come and sends what fits.
    fn work(&mut self) {
        let socket = self.stack.sockets.get_mut::<udp::Socket<'_>>(self.udp);
        while socket.recv().is_ok() {
            self.ticks.came();
        }
        let socket = self.stack.sockets.get_mut::<tcp::Socket<'_>>(self.tcp);
        while socket.can_recv() {
            let at = self.taken;
            let take = |bytes: &mut [u8]| {
                compare(DOWN, at, bytes);
                (bytes.len(), bytes.len() as u64)
            };
            self.taken += socket.recv(take).expect("bytes");
            self.stream.came();
        }
        while socket.can_send() {
            let at = self.sent;
            let put = |room: &mut [u8]| {
                let len = room.len().min(16 << 10);
                fill(UP, at, &mut room[..len]);
                (len, len as u64)
            };
            self.sent += socket.send(put).expect("room");
        }
    }

    /// Both ends have all that the other has sent.
    fn finish(&mut self, peer: &Peer) {
        peer.over.store(true, Relaxed);
        self.until("the end from the host", |guest| !guest.socket().may_recv());
        self.socket().close();
        let all = self.sent;
        self.until("the end from the guest", |_| peer.taken.load(Relaxed) == all);
        assert_eq!(self.taken, peer.sent.load(Relaxed));
        assert_eq!(self.stack.take_dropped(), 0, "wrong checksums at the guest's end");
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.stack.turn().expect("the device works");
            self.work();
            if done(self) {
                return;
            }
            assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
            if !self.stack.turn().expect("the device works") {
                self.stack.sleep(Duration::from_millis(5)).expect("a sleep");
            }
        }
    }
}

/// Packets that the host's TCP found to be corrupt.
fn checksum_errors() -> u64 {
    let text = std::fs::read_to_string("/proc/net/snmp").expect("counters");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut both = names.split(' ').zip(values.split(' '));
    let (_, errors) = both.find(|(name, _)| *name == "InCsumErrors").expect("InCsumErrors");
    errors.parse().expect("a number")
}

#[test]
fn a_guests_link_and_connection_outlive_killed_backends() {
    if !in_namespace("net::a_guests_link_and_connection_outlive_killed_backends") {
        return;
    }
    let rig = Rig::start();
    let backend = rig.backend();
    let options = FrontOptions { max_queues: 2, patience: PATIENCE, ..FrontOptions::default() };
    let front = NetFront::connect(&rig.guest, 0, &options).expect("a vif");
    ip("addr add 10.9.0.1/24 dev vif1.0");
    ip("link set vif1.0 up");
    ip(&format!("neigh add {GUEST} lladdr {MAC} dev vif1.0"));
    let (number, changes) = tap();
    let listener = TcpListener::bind((HOST, PORT)).expect("a listener");
    let peer = Peer::serve(listener);
    let mut guest = Guest::connect(&front);
    let begun = Instant::now();
    let backend = std::thread::scope(|scope| {
        let killing = scope.spawn(|| rig.kill_all(backend));
        while !killing.is_finished() {
            let before = guest.taken;
            guest.until("bytes", |guest| guest.taken > before || killing.is_finished());
            assert!(front.carrier(), "the link is down");
        }
        killing.join().expect("kills")
    });
    eprintln!(
        "{KILLS} kills in {:.1} s: longest time without a packet {} ms, without bytes of the \
         stream {} ms; {} MiB down, {} MiB up; the link of the host's device has changed {} times",
        begun.elapsed().as_secs_f64(),
        guest.ticks.longest.as_millis(),
        guest.stream.longest.as_millis(),
        guest.taken >> 20,
        guest.sent >> 20,
        tap().1 - changes,
    );
    guest.finish(&peer);
    assert!(guest.taken > 1 << 20 && guest.sent > 1 << 20);
    assert_eq!(front.fault(), None);
    assert_eq!(checksum_errors(), 0);
    assert_eq!(tap().0, number, "it is another device");
    assert_eq!(rig.begins(), KILLS + 1, "{}", rig.log());
    assert!(!rig.log().contains("panicked") && !rig.log().contains("ERROR"), "{}", rig.log());
    drop(guest);
    front.close().expect("closed");
    drop(backend);
}
