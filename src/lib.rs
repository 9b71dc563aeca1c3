//! Ringback: a user-space Xen split-driver I/O stack. This crate re-exports the parts; the
//! program `ringback` runs them.

pub use {blkback, blktap, hypervisor, perf, rings};
