//! What an interface's driver says of itself (linux/ethtool.h).
// ioctls take pointers that the compiler cannot follow.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

const SIOCETHTOOL: Opcode = 0x8946;
/// `ETHTOOL_GFLAGS`, `ETHTOOL_GCHANNELS`
const GET_FLAGS: u32 = 0x25;
const GET_CHANNELS: u32 = 0x3c;
/// `ETH_FLAG_RXVLAN`: VLAN tags are taken out of what comes and handed on beside it.
const RX_VLAN: u32 = 1 << 8;
/// `IFNAMSIZ`
const NAME: usize = 16;

/// `struct ifreq` with an address.
#[repr(C)]
struct Request {
    name: [u8; NAME],
    data: *mut c_void,
    rest: [u8; 16],
}

/// `struct ethtool_value`
#[repr(C)]
struct Value {
    command: u32,
    value: u32,
}

/// `struct ethtool_channels`
#[derive(Default)]
#[repr(C)]
struct Channels {
    command: u32,
    most: [u32; 4],
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// An ioctl with its request.
struct Ethtool<'a>(&'a mut Request);

// SAFETY: SIOCETHTOOL takes a `struct ifreq`; the kernel keeps no pointer.
unsafe impl Ioctl for Ethtool<'_> {
    type Output = ();
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> Opcode {
        SIOCETHTOOL
    }
    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut *self.0).cast()
    }
    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// Asks the driver of the interface `name`.
///
/// # Safety
/// `T` begins with a command, and is what this command takes.
unsafe fn ask<T>(socket: BorrowedFd<'_>, name: &str, question: &mut T) -> io::Result<()> {
    let data = (&raw mut *question).cast();
    let mut request = Request { name: [0; NAME], data, rest: [0; 16] };
    for (to, from) in request.name.iter_mut().zip(name.bytes().take(NAME - 1)) {
        *to = from;
    }
    // SAFETY: as the caller says.
    unsafe { ioctl(socket, Ethtool(&mut request))? };
    Ok(())
}

/// The hardware queues of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Queues {
    /// Those that packets come through.
    pub rx: u32,
    /// Those that packets go through.
    pub tx: u32,
}

/// How many hardware queues are in use.
pub(super) fn queues(socket: BorrowedFd<'_>, name: &str) -> io::Result<Queues> {
    let mut channels = Channels { command: GET_CHANNELS, ..Channels::default() };
    // SAFETY: ETHTOOL_GCHANNELS takes a `struct ethtool_channels`.
    unsafe { ask(socket, name, &mut channels)? };
    let with = |own: u32| own.saturating_add(channels.combined);
    Ok(Queues { rx: with(channels.rx), tx: with(channels.tx) })
}

/// Whether VLAN tags stay in packets that come.
pub(super) fn leaves_tags(socket: BorrowedFd<'_>, name: &str) -> io::Result<bool> {
    let mut flags = Value { command: GET_FLAGS, value: 0 };
    // SAFETY: ETHTOOL_GFLAGS takes a `struct ethtool_value`.
    unsafe { ask(socket, name, &mut flags)? };
    Ok(flags.value & RX_VLAN == 0)
}
