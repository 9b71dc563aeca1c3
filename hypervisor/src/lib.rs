//! What a split driver asks of a hypervisor, on the real Xen ([`xen`]) and on the bundled one
//! ([`embedded`]): grants, event channels and xenstore, and [`xenbus`], the handshake of a
//! device's two ends, on top.
//!
//! A backend is written against [`Hypervisor`]; a frontend in user space against [`Guest`].

mod seams;
pub use seams::*;

pub mod core;
pub mod embedded;
pub mod store;
pub mod xen;
pub mod xenbus;
