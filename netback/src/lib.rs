//! The network backend and frontend of the Xen split-driver model.
//!
//! A vif's packets pass pure stages: slots of the ring to a packet, a packet to grant copies, copies
//! to a [`Frame`] and responses; and the same the other way round. What the vif connects to is an
//! [`Endpoint`]. A queue has a thread of its own and shares no lock with another, but for frames that
//! it hands over where a guest has chosen their queue by [`hash`].
//!
//! What a guest changes while its queues run is in [`live`]: how packets are spread ([`ctrl`], the
//! control ring, which has a thread of its own), group addresses, headroom, and the link.

pub mod backend;
pub mod checksum;
pub mod config;
mod control;
mod counters;
pub mod ctrl;
pub mod endpoint;
pub mod filter;
pub mod frame;
pub mod frontend;
pub mod hash;
pub mod hold;
mod inflight;
mod kept;
pub mod limit;
pub mod live;
mod mailbox;
pub mod negotiate;
pub mod offload;
pub mod proto;
mod queue;
pub mod rx;
pub mod segment;
pub mod stack;
pub mod staging;
pub mod tx;

pub use backend::{Host, NetBackend, Open, SCRIPT, open_tap};
pub use config::Config;
pub use counters::QueueCounters;
pub use endpoint::named::opener;
pub use endpoint::{Endpoint, EndpointQueue};
pub use frame::{Frame, Pool};
pub use frontend::{FrontOptions, FrontQueue, NetFront};
