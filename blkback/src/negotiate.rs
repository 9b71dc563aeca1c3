//! What the two ends tell each other through xenstore before the ring runs: pure functions from
//! and to keys. The keys are those of Xen's io/blkif.h.

mod front;

use hypervisor::xenbus::Key;
use hypervisor::xenbus::keys::{Keys, Refused, key, shown};

use crate::proto::{VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE};

/// What a backend offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// `feature-flush-cache`
    pub flush: bool,
    /// `feature-barrier`
    pub barrier: bool,
    /// `feature-persistent`
    pub persistent: bool,
    /// `feature-max-indirect-segments`; 0 offers none.
    pub max_indirect_segments: u32,
    /// `max-ring-page-order`
    pub max_ring_page_order: u32,
    /// `multi-queue-max-queues`
    pub max_queues: u32,
}

/// What a disk is, for its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskKeys {
    /// Bytes.
    pub size: u64,
    /// Logical block size in bytes.
    pub logical_block: u32,
    /// Physical block size in bytes.
    pub physical_block: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether it is a CD-ROM drive.
    pub cdrom: bool,
    /// Whether its medium can be taken out.
    pub removable: bool,
    /// Granularity of discard in bytes, if it is offered.
    pub discard: Option<u32>,
    /// Whether a secure discard is possible.
    pub secure_discard: bool,
}

impl Offer {
    /// The keys that a frontend reads before it makes its rings; written before state 2.
    pub fn early_keys(&self) -> Vec<Key> {
        vec![
            key("max-ring-page-order", self.max_ring_page_order),
            // The older name of the same, in pages.
            key("max-ring-pages", 1u32 << self.max_ring_page_order),
            key("multi-queue-max-queues", self.max_queues),
            // Written as 0 too: a predecessor with other knobs may have left another value.
            key("feature-max-indirect-segments", self.max_indirect_segments),
            key("feature-persistent", u8::from(self.persistent)),
        ]
    }

    /// The keys that a frontend reads when it sees us connected; written before state 4.
    pub fn disk_keys(&self, disk: &DiskKeys) -> Vec<Key> {
        let mut info = 0;
        for (is, bit) in [
            (disk.cdrom, VDISK_CDROM),
            (disk.removable, VDISK_REMOVABLE),
            (disk.read_only, VDISK_READONLY),
        ] {
            info |= if is { bit } else { 0 };
        }
        let mut keys = vec![
            key("feature-flush-cache", u8::from(self.flush)),
            key("feature-barrier", u8::from(self.barrier)),
            // In units of 512 bytes whatever the block size is: Linux's reading of blkif.h.
            key("sectors", disk.size / 512),
            key("info", info),
            key("sector-size", disk.logical_block),
            key("physical-sector-size", disk.physical_block),
        ];
        keys.push(key("feature-discard", u8::from(disk.discard.is_some())));
        if let Some(granularity) = disk.discard {
            keys.extend([
                key("discard-granularity", granularity),
                key("discard-alignment", 0),
                key("discard-secure", u8::from(disk.secure_discard)),
            ]);
        }
        keys
    }
}

/// The layout of requests (`protocol`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// `x86_64-abi`, and where the key is missing.
    X86_64,
    /// `x86_32-abi`
    X86_32,
    /// The layout of another architecture's own (`arm-abi`).
    Native,
}

/// One queue as the frontend has made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueKeys {
    /// The ring's pages.
    pub ring_refs: Vec<u32>,
    /// The frontend's event channel.
    pub port: u32,
}

/// What a frontend has chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The layout of requests.
    pub protocol: Protocol,
    /// Whether it keeps its grants.
    pub persistent: bool,
    /// Its queues.
    pub queues: Vec<QueueKeys>,
}

impl Accepted {
    /// Reads a frontend's keys through `read`. It may know none of the optional ones.
    pub fn read(offer: &Offer, read: impl Fn(&str) -> Option<String>) -> Result<Accepted, Refused> {
        let keys = Keys::of_frontend(read);
        let protocol = match keys.get("protocol").as_deref().map(str::trim) {
            None | Some("x86_64-abi") => Protocol::X86_64,
            Some("x86_32-abi") => Protocol::X86_32,
            Some("arm-abi") if cfg!(not(target_arch = "x86_64")) => Protocol::Native,
            Some(other) => {
                let other = shown(other);
                let why = format!("is {other}; x86_64-abi and x86_32-abi are supported");
                return Err(keys.refuse("protocol", why));
            }
        };
        let persistent = keys.number("feature-persistent")?.unwrap_or(0) == 1;
        let count = keys.within("multi-queue-num-queues", 1, 1, offer.max_queues)?;
        let pages = Self::ring_pages(&keys, offer)?;
        let mut accepted = Accepted { protocol, persistent, queues: Vec::new() };
        for number in 0..count {
            let prefix = if count == 1 { String::new() } else { format!("queue-{number}/") };
            let queue = Self::queue(&keys, &prefix, pages)?;
            accepted.check_apart(&keys, &queue, &prefix)?;
            accepted.queues.push(queue);
        }
        Ok(accepted)
    }

    /// Pages of each ring: by order, by the older count of pages, or `None` for a frontend that
    /// writes one `ring-ref` without a number.
    fn ring_pages(
        keys: &Keys<impl Fn(&str) -> Option<String>>,
        offer: &Offer,
    ) -> Result<Option<u32>, Refused> {
        let most = offer.max_ring_page_order;
        let order = keys.optional("ring-page-order", 0, most)?;
        let pages = keys.optional("num-ring-pages", 1, 1u32 << most)?;
        match (order, pages) {
            (_, Some(pages)) if !pages.is_power_of_two() => {
                let why = format!("is {pages}, which is not a power of two");
                Err(keys.refuse("num-ring-pages", why))
            }
            (Some(order), Some(pages)) if 1 << order != pages => {
                let both = format!("ring-page-order ({order}) and num-ring-pages ({pages})");
                Err(Refused(format!("frontend keys {both} disagree")))
            }
            (Some(order), _) => Ok(Some(1 << order)),
            (None, pages) => Ok(pages),
        }
    }

    fn queue(
        keys: &Keys<impl Fn(&str) -> Option<String>>,
        prefix: &str,
        pages: Option<u32>,
    ) -> Result<QueueKeys, Refused> {
        let name = |key: &str| format!("{prefix}{key}");
        // A single page may stand as `ring-ref` even where the order is written too.
        let single = matches!(pages, None | Some(1)) && keys.get(&name("ring-ref")).is_some();
        // Linux's backend takes `ring-ref0` for a single page too.
        let numbered = pages.is_some() || keys.get(&name("ring-ref0")).is_some();
        let ring_refs = if single || !numbered {
            vec![keys.required(&name("ring-ref"))?]
        } else {
            (0..pages.unwrap_or(1))
                .map(|i| keys.required(&name(&format!("ring-ref{i}"))))
                .collect::<Result<_, _>>()?
        };
        Ok(QueueKeys { ring_refs, port: keys.port(&name("event-channel"))? })
    }

    /// Two rings in one page would make nonsense of both.
    fn check_apart(
        &self,
        keys: &Keys<impl Fn(&str) -> Option<String>>,
        queue: &QueueKeys,
        prefix: &str,
    ) -> Result<(), Refused> {
        let mine = &queue.ring_refs;
        let twice = (1..mine.len()).any(|i| mine[..i].contains(&mine[i]));
        let shared = self.queues.iter().any(|q| q.ring_refs.iter().any(|r| mine.contains(r)));
        if twice || shared {
            let name = format!("{prefix}ring-ref");
            return Err(keys.refuse(&name, "names a page of another ring"));
        }
        if self.queues.iter().any(|q| q.port == queue.port) {
            let name = format!("{prefix}event-channel");
            return Err(keys.refuse(&name, "names the port of another queue"));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "negotiate_tests.rs"]
mod tests;
