use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::frame::{Checksum, MAX_FRAME};

const LIMIT: Duration = Duration::from_secs(20);

/// A queue with frames of its own.
struct End {
    _stream: Stream,
    queue: Box<dyn EndpointQueue>,
    pool: Pool,
    to_send: VecDeque<Frame>,
    got: VecDeque<Frame>,
}

fn end(role: Role, address: &Address) -> End {
    let stream = Stream::open(role, address.clone(), 1500).unwrap();
    stream.connect(1, Accepts::default()).unwrap();
    let queue = stream.queue(0).unwrap();
    assert!(stream.queue(1).is_err());
    let lists = VecDeque::new;
    End { _stream: stream, queue, pool: Pool::private(256), to_send: lists(), got: lists() }
}

fn unix(folder: &Path) -> Address {
    Address::Unix(folder.join("net.sock"))
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 + n / 251 + seed) as u8).collect()
}

impl End {
    fn put(&mut self, bytes: &[u8]) {
        let mut frame = self.pool.take().unwrap();
        frame.set_len(bytes.len());
        frame.copy_from_slice(bytes);
        frame.offload.checksum = Checksum::Valid;
        self.to_send.push_back(frame);
    }
    fn turn(&mut self) {
        self.queue.send(&mut self.to_send, &mut self.pool).unwrap();
        self.queue.receive(&mut self.got, 64, &mut self.pool).unwrap();
    }
    /// What has come, whose memory goes back.
    fn take(&mut self) -> Vec<Vec<u8>> {
        let all = self.got.iter().map(|frame| frame.to_vec()).collect();
        assert!(self.got.iter().all(|frame| frame.offload.checksum == Checksum::Unknown));
        self.got.drain(..).for_each(|frame| self.pool.give(frame));
        all
    }
    /// Sleeps as a queue's thread does.
    fn sleep(&self) {
        let waits = self.queue.waits();
        let ins = waits.readable.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN));
        let outs = waits.writable.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::OUT));
        let mut fds: Vec<_> = ins.chain(outs).collect();
        let most = Duration::from_millis(20);
        let own = waits.deadline.map_or(most, |at| at.saturating_duration_since(Instant::now()));
        poll(&mut fds, Some(&Timespec::try_from(own.min(most)).unwrap())).unwrap();
    }
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < limit, "not within {LIMIT:?}: {what}");
    }
}

/// Sends frames from `a` until one has arrived at `b`: until then nobody may be there.
fn meet(a: &mut End, b: &mut End) {
    until("the ends have met", || {
        a.put(&pattern(1, 60));
        a.turn();
        b.turn();
        b.sleep();
        !b.take().is_empty()
    });
    a.queue.take_dropped();
}

/// Frames of every kind of length arrive once, whole and in order.
fn all_arrive(a: &mut End, b: &mut End) {
    let lens = [14, 60, 61, 1514, 9014, 65_549, MAX_FRAME];
    let (mut next, mut came) = (0, 0);
    until("all have arrived", || {
        while next < 300 && a.to_send.len() < 20 {
            a.put(&pattern(next, lens[next % lens.len()]));
            next += 1;
        }
        a.turn();
        b.turn();
        for bytes in b.take() {
            // What was sent before they had met may come late.
            if came == 0 && bytes == pattern(1, 60) {
                continue;
            }
            assert!(bytes == pattern(came, lens[came % lens.len()]), "frame {came} has changed");
            came += 1;
        }
        if came < 300 {
            b.sleep();
        }
        came == 300
    });
    assert_eq!((a.queue.take_dropped(), a.pool.free()), (0, 256));
}

#[test]
fn frames_of_all_lengths_both_ways_over_unix_and_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [unix(folder.path()), Address::Tcp(free.to_string())] {
        let mut server = end(Role::Server, &address);
        let mut client = end(Role::Client, &address);
        meet(&mut client, &mut server);
        all_arrive(&mut client, &mut server);
        all_arrive(&mut server, &mut client);
    }
    assert!(!folder.path().join("net.sock").exists(), "the server's socket was left behind");
}

#[test]
fn who_has_lost_its_peer_finds_another() {
    let folder = tempfile::tempdir().unwrap();
    let address = unix(folder.path());
    let mut client = end(Role::Client, &address);
    // Nobody is there: what is sent is lost, not kept.
    client.put(&pattern(0, 60));
    client.turn();
    assert_eq!((client.queue.take_dropped(), client.to_send.len()), (1, 0));
    for _ in 0..2 {
        let mut server = end(Role::Server, &address);
        meet(&mut client, &mut server);
        all_arrive(&mut server, &mut client);
        drop(server);
    }
    // A killed server's socket is in nobody's way.
    drop(UnixListener::bind(folder.path().join("net.sock")).unwrap());
    let mut server = end(Role::Server, &address);
    meet(&mut client, &mut server);
    assert!(
        Stream::open(Role::Server, address, 1500).is_err(),
        "a server that is there was replaced"
    );
}

#[test]
fn a_peer_that_sends_bytes_one_by_one_and_nonsense() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = end(Role::Server, &unix(folder.path()));
    let connect = || UnixStream::connect(folder.path().join("net.sock")).unwrap();
    let mut peer = connect();
    let mut bytes = Vec::new();
    for len in [0, 13, 14, 100] {
        bytes.extend_from_slice(&(len as u32).to_be_bytes());
        bytes.extend_from_slice(&pattern(len, len));
    }
    for byte in &bytes {
        peer.write_all(&[*byte]).unwrap();
        server.turn();
    }
    until("two frames", || {
        server.turn();
        server.got.len() == 2
    });
    assert_eq!(server.take(), [pattern(14, 14), pattern(100, 100)]);
    assert_eq!(server.queue.take_dropped(), 1, "too short");
    // A length that is none ends the connection, and the next peer is served.
    peer.write_all(&(MAX_FRAME as u32 + 1).to_be_bytes()).unwrap();
    until("the connection's end", || {
        server.turn();
        peer.set_nonblocking(true).unwrap();
        matches!(peer.read(&mut [0]), Ok(0))
    });
    let mut peer = connect();
    peer.write_all(&bytes).unwrap();
    until("two frames", || {
        server.turn();
        server.got.len() == 2
    });
    assert_eq!(server.take().len(), 2);
}

#[test]
fn a_peer_that_does_not_read_holds_frames_up_and_one_that_goes_loses_them() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap().to_string());
    let mut client = end(Role::Client, &address);
    client.turn();
    let (mut peer, _): (TcpStream, _) = listener.accept().unwrap();
    let mut sent = 0;
    until("the socket is full", || {
        client.put(&pattern(sent, 60_000));
        client.turn();
        sent += 1;
        client.queue.waits().writable.is_some()
    });
    assert!(!client.to_send.is_empty());
    client.turn();
    // The peer reads them after all.
    let mut bytes = Vec::new();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    let mut piece = vec![0; 1 << 16];
    until("all have come", || {
        client.turn();
        let len = peer.read(&mut piece).unwrap();
        bytes.extend_from_slice(&piece[..len]);
        bytes.len() >= sent * 60_004
    });
    for (number, frame) in bytes.chunks(60_004).enumerate() {
        assert_eq!(frame[..4], 60_000u32.to_be_bytes());
        assert!(frame[4..] == pattern(number, 60_000), "frame {number} has changed");
    }
    assert_eq!((client.pool.free(), client.queue.take_dropped()), (256, 0));
    // It goes in the middle of a frame: the next one does not get the rest of it.
    until("the socket is full", || {
        client.put(&pattern(0, 60_000));
        client.turn();
        client.queue.waits().writable.is_some()
    });
    drop(peer);
    until("what was left is dropped", || {
        client.turn();
        client.to_send.is_empty()
    });
    assert!(client.queue.take_dropped() > 0);
    assert_eq!(client.pool.free(), 256);
    listener.set_nonblocking(true).unwrap();
    let mut next = None;
    until("it comes again", || {
        client.turn();
        client.sleep();
        next = listener.accept().ok();
        next.is_some()
    });
    let (mut peer, _) = next.unwrap();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    until("a frame", || {
        client.put(&pattern(9, 60));
        client.turn();
        client.pool.free() == 256 && client.queue.take_dropped() == 0
    });
    let mut head = [0; 64];
    peer.read_exact(&mut head).unwrap();
    assert!(head[..4] == 60u32.to_be_bytes() && head[4..] == pattern(9, 60));
}

struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU's hub between two of its network backends, and no machine.
fn qemu(first: &str, second: &str) -> Qemu {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-machine", "none", "-nodefaults", "-display", "none", "-monitor", "none"]);
    for (id, netdev) in [("a", first), ("b", second)] {
        let port = format!("hubport,id=port-{id},hubid=0,netdev={id}");
        command.args(["-netdev", &netdev.replacen(',', &format!(",id={id},"), 1)]);
        command.args(["-netdev", &port]);
    }
    let started = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    Qemu(started.expect("QEMU is needed: apt install qemu-system-x86"))
}

#[test]
fn qemu_passes_frames_on_between_its_two_kinds_of_sockets() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // QEMU connects to our server, and ours to its own, which is slow to come.
    let mut server = end(Role::Server, &Address::Unix(path("a")));
    let mut client = end(Role::Client, &Address::Tcp(free.to_string()));
    let first = format!("stream,server=off,addr.type=unix,addr.path={}", path("a").display());
    let second = format!("socket,listen={free}");
    let _qemu = qemu(&first, &second);
    meet(&mut client, &mut server);
    exchange(&mut client, &mut server);
    exchange(&mut server, &mut client);
}

/// Frames that QEMU passes on, one after the other: its hub drops what it has no room for.
fn exchange(a: &mut End, b: &mut End) {
    for (number, len) in [60, 61, 1514, 9014, 65_549].into_iter().enumerate() {
        a.put(&pattern(number + 2, len));
        let mut came = Vec::new();
        until("a frame came through QEMU", || {
            a.turn();
            b.turn();
            came.extend(b.take());
            b.sleep();
            came.iter().any(|bytes| *bytes == pattern(number + 2, len))
        });
    }
}
