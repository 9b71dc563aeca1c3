//! xenstore: the wire protocol of xs_wire.h, and a client that speaks it over a Unix socket or
//! /dev/xen/xenbus.

mod client;
mod inbox;
pub mod wire;

pub use client::{Client, Error, Permission, Rights, Tx};
pub use inbox::{Inbox, Watched};
