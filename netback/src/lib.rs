//! The network backend and frontend of the Xen split-driver model.
//!
//! A vif's packets pass pure stages: slots of the ring to a packet, a packet to grant copies, copies
//! to a [`Frame`] and responses; and the same the other way round. What the vif connects to is an
//! [`Endpoint`]. A queue has a thread of its own and shares no lock with another.

pub mod endpoint;
pub mod frame;
pub mod frontend;
pub mod negotiate;
pub mod proto;
pub mod stack;

pub use endpoint::{Endpoint, EndpointQueue};
pub use frame::{Frame, Pool};
pub use frontend::{FrontOptions, FrontQueue, NetFront};
