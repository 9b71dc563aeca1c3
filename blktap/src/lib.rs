//! Disks: a [`Disk`] is opened once and gives one [`DiskQueue`] to each thread that does I/O.
pub mod disk;
pub use disk::*;
