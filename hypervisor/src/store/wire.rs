//! The wire format of xenstore (Xen's `io/xs_wire.h`): a 16-byte header, then up to 4096 bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Longest payload (XENSTORE_PAYLOAD_MAX).
pub const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path, without its terminating NUL (XENSTORE_ABS_PATH_MAX).
pub const ABS_PATH_MAX: usize = 3072;
/// Longest relative path (XENSTORE_REL_PATH_MAX).
pub const REL_PATH_MAX: usize = 2048;
/// Bytes of a header.
pub const HEADER_LEN: usize = 16;

/// `struct xsd_sockmsg`, in the byte order of the machine (both ends are on it).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// What is asked, or what is answered; a [`Kind`].
    pub kind: u32,
    /// Chosen by the client, echoed in the reply; 0 in watch events.
    pub req_id: u32,
    /// The transaction, 0 for none.
    pub tx_id: u32,
    /// Bytes that follow.
    pub len: u32,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        /// Message types (`enum xsd_sockmsg_type`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[allow(missing_docs)]
        pub enum Kind { $($(#[$doc])* $name = $value,)* }

        impl Kind {
            /// Every kind that there is.
            pub const ALL: &[Kind] = &[$(Kind::$name),*];

            /// The kind with this number.
            pub fn from_u32(value: u32) -> Option<Kind> {
                match value {
                    $($value => Some(Kind::$name),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    Control = 0,
    Directory = 1,
    Read = 2,
    GetPerms = 3,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    Introduce = 8,
    Release = 9,
    GetDomainPath = 10,
    Write = 11,
    Mkdir = 12,
    Rm = 13,
    SetPerms = 14,
    WatchEvent = 15,
    Error = 16,
    IsDomainIntroduced = 17,
    Resume = 18,
    SetTarget = 19,
    ResetWatches = 21,
    DirectoryPart = 22,
}

/// Error names on the wire (`xsd_errors`) and their errno numbers on Linux.
pub const ERRORS: &[(&str, i32)] = &[
    ("EINVAL", 22),
    ("EACCES", 13),
    ("EEXIST", 17),
    ("EISDIR", 21),
    ("ENOENT", 2),
    ("ENOMEM", 12),
    ("ENOSPC", 28),
    ("EIO", 5),
    ("ENOTEMPTY", 39),
    ("ENOSYS", 38),
    ("EROFS", 30),
    ("EBUSY", 16),
    ("EAGAIN", 11),
    ("EISCONN", 106),
    ("E2BIG", 7),
    ("EPERM", 1),
];

/// The errno of an error's name; EINVAL for a name that we do not know, as libxenstore does.
pub fn errno_of(name: &str) -> i32 {
    ERRORS.iter().find(|(n, _)| *n == name).map_or(22, |(_, e)| *e)
}

/// The name of an errno; `EIO` for one that the protocol has no name for.
pub fn name_of(errno: i32) -> &'static str {
    ERRORS.iter().find(|(_, e)| *e == errno).map_or("EIO", |(n, _)| n)
}

/// A whole message as bytes.
pub fn encode(kind: Kind, req_id: u32, tx_id: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { kind: kind as u32, req_id, tx_id, len: payload.len() as u32 };
    let mut message = Vec::with_capacity(HEADER_LEN + payload.len());
    message.extend_from_slice(header.as_bytes());
    message.extend_from_slice(payload);
    message
}
