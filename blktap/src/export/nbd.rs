//! An NBD server: disks for QEMU, nbd-client, libnbd and everybody else who speaks the Network
//! Block Device protocol (fixed newstyle), over Unix sockets and TCP.
//!
//! | part | what it is |
//! |---|---|
//! | [`proto`], [`handshake`], [`request`] | the protocol: pure, fuzzed against a model |
//! | [`Server`] | listening; one thread with one queue of the disk for each connection |
//! | [`tls`] | certificates on both sides |
//!
//! **What clients get**: READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, CACHE, BLOCK_STATUS; FUA, DF,
//! NO_HOLE, REQ_ONE; structured replies (a read is one chunk, so DF changes nothing);
//! `base:allocation` and `qemu:dirty-bitmap:NAME`; multi-conn, for a flush on one connection
//! covers what was answered on all. FAST_ZERO is not offered: a disk does not say beforehand
//! whether zeroing is fast.
//!
//! **Block sizes** are the disk's for clients that ask for them, and what misses them is
//! refused (EINVAL). Clients that do not ask may send any range, as with qemu-nbd; ends of
//! blocks are then read, changed and written, one such write at a time.
//!
//! **Limits**: 32 MiB a request, 128 requests and 33 MiB of payload a connection, 64
//! connections, 10 s for a handshake of at most 128 options of at most 64 KiB each. What cannot
//! be a client's honest word ends its connection, with one log line that names the cause; the
//! others go on.

mod connection;
pub mod handshake;
pub(crate) mod memory;
mod negotiate;
pub mod proto;
pub mod request;
mod server;
mod status;
pub mod tls;
pub(crate) mod transport;

pub(crate) use server::prepare_tcp;
pub use server::{Clients, Export, Limits, Server};
