//! What is put to the test: an image of some format, and how it is used.
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use blktap::formats::{Change, Format, ImageError};
use blktap::image::{Blocking, ImageDisk};
use blktap::storage::Storage;
use blktap::{Disk, DiskQueue, Op, blocking};

use crate::direct::{Direct, Stop};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    pub corruptions: u64,
    pub leaks: u64,
    /// In words.
    pub why: Vec<String>,
}

/// Whether a check mends what it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mend {
    Nothing,
    All,
}

/// What only some formats can, on an image that nobody has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Special {
    Snapshot(String),
    Apply(String),
    Delete(String),
    /// To so many bytes.
    Resize(u64),
}

/// An open image and those it builds on.
pub type Layers = Vec<Arc<dyn Format>>;

/// A kind of image.
pub trait Case: Sync {
    fn name(&self) -> String;
    /// Sectors of the new disk.
    fn sectors(&self) -> u64;
    /// Sectors of the backing image, of which each holds [`BASE`](crate::history::BASE).
    fn base(&self) -> u64 {
        0
    }
    /// How many files it has.
    fn files(&self) -> usize {
        1
    }
    /// Sectors that are allocated together.
    fn cluster(&self) -> u64;
    /// Makes it, durable.
    fn create(&self, files: &[Arc<dyn Storage>]) -> Result<(), ImageError>;
    /// Opens it as a server would, mending what that mends.
    fn open(&self, files: &[Arc<dyn Storage>]) -> Result<Layers, ImageError>;
    /// Carries out what only some formats can, while nobody has it open; durable in the end.
    fn special(&self, files: &[Arc<dyn Storage>], special: &Special) -> Result<(), ImageError> {
        let _ = files;
        Err(ImageError::Unsupported(format!("{special:?}")))
    }
    /// The names of its snapshots.
    fn snapshots(&self, files: &[Arc<dyn Storage>]) -> Result<Vec<String>, ImageError> {
        let _ = files;
        Ok(Vec::new())
    }
    /// Looks for what is wrong, while nobody has it open.
    fn check(&self, files: &[Arc<dyn Storage>], mend: Mend) -> Result<Health, ImageError> {
        let _ = (files, mend);
        Ok(Health::default())
    }
    /// The format's name for qemu-img, where that reads it.
    fn qemu(&self) -> Option<&'static str> {
        None
    }
    /// Whether a check can mend.
    fn mends(&self) -> bool {
        false
    }
    /// Whether its refcounts are right only once it was mended.
    fn is_lazy(&self) -> bool {
        false
    }
    /// Whether qemu-img can check that format.
    fn checked_by_qemu(&self) -> bool {
        true
    }
    /// Steps that it takes part in.
    fn specials(&self) -> Specials {
        Specials::default()
    }
}

/// Which special steps a case takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Specials {
    pub snapshots: bool,
    /// The most sectors to grow to.
    pub grow: Option<u64>,
    /// Whether it may shrink.
    pub shrinks: bool,
}

/// How requests reach an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through the resolve contract alone.
    Direct,
    /// Through an [`ImageDisk`]'s queue.
    Disk,
}

/// An open image with a way to use it.
pub struct Driver(Used);

enum Used {
    Direct(Direct),
    Disk { queue: RefCell<Box<dyn DiskQueue>>, disk: Arc<ImageDisk> },
}

fn stop(e: std::io::Error) -> Stop {
    Stop::Failed(ImageError::Io { what: "use the disk", source: e })
}

impl Driver {
    pub fn new(layers: Layers, way: Way) -> Result<Self, ImageError> {
        let way = match way {
            Way::Direct => Used::Direct(Direct::new(layers)),
            Way::Disk => {
                let disk = ImageDisk::new(layers, 512, Blocking::Inline)?;
                let queue = disk.queue(4).map_err(ImageError::io("open a queue"))?;
                Used::Disk { queue: RefCell::new(queue), disk }
            }
        };
        Ok(Driver(way))
    }

    fn top(&self) -> Arc<dyn Format> {
        match &self.0 {
            Used::Direct(direct) => Arc::clone(direct.top()),
            Used::Disk { disk, .. } => Arc::clone(disk.format()),
        }
    }

    /// Sectors.
    pub fn size(&self) -> u64 {
        self.top().size() / 512
    }

    pub fn read(&self, sectors: Range<u64>) -> Result<Vec<u8>, ImageError> {
        let mut bytes = vec![0xee; (sectors.end - sectors.start) as usize * 512];
        match &self.0 {
            Used::Direct(direct) => direct.read(sectors.start * 512, &mut bytes)?,
            Used::Disk { queue, .. } => {
                let queue = &mut **queue.borrow_mut();
                let read = blocking::read_at(queue, sectors.start * 512, &mut bytes);
                read.map_err(ImageError::io("read the disk"))?;
            }
        }
        Ok(bytes)
    }

    /// As [`Direct::give_up_after`]; a queue is left alone.
    pub fn give_up_after(&self, steps: Option<u32>) {
        if let Used::Direct(direct) = &self.0 {
            direct.give_up_after(steps);
        }
    }

    pub fn change(&self, sectors: Range<u64>, change: Change, data: &[u8]) -> Result<(), Stop> {
        let range = sectors.start * 512..sectors.end * 512;
        match &self.0 {
            Used::Direct(direct) => direct.change(range, change, data),
            Used::Disk { queue, .. } => {
                let queue = &mut **queue.borrow_mut();
                let len = range.end - range.start;
                match change {
                    Change::Write => blocking::write_at(queue, range.start, data),
                    Change::Zero => blocking::range(queue, Op::WriteZeroes, range.start, len),
                    Change::Discard => blocking::range(queue, Op::Discard, range.start, len),
                }
                .map_err(stop)
            }
        }
    }

    pub fn flush(&self) -> Result<(), ImageError> {
        match &self.0 {
            Used::Direct(direct) => direct.flush(),
            Used::Disk { queue, .. } => {
                blocking::flush(&mut **queue.borrow_mut()).map_err(ImageError::io("flush the disk"))
            }
        }
    }

    pub fn close(self) -> Result<(), ImageError> {
        match self.0 {
            Used::Direct(direct) => direct.top().close(),
            Used::Disk { queue, disk } => {
                drop(queue);
                disk.close()
            }
        }
    }
}
