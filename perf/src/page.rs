//! The stats page: one mapped file per device, written by its backend, read live by anyone who
//! may read the file.
//!
//! All numbers are little-endian. The file describes itself: a header, a directory of blocks,
//! and for each block its schema as text (`name TAB kind TAB unit TAB offset TAB help NEWLINE`)
//! and its values. A reader trusts nothing in it.
//!
//! | offset | bytes | header field |
//! |---|---|---|
//! | 0 | 8 | magic `RBSTATS` and a zero byte |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | header length, 256 |
//! | 16 | 8 | file length |
//! | 24 | 4 | writer's process id |
//! | 28 | 4 | domid of the guest |
//! | 32 | 8 | device id |
//! | 40 | 8 | writer's start time (field 22 of `/proc/PID/stat`) |
//! | 48 | 4 | blocks in the directory (stored last, with release) |
//! | 52 | 4 | room in the directory |
//! | 56 | 8 | blocks that found no room and are not shown |
//! | 64 | 32 | kind of device, zero-padded UTF-8 |
//! | 96 | 64 | name of the device, zero-padded UTF-8 |
//!
//! The directory follows at 256 with 128 bytes an entry: name (48), type (32), then offset and
//! length of the schema and offset and length of the values (8 each), and 16 spare bytes.

mod layout;
mod process;
mod reader;
mod writer;

pub use reader::{ReadError, Reader, find};
pub use writer::{Builder, StatsPage};

/// Which device a page is about.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Device {
    /// Kind of device as in xenstore: `vbd`, `vif`, `vscsi`, `vusb`. At most 31 bytes are kept.
    pub kind: String,
    /// Name of the device for a person, `xvda` say. At most 63 bytes are kept.
    pub name: String,
    /// The guest that it serves.
    pub domid: u16,
    /// The device's number in xenstore (51712 for xvda).
    pub devid: u64,
}
