//! The frontend's side: reading what a backend offers, writing what was chosen.

use hypervisor::xenbus::Key;

use super::{Accepted, DiskKeys, Offer, Protocol, key, shown};
use crate::proto::{
    Abi, MAX_INDIRECT_SEGMENTS, Native, SECTOR, VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE,
    X86_32, X86_64,
};

/// Why a backend's keys make no disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// A key that must be there is not.
    #[error("backend key {0} is missing")]
    Missing(&'static str),
    /// A key holds what it cannot hold.
    #[error("backend key {key} is {value:?}, which makes no sense")]
    Nonsense {
        /// The key.
        key: &'static str,
        /// Its value, shortened.
        value: String,
    },
}

/// The largest ring that a frontend is ready for, as log2 of its pages.
const MAX_ORDER: u64 = 8;

struct Keys<F>(F);

impl<F: Fn(&str) -> Option<String>> Keys<F> {
    /// A number between `low` and `high`, `None` where the key is missing.
    fn number(&self, key: &'static str, low: u64, high: u64) -> Result<Option<u64>, Unusable> {
        let Some(value) = (self.0)(key) else { return Ok(None) };
        let digits = value.trim();
        let plain = digits.bytes().all(|b| b.is_ascii_digit());
        match digits.parse() {
            Ok(number) if plain && (low..=high).contains(&number) => Ok(Some(number)),
            _ => Err(Unusable::Nonsense { key, value: shown(&value) }),
        }
    }
    fn flag(&self, key: &'static str) -> Result<bool, Unusable> {
        Ok(self.number(key, 0, 1)? == Some(1))
    }
    fn block_size(&self, key: &'static str, default: u32) -> Result<u32, Unusable> {
        let size = self.number(key, SECTOR, 1 << 31)?.map_or(default, |size| size as u32);
        let nonsense = || Unusable::Nonsense { key, value: size.to_string() };
        size.is_power_of_two().then_some(size).ok_or_else(nonsense)
    }
}

impl Offer {
    /// Reads a backend's offer through `read`. What it does not mention it does not offer; what
    /// is larger than the format or than a frontend needs is cut.
    pub fn read(read: impl Fn(&str) -> Option<String>) -> Result<Offer, Unusable> {
        let keys = Keys(read);
        let max = u64::from(u32::MAX);
        let order = keys.number("max-ring-page-order", 0, max)?.unwrap_or(0);
        // Backends know one of the two names, or both.
        let pages = keys.number("max-ring-pages", 1, max)?.unwrap_or(1);
        let indirect = keys.number("feature-max-indirect-segments", 0, max)?.unwrap_or(0);
        Ok(Offer {
            flush: keys.flag("feature-flush-cache")?,
            barrier: keys.flag("feature-barrier")?,
            persistent: keys.flag("feature-persistent")?,
            max_indirect_segments: indirect.min(MAX_INDIRECT_SEGMENTS as u64) as u32,
            max_ring_page_order: order.max(pages.ilog2().into()).min(MAX_ORDER) as u32,
            max_queues: keys.number("multi-queue-max-queues", 1, max)?.unwrap_or(1) as u32,
        })
    }
}

impl DiskKeys {
    /// Reads what a connected backend says of its disk through `read`. Only `sectors` must be
    /// there.
    pub fn read(read: impl Fn(&str) -> Option<String>) -> Result<DiskKeys, Unusable> {
        let keys = Keys(read);
        let sectors = keys.number("sectors", 0, u64::MAX / SECTOR)?;
        let logical_block = keys.block_size("sector-size", SECTOR as u32)?;
        let physical_block = keys.block_size("physical-sector-size", logical_block)?;
        let info = keys.number("info", 0, u32::MAX.into())?.unwrap_or(0) as u32;
        let granularity = keys.number("discard-granularity", 1, u32::MAX.into())?;
        let granularity = granularity.map_or(logical_block, |g| g as u32);
        let discard = keys.flag("feature-discard")?.then_some(granularity);
        Ok(DiskKeys {
            size: sectors.ok_or(Unusable::Missing("sectors"))? * SECTOR,
            logical_block,
            physical_block,
            read_only: info & VDISK_READONLY != 0,
            cdrom: info & VDISK_CDROM != 0,
            removable: info & VDISK_REMOVABLE != 0,
            discard,
            secure_discard: discard.is_some() && keys.flag("discard-secure")?,
        })
    }
}

impl Protocol {
    /// The value of the `protocol` key (io/protocols.h).
    pub fn name(self) -> &'static str {
        match self {
            Protocol::X86_64 => X86_64::PROTOCOL,
            Protocol::X86_32 => X86_32::PROTOCOL,
            Protocol::Native => Native::PROTOCOL,
        }
    }
}

impl Accepted {
    /// The keys by which a frontend tells this to the backend, below its own node. All queues
    /// have rings of the same size, a power of two.
    pub fn front_keys(&self) -> Vec<Key> {
        let pages = self.queues.first().map_or(1, |queue| queue.ring_refs.len());
        let mut keys = vec![
            key("protocol", self.protocol.name()),
            key("feature-persistent", u8::from(self.persistent)),
        ];
        if pages > 1 {
            keys.push(key("ring-page-order", pages.ilog2()));
            keys.push(key("num-ring-pages", pages));
        }
        if self.queues.len() > 1 {
            keys.push(key("multi-queue-num-queues", self.queues.len()));
        }
        for (number, queue) in self.queues.iter().enumerate() {
            // A single queue's keys are at the top, as if there were no such thing as queues.
            let prefix = match self.queues.len() {
                1 => String::new(),
                _ => format!("queue-{number}/"),
            };
            keys.push(key(&format!("{prefix}event-channel"), queue.port));
            for (page, gref) in queue.ring_refs.iter().enumerate() {
                let index = if pages > 1 { page.to_string() } else { String::new() };
                keys.push(key(&format!("{prefix}ring-ref{index}"), gref));
            }
        }
        keys
    }
}
