//! The bundled hypervisor: [`core`](crate::core) served to processes.
//!
//! One process runs [`serve`]; guests and backends are processes of their own that hold a
//! connected socket as their identity. What crosses between them:
//!
//! - **Memory.** A guest has for each peer and access an *arena*, a memfd that the hypervisor
//!   made and sealed. A backend maps pages of it after the hypervisor has checked the grant
//!   table, and gets no other descriptor of the guest's. A read-only arena is sealed against
//!   new writable mappings once its guest has mapped it.
//! - **Events.** Two pipes a channel. Each side has an open file description of its own for
//!   each end that it uses, so no flag that one side sets reaches the other.
//! - **Requests.** One datagram each way on a `SOCK_SEQPACKET` socket ([`message`]); the
//!   hypervisor takes no descriptor from anyone.
//! - **The store.** xenstored's protocol on a stream socket.
//!
//! A domain ends when the last of its request connections is closed.

mod arena;
mod backend;
mod channel;
mod frontend;
mod grants;
mod link;
pub mod message;
mod server;
mod toolstack;

pub use backend::Backend;
pub use frontend::Frontend;
pub use grants::Refused;
pub use link::Link;
pub use server::{HYPERVISOR_SOCKET, STORE_SOCKET, Server, serve, sweep};
pub use toolstack::Toolstack;
