//! The engine alone: the same reads of the same file by one thread, without guest, ring or grants.
//! What the kernel's copies and the device allow; a backend cannot do more on one processor.
// Gives the queue the addresses of its buffers.
#![allow(unsafe_code)]

use std::io;
use std::path::Path;

use blktap::storage::{Access, Cache, Lock, OpenOptions};
use blktap::{Disk, IoBuf, RawDisk};

use super::blk::Caching;
use super::front::Through;
use super::load::{self, BLOCK, Client, Load, Measured, Op};
use super::usage::Usage;

struct Alone(Through);

impl Client for Alone {
    fn send(&mut self, op: Op, offset: u64, slot: u32) -> io::Result<()> {
        self.0.send(op, offset, slot)
    }
    fn collect(&mut self, answered: &mut Vec<u32>) -> io::Result<()> {
        self.0.collect(answered)
    }
    fn calls(&self) -> Option<u64> {
        None
    }
}

/// One measurement, in this process. Reads only: the file is the backend's.
pub fn measure(path: &Path, cache: Caching, load: Load) -> io::Result<Measured> {
    let cache = if cache.is_direct() { Cache::None } else { Cache::Writeback };
    let options = OpenOptions::new(path).access(Access::ReadOnly).cache(cache).lock(Lock::Off);
    let disk = RawDisk::open(&options).map_err(io::Error::other)?;
    let block = BLOCK as usize;
    let mut memory = vec![0u8; (load.depth as usize + 1) * block];
    let base = memory.as_mut_ptr();
    let skip = base.align_offset(block);
    let buf = |slot: u32| {
        // SAFETY: one of the whole blocks of `memory`, which outlives the queue.
        [unsafe { IoBuf::new(base.add(skip + slot as usize * block), block) }]
    };
    let through = Through::new(disk.queue(load.depth)?, (0..load.depth).map(buf).collect());
    let nobody = || Ok((Usage::default(), None));
    let measured = load::drive(&mut Alone(through), load, &nobody);
    drop(memory);
    measured
}
