//! An image format of one's own, as a crate that knows blktap's public face alone.
//!
//! The format: 8 bytes of magic, the disk's size (64 bits, little-endian), a table of 32-bit
//! cluster numbers from byte 4096 on, and clusters of 64 KiB. Number 0 means: not in this image.
//! The table is kept in memory as a whole; a bigger format would answer `Outcome::Miss` and read
//! its parts in `load`.
//!
//! `cargo run -p ringback-blktap --example own_format`
#![allow(clippy::print_stdout)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use blktap::formats::{
    Change, ClusterGuards, Extent, Format, Fresh, Guard, GuardedRange, ImageError, Leases, Miss,
    Outcome, Piece, Place, Target, Waiter,
};
use blktap::storage::Storage;

const MAGIC: &[u8; 8] = b"SPARSE\r\n";
const TABLE: u64 = 4096;
const CLUSTER: u64 = 64 << 10;

/// An open image.
pub struct Sparse {
    files: [Arc<dyn Storage>; 1],
    size: u64,
    table: Vec<AtomicU32>,
    /// The next cluster's number.
    next: AtomicU64,
    guards: ClusterGuards,
    leases: Arc<Leases>,
    unflushed: AtomicBool,
    flushing: parking_lot::Mutex<()>,
}

fn clusters(size: u64) -> u64 {
    size.div_ceil(CLUSTER)
}

impl Sparse {
    /// Makes an empty image of `size` bytes.
    pub fn create(storage: &dyn Storage, size: u64) -> Result<(), ImageError> {
        let mut start = vec![0; (TABLE + clusters(size) * 4).next_multiple_of(CLUSTER) as usize];
        start[..8].copy_from_slice(MAGIC);
        start[8..16].copy_from_slice(&size.to_le_bytes());
        storage.write_at(0, &start).map_err(ImageError::io("write the header"))?;
        storage.sync().map_err(ImageError::io("flush the header"))
    }

    /// Opens an image. What a header says is not believed before it was checked.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Arc<Sparse>, ImageError> {
        let (mut magic, mut size) = ([0; 8], [0; 8]);
        storage.read_at(0, &mut magic).map_err(ImageError::io("read the header"))?;
        storage.read_at(8, &mut size).map_err(ImageError::io("read the header"))?;
        let size = u64::from_le_bytes(size);
        if &magic != MAGIC {
            return Err(ImageError::NotThis("sparse"));
        }
        if size > 1 << 40 || !size.is_multiple_of(512) {
            return Err(ImageError::Corrupt(format!("a disk of {size} bytes")));
        }
        let mut bytes = vec![0; clusters(size) as usize * 4];
        storage.read_at(TABLE, &mut bytes).map_err(ImageError::io("read the table"))?;
        let end = storage.size().map_err(ImageError::io("find the size"))?.div_ceil(CLUSTER);
        let first = (TABLE + bytes.len() as u64).div_ceil(CLUSTER);
        let mut table = Vec::new();
        for entry in bytes.chunks_exact(4) {
            let number = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            if number != 0 && !(first..end).contains(&u64::from(number)) {
                return Err(ImageError::Corrupt(format!("cluster {number} is not in the file")));
            }
            table.push(AtomicU32::new(number));
        }
        Ok(Arc::new(Sparse {
            files: [storage],
            size,
            table,
            next: AtomicU64::new(end.max(first)),
            guards: ClusterGuards::default(),
            leases: Arc::default(),
            unflushed: AtomicBool::new(false),
            flushing: parking_lot::Mutex::new(()),
        }))
    }

    fn number(&self, cluster: u64) -> u64 {
        u64::from(self.table[cluster as usize].load(Ordering::Acquire))
    }
}

/// A guard's number: the guest's cluster in the upper half, the new one in the lower.
fn guard_of(cluster: u64, number: u64) -> Guard {
    Guard(cluster << 32 | number)
}

impl Format for Sparse {
    fn name(&self) -> &'static str {
        "sparse"
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn cluster(&self) -> u64 {
        CLUSTER
    }
    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }
    fn leases(&self) -> &Arc<Leases> {
        &self.leases
    }
    fn resolve_read(
        &self,
        range: Range<u64>,
        out: &mut Vec<Extent>,
    ) -> Result<Outcome<()>, ImageError> {
        let (cluster, skip) = (range.start / CLUSTER, range.start % CLUSTER);
        let place = match self.number(cluster) {
            0 => Place::Absent,
            number => Place::Data { file: 0, offset: number * CLUSTER + skip },
        };
        out.push(Extent { len: (CLUSTER - skip).min(range.end - range.start), place });
        Ok(Outcome::Ready(()))
    }
    fn resolve_write(
        &self,
        range: Range<u64>,
        change: Change,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Outcome<Option<Guard>>, ImageError> {
        let (cluster, skip) = (range.start / CLUSTER, range.start % CLUSTER);
        let len = (CLUSTER - skip).min(range.end - range.start);
        let in_place = |number| Target::InPlace { file: 0, offset: number * CLUSTER + skip };
        if change == Change::Discard {
            out.push(Piece { len, target: Target::Nothing });
            return Ok(Outcome::Ready(None));
        }
        if self.number(cluster) != 0 {
            out.push(Piece { len, target: in_place(self.number(cluster)) });
            return Ok(Outcome::Ready(None));
        }
        let Some(guarded) = self.guards.take(cluster..cluster + 1, waiter) else {
            return Ok(Outcome::Busy);
        };
        // It may have come between the look and the guard.
        if self.number(cluster) != 0 {
            self.guards.release(guarded);
            out.push(Piece { len, target: in_place(self.number(cluster)) });
            return Ok(Outcome::Ready(None));
        }
        drop(guarded);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if number > u64::from(u32::MAX) {
            self.guards.release(GuardedRange::of(cluster..cluster + 1));
            return Err(ImageError::NoSpace("the format has no more cluster numbers".into()));
        }
        let end = (cluster + 1) * CLUSTER;
        let target = Target::New {
            file: 0,
            offset: number * CLUSTER + skip,
            head: skip as u32,
            tail: (end - range.start - len) as u32,
            // Beyond the end of the file, once.
            fresh: Fresh::Zeroes,
        };
        out.push(Piece { len, target });
        Ok(Outcome::Ready(Some(guard_of(cluster, number))))
    }
    fn commit(&self, guard: Guard) {
        let (cluster, number) = (guard.0 >> 32, guard.0 as u32);
        self.table[cluster as usize].store(number, Ordering::Release);
        self.unflushed.store(true, Ordering::SeqCst);
        self.guards.release(GuardedRange::of(cluster..cluster + 1));
    }
    fn abort(&self, guard: Guard) {
        // The new cluster is lost to the file; nothing else is.
        let cluster = guard.0 >> 32;
        self.guards.release(GuardedRange::of(cluster..cluster + 1));
    }
    fn load(&self, _miss: Miss) -> Result<(), ImageError> {
        Ok(())
    }
    fn decompress(&self, _cluster: u64, _out: &mut Vec<u8>) -> Result<(), ImageError> {
        Err(ImageError::Unsupported("compressed clusters".into()))
    }
    fn has_unflushed(&self) -> bool {
        self.unflushed.load(Ordering::SeqCst)
    }
    fn flush(&self) -> Result<(), ImageError> {
        let _one = self.flushing.lock();
        // Only what is in the table now is written below; the data behind it are synced first.
        let table: Vec<u8> =
            self.table.iter().flat_map(|n| n.load(Ordering::Acquire).to_le_bytes()).collect();
        let file = &self.files[0];
        // A cluster of zeroes need not have been written.
        let end = self.next.load(Ordering::Relaxed) * CLUSTER;
        if file.size().map_err(ImageError::io("find the size"))? < end {
            file.set_size(end).map_err(ImageError::io("grow the file"))?;
        }
        file.sync().map_err(ImageError::io("flush the data"))?;
        file.write_at(TABLE, &table).map_err(ImageError::io("write the table"))?;
        file.sync().map_err(ImageError::io("flush the table"))?;
        let same = self.table.iter().zip(table.chunks_exact(4));
        if same.into_iter().all(|(n, b)| n.load(Ordering::Acquire).to_le_bytes() == *b) {
            self.unflushed.store(false, Ordering::SeqCst);
        }
        Ok(())
    }
    fn close(&self) -> Result<(), ImageError> {
        self.flush()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    use blktap::image::{Blocking, ImageDisk};
    use blktap::storage::{OpenOptions, open};
    use blktap::{Disk, blocking};

    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.sparse");
    std::fs::File::create(&path)?;
    let file = Arc::new(open(&OpenOptions::new(&path))?);
    Sparse::create(&*file, 64 << 20)?;

    let disk = ImageDisk::new(vec![Sparse::open(file.clone())?], 512, Blocking::Threads)?;
    let mut queue = disk.queue(32)?;
    blocking::write_at(&mut *queue, 40 << 20, b"hello, ".repeat(512 / 7 + 1)[..512].as_ref())?;
    let mut read = [0; 512];
    blocking::read_at(&mut *queue, 40 << 20, &mut read)?;
    blocking::flush(&mut *queue)?;
    drop(queue);
    disk.close()?;
    println!("{}: {} bytes of file", String::from_utf8_lossy(&read[..5]), file.size()?);
    Ok(())
}
