//! vhost-user-blk: disks for QEMU, KVM and everybody else who drives virtio devices of another
//! process.
//!
//! | part | what it is |
//! |---|---|
//! | `ring` | split and packed virtqueues, and the record of what is in flight |
//! | `blk` | the block device: features, configuration, requests |
//! | `memory`, `torn` | the front-end's memory, which it may take away |
//! | `worker` | the loop of a queue: one thread with one queue of the disk |
//! | `device`, `connection` | the protocol's messages (by the `vhost` crate), put into effect |
//! | [`Server`] | one front-end after the other |
//!
//! **What front-ends get**: as many queues as are allowed, each with a thread of its own;
//! indirect descriptors, event indexes, packed rings; flush, discard, write zeroes, a writeback
//! switch; a new size as soon as the disk has one; a record of what is in flight, with which the
//! successor of a killed back-end goes on.
//!
//! **Limits**: 1024 entries a ring, 1024 descriptors and 4 GiB a request, 32 regions of memory.
//! What cannot be a driver's or a front-end's honest word ends the connection, with one log line
//! that names the cause; the next one is served.

mod blk;
mod connection;
mod device;
mod memory;
mod ring;
mod server;
mod torn;
mod vring;
mod worker;

pub use server::{Export, MAX_QUEUES, Server};
