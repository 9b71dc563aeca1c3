//! The calls that make a TAP device (Linux's linux/if_tun.h).
// ioctls take pointers that the compiler cannot follow.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open as open_file};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

use super::super::Accepts;
use super::HEADER;
use crate::config::Carrier;

const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETPERSIST: Opcode = 0x4004_54cb;
const TUNSETOFFLOAD: Opcode = 0x4004_54d0;
const TUNGETIFF: Opcode = 0x8004_54d2;
const TUNSETVNETHDRSZ: Opcode = 0x4004_54d8;
const TUNSETCARRIER: Opcode = 0x4004_54e2;

const IFF_TAP: i16 = 0x0002;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;

const TUN_F_CSUM: usize = 1;
const TUN_F_TSO4: usize = 2;
const TUN_F_TSO6: usize = 4;
const TUN_F_TSO_ECN: usize = 8;

/// `IFNAMSIZ`
const NAME: usize = 16;

/// `struct ifreq` with a device's flags.
#[repr(C)]
#[derive(Clone, Copy)]
struct Request {
    name: [u8; NAME],
    flags: i16,
    rest: [u8; 22],
}

/// Whether a device outlives its last descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// It does: a successor finds it with its addresses and in its bridge.
    Stays,
    /// It does not.
    Goes,
}

/// An ioctl with a pointer.
struct Pointer<'a, const CODE: Opcode, T>(&'a mut T);

// SAFETY: the codes below are used with the types that linux/if_tun.h and the kernel's tun.c give
// them: `int` for the header's size and the carrier, `struct ifreq` for the device. The kernel
// keeps no pointer.
unsafe impl<const CODE: Opcode, T> Ioctl for Pointer<'_, CODE, T> {
    type Output = ();
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> Opcode {
        CODE
    }
    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut *self.0).cast()
    }
    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// An ioctl whose argument is a number.
struct Number<const CODE: Opcode>(usize);

// SAFETY: TUNSETPERSIST and TUNSETOFFLOAD take their argument by value.
unsafe impl<const CODE: Opcode> Ioctl for Number<CODE> {
    type Output = ();
    const IS_MUTATING: bool = false;
    fn opcode(&self) -> Opcode {
        CODE
    }
    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }
    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// Opens a queue of the device `name`, which is made if there is none.
pub(super) fn open(name: &str) -> io::Result<OwnedFd> {
    let mut request = Request {
        name: [0; NAME],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE,
        rest: [0; 22],
    };
    let bytes = name.as_bytes();
    // Also `%`, with which the kernel would choose a number.
    if bytes.is_empty() || bytes.len() >= NAME || bytes.contains(&b'%') || bytes.contains(&b'/') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no name of a device"));
    }
    request.name[..bytes.len()].copy_from_slice(bytes);
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let end = open_file("/dev/net/tun", flags, Mode::empty())?;
    let new = !exists(name);
    let mut size = HEADER.bytes() as i32;
    // SAFETY: pointers to a `struct ifreq` and to an `int`, as these ioctls take them.
    unsafe {
        ioctl(&end, Pointer::<TUNSETIFF, _>(&mut request))?;
        ioctl(&end, Pointer::<TUNSETVNETHDRSZ, _>(&mut size))?;
    }
    if new {
        carrier(end.as_fd(), Carrier::Down)?;
    }
    Ok(end)
}

/// Whether there is a device of this name.
pub(super) fn exists(name: &str) -> bool {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None);
    socket.is_ok_and(|socket| name_to_index(&socket, name).is_ok())
}

/// The device's name.
pub(super) fn name(end: BorrowedFd<'_>) -> io::Result<String> {
    let mut request = Request { name: [0; NAME], flags: 0, rest: [0; 22] };
    // SAFETY: a pointer to a `struct ifreq`, which is filled.
    unsafe { ioctl(end, Pointer::<TUNGETIFF, _>(&mut request))? };
    let len = request.name.iter().position(|b| *b == 0).unwrap_or(NAME);
    Ok(String::from_utf8_lossy(&request.name[..len]).into_owned())
}

pub(super) fn persist(end: BorrowedFd<'_>, persistence: Persistence) -> io::Result<()> {
    let stays = usize::from(persistence == Persistence::Stays);
    // SAFETY: by value.
    unsafe { ioctl(end, Number::<TUNSETPERSIST>(stays)) }.map_err(io::Error::from)
}

/// Tells the host what it may leave to the guest.
pub(super) fn offload(end: BorrowedFd<'_>, accepts: Accepts) -> io::Result<()> {
    // One bit for both IPs: what only one of them takes is summed here.
    let checksum = accepts.checksum4 || accepts.checksum6;
    let mut bits = if checksum { TUN_F_CSUM } else { 0 };
    for (accepted, bit) in [(accepts.tso4, TUN_F_TSO4), (accepts.tso6, TUN_F_TSO6)] {
        bits |= if accepted { bit | TUN_F_TSO_ECN } else { 0 };
    }
    // SAFETY: by value.
    unsafe { ioctl(end, Number::<TUNSETOFFLOAD>(bits)) }.map_err(io::Error::from)
}

pub(super) fn carrier(end: BorrowedFd<'_>, carrier: Carrier) -> io::Result<()> {
    let mut up = i32::from(carrier == Carrier::Up);
    // SAFETY: a pointer to an `int`.
    unsafe { ioctl(end, Pointer::<TUNSETCARRIER, _>(&mut up)) }.map_err(io::Error::from)
}
