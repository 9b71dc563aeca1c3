//! Disks: a [`Disk`] is opened once and gives one [`DiskQueue`] to each thread that does I/O.
pub mod blocking;
pub mod copy;
pub mod disk;
pub mod engine;
pub mod export;
pub mod faults;
pub mod filters;
pub mod formats;
pub mod image;
pub mod live;
pub mod storage;
pub use disk::*;
pub use engine::doctor;
pub use image::ImageDisk;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
