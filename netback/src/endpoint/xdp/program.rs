//! The program that hands each packet of an interface to the socket of its hardware queue: bpf(2),
//! linux/bpf.h. It is so small that it stands here as the kernel's instructions.
// bpf(2) takes addresses.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_long};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Commands of bpf(2).
const BPF_MAP_CREATE: u32 = 0;
const BPF_MAP_UPDATE_ELEM: u32 = 2;
const BPF_PROG_LOAD: u32 = 5;
const BPF_LINK_CREATE: u32 = 28;

const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_PROG_TYPE_XDP: u32 = 6;
/// How the program is attached (`enum bpf_attach_type`).
const BPF_XDP: u32 = 37;
/// `XDP_FLAGS_DRV_MODE`: in the driver, before there is a packet of the kernel's.
const IN_DRIVER: u32 = 1 << 2;
/// What becomes of a packet whose queue has no socket: the host has it (`XDP_PASS`).
const XDP_PASS: i32 = 2;
/// Offset of `rx_queue_index` in `struct xdp_md`.
const RX_QUEUE_INDEX: i16 = 16;
/// `bpf_redirect_map`
const REDIRECT_MAP: i32 = 51;
/// `BPF_PSEUDO_MAP_FD`: the constant is a map's descriptor.
const IS_MAP: u8 = 1;

/// `struct bpf_insn`
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    constant: i32,
}

/// An instruction with its target and its source register.
const fn op(code: u8, (to, from): (u8, u8), offset: i16, constant: i32) -> Instruction {
    let registers = if cfg!(target_endian = "little") { to | from << 4 } else { to << 4 | from };
    Instruction { code, registers, offset, constant }
}

/// `return bpf_redirect_map(&map, ctx->rx_queue_index, XDP_PASS);`
fn instructions(map: i32) -> [Instruction; 6] {
    [
        op(0x61, (2, 1), RX_QUEUE_INDEX, 0), // r2 = *(u32 *)(r1 + 16)
        op(0x18, (1, IS_MAP), 0, map),       // r1 = map
        op(0, (0, 0), 0, 0),                 // ... its upper half
        op(0xb7, (3, 0), 0, XDP_PASS),       // r3 = XDP_PASS
        op(0x85, (0, 0), 0, REDIRECT_MAP),   // r0 = bpf_redirect_map(r1, r2, r3)
        op(0x95, (0, 0), 0, 0),              // return r0
    ]
}

/// A name of at most 15 bytes, as `ip link` and bpftool show it.
const NAME: [u8; 16] = *b"ringback_xdp\0\0\0\0";
/// The kernel wants to know it; the functions used are not for GPL programs alone.
const LICENSE: &CStr = c"MIT OR Apache-2.0";

/// The members of `union bpf_attr` that each command has, as far as they are used.
#[derive(Default)]
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner_map: u32,
    node: u32,
    name: [u8; 16],
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(Default)]
#[repr(C)]
struct ProgramLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    interface: u32,
    kind: u32,
    flags: u32,
}

/// Calls bpf(2).
///
/// # Safety
/// `T` is what `command` takes, and the addresses in it are of what it says they are.
unsafe fn bpf<T>(command: u32, attributes: &T) -> io::Result<c_long> {
    // SAFETY: `size_of::<T>()` readable bytes; what is behind them counts as 0.
    let done = unsafe {
        libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>() as u32)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

/// As [`bpf`], for commands that make a descriptor.
///
/// # Safety
/// As of [`bpf`].
unsafe fn bpf_fd<T>(command: u32, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller says; the descriptor is new and nobody else's.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attributes)? as i32)) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    // A descriptor is not negative.
    fd.as_raw_fd().unsigned_abs()
}

/// The program, loaded, and the map of sockets that it looks into.
pub(super) struct Program {
    map: OwnedFd,
    program: OwnedFd,
}

impl Program {
    /// For an interface with so many hardware queues. Needs CAP_BPF and CAP_NET_ADMIN, not in a user
    /// namespace but in the machine's.
    pub(super) fn load(queues: u32) -> io::Result<Program> {
        let of_map = MapCreate {
            kind: BPF_MAP_TYPE_XSKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: queues,
            name: NAME,
            ..MapCreate::default()
        };
        // SAFETY: no addresses.
        let map = unsafe { bpf_fd(BPF_MAP_CREATE, &of_map)? };
        let instructions = instructions(map.as_raw_fd());
        let of_program = ProgramLoad {
            kind: BPF_PROG_TYPE_XDP,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr().addr() as u64,
            license: LICENSE.as_ptr().addr() as u64,
            name: NAME,
            expected: BPF_XDP,
            ..ProgramLoad::default()
        };
        // SAFETY: `count` instructions and a string with its end, which live longer than the call.
        let program = unsafe { bpf_fd(BPF_PROG_LOAD, &of_program)? };
        Ok(Program { map, program })
    }

    /// Packets of the hardware queue `number` go to `socket`.
    pub(super) fn direct(&self, number: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let value = self::number(socket);
        let attributes = MapUpdate {
            map: self::number(self.map.as_fd()),
            padding: 0,
            key: (&raw const number).addr() as u64,
            value: (&raw const value).addr() as u64,
            flags: 0,
        };
        // SAFETY: a key and a value of 4 bytes each, as the map was made with.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }.map(drop)
    }

    /// Lets the driver of an interface run the program as long as the descriptor lives.
    pub(super) fn attach(&self, interface: u32) -> io::Result<OwnedFd> {
        let program = number(self.program.as_fd());
        let attributes = LinkCreate { program, interface, kind: BPF_XDP, flags: IN_DRIVER };
        // SAFETY: no addresses.
        unsafe { bpf_fd(BPF_LINK_CREATE, &attributes) }
    }
}
