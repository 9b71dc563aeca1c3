//! A vhost-user front-end by hand: it can say anything. Its guest is a memfd of 1 MiB that is
//! read and written as a file, with one ring of 8 entries.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Message kinds.
pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

/// VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1, INDIRECT_DESC, FLUSH.
pub const FEATURES: u64 = 1 << 30 | 1 << 32 | 1 << 28 | 1 << 9;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 15;

/// Where the guest's memory is, as the guest and as the front-end have it.
pub const GUEST: u64 = 0x10_0000;
pub const USER: u64 = 0x7f00_0000_0000;
pub const BYTES: u64 = 1 << 20;
/// The ring's parts, in the memory.
pub const DESC: u64 = 0;
pub const AVAIL: u64 = 0x1000;
pub const USED: u64 = 0x2000;
pub const SIZE: u16 = 8;
/// A request's parts, in the memory.
pub const HEADER: u64 = 0x3000;
pub const STATUS: u64 = 0x3800;
pub const DATA: u64 = 0x4000;
/// An indirect table.
pub const TABLE: u64 = 0x8000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// See the module.
pub struct Client {
    pub socket: UnixStream,
    pub memory: File,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    available: u16,
}

/// u32 words as bytes.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}
/// u64 words as bytes.
pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

pub fn memfd(bytes: u64) -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(bytes).expect("its size");
    file
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

impl Client {
    /// Connected, and nothing said.
    pub fn connect(socket: &Path) -> Client {
        let end = Instant::now() + PATIENCE;
        let socket = loop {
            match UnixStream::connect(socket) {
                Ok(socket) => break socket,
                Err(e) => assert!(Instant::now() < end, "{}: {e}", socket.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Client { socket, memory: memfd(BYTES), kick: event(), call: event(), available: 0 }
    }

    /// With features and memory.
    pub fn greet(socket: &Path) -> Client {
        let mut client = Client::connect(socket);
        client.say(SET_OWNER, &[], &[]);
        let offered = client.ask(GET_FEATURES, &[]);
        let offered = u64::from_ne_bytes(offered.try_into().expect("8 bytes"));
        assert_eq!(offered & FEATURES, FEATURES, "{offered:#x}");
        client.say(SET_FEATURES, &longs(&[FEATURES]), &[]);
        client.say(SET_PROTOCOL_FEATURES, &longs(&[PROTOCOL]), &[]);
        let fd = client.memory.try_clone().expect("a descriptor");
        client.say(SET_MEM_TABLE, &Client::table(&[[GUEST, BYTES, USER, 0]]), &[fd.as_fd()]);
        client
    }

    /// With a ring that runs.
    pub fn start(socket: &Path) -> Client {
        let mut client = Client::greet(socket);
        client.start_ring();
        client
    }

    /// Has the ring run, from its beginning.
    pub fn start_ring(&mut self) {
        self.say(SET_VRING_NUM, &words(&[0, u32::from(SIZE)]), &[]);
        self.say(SET_VRING_BASE, &words(&[0, 0]), &[]);
        self.say(SET_VRING_ADDR, &Client::address(USER + DESC, USER + USED, USER + AVAIL), &[]);
        let (kick, call) = (self.kick.try_clone(), self.call.try_clone());
        self.say(SET_VRING_CALL, &longs(&[0]), &[call.expect("a descriptor").as_fd()]);
        self.say(SET_VRING_KICK, &longs(&[0]), &[kick.expect("a descriptor").as_fd()]);
        self.say(SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    }

    /// SET_MEM_TABLE's payload: guest address, bytes, user address, offset of each region.
    pub fn table(regions: &[[u64; 4]]) -> Vec<u8> {
        let mut bytes = words(&[regions.len() as u32, 0]);
        regions.iter().for_each(|r| bytes.extend(longs(r)));
        bytes
    }

    /// SET_VRING_ADDR's payload for queue 0.
    pub fn address(desc: u64, used: u64, avail: u64) -> Vec<u8> {
        let mut bytes = words(&[0, 0]);
        bytes.extend(longs(&[desc, used, avail, 0]));
        bytes
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "room for descriptors");
        }
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// A message that need not be answered. It may fail: the other side may be gone.
    pub fn tell(&mut self, kind: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut bytes = words(&[kind, 1, payload.len() as u32]);
        bytes.extend(payload);
        let _ = self.send(&bytes, fds);
    }

    /// A message that is acknowledged, once that was agreed.
    fn say(&mut self, kind: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let acknowledged =
            kind > SET_FEATURES && kind != SET_OWNER && kind != SET_PROTOCOL_FEATURES;
        let mut bytes = words(&[kind, if acknowledged { 9 } else { 1 }, payload.len() as u32]);
        bytes.extend(payload);
        self.send(&bytes, fds).expect("a message is taken");
        if acknowledged {
            assert_eq!(self.reply(kind), longs(&[0]), "message {kind} is refused");
        }
    }

    /// A message's answer.
    pub fn ask(&mut self, kind: u32, payload: &[u8]) -> Vec<u8> {
        self.tell(kind, payload, &[]);
        self.reply(kind)
    }

    fn reply(&mut self, kind: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.socket.read_exact(&mut header).expect("an answer");
        assert_eq!(header[..4], kind.to_ne_bytes());
        let mut payload = vec![0; header[8] as usize];
        self.socket.read_exact(&mut payload).expect("an answer");
        payload
    }

    /// Waits until the other side has closed the connection.
    pub fn until_closed(mut self) {
        let mut bytes = [0; 256];
        loop {
            match self.socket.read(&mut bytes) {
                Ok(0) => return,
                // What it had answered before.
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return,
                Err(e) => panic!("the connection is not closed: {e}"),
            }
        }
    }

    pub fn poke(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).expect("the guest's memory");
    }
    pub fn peek<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, at).expect("the guest's memory");
        bytes
    }

    /// A descriptor of a table at `table`; `addr` is the guest's.
    pub fn desc(&self, table: u64, n: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.poke(table + 16 * u64::from(n), &bytes);
    }

    /// A request's head.
    pub fn header(&self, kind: u32, sector: u64) {
        let mut bytes = words(&[kind, 0]);
        bytes.extend(sector.to_le_bytes());
        self.poke(HEADER, &bytes);
        self.poke(STATUS, &[0xff]);
    }

    /// Header, 4096 bytes of data and status at descriptors 0, 1, 2.
    pub fn request(&self, kind: u32, sector: u64, data: u16) {
        self.header(kind, sector);
        self.desc(DESC, 0, GUEST + HEADER, 16, NEXT, 1);
        self.desc(DESC, 1, GUEST + DATA, 4096, NEXT | data, 2);
        self.desc(DESC, 2, GUEST + STATUS, 1, WRITE, 0);
    }

    /// Makes a chain available, without telling.
    pub fn offer(&mut self, head: u16) {
        let at = AVAIL + 4 + 2 * u64::from(self.available % SIZE);
        self.poke(at, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.poke(AVAIL + 2, &self.available.to_le_bytes());
    }

    /// And tells.
    pub fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("an event");
    }

    /// How far the used ring is.
    pub fn used(&self) -> u16 {
        u16::from_le_bytes(self.peek(USED + 2))
    }

    /// Waits for so many answers; the status of the last.
    pub fn wait_used(&self, used: u16) -> u8 {
        let end = Instant::now() + PATIENCE;
        while self.used() != used {
            assert!(Instant::now() < end, "{} of {used} requests are answered", self.used());
            std::thread::sleep(Duration::from_millis(1));
        }
        self.peek::<1>(STATUS)[0]
    }
}
