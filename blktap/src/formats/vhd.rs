//! VHD images: Microsoft's "Virtual Hard Disk Image Format Specification" of 2006 with tapdisk's
//! batmap, in QEMU `vpc`.
//!
//! A fixed image is the disk's bytes and a footer. The others have blocks (2 MiB) that a block
//! table names; each begins with a bitmap of its sectors. In a dynamic image a sector that is not
//! set reads as zeroes, in a differencing one as the parent's.
//!
//! **QEMU does not look at bitmaps**: it reads what a block's bytes are, and sets all bits of a
//! block that it writes to. So new blocks are all zeroes with all bits set where there is no
//! parent, and zeroes are always in the data too.
//!
//! **Order on disk.** The footer moves behind a new block before anything else is written there; a
//! flush makes data, footers and the bitmaps of new blocks durable, then writes the table's
//! entries and the bits of sectors that were set, and syncs again. So the table never names what
//! is not there, a bit is never set before its data, and if the footer at the end is lost, its
//! copy at the start is not: opening for writing puts it back.
mod batmap;
mod bitmap;
mod check;
mod create;
mod flush;
mod footer;
mod growth;
mod header;
mod layout;
mod locator;
mod open;
mod rebase;
mod resize;
mod resolve;
mod space;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use self::batmap::Batmap;
use self::bitmap::Bitmaps;
pub use self::check::{CheckReport, Repair};
pub use self::create::{CreateOptions, Shape};
use self::flush::{Dirty, Flushes};
use self::footer::Footer;
pub use self::footer::{Geometry, Kind};
use self::header::Header;
use self::layout::UNUSED;
pub use self::locator::{Naming, NewParent, Parent, ParentState};
use self::space::Space;
use super::{
    BackingName, Change, Extent, Format, Guard, ImageError, Leases, Miss, Outcome, Piece, Place,
    Target, Waiter,
};
use crate::disk::Region;
use crate::storage::{Access, Storage};

/// An open VHD image.
pub struct Vhd {
    files: [Arc<dyn Storage>; 1],
    leases: Arc<Leases>,
    footer: Footer,
    kind: Kind,
    size: u64,
    parent: Option<Parent>,
    /// `None`: a fixed image.
    table: Option<Table>,
    /// The old footer of a fixed image that was growing, among its sectors: zeroes.
    stale: Option<u64>,
    flushes: Flushes,
}

/// The blocks of an image that is not fixed.
struct Table {
    header: Header,
    /// Bytes of a block are 1 << shift.
    shift: u32,
    bitmap_bytes: u64,
    kind: Kind,
    /// For each block of the disk its sector in the file, or [`UNUSED`], and [`FULL`].
    blocks: Box<[AtomicU64]>,
    bitmaps: Bitmaps,
    space: Mutex<Space>,
    dirty: Dirty,
    batmap: Mutex<Option<Batmap>>,
}

/// All sectors of a block are set.
const FULL: u64 = 1 << 32;
/// A miss that wants a block allocated, not its bitmap loaded.
const ALLOCATE: u64 = 1 << 32;

/// The sector in a block's word.
fn sector_of(word: u64) -> u32 {
    word as u32
}

impl Table {
    fn word(&self, block: u32) -> u64 {
        self.blocks[block as usize].load(Ordering::Acquire)
    }
    fn sectors(&self) -> u32 {
        1 << (self.shift - 9)
    }
    fn block_bytes(&self) -> u64 {
        self.bitmap_bytes + (1 << self.shift)
    }
    /// What a sector that is not set reads as.
    fn below(&self) -> Place {
        match self.kind {
            Kind::Differencing => Place::Absent,
            _ => Place::Zero,
        }
    }
}

impl Vhd {
    /// How it keeps its bytes.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What a differencing image says about its parent.
    pub fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }

    fn storage(&self) -> &dyn Storage {
        &*self.files[0]
    }

    fn read_fixed(&self, range: Range<u64>, out: &mut Vec<Extent>) {
        let stale = self.stale.map_or(range.end..range.end, |at| at..at + 512);
        let [from, to] = [stale.start, stale.end].map(|at| at.clamp(range.start, range.end));
        let data = |offset| Place::Data { file: 0, offset };
        let parts = [
            (range.start..from, data(range.start)),
            (from..to, Place::Zero),
            (to..range.end, data(to)),
        ];
        for (part, place) in parts.into_iter().filter(|(part, _)| !part.is_empty()) {
            out.push(Extent { len: part.end - part.start, place });
        }
    }
}

impl Format for Vhd {
    fn name(&self) -> &'static str {
        "vpc"
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn cluster(&self) -> u64 {
        self.table.as_ref().map_or(512, |t| 1 << t.shift)
    }
    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }
    fn leases(&self) -> &Arc<Leases> {
        &self.leases
    }
    fn backing(&self) -> Option<BackingName> {
        let parent = self.parent.as_ref()?;
        let name = parent.names.first().map(|(_, name)| name.clone()).unwrap_or_default();
        let format = if parent.id.is_some() { "vpc" } else { "raw" };
        Some(BackingName { name, format: Some(format.to_owned()) })
    }
    fn other_backing_names(&self) -> Vec<String> {
        let names = self.parent.iter().flat_map(|p| &p.names);
        names.skip(1).map(|(_, name)| name.clone()).collect()
    }
    fn check_backing(&self, backing: &dyn Format, modified: SystemTime) -> Result<(), ImageError> {
        let Some(parent) = &self.parent else { return Ok(()) };
        if parent.check(backing.unique_id(), modified)? == ParentState::Touched {
            let name = self.storage().name();
            tracing::warn!("{name}: its parent's file was modified since, or its time was");
        }
        Ok(())
    }
    fn unique_id(&self) -> Option<[u8; 16]> {
        Some(self.footer.id)
    }

    fn resolve_read(
        &self,
        range: Range<u64>,
        out: &mut Vec<Extent>,
    ) -> Result<Outcome<()>, ImageError> {
        match &self.table {
            Some(table) => Ok(table.read(range, out)),
            None => {
                self.read_fixed(range, out);
                Ok(Outcome::Ready(()))
            }
        }
    }

    fn resolve_write(
        &self,
        range: Range<u64>,
        change: Change,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Outcome<Option<Guard>>, ImageError> {
        if self.storage().access() == Access::ReadOnly {
            return Err(ImageError::ReadOnly);
        }
        let Some(table) = &self.table else {
            let len = range.end - range.start;
            out.push(Piece { len, target: Target::InPlace { file: 0, offset: range.start } });
            return Ok(Outcome::Ready(None));
        };
        Ok(table.write(range, change, waiter, &self.leases, self.size, out))
    }

    fn commit(&self, guard: Guard) {
        if let Some(table) = &self.table {
            table.commit(&guard);
        }
    }

    fn abort(&self, guard: Guard) {
        if let Some(table) = &self.table {
            table.abort(&guard);
        }
    }

    fn load(&self, miss: Miss) -> Result<(), ImageError> {
        let Some(table) = &self.table else { return Ok(()) };
        let block = miss.0 as u32;
        if block as usize >= table.blocks.len() {
            return Err(ImageError::Invalid(format!("no block {block}")));
        }
        if miss.0 & ALLOCATE != 0 {
            return table.allocate(block, self.storage(), &self.footer, &self.leases);
        }
        table.load_bitmap(block, self.storage())
    }

    fn decompress(&self, _cluster: u64, _out: &mut Vec<u8>) -> Result<(), ImageError> {
        Err(ImageError::Invalid("a VHD has no compressed blocks".into()))
    }

    fn has_unflushed(&self) -> bool {
        self.table.as_ref().is_some_and(|t| t.dirty.is_dirty())
    }

    fn flush(&self) -> Result<(), ImageError> {
        self.flushes.run(|| match &self.table {
            Some(table) => table.flush(self.storage(), &self.leases),
            None => self.storage().sync().map_err(ImageError::io("flush the file")),
        })
    }

    fn close(&self) -> Result<(), ImageError> {
        if self.storage().access() == Access::ReadOnly {
            return Ok(());
        }
        self.flush()?;
        match &self.table {
            Some(table) => table.write_batmap(self.storage()),
            None => Ok(()),
        }
    }

    fn map_data(
        &self,
        _file: u16,
        range: Range<u64>,
        out: &mut Vec<Region>,
    ) -> std::io::Result<()> {
        self.storage().map(range, out)
    }
}
