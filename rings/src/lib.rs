//! Typed shared-memory rings of the Xen split-driver model, generic over a protocol.
//!
//! Nothing here notifies, sleeps, reads a clock or makes a system call: a ring says *whether* to
//! notify, the caller does it.
//!
//! ```
//! use std::sync::Arc;
//! use rings::{BackRing, FrontRing, Notify, Protocol, Table, mem::HeapPages};
//!
//! struct Doubling;
//! impl Protocol for Doubling {
//!     const NAME: &'static str = "doubling";
//!     type Req = [u32; 4];
//!     type Rsp = [u32; 2];
//! }
//!
//! let page = Arc::new(HeapPages::new(1));
//! let mut front = FrontRing::<Doubling, _>::init(page.clone(), Default::default())?;
//! let table = Table::on_heap(rings::slot_count::<Doubling>(1));
//! let (mut back, _) = BackRing::<Doubling, _, _>::attach(page, table, Default::default())?;
//!
//! front.push(&[1, 21, 0, 0]).expect("an empty ring has room");
//! assert_eq!(front.publish(), Notify::Send);
//!
//! while let Some(taken) = back.take()? {
//!     let [id, n, ..] = taken.req;
//!     back.respond(taken.slot, &[id, 2 * n]);
//! }
//! assert_eq!(back.publish(), Notify::Send);
//!
//! assert_eq!(front.take()?, Some([1, 42]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![no_std]
extern crate alloc;
#[cfg(test)]
extern crate std;

mod back;
pub mod bytes;
mod counters;
mod front;
pub mod grants;
pub mod index;
pub mod indirect;
pub mod inflight;
pub mod mem;
pub mod persistent;
mod protocol;

#[cfg(test)]
mod kill_tests;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;

pub use back::{AttachError, BackRing, Slot, Taken};
pub use counters::RingCounters;
pub use front::{FrontRing, Full};
pub use index::{Notify, Pending};
pub use inflight::{Forget, InFlight, Table};
pub use protocol::{Corrupt, Protocol, SizeError, slot_count, slot_size};

/// Xen's page size. The ring ABI is defined in these pages whatever the host's page size is
/// (`XEN_PAGE_SIZE` in Linux, `XC_PAGE_SIZE` in the toolstack).
pub const PAGE_SIZE: usize = 4096;
