//! Devices of the kernel's nbd driver, by its generic netlink family (linux/nbd-netlink.h).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use blktap::Handover;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

use super::super::Result;

/// linux/netlink.h: a request that is to be acknowledged; kinds of messages; header sizes.
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const KIND_ERROR: u16 = 2;
const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const NESTED: u16 = 0x8000;
/// linux/genetlink.h: who knows the families' numbers, how it is asked, what it is told.
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// linux/nbd-netlink.h.
const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
/// What the driver knows of a server's transmission flags: flush, FUA, trim, read-only, many.
const KNOWN_FLAGS: u16 = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 8;

/// Appends an attribute: length, kind, bytes, filled up to a multiple of 4.
fn attribute(out: &mut Vec<u8>, kind: u16, bytes: &[u8]) {
    out.extend_from_slice(&(4 + bytes.len() as u16).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A message to a family.
fn message(family: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    let len = (HEADER + GENERIC_HEADER + attributes.len()) as u32;
    let mut out = Vec::with_capacity(len as usize);
    out.extend_from_slice(&len.to_ne_bytes());
    out.extend_from_slice(&family.to_ne_bytes());
    out.extend_from_slice(&(REQUEST | ACK).to_ne_bytes());
    // Number and sender: there is one question at a time.
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&[command, 1, 0, 0]);
    out.extend_from_slice(attributes);
    out
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The bytes of an attribute.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let (Some(len), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        let bytes = attributes.get(4..usize::from(len))?;
        if kind & !NESTED == wanted {
            return Some(bytes);
        }
        attributes = attributes.get(usize::from(len).next_multiple_of(4)..)?;
    }
    None
}

/// What a datagram holds: attributes of answers, and whether the end was told.
fn answers(mut datagram: &[u8], found: &mut Vec<u8>) -> io::Result<bool> {
    while let Some(len) = datagram.get(..4) {
        let len = u32::from_ne_bytes([len[0], len[1], len[2], len[3]]) as usize;
        let cut = || io::Error::new(io::ErrorKind::InvalidData, "a netlink answer cut short");
        let whole = datagram.get(..len).filter(|m| m.len() >= HEADER + 4).ok_or_else(cut)?;
        if u16_at(whole, 4) == Some(KIND_ERROR) {
            let errno = [whole[16], whole[17], whole[18], whole[19]];
            return match i32::from_ne_bytes(errno) {
                0 => Ok(true),
                errno => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
            };
        }
        found.extend_from_slice(&whole[HEADER + GENERIC_HEADER..]);
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// A socket of the kernel's generic netlink.
struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> io::Result<Netlink> {
        let flags = SocketFlags::CLOEXEC;
        let kind = Some(netlink::GENERIC);
        Ok(Netlink(socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, kind)?))
    }

    /// Asks, and waits for the end: the answers' attributes.
    fn ask(&self, family: u16, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
        let kernel = SocketAddrNetlink::new(0, 0);
        let question = message(family, command, attributes);
        sendto(&self.0, &question, SendFlags::empty(), &kernel)?;
        let (mut found, mut bytes) = (Vec::new(), [0; 8192]);
        loop {
            let (_, len) = recv(&self.0, &mut bytes[..], RecvFlags::empty())?;
            if answers(&bytes[..len.min(8192)], &mut found)? {
                return Ok(found);
            }
        }
    }

    /// The number of the nbd driver's family.
    fn family(&self) -> Result<u16> {
        let mut name = Vec::new();
        attribute(&mut name, FAMILY_NAME, b"nbd\0");
        let found = self.ask(CONTROLLER, GET_FAMILY, &name).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                "this kernel has no nbd driver: modprobe nbd, or use the NBD socket".to_owned()
            }
            _ => format!("asking for the nbd driver: {e}"),
        })?;
        let number = find(&found, FAMILY_ID).and_then(|id| u16_at(id, 0));
        Ok(number.ok_or("the kernel does not tell the nbd driver's number")?)
    }
}

/// The number of /dev/nbdN.
pub fn index_of(device: &Path) -> Result<u32> {
    let number = device.to_str().and_then(|path| path.strip_prefix("/dev/nbd")?.parse().ok());
    Ok(number.ok_or_else(|| format!("{}: name it as /dev/nbdN", device.display()))?)
}

fn connect_attributes(index: Option<u32>, link: &Handover) -> Vec<u8> {
    let mut out = Vec::new();
    if let Some(index) = index {
        attribute(&mut out, INDEX, &index.to_ne_bytes());
    }
    attribute(&mut out, SIZE_BYTES, &link.size.to_ne_bytes());
    attribute(&mut out, BLOCK_SIZE_BYTES, &u64::from(link.block.max(512)).to_ne_bytes());
    let flags = u64::from(link.flags & KNOWN_FLAGS);
    attribute(&mut out, SERVER_FLAGS, &flags.to_ne_bytes());
    let (mut fd, mut item) = (Vec::new(), Vec::new());
    attribute(&mut fd, SOCK_FD, &link.socket.as_raw_fd().to_ne_bytes());
    attribute(&mut item, SOCK_ITEM | NESTED, &fd);
    attribute(&mut out, SOCKETS | NESTED, &item);
    out
}

/// Gives a connection to the driver; without an index to the first free device. Its number.
pub fn connect(index: Option<u32>, link: &Handover) -> Result<u32> {
    let netlink = Netlink::open()?;
    let family = netlink.family()?;
    let found = netlink.ask(family, CONNECT, &connect_attributes(index, link));
    let found = found.map_err(|e| match (e.raw_os_error(), index) {
        (Some(16), Some(index)) => format!("/dev/nbd{index} is in use"),
        (Some(16), None) => "all devices of the nbd driver are in use".to_owned(),
        _ => format!("connecting an nbd device: {e}"),
    })?;
    let told = find(&found, INDEX).and_then(|n| Some(u32::from_ne_bytes(n.try_into().ok()?)));
    Ok(told.or(index).ok_or("the kernel does not tell which device it has connected")?)
}

/// Ends a device.
pub fn disconnect(index: u32) -> Result<()> {
    let netlink = Netlink::open()?;
    let mut attributes = Vec::new();
    attribute(&mut attributes, INDEX, &index.to_ne_bytes());
    let done = netlink.ask(netlink.family()?, DISCONNECT, &attributes);
    done.map_err(|e| format!("disconnecting /dev/nbd{index}: {e}"))?;
    Ok(())
}

/// Whether somebody has the device mounted or open as a part of another (its holders).
pub fn is_held(index: u32) -> bool {
    let device = format!("/dev/nbd{index}");
    let mounted = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let is_part = |name: &str| {
        name.strip_prefix(&device).is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
    };
    let holders = fs::read_dir(format!("/sys/block/nbd{index}/holders"));
    mounted.lines().filter_map(|line| line.split(' ').next()).any(is_part)
        || holders.is_ok_and(|mut held| held.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_laid_out_as_the_kernel_reads_them() {
        let mut name = Vec::new();
        attribute(&mut name, FAMILY_NAME, b"nbd\0");
        let question = message(CONTROLLER, GET_FAMILY, &name);
        let wanted = [
            &28u32.to_ne_bytes()[..],
            &0x10u16.to_ne_bytes(),
            &5u16.to_ne_bytes(),
            &[0; 8],
            &[3, 1, 0, 0],
            &8u16.to_ne_bytes(),
            &2u16.to_ne_bytes(),
            b"nbd\0",
        ];
        assert_eq!(question, wanted.concat());
    }

    #[test]
    fn a_connection_names_its_socket_size_and_flags() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let link = Handover { socket: socket.into(), size: 1 << 30, flags: 0xffff, block: 1 };
        let all = connect_attributes(Some(7), &link);
        assert_eq!(find(&all, INDEX), Some(&7u32.to_ne_bytes()[..]));
        assert_eq!(find(&all, SIZE_BYTES), Some(&(1u64 << 30).to_ne_bytes()[..]));
        assert_eq!(find(&all, BLOCK_SIZE_BYTES), Some(&512u64.to_ne_bytes()[..]));
        assert_eq!(find(&all, SERVER_FLAGS), Some(&0x12fu64.to_ne_bytes()[..]));
        let item = find(find(&all, SOCKETS).expect("sockets"), SOCK_ITEM).expect("an item");
        let fd = link.socket.as_raw_fd().to_ne_bytes();
        assert_eq!(find(item, SOCK_FD), Some(&fd[..]));
        assert_eq!(find(&connect_attributes(None, &link), INDEX), None);
        assert_eq!(find(&[9, 0, 1, 0, 5], INDEX), None, "cut short");
    }

    #[test]
    fn answers_and_errors_are_told_apart() {
        let mut answer = Vec::new();
        attribute(&mut answer, FAMILY_ID, &0x1cu16.to_ne_bytes());
        let mut datagram = message(CONTROLLER, 1, &answer);
        let end = |errno: i32| {
            let head = [&20u32.to_ne_bytes()[..], &KIND_ERROR.to_ne_bytes(), &[0; 10]].concat();
            [head, errno.to_ne_bytes().to_vec()].concat()
        };
        let mut found = Vec::new();
        assert!(!answers(&datagram, &mut found).expect("an answer"));
        datagram.extend(end(0));
        assert!(answers(&datagram, &mut found).expect("an answer and the end"));
        assert_eq!(find(&found, FAMILY_ID).and_then(|id| u16_at(id, 0)), Some(0x1c));
        let error = answers(&end(-2), &mut found).expect_err("ENOENT");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        answers(&datagram[..26], &mut found).expect_err("cut short");
        assert_eq!(index_of(Path::new("/dev/nbd12")).expect("a number"), 12);
        index_of(Path::new("/dev/sda")).expect_err("no nbd device");
    }

    #[test]
    fn the_kernel_understands_the_question() {
        // Where there is no driver it says so, and where there is one its number comes.
        match Netlink::open().expect("netlink").family() {
            Ok(number) => assert!(number > CONTROLLER),
            Err(e) => assert!(e.to_string().contains("no nbd driver"), "{e}"),
        }
    }
}
