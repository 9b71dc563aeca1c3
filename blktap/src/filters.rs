//! Filters: disks around a disk. Each is a [`Disk`](crate::Disk) that passes on what another one
//! can do, and changes one thing of it.
//!
//! | filter | what it does |
//! |---|---|
//! | [`changed`] | logs which blocks change, for backups |
//! | [`throttle`] | holds requests back so that rates stay below limits, alone or in groups |

mod around;
pub mod changed;
mod held;
pub mod throttle;

pub use changed::ChangedDisk;
pub use throttle::ThrottleDisk;

/// The methods of `Disk` that a filter passes on to its field `below`, but for `queue`.
macro_rules! forward_to_below {
    () => {
        fn geometry(&self) -> crate::disk::Geometry {
            self.below.geometry()
        }
        forward_to_below!(but geometry);
    };
    (but geometry) => {
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
        forward_to_below!(but geometry, bitmaps);
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
