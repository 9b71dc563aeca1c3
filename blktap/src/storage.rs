//! Opening what lies under a disk: a regular file or a block device, its locks, its alignment.
mod error;
mod lock;
mod open;
mod probe;

pub use error::OpenError;
pub use lock::{Lock, Sharing};
pub use open::{Access, BlockSize, Cache, OpenOptions, Storage, open};
pub use probe::{Medium, Probe};
