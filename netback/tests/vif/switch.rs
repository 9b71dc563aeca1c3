//! A switch by hand: a vhost-user back-end that says what a test wants. It reads and writes the memory it
//! is given as a file.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{Ordering, fence};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::rig::{LIMIT, until};

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const PROTOCOL: u64 = 1 << 30;
pub(crate) const CSUM: u64 = 1;
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const GUEST_TSO4: u64 = 1 << 7;
pub(crate) const HOST_TSO4: u64 = 1 << 11;
pub(crate) const MQ: u64 = 1 << 22;
/// VHOST_USER_PROTOCOL_F_MQ and _REPLY_ACK.
const PROTOCOL_FEATURES: u64 = 1 | 1 << 3;

/// A pair's rings.
pub(crate) const RECEIVE: usize = 0;
pub(crate) const TRANSMIT: usize = 1;
/// Before each frame.
pub(crate) const HEADER: usize = 12;
/// Buffers of a ring.
pub(crate) const BUFFERS: u16 = 256;

const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

#[derive(Default)]
struct Vring {
    size: u32,
    /// Descriptors, used and available, as offsets in the memory.
    parts: [u64; 3],
    kick: Option<File>,
    call: Option<File>,
    runs: bool,
    seen: u16,
    used: u16,
}

/// See the module.
pub(crate) struct Switch {
    pub(crate) socket: UnixStream,
    offered: u64,
    pairs: u64,
    pub(crate) features: u64,
    memory: Option<File>,
    /// What the front-end calls the memory's first byte, and its length.
    at: u64,
    pub(crate) len: u64,
    rings: Vec<Vring>,
}

fn half(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Switch {
    pub(crate) fn connect(path: &std::path::Path, offered: u64, pairs: u64) -> Switch {
        Switch::new(UnixStream::connect(path).unwrap(), offered, pairs)
    }

    pub(crate) fn new(socket: UnixStream, offered: u64, pairs: u64) -> Switch {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        let rings = (0..2 * pairs).map(|_| Vring::default()).collect();
        Switch { socket, offered, pairs, features: 0, memory: None, at: 0, len: 0, rings }
    }

    /// A message's kind, flags and payload, with its descriptors.
    fn hear(&mut self) -> (u32, u32, Vec<u8>, Vec<OwnedFd>) {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut header)];
        let heard = recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC);
        assert_eq!(heard.expect("a message").bytes, 12, "the front-end has closed");
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        self.socket.read_exact(&mut payload).unwrap();
        (word(0), word(4), payload, fds)
    }

    pub(crate) fn reply(&mut self, kind: u32, value: u64) {
        let mut bytes = [kind, 1 | REPLY, 8].map(u32::to_ne_bytes).concat();
        bytes.extend_from_slice(&value.to_ne_bytes());
        self.socket.write_all(&bytes).unwrap();
    }

    /// Answers one message.
    fn answer(&mut self) {
        let (kind, flags, payload, mut fds) = self.hear();
        let word = |at: usize| u32::from_ne_bytes(payload[at..at + 4].try_into().unwrap());
        let (pairs, offered, at) = (self.pairs, self.offered, self.at);
        let protocol = offered & PROTOCOL != 0;
        match kind {
            1 => return self.reply(kind, offered),
            15 => return self.reply(kind, PROTOCOL_FEATURES),
            17 => return self.reply(kind, pairs),
            2 => self.features = half(&payload, 0),
            3 | 16 => {}
            5 => {
                assert_eq!((word(0), half(&payload, 32)), (1, 0), "one region, from its begin");
                (self.len, self.at) = (half(&payload, 16), half(&payload, 24));
                self.memory = Some(fds.remove(0).into());
            }
            8 => self.rings[word(0) as usize].size = word(4),
            9 => {
                let parts = [8, 16, 24].map(|part| half(&payload, part) - at);
                self.rings[word(0) as usize].parts = parts;
            }
            10 => assert_eq!(word(4), 0, "a base"),
            12 => {
                let ring = &mut self.rings[half(&payload, 0) as usize & 0xff];
                (ring.kick, ring.runs) = (Some(fds.remove(0).into()), !protocol);
            }
            13 => self.rings[half(&payload, 0) as usize & 0xff].call = Some(fds.remove(0).into()),
            18 => self.rings[word(0) as usize].runs = word(4) == 1,
            _ => panic!("message {kind}"),
        }
        if flags & NEED_REPLY != 0 {
            self.reply(kind, 0);
        }
    }

    /// Listens until so many rings run.
    pub(crate) fn start(&mut self, rings: usize) {
        while self.rings.iter().filter(|ring| ring.runs).count() < rings {
            self.answer();
        }
        let names = (self.rings[0].size, self.rings[1].size);
        assert_eq!(names, (BUFFERS.into(), BUFFERS.into()));
    }

    fn read(&self, at: u64, bytes: &mut [u8]) {
        self.memory.as_ref().unwrap().read_exact_at(bytes, at).unwrap();
    }
    fn short(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.as_ref().unwrap().write_all_at(bytes, at).unwrap();
    }

    /// The next buffer that a ring lends: its number, place and length.
    pub(crate) fn next(&mut self, ring: usize) -> Option<(u16, u64, u32)> {
        let [desc, _, avail] = self.rings[ring].parts;
        let seen = self.rings[ring].seen;
        if self.short(avail + 2) == seen {
            return None;
        }
        self.rings[ring].seen = seen.wrapping_add(1);
        let number = self.short(avail + 4 + 2 * u64::from(seen % BUFFERS));
        let mut bytes = [0; 16];
        self.read(desc + 16 * u64::from(number), &mut bytes);
        let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        Some((number, half(&bytes, 0) - self.at, len))
    }

    /// Gives a buffer back, and calls if it is asked to.
    pub(crate) fn used(&mut self, ring: usize, id: u32, len: u32) {
        let old = self.rings[ring].used;
        self.entry(ring, id, len);
        let new = self.rings[ring].used;
        let [_, used, avail] = self.rings[ring].parts;
        self.write(used + 2, &new.to_le_bytes());
        fence(Ordering::SeqCst);
        let is_asked = if self.features & EVENT_IDX != 0 {
            let event = self.short(avail + 4 + 2 * u64::from(BUFFERS));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.short(avail) & 1 == 0
        };
        if is_asked {
            self.call(ring);
        }
    }
    /// Writes of a buffer that it was given back, and does not show it.
    pub(crate) fn entry(&mut self, ring: usize, id: u32, len: u32) {
        let [_, used, _] = self.rings[ring].parts;
        let entry = used + 4 + 8 * u64::from(self.rings[ring].used % BUFFERS);
        self.write(entry, &[id.to_le_bytes(), len.to_le_bytes()].concat());
        self.rings[ring].used = self.rings[ring].used.wrapping_add(1);
    }
    /// Writes how far buffers were given back, and calls.
    pub(crate) fn index(&mut self, ring: usize, index: u16) {
        let [_, used, _] = self.rings[ring].parts;
        self.write(used + 2, &index.to_le_bytes());
        self.call(ring);
    }
    fn call(&mut self, ring: usize) {
        let call = self.rings[ring].call.as_mut().unwrap();
        // Where hundreds were not heard it is enough.
        let full = |e: &std::io::Error| e.kind() == std::io::ErrorKind::WouldBlock;
        assert!(call.write_all(&1u64.to_ne_bytes()).as_ref().map_or_else(full, |()| true));
    }

    /// What the vif sends next, with its header.
    pub(crate) fn got(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        until("a packet comes", || {
            let Some((number, at, len)) = self.next(TRANSMIT) else { return false };
            bytes = vec![0; len as usize];
            self.read(at, &mut bytes);
            self.used(TRANSMIT, number.into(), 0);
            true
        });
        bytes
    }

    /// Sends to the vif, with a header.
    pub(crate) fn put(&mut self, ring: usize, bytes: &[u8]) {
        let (number, at, len) = self.next(ring).expect("a buffer");
        assert!(bytes.len() <= len as usize);
        self.write(at, bytes);
        self.used(ring, number.into(), bytes.len() as u32);
    }

    /// Whether the front-end has gone; it says nothing more.
    pub(crate) fn is_left(&mut self) -> bool {
        // Reset where it has not read all that was said.
        let reset = |e: &std::io::Error| e.kind() == std::io::ErrorKind::ConnectionReset;
        match self.socket.read(&mut [0; 1]) {
            Ok(bytes) => bytes == 0,
            Err(e) => reset(&e),
        }
    }
}
