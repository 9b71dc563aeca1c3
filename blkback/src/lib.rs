//! The block backend and frontend of the Xen split-driver model.
//!
//! [`proto`] is the wire format of Xen's io/blkif.h, [`negotiate`] what the ends agree on,
//! [`backend`] the device that a xenbus server runs. A queue has a thread of its own and shares
//! no lock with another.

pub mod backend;
pub mod config;
mod control;
mod counters;
pub mod frontend;
mod inflight;
#[cfg(feature = "test-faults")]
mod leak;
mod live;
pub mod negotiate;
pub mod proto;
mod queue;

pub use backend::{BlkBackend, Open, SCRIPT, Wanted, open_target, opener};
pub use config::Config;
pub use counters::QueueCounters;
pub use frontend::{BlkFront, FrontOptions};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
