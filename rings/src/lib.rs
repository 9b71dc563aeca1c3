//! Typed shared-memory rings of the Xen split-driver model, generic over a protocol.
//!
//! Nothing here notifies, sleeps, reads a clock or makes a system call: a ring says *whether* to
//! notify, the caller does it.
#![no_std]
extern crate alloc;

pub mod mem;

/// Xen's page size. The ring ABI is defined in these pages whatever the host's page size is
/// (`XEN_PAGE_SIZE` in Linux, `XC_PAGE_SIZE` in the toolstack).
pub const PAGE_SIZE: usize = 4096;
