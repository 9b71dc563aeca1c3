//! The calls behind a packet socket (Linux's linux/if_packet.h, packet(7)).
// Messages are given to the kernel by address.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint, c_void};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;

use crate::frame::Frame;

/// Frames of one call.
pub(super) const BATCH: usize = 64;
/// Bytes of packets that may wait in a queue's socket.
const WAITING: c_int = 4 << 20;
/// Room for what the kernel says of a packet beside its bytes.
type Control = [u64; 8];

/// An interface.
#[derive(Clone, Debug)]
pub(super) struct Interface {
    pub index: u32,
    pub mtu: u16,
}

/// What came into a frame.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arrived {
    /// Bytes; none if there were more than the frame has room for.
    pub len: Option<usize>,
    /// The type and the rest of a VLAN tag that the kernel has taken out.
    pub tag: Option<(u16, u16)>,
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A socket that hears nothing yet.
pub(super) fn raw() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers; the descriptor is new and nobody else's.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::socket(libc::AF_PACKET, kind, 0))?)) }
}

fn set<T>(socket: &OwnedFd, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `len` readable bytes of plain data; the callers below give each option its type.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), len)
    };
    check(done).map(drop)
}

/// Finds an interface; also says that there is no privilege for packet sockets.
pub(super) fn find(name: &str) -> io::Result<Interface> {
    let socket = raw()?;
    let index = name_to_index(&socket, name)?;
    // SAFETY: plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as _;
    }
    // SAFETY: SIOCGIFMTU takes a `struct ifreq`, in which it fills this field.
    let mtu = unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request))?;
        request.ifr_ifru.ifru_mtu
    };
    Ok(Interface { index, mtu: u16::try_from(mtu).unwrap_or(u16::MAX) })
}

/// Sockets that share what comes over an interface.
pub(super) fn open(interface: &Interface, count: usize) -> io::Result<Vec<OwnedFd>> {
    // Until all are there each hears nothing: otherwise packets would come twice, or once too seldom.
    let mut nothing = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 };
    let deaf = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    let mut sockets: Vec<OwnedFd> = Vec::new();
    let mut group = libc::PACKET_FANOUT_FLAG_UNIQUEID << 16;
    for _ in 0..count {
        let socket = raw()?;
        set(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &deaf)?;
        for option in [libc::PACKET_VNET_HDR, libc::PACKET_AUXDATA, libc::PACKET_IGNORE_OUTGOING] {
            set::<c_int>(&socket, libc::SOL_PACKET, option, &1)?;
        }
        if set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &WAITING).is_err() {
            set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &WAITING)?;
        }
        bind(&socket, interface)?;
        promiscuous(&socket, interface)?;
        if count > 1 {
            // Its kind is the upper half: by flows.
            set(&socket, libc::SOL_PACKET, libc::PACKET_FANOUT, &group)?;
            if sockets.is_empty() {
                group = fanout(&socket)? & 0xffff | libc::PACKET_FANOUT_HASH << 16;
            }
        }
        sockets.push(socket);
    }
    for socket in &sockets {
        set::<c_int>(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0)?;
    }
    Ok(sockets)
}

fn bind(socket: &OwnedFd, interface: &Interface) -> io::Result<()> {
    // SAFETY: plain data, for which zeros are a value.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = interface.index as c_int;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: a `sockaddr_ll` and its length.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) }).map(drop)
}

/// As long as the socket lives.
pub(super) fn promiscuous(socket: &OwnedFd, interface: &Interface) -> io::Result<()> {
    let request = libc::packet_mreq {
        mr_ifindex: interface.index as c_int,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    set(socket, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request)
}

/// The group that a socket shares packets in.
fn fanout(socket: &OwnedFd) -> io::Result<c_uint> {
    let (mut group, mut len) = (0 as c_uint, size_of::<c_uint>() as libc::socklen_t);
    let to: *mut c_void = (&raw mut group).cast();
    // SAFETY: `len` writable bytes.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_FANOUT,
            to,
            &raw mut len,
        )
    })?;
    Ok(group)
}

/// The messages of one call: each of one piece.
fn messages(pieces: &mut [libc::iovec; BATCH]) -> [libc::mmsghdr; BATCH] {
    pieces.each_mut().map(|piece| {
        // SAFETY: plain data, for which zeros are a value.
        let mut message: libc::mmsghdr = unsafe { zeroed() };
        message.msg_hdr.msg_iov = piece;
        message.msg_hdr.msg_iovlen = 1;
        message
    })
}

/// The first [`BATCH`] frames as pieces, and how many there are.
fn pieces<'a>(frames: impl Iterator<Item = &'a Frame>) -> ([libc::iovec; BATCH], usize) {
    let mut pieces = [libc::iovec { iov_base: null_mut(), iov_len: 0 }; BATCH];
    let mut count = 0;
    for (piece, frame) in pieces.iter_mut().zip(frames) {
        *piece = libc::iovec { iov_base: frame.address().cast(), iov_len: frame.len() };
        count += 1;
    }
    (pieces, count)
}

fn counted(result: c_int) -> Result<usize, Errno> {
    usize::try_from(result)
        .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Sends frames with their headers; how many were taken.
pub(super) fn send<'a>(
    socket: BorrowedFd<'_>,
    frames: impl Iterator<Item = &'a Frame>,
) -> Result<usize, Errno> {
    let (mut pieces, count) = pieces(frames);
    let mut messages = messages(&mut pieces);
    // SAFETY: `count` messages, whose pieces are the bytes of frames that live longer than the call.
    counted(unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            count as c_uint,
            libc::MSG_DONTWAIT,
        )
    })
}

/// Fills frames, as long as each is; how many packets came. The frames are those of the caller alone.
pub(super) fn receive<'a>(
    socket: BorrowedFd<'_>,
    frames: impl Iterator<Item = &'a Frame>,
    arrived: &mut [Arrived; BATCH],
) -> Result<usize, Errno> {
    let (mut pieces, count) = pieces(frames);
    let mut messages = messages(&mut pieces);
    let mut controls: [Control; BATCH] = [[0; 8]; BATCH];
    for (message, control) in messages.iter_mut().zip(&mut controls) {
        message.msg_hdr.msg_control = (&raw mut *control).cast();
        message.msg_hdr.msg_controllen = size_of::<Control>();
    }
    // SAFETY: `count` messages, whose pieces are the bytes of frames and whose control data is
    // `controls`; all of it lives longer than the call and nobody else uses it meanwhile.
    let came = counted(unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            count as c_uint,
            libc::MSG_DONTWAIT,
            null_mut(),
        )
    })?;
    for (message, arrived) in messages.iter().zip(arrived).take(came) {
        let is_whole = message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
        arrived.len = is_whole.then_some(message.msg_len as usize);
        arrived.tag = tag(&message.msg_hdr);
    }
    Ok(came)
}

/// The VLAN tag that stands beside a packet.
fn tag(message: &libc::msghdr) -> Option<(u16, u16)> {
    // SAFETY: the kernel has filled the control data and says in the message how much of it.
    let data = unsafe {
        let head = libc::CMSG_FIRSTHDR(message).as_ref()?;
        let fits =
            head.cmsg_len >= libc::CMSG_LEN(size_of::<libc::tpacket_auxdata>() as c_uint) as usize;
        let is_data =
            head.cmsg_level == libc::SOL_PACKET && head.cmsg_type == libc::PACKET_AUXDATA && fits;
        is_data.then(|| libc::CMSG_DATA(head).cast::<libc::tpacket_auxdata>().read_unaligned())?
    };
    let has = |flag| data.tp_status & flag != 0;
    let kind = if has(libc::TP_STATUS_VLAN_TPID_VALID) { data.tp_vlan_tpid } else { 0x8100 };
    has(libc::TP_STATUS_VLAN_VALID).then_some((kind, data.tp_vlan_tci))
}
