//! Filters: disks around a disk. Each is a [`Disk`](crate::Disk) that passes on what another one
//! can do, and changes one thing of it.
//!
//! | filter | what it does |
//! |---|---|
//! | [`changed`] | logs which blocks change, for backups |
//! | [`counted`] | counts requests, bytes and failures |
//! | [`delay`] | has requests wait, for tests |
//! | [`fault`] | has requests fail, for tests |
//! | [`hold`] | keeps writes in memory until they are released or dropped |
//! | [`mirror`] | writes to a second disk too |
//! | [`priority`] | tells the kernel how urgent requests are |
//! | [`stall`] | stops at errors until it is told to go on |
//! | [`throttle`] | holds requests back so that rates stay below limits, alone or in groups |

mod around;
mod bells;
pub mod changed;
pub mod counted;
pub mod delay;
pub mod fault;
mod held;
pub mod hold;
pub mod mirror;
pub mod priority;
pub mod stall;
pub mod throttle;

pub use changed::ChangedDisk;
pub use counted::CountedDisk;
pub use delay::DelayDisk;
pub use fault::FaultyDisk;
pub use hold::HoldDisk;
pub use mirror::MirrorDisk;
pub use priority::PriorityDisk;
pub use stall::StallDisk;
pub use throttle::ThrottleDisk;

/// The methods of `Disk` that a filter passes on to its field `below`, but for `queue`.
macro_rules! forward_to_below {
    () => {
        forward_to_below!(but map);
        forward_to_below!(but geometry, bitmaps);
    };
    (but map) => {
        fn geometry(&self) -> crate::disk::Geometry {
            self.below.geometry()
        }
        fn refresh(&self) -> std::io::Result<crate::disk::Geometry> {
            self.below.refresh()
        }
        fn bitmaps(&self) -> Vec<String> {
            self.below.bitmaps()
        }
        fn bitmap(
            &self,
            name: &str,
            range: std::ops::Range<u64>,
            out: &mut Vec<(u64, bool)>,
        ) -> std::io::Result<()> {
            self.below.bitmap(name, range, out)
        }
    };
    (but geometry, bitmaps) => {
        fn discarded(&self) -> crate::disk::Discarded {
            self.below.discarded()
        }
        fn map(
            &self,
            range: std::ops::Range<u64>,
            out: &mut Vec<crate::disk::Region>,
        ) -> std::io::Result<()> {
            self.below.map(range, out)
        }
    };
}
use forward_to_below;

/// A number, perhaps with K, M or G (of 1024), as knobs of filters have it.
pub fn amount(value: &str) -> Option<u64> {
    let (digits, unit) = match value.char_indices().last()? {
        (at, 'k' | 'K') => (&value[..at], 1 << 10),
        (at, 'm' | 'M') => (&value[..at], 1 << 20),
        (at, 'g' | 'G') => (&value[..at], 1 << 30),
        _ => (value, 1),
    };
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(unit)
}
