//! The wire format of the Network Block Device protocol (doc/proto.md of the nbd project), both
//! directions. No system call, no clock, no thread.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// TCP port that IANA has assigned.
pub const PORT: u16 = 10809;

/// "NBDMAGIC", the first bytes of a server.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": newstyle, and each option of a client.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Each answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// A simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// A chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: options are answered; the 124 zeroes after NBD_OPT_EXPORT_NAME are left out.
pub const FIXED_NEWSTYLE: u16 = 1;
/// See [`FIXED_NEWSTYLE`].
pub const NO_ZEROES: u16 = 2;

/// Longest string (a name, a query) that the protocol allows.
pub const MAX_STRING: usize = 4096;
/// Largest payload of a request.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Bytes of a request without its payload.
pub const REQUEST_LEN: usize = size_of::<RequestHeader>();

/// Options of the handshake.
#[allow(missing_docs)]
pub mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Answers to options. Those with the highest bit are errors.
#[allow(missing_docs)]
pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR | 1;
    pub const ERR_POLICY: u32 = ERROR | 2;
    pub const ERR_INVALID: u32 = ERROR | 3;
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// What NBD_OPT_INFO and NBD_OPT_GO ask for and tell.
#[allow(missing_docs)]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
#[allow(missing_docs)]
pub mod can {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const FLUSH: u16 = 1 << 2;
    pub const FUA: u16 = 1 << 3;
    pub const TRIM: u16 = 1 << 5;
    pub const WRITE_ZEROES: u16 = 1 << 6;
    pub const DF: u16 = 1 << 7;
    pub const MULTI_CONN: u16 = 1 << 8;
    pub const CACHE: u16 = 1 << 10;
}

/// Commands.
#[allow(missing_docs)]
pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
#[allow(missing_docs)]
pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Chunks of structured replies. Those with the highest bit are errors.
#[allow(missing_docs)]
pub mod chunk {
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const IS_ERROR: u16 = 1 << 15;
    pub const ERROR: u16 = IS_ERROR | 1;
    pub const ERROR_OFFSET: u16 = IS_ERROR | 2;
}

/// The metadata context of allocation.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// What the names of dirty bitmaps' contexts begin with.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// States of `base:allocation`.
pub const STATE_HOLE: u32 = 1;
/// See [`STATE_HOLE`].
pub const STATE_ZERO: u32 = 2;

/// The server's first bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`MAGIC`].
    pub magic: U64,
    /// [`OPTION_MAGIC`].
    pub style: U64,
    /// Handshake flags.
    pub flags: U16,
}

/// An option without its data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// Of [`opt`].
    pub option: U32,
    /// Bytes of data.
    pub len: U32,
}

/// An answer to an option, without its data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionReply {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that is answered.
    pub option: U32,
    /// Of [`rep`].
    pub kind: U32,
    /// Bytes of data.
    pub len: U32,
}

/// A request without its payload.
#[derive(
    Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq,
)]
#[repr(C)]
pub struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// Of [`flag`].
    pub flags: U16,
    /// Of [`cmd`].
    pub command: U16,
    /// Comes back in the reply.
    pub cookie: U64,
    /// First byte.
    pub offset: U64,
    /// Bytes.
    pub len: U32,
}

/// A simple reply, before a read's data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_MAGIC`].
    pub magic: U32,
    /// 0, or an error of the protocol's.
    pub error: U32,
    /// The request's.
    pub cookie: U64,
}

/// The head of a chunk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Chunk {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`chunk::DONE`] in the last one.
    pub flags: U16,
    /// Of [`chunk`].
    pub kind: U16,
    /// The request's.
    pub cookie: U64,
    /// Bytes that follow.
    pub len: U32,
}

/// A chunk of data, before the data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataChunk {
    /// Its head.
    pub chunk: Chunk,
    /// Where the data begins on the disk.
    pub offset: U64,
}

/// A chunk that reports an error, without a message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ErrorChunk {
    /// Its head.
    pub chunk: Chunk,
    /// The error.
    pub error: U32,
    /// Bytes of the message.
    pub message: U16,
}

/// The head of the only or last chunk of a reply.
pub fn last_chunk(kind: u16, cookie: u64, len: u32) -> Chunk {
    Chunk {
        magic: CHUNK_MAGIC.into(),
        flags: chunk::DONE.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        len: len.into(),
    }
}

/// A simple reply.
pub fn simple(cookie: u64, error: u32) -> SimpleReply {
    SimpleReply { magic: SIMPLE_MAGIC.into(), error: error.into(), cookie: cookie.into() }
}

/// An errno as the protocol's error; those that it does not know are I/O errors.
pub fn error_of(errno: i32) -> u32 {
    match errno {
        0 => 0,
        libc::EPERM | libc::EROFS => 1,
        libc::ENOMEM => 12,
        libc::EINVAL => 22,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => 28,
        libc::EOVERFLOW => 75,
        libc::EOPNOTSUPP => 95,
        libc::ESHUTDOWN => 108,
        _ => 5,
    }
}

/// A protocol's error as an errno.
pub fn errno_of(error: u32) -> i32 {
    match error {
        0 => 0,
        1 => libc::EPERM,
        12 => libc::ENOMEM,
        22 => libc::EINVAL,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        108 => libc::ESHUTDOWN,
        _ => libc::EIO,
    }
}
