//! Virtqueues, the device's side: split (VIRTIO 1.2, 2.7) and packed (2.8), behind one trait.

mod chain;
mod inflight;
mod packed;
mod split;
#[cfg(test)]
mod tests;

pub use chain::{Chain, Desc};
pub use inflight::{Area, stride};
pub use packed::Packed;
pub use split::Split;

use super::memory::{Memory, Window};

/// Most descriptors of one chain, with those of its indirect table; QEMU's limit too.
pub const MAX_CHAIN: usize = 1024;
/// Most entries of a ring (2.7: at most 32768; QEMU makes none above 1024).
pub const MAX_SIZE: u16 = 1024;

/// What a driver may not do: its ring is not looked at any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// 2.7.6, 2.7.13.3.
    #[error("the available index is {0} ahead, and the ring has {1} entries")]
    Index(u16, u16),
    /// A number that the ring does not have.
    #[error("a chain starts at descriptor {0}, and the ring has {1}")]
    Head(u16, u16),
    /// It is in flight.
    #[error("buffer {0} is made available again before it was used")]
    Taken(u16),
    /// More descriptors in flight than there are.
    #[error("more descriptors are available than the ring has")]
    Overfull,
    /// 2.7.5: a number that the table does not have.
    #[error("a chain goes on at descriptor {0}, and its table has {1}")]
    Next(u16, u16),
    /// 2.7.5.2: it goes in a circle, or is too long.
    #[error("a chain has more than {0} descriptors")]
    Long(usize),
    /// No bytes.
    #[error("a descriptor of 0 bytes")]
    Empty,
    /// 2.7.4.2.
    #[error("a descriptor to read from follows one to write to")]
    Order,
    /// 2.7.5.3.
    #[error("an indirect table: {0}")]
    Indirect(&'static str),
    /// Not the guest's memory.
    #[error("{len:#x} bytes at guest address {addr:#x} lie in no region of the front-end's")]
    Outside { addr: u64, len: u64 },
    /// The front-end took its memory away.
    #[error("a file of the front-end's memory was cut short")]
    Torn,
    /// What the device needs to answer is not there.
    #[error("a request {0}")]
    Request(&'static str),
    /// The record of what was in flight.
    #[error("the in-flight region: {0}")]
    Inflight(&'static str),
}

/// Whether the driver wants to be told of what was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Notify {
    /// Yes.
    Send,
    /// It polls, or will look anyway.
    Skip,
}

/// Whether something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// Yes: take it.
    Work,
    /// No.
    Nothing,
}

/// Whether the driver has taken up VIRTIO_F_EVENT_IDX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Events {
    /// Flags switch notifications on and off.
    Flags,
    /// Each side says at which entry it wants one.
    Index,
}

/// Where the parts of a ring are, and how it was agreed to be used.
#[derive(Debug)]
pub struct Layout {
    /// Entries.
    pub size: u16,
    /// The descriptor table, or the descriptor ring.
    pub desc: Window,
    /// The available ring, or the driver's event suppression.
    pub driver: Window,
    /// The used ring, or the device's event suppression.
    pub device: Window,
    /// Of the two.
    pub events: Events,
    /// The record of what is in flight.
    pub inflight: Option<Area>,
}

/// One ring as the device sees it. Ids are below the ring's size, and name what was taken and
/// not yet put.
pub trait Ring {
    /// Begins to bring here what the next so many `take`s will read.
    fn prefetch(&self, most: u16);
    /// Takes the next chain that is available: first those that a killed predecessor had in
    /// flight, in the order in which it had taken them.
    fn take(&mut self, memory: &Memory, chain: &mut Chain) -> Result<Option<u16>, Broken>;
    /// Answers what was taken: so many bytes were written to it. The driver sees it with the
    /// next `publish`.
    fn put(&mut self, id: u16, written: u32);
    /// Shows the driver all that was put.
    fn publish(&mut self) -> Notify;
    /// Whether the next `publish` will have to notify.
    fn is_awaited(&self) -> bool;
    /// Whether more is available.
    fn peek(&self) -> Pending;
    /// Asks for notifications, and says whether something came before the driver can have
    /// noticed.
    fn arm(&mut self) -> Pending;
    /// Asks for none for now.
    fn disarm(&mut self);
    /// What SET_VRING_BASE needs to go on here, when nothing is in flight.
    fn base(&self) -> u32;
    /// All that was taken is published: the record of it is as new.
    fn settle(&mut self);
}

/// 2.7.10: whether an event at `event` was passed on the way from `old` to `new`.
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
