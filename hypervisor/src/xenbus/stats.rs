//! A device's stats page.

use std::path::Path;

use perf::page::{Builder, Device, StatsPage};
use perf::{Block, Handle};

use super::DeviceId;

/// The page, or none where none could be made: counters then count for nobody.
#[derive(Default)]
pub struct Stats(Option<StatsPage>);

impl Stats {
    /// The page of the device, which people call `name`, with room for so many blocks.
    pub fn create(run_dir: &Path, id: &DeviceId, name: String, blocks: usize) -> Stats {
        let (kind, devid) = (id.kind.to_owned(), id.devid.into());
        let builder = Builder::new(Device { kind, name, domid: id.domid, devid });
        let builder = builder.blocks(blocks as u32).bytes((blocks + 8) * 2048);
        let made = builder.create(id.file(run_dir, "stats"));
        Stats(made.inspect_err(|e| tracing::warn!("{id}: no stats page: {e}")).ok())
    }
    /// The block `name`.
    pub fn block<T: Block>(&self, name: &str) -> Handle<T> {
        self.0.as_ref().map_or_else(Handle::default, |page| page.block(name))
    }
}
