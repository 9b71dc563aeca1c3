//! The NBD server and client against other people's: fio, libnbd's tools, QEMU's, nbdkit; and
//! the server against those who break the protocol.

#[path = "../support/mod.rs"]
mod support;
#[allow(dead_code)]
#[path = "../vhd/model.rs"]
mod vhd_model;

mod client;
mod counted;
mod fuzz;
mod hostile;
mod images;
mod queues;
mod rig;
mod tls;
mod tools;
