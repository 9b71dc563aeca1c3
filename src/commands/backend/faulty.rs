//! Disks that go wrong on purpose, to test what verifies them with:
//! `RINGBACK_TEST_FAULT=flip|lose|fail|drop-flushes|cut`. The last two put a volatile cache
//! before the image, whose content is lost at the end but for what was flushed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use blkback::{Open, Wanted, open_target, opener};
use blktap::faults::{Fault, FaultDisk};
use blktap::image::BackingPolicy;
use blktap::{Disk, DiskQueue, Geometry, MemDisk, Op, Volatility};

/// The requests that are struck. Several: what one has done may be written over before it is seen.
const NTH: [u64; 5] = [5, 7, 11, 13, 17];

/// How a backend opens its disks.
pub fn open(backing: BackingPolicy) -> Arc<Open> {
    let Ok(fault) = std::env::var("RINGBACK_TEST_FAULT") else { return opener(backing) };
    Arc::new(move |wanted: &Wanted| {
        let struck = |fault: fn(u64) -> Fault| -> Result<Arc<dyn Disk>, _> {
            Ok(FaultDisk::new(open_target(wanted, &backing)?, &NTH.map(fault)))
        };
        match fault.as_str() {
            "flip" => struck(|nth| Fault::FlipByte { nth, at: 4097 }),
            "lose" => struck(|nth| Fault::LoseWrite { nth }),
            "fail" => struck(|nth| Fault::Fail { op: Op::Write, nth, errno: 28 }),
            "drop-flushes" => Ok(FaultDisk::new(Volatile::open(wanted)?, &[Fault::DropFlushes])),
            "cut" => Ok(Volatile::open(wanted)?),
            other => panic!("RINGBACK_TEST_FAULT={other}: there is no such fault"),
        }
    })
}

/// A small image behind a cache in memory; the power is cut when it is closed.
struct Volatile {
    cache: Arc<MemDisk>,
    path: PathBuf,
}

impl Volatile {
    fn open(wanted: &Wanted) -> io::Result<Arc<Volatile>> {
        let path = PathBuf::from(wanted.params.trim_start_matches("raw:"));
        let bytes = std::fs::read(&path)?;
        let cache = MemDisk::with(bytes.len(), Volatility::Cached);
        Ok(Arc::new(Volatile { cache, path }))
    }
}

impl Disk for Volatile {
    fn geometry(&self) -> Geometry {
        self.cache.geometry()
    }
    fn refresh(&self) -> io::Result<Geometry> {
        self.cache.refresh()
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        self.cache.queue(depth)
    }
}

impl Drop for Volatile {
    fn drop(&mut self) {
        self.cache.power_cut();
        let written = File::options()
            .write(true)
            .open(&self.path)
            .and_then(|file| self.cache.with_bytes(|bytes| file.write_all_at(bytes, 0)));
        if let Err(e) = written {
            tracing::error!("{}: {e}", self.path.display());
        }
    }
}
