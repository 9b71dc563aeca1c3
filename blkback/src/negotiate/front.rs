//! The frontend's side: reading what a backend offers, writing what was chosen.

use hypervisor::xenbus::Key;
use hypervisor::xenbus::keys::{Keys, Refused, key};

use super::{Accepted, DiskKeys, Offer, Protocol};
use crate::proto::{
    Abi, MAX_INDIRECT_SEGMENTS, Native, SECTOR, VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE,
    X86_32, X86_64,
};

/// The largest ring that a frontend is ready for, as log2 of its pages.
const MAX_ORDER: u32 = 8;

/// The size of blocks, if it can be one.
fn block_size(
    keys: &Keys<impl Fn(&str) -> Option<String>>,
    name: &str,
    default: u32,
) -> Result<u32, Refused> {
    let size = keys.within(name, default, SECTOR as u32, 1 << 31)?;
    let refused = || keys.refuse(name, format!("is {size}, which is not a power of two"));
    size.is_power_of_two().then_some(size).ok_or_else(refused)
}

impl Offer {
    /// Reads a backend's offer through `read`. What it does not mention it does not offer; what
    /// is larger than the format or than a frontend needs is cut.
    pub fn read(read: impl Fn(&str) -> Option<String>) -> Result<Offer, Refused> {
        let keys = Keys::of_backend(read);
        let order = keys.number("max-ring-page-order")?.unwrap_or(0);
        // Backends know one of the two names, or both.
        let pages = keys.within("max-ring-pages", 1, 1, u32::MAX)?;
        let indirect = keys.number("feature-max-indirect-segments")?.unwrap_or(0);
        Ok(Offer {
            flush: keys.flag("feature-flush-cache")?,
            barrier: keys.flag("feature-barrier")?,
            persistent: keys.flag("feature-persistent")?,
            max_indirect_segments: indirect.min(MAX_INDIRECT_SEGMENTS as u32),
            max_ring_page_order: order.max(pages.ilog2()).min(MAX_ORDER),
            max_queues: keys.within("multi-queue-max-queues", 1, 1, u32::MAX)?,
        })
    }
}

impl DiskKeys {
    /// Reads what a connected backend says of its disk through `read`. Only `sectors` must be
    /// there.
    pub fn read(read: impl Fn(&str) -> Option<String>) -> Result<DiskKeys, Refused> {
        let keys = Keys::of_backend(read);
        let sectors = keys.optional("sectors", 0, u64::MAX / SECTOR)?;
        let logical_block = block_size(&keys, "sector-size", SECTOR as u32)?;
        let physical_block = block_size(&keys, "physical-sector-size", logical_block)?;
        let info = keys.number("info")?.unwrap_or(0);
        let granularity = keys.within("discard-granularity", logical_block, 1, u32::MAX)?;
        let discard = keys.flag("feature-discard")?.then_some(granularity);
        Ok(DiskKeys {
            size: sectors.ok_or_else(|| keys.refuse("sectors", "is missing"))? * SECTOR,
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
