//! The handshake of a device's two ends through xenstore (Xen's `io/xenbus.h`).
//!
//! [`machine`] decides, as a pure function of what is seen; `server` looks, calls the device and
//! writes. Backends implement [`Backend`] and [`Device`] and are run by [`serve`]. What devices of
//! all kinds have alike beside it is here too: [`keys`], [`knobs`], [`queue`] threads, [`Stats`],
//! and a frontend's [`Connection`](front::Connection).

mod control;
mod device;
pub mod front;
pub mod inflight;
pub mod keys;
pub mod knobs;
pub mod lasting;
mod log_limit;
pub mod machine;
mod nodes;
pub mod placement;
pub mod queue;
mod server;
mod stats;
pub mod toolstack;

pub use device::{Device, Fault, Faults, Meeting, Parting};
pub use log_limit::LogLimit;
pub use machine::State;
pub use nodes::{DeviceId, Key, Nodes};
pub use server::{Backend, Nodesets, Options, Scope, serve};
pub use stats::Stats;
