//! A vif of a guest of `ringback run`: an address by DHCP, pings, a download and an upload, both
//! compared by their SHA-256.

use std::fmt::Write;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hypervisor::Guest;
use netback::endpoint::user::{GATEWAY, WEB_PORT, fill};
use netback::stack::host::Host;
use netback::stack::several::Several;
use netback::{FrontOptions, FrontQueue, NetFront, Pool};
use sha2::{Digest, Sha256};
use smoltcp::iface::SocketHandle;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{icmp, tcp};
use smoltcp::wire::{EthernetAddress, Icmpv4Packet, Icmpv4Repr};

use crate::commands::run::plan::{Transfer, VifPlan, VifReport};

type Stack = Host<Several<FrontQueue>>;

/// How long anything may take to come: an address, a connection, the next bytes.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a ping may take.
const PING: Duration = Duration::from_secs(2);
/// Frames of the guest's stack.
const FRAMES: usize = 512;
/// Bytes of a connection's buffers.
const BUFFER: usize = 512 << 10;
/// The guest's pings, and its first port.
const IDENT: u16 = 0x5242;
const FIRST_PORT: u16 = 40_000;

/// Does what the plan says. What goes wrong is in the report; an error is one of this end.
pub(super) fn run(guest: &dyn Guest, plan: &VifPlan, moved: &AtomicU64) -> io::Result<VifReport> {
    let options = FrontOptions {
        max_queues: plan.queues,
        max_ring_page_order: plan.ring_page_order,
        ..FrontOptions::default()
    };
    let front = NetFront::connect(guest, plan.devid, &options)?;
    let queues = (0..front.queues()).map(|number| front.queue(number));
    let queues = Several::new(queues.collect::<io::Result<Vec<_>>>()?)?;
    let mac = EthernetAddress(front.mac().unwrap_or(plan.mac));
    let mut stack = Host::new(queues, Pool::private(FRAMES), front.link(), mac, plan.seed);
    let mut report = VifReport {
        devid: plan.devid,
        queues: front.queues(),
        ring_pages: front.chosen().queues.first().map_or(0, |queue| queue.tx_refs.len()),
        ..VifReport::default()
    };
    if let Err(e) = work(&mut stack, plan, moved, &mut report) {
        report.complain(e.to_string());
    }
    report.gso_frames = stack.queue().queues().iter().map(|queue| queue.totals().tx_gso).sum();
    report.fault = front.fault();
    drop(stack);
    if let Err(e) = front.close() {
        report.fault.get_or_insert(format!("closing: {e}"));
    }
    Ok(report)
}

fn work(
    stack: &mut Stack,
    plan: &VifPlan,
    moved: &AtomicU64,
    report: &mut VifReport,
) -> io::Result<()> {
    report.address = stack.configure(PATIENCE)?.to_string();
    ping_all(stack, plan, report)?;
    let mut transfers = Transfers { stack, port: FIRST_PORT, moved };
    if plan.download > 0 {
        let way = transfers.download(plan.download, plan.seed)?;
        report.download = Some(way);
        if !way.checksum_ok {
            report.complain("what was downloaded has another checksum".into());
        }
    }
    if plan.upload > 0 {
        let way = transfers.upload(plan.upload, !plan.seed)?;
        report.upload = Some(way);
        if !way.checksum_ok {
            report.complain("what was uploaded has another checksum".into());
        }
    }
    Ok(())
}

fn ping_all(stack: &mut Stack, plan: &VifPlan, report: &mut VifReport) -> io::Result<()> {
    let longest = plan.ping_sizes.iter().max().copied().unwrap_or(0) as usize + 8;
    let buffer =
        || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4 * longest]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(IDENT)).map_err(|e| io::Error::other(e.to_string()))?;
    let handle = stack.sockets.add(socket);
    let mut number = 0u16;
    for size in &plan.ping_sizes {
        for _ in 0..plan.pings {
            number = number.wrapping_add(1);
            report.pings += 1;
            match ping(stack, handle, number, *size as usize) {
                Ok(()) => report.largest_ping = report.largest_ping.max(*size),
                Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                    report.ping_loss += 1;
                    report.complain(format!("a ping of {size} bytes was lost"));
                }
                Err(e) => return Err(e),
            }
        }
    }
    stack.sockets.remove(handle);
    Ok(())
}

/// Sends one ping and waits for its answer, byte by byte the same.
fn ping(stack: &mut Stack, handle: SocketHandle, number: u16, size: usize) -> io::Result<()> {
    let mut data = vec![0; size];
    fill(u64::from(number), 0, &mut data);
    let request = Icmpv4Repr::EchoRequest { ident: IDENT, seq_no: number, data: &data };
    let answer = Icmpv4Repr::EchoReply { ident: IDENT, seq_no: number, data: &data };
    let sums = ChecksumCapabilities::default();
    let socket = stack.sockets.get_mut::<icmp::Socket<'_>>(handle);
    let room = socket.send(request.buffer_len(), GATEWAY.into());
    let room = room.map_err(|e| io::Error::other(format!("a ping of {size} bytes: {e}")))?;
    request.emit(&mut Icmpv4Packet::new_unchecked(room), &sums);
    stack.until("the answer to a ping", PING, |stack| {
        let socket = stack.sockets.get_mut::<icmp::Socket<'_>>(handle);
        while let Ok((bytes, from)) = socket.recv() {
            let packet = Icmpv4Packet::new_checked(bytes).ok();
            let found = packet.as_ref().and_then(|packet| Icmpv4Repr::parse(packet, &sums).ok());
            if from == GATEWAY.into() && found == Some(answer) {
                return Ok(Some(()));
            }
        }
        Ok(None)
    })
}

/// Transfers by HTTP, each on a connection of its own.
struct Transfers<'a> {
    stack: &'a mut Stack,
    port: u16,
    moved: &'a AtomicU64,
}

/// What an answer's head says, and its body as far as it is kept.
struct Answer {
    head: Vec<u8>,
    sum: Sha256,
    len: u64,
    text: Vec<u8>,
}

impl Transfers<'_> {
    fn download(&mut self, len: u64, seed: u64) -> io::Result<Transfer> {
        let begun = Instant::now();
        let answer = self.talk(&format!("GET /bytes/{len}/{seed} HTTP/1.1"), 0, 0)?;
        let seconds = begun.elapsed().as_secs_f64();
        let found = hex(answer.sum);
        let told = self.talk(&format!("GET /sha256/{len}/{seed} HTTP/1.1"), 0, 0)?;
        let told_ok = told.text.starts_with(found.as_bytes());
        let checksum_ok = answer.len == len && told_ok && found == expected(len, seed);
        Ok(Transfer { bytes: answer.len, seconds, checksum_ok })
    }

    fn upload(&mut self, len: u64, seed: u64) -> io::Result<Transfer> {
        let begun = Instant::now();
        let request = format!("PUT /upload HTTP/1.1\r\nContent-Length: {len}");
        let answer = self.talk(&request, len, seed)?;
        let seconds = begun.elapsed().as_secs_f64();
        let checksum_ok = answer.text.starts_with(expected(len, seed).as_bytes());
        Ok(Transfer { bytes: len, seconds, checksum_ok })
    }

    /// Says a request, which so many bytes of a sequence follow, and takes the answer.
    fn talk(&mut self, request: &str, body: u64, seed: u64) -> io::Result<Answer> {
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let handle = self.stack.sockets.add(socket);
        let result = self.converse(handle, request, body, seed);
        let socket = self.stack.sockets.get_mut::<tcp::Socket<'_>>(handle);
        if result.is_err() {
            socket.abort();
        } else {
            socket.close();
        }
        self.stack.turn()?;
        self.stack.sockets.remove(handle);
        result.map_err(|e| io::Error::new(e.kind(), format!("{request}: {e}")))
    }

    fn converse(
        &mut self,
        handle: SocketHandle,
        request: &str,
        body: u64,
        seed: u64,
    ) -> io::Result<Answer> {
        self.port = self.port.wrapping_add(1).max(FIRST_PORT);
        let (interface, sockets) = self.stack.parts();
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        let connected = socket.connect(interface.context(), (GATEWAY, WEB_PORT), self.port);
        connected.map_err(|e| io::Error::other(e.to_string()))?;
        let mut head = format!("{request}\r\nHost: {GATEWAY}\r\n\r\n").into_bytes();
        let mut answer = Answer { head: Vec::new(), sum: Sha256::new(), len: 0, text: Vec::new() };
        let (mut sent, mut last) = (0, Instant::now());
        loop {
            let moved = self.moved;
            // As long as bytes move, it may take as long as it takes.
            let over = self.stack.until("an answer", PATIENCE, |stack| {
                let socket = stack.sockets.get_mut::<tcp::Socket<'_>>(handle);
                let out = send(socket, &mut head, &mut sent, body, seed);
                let bytes = out + answer.take(socket);
                moved.fetch_add(bytes, Ordering::Relaxed);
                let over = head.is_empty() && sent == body && !socket.may_recv();
                let begun = socket.state() != tcp::State::SynSent;
                Ok((over || (bytes > 0 && last.elapsed() > PATIENCE / 2)).then_some(over && begun))
            })?;
            last = Instant::now();
            if over {
                break;
            }
        }
        if !answer.head.starts_with(b"HTTP/1.1 200 ") {
            let line =
                String::from_utf8_lossy(answer.head.split(|b| *b == b'\r').next().unwrap_or(&[]));
            return Err(io::Error::other(format!("the server says {line:?}")));
        }
        Ok(answer)
    }
}

/// Sends what fits; how many bytes.
fn send(
    socket: &mut tcp::Socket<'_>,
    head: &mut Vec<u8>,
    sent: &mut u64,
    body: u64,
    seed: u64,
) -> u64 {
    if !socket.may_send() {
        return 0;
    }
    if !head.is_empty() {
        let done = socket.send_slice(head).unwrap_or(0);
        head.drain(..done);
    }
    let mut all = 0;
    while head.is_empty() && *sent < body && socket.can_send() {
        let done = socket.send(|room| {
            let len = room.len().min(usize::try_from(body - *sent).unwrap_or(usize::MAX));
            fill(seed, *sent, &mut room[..len]);
            (len, len as u64)
        });
        let Ok(done) = done else { break };
        *sent += done;
        all += done;
    }
    all
}

impl Answer {
    /// Takes what has come; how many bytes of the body.
    fn take(&mut self, socket: &mut tcp::Socket<'_>) -> u64 {
        let before = self.len;
        while socket.can_recv() {
            let taken = socket.recv(|bytes| {
                self.add(bytes);
                (bytes.len(), ())
            });
            if taken.is_err() {
                break;
            }
        }
        self.len - before
    }

    fn add(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let ([first, more @ ..], false) = (rest, self.head.ends_with(b"\r\n\r\n")) {
            self.head.push(*first);
            rest = more;
        }
        self.sum.update(rest);
        self.len += rest.len() as u64;
        let kept = 128usize.saturating_sub(self.text.len()).min(rest.len());
        self.text.extend_from_slice(&rest[..kept]);
    }
}

/// The SHA-256 of the first `len` bytes of a sequence.
fn expected(len: u64, seed: u64) -> String {
    let (mut sum, mut piece, mut at) = (Sha256::new(), vec![0; 64 << 10], 0);
    while at < len {
        let now = (len - at).min(piece.len() as u64) as usize;
        fill(seed, at, &mut piece[..now]);
        sum.update(&piece[..now]);
        at += now as u64;
    }
    hex(sum)
}

fn hex(sum: Sha256) -> String {
    let mut text = String::new();
    for byte in sum.finalize() {
        // A String takes all.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
