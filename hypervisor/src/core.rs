//! The bundled hypervisor itself: pure state with no system call, no clock and no thread.
//!
//! [`grants`] are grant tables (grant_table.h), [`events`] event channels (event_channel.h),
//! [`domains`] who exists, and [`xenstore`] the store behind xs_wire.h. A platform such as
//! [`embedded`](crate::embedded) carries their calls to processes.

pub mod domains;
pub mod events;
pub mod grants;
pub mod xenstore;
