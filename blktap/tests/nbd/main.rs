//! The NBD server and client against other people's: fio, libnbd's tools, QEMU's, nbdkit; and
//! the server against those who break the protocol.

#[path = "../support/mod.rs"]
mod support;

mod client;
mod fuzz;
mod hostile;
mod rig;
mod tls;
mod tools;
