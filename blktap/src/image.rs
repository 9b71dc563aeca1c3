//! Disks that are images: a format over the images it builds on, with queues that move the data.
mod chain;
mod log;
mod lower;
mod open;
mod probe;
mod queue;
mod requests;
mod status;
mod transfer;
mod workers;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

pub use open::{
    BackingPolicy, Commits, ImageFormat, ImageOpenError, ImageOptions, MAX_CHAIN, open, open_image,
    open_layers,
};
pub use probe::probe;
pub use queue::ImageQueue;
pub use status::{Status, StatusPlace};
pub use workers::Blocking;

use crate::disk::{Disk, DiskQueue, Geometry, Kept, Region};
use crate::formats::{Format, ImageError};
use crate::storage::Access;
use chain::{Chain, Found, Source};
use log::ErrorLog;
use workers::Workers;

/// What all queues of an image share.
struct Shared {
    chain: Arc<Chain>,
    workers: Arc<Workers>,
    log: Arc<ErrorLog>,
    /// A power of two.
    logical: u32,
    access: Access,
    commits: Commits,
    /// Whether `close` has been carried out, and how that ended.
    closed: Mutex<Option<Result<(), String>>>,
}

impl Shared {
    fn read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }
    /// Whole logical blocks, in bytes.
    fn size(&self) -> u64 {
        self.chain.top().size() & !(u64::from(self.logical) - 1)
    }
    fn close(&self) -> Result<(), ImageError> {
        let mut closed = self.closed.lock();
        if closed.is_none() {
            let result = if self.read_only() { Ok(()) } else { self.chain.top().close() };
            *closed = Some(result.as_ref().copied().map_err(ToString::to_string));
            return result;
        }
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            self.log.say(&self.chain, &e);
        }
    }
}

/// An image as a [`Disk`]. The last of it and of its queues to be dropped closes the image;
/// [`close`](Self::close) does so earlier and says how it went.
pub struct ImageDisk {
    shared: Arc<Shared>,
}

impl ImageDisk {
    /// An image over those it builds on, which come after it, nearest first, and are only read.
    /// `logical_block` is the smallest unit of a request, 512 to 4096.
    pub fn new(
        layers: Vec<Arc<dyn Format>>,
        logical_block: u32,
        blocking: Blocking,
    ) -> Result<Arc<Self>, ImageError> {
        ImageDisk::that_commits(layers, logical_block, blocking, Commits::AtFlush)
    }

    /// As [`new`](Self::new), with a choice of when metadata is written.
    pub fn that_commits(
        layers: Vec<Arc<dyn Format>>,
        logical_block: u32,
        blocking: Blocking,
        commits: Commits,
    ) -> Result<Arc<Self>, ImageError> {
        if !logical_block.is_power_of_two() || !(512..=4096).contains(&logical_block) {
            let why = format!("a logical block of {logical_block} bytes: 512, 1024, 2048 or 4096");
            return Err(ImageError::Invalid(why));
        }
        let chain = Chain::new(layers)?;
        let shared = Shared {
            access: chain.files().first().map_or(Access::ReadOnly, |f| f.access()),
            chain: Arc::new(chain),
            workers: Arc::new(Workers::new(blocking)),
            log: Arc::default(),
            logical: logical_block,
            commits,
            closed: Mutex::new(None),
        };
        Ok(Arc::new(ImageDisk { shared: Arc::new(shared) }))
    }

    /// The format that is written.
    pub fn format(&self) -> &Arc<dyn Format> {
        self.shared.chain.top()
    }

    /// The layers, the written one first.
    pub fn layers(&self) -> impl Iterator<Item = &Arc<dyn Format>> {
        self.shared.chain.layers().iter().map(|l| &l.format)
    }

    /// Flushes and leaves the image as one that was closed properly. All queues are gone.
    pub fn close(&self) -> Result<(), ImageError> {
        self.shared.close()
    }

    /// A queue, with its own type.
    pub fn image_queue(&self, depth: u32) -> io::Result<ImageQueue> {
        ImageQueue::new(Arc::clone(&self.shared), depth.clamp(1, crate::engine::MAX_DEPTH))
    }
}

fn io_error(error: &ImageError) -> io::Error {
    io::Error::other(error.to_string())
}

impl Disk for ImageDisk {
    fn geometry(&self) -> Geometry {
        let (chain, logical) = (&self.shared.chain, self.shared.logical);
        let files = || chain.files().iter().filter_map(|f| f.engine_file());
        let align = files().map(|f| f.memory_align.max(f.length_align)).max().unwrap_or(1);
        let cluster = u32::try_from(chain.top().cluster()).unwrap_or(1 << 21);
        let read_only = self.shared.read_only();
        Geometry {
            size: self.shared.size(),
            logical_block: logical,
            physical_block: logical.max(4096),
            memory_align: align,
            discard: (!read_only).then_some(cluster.max(logical)),
            secure_discard: false,
            read_only,
        }
    }

    fn refresh(&self) -> io::Result<Geometry> {
        self.shared.chain.top().refresh()?;
        Ok(self.geometry())
    }

    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        Ok(Box::new(self.image_queue(depth)?))
    }

    fn close(&self) -> io::Result<()> {
        self.shared.close().map_err(|e| io_error(&e))
    }

    fn image(&self) -> Option<&ImageDisk> {
        Some(self)
    }

    fn map(&self, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        let chain = &self.shared.chain;
        let (mut scratch, mut stretches) = (chain.scratch(), Vec::new());
        // The data are not looked at: a cluster that is freed meanwhile was part of the answer.
        let bytes = loop {
            stretches.clear();
            match chain.resolve(range.clone(), &mut scratch, &mut stretches) {
                Ok(Found::Bytes(bytes)) => break bytes,
                Ok(Found::Miss(m)) => match chain.layers().get(usize::from(m.layer)) {
                    Some(layer) => layer.format.load(m.miss).map_err(|e| io_error(&e))?,
                    None => return Err(io::ErrorKind::InvalidData.into()),
                },
                Err(e) => return Err(io_error(&e)),
            }
        };
        debug_assert!(bytes > 0);
        for stretch in &stretches {
            match stretch.source {
                Source::Zero => join(out, Region { len: stretch.len, kept: Kept::Hole }),
                Source::Compressed { .. } => {
                    join(out, Region { len: stretch.len, kept: Kept::Data });
                }
                Source::Data { file, offset } => {
                    let at = offset..offset + stretch.len;
                    self.map_data(file, at, out)?;
                }
            }
        }
        Ok(())
    }

    fn bitmaps(&self) -> Vec<String> {
        let all = self.shared.chain.top().bitmaps();
        all.into_iter().filter(|b| !b.in_use).map(|b| b.name).collect()
    }

    fn bitmap(&self, name: &str, range: Range<u64>, out: &mut Vec<(u64, bool)>) -> io::Result<()> {
        self.shared.chain.top().bitmap(name, range, out).map_err(|e| io_error(&e))
    }
}

impl ImageDisk {
    /// How a file of the chain keeps a range, as its layer has it.
    fn map_data(&self, file: u16, range: Range<u64>, out: &mut Vec<Region>) -> io::Result<()> {
        let layers = self.shared.chain.layers();
        let layer = layers.iter().rev().find(|l| l.first_file <= file);
        let Some(layer) = layer else { return Err(io::ErrorKind::InvalidData.into()) };
        let mut regions = Vec::new();
        layer.format.map_data(file - layer.first_file, range, &mut regions)?;
        regions.into_iter().for_each(|r| join(out, r));
        Ok(())
    }
}

fn join(out: &mut Vec<Region>, region: Region) {
    match out.last_mut() {
        Some(last) if last.kept == region.kept => last.len += region.len,
        _ => out.push(region),
    }
}
