//! What the tests of disks share: memory with odd addresses, one request at a time, folders on
//! a real file system.
#![allow(dead_code, unreachable_pub, unsafe_code)]

pub mod model;

use std::fs::File;
use std::path::{Path, PathBuf};

use blktap::{DiskQueue, Done, IoBuf, Op, Request};
use tempfile::TempDir;

/// A folder on the file system that the build uses (one with direct I/O; /tmp may be tmpfs).
pub fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

/// A sparse file of `len` bytes.
pub fn image(folder: &TempDir, name: &str, len: u64) -> PathBuf {
    let path = folder.path().join(name);
    File::create(&path).expect("a file").set_len(len).expect("its size");
    path
}

/// Blocks of 512 bytes that a file occupies.
pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).expect("stat").blocks()
}

/// Memory with a chosen alignment.
pub struct Memory {
    bytes: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Memory {
    /// `len` bytes at an address that is `odd` past a multiple of 4096.
    pub fn new(len: usize, odd: usize) -> Self {
        let bytes = vec![0u8; len + 8192];
        let skip = bytes.as_ptr().align_offset(4096) + odd;
        Memory { bytes, skip, len }
    }
    pub fn of(data: &[u8], odd: usize) -> Self {
        let mut m = Memory::new(data.len(), odd);
        m.slice_mut().copy_from_slice(data);
        m
    }
    pub fn slice(&self) -> &[u8] {
        &self.bytes[self.skip..self.skip + self.len]
    }
    pub fn slice_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + self.len]
    }
    /// The whole as one piece.
    pub fn buf(&mut self) -> IoBuf {
        self.bufs(&[self.len])[0]
    }
    /// Cut into pieces of the given lengths.
    pub fn bufs(&mut self, lens: &[usize]) -> Vec<IoBuf> {
        let mut at = self.slice_mut().as_mut_ptr();
        assert!(lens.iter().sum::<usize>() <= self.len);
        let mut bufs = Vec::new();
        for len in lens {
            // SAFETY: inside the vector, which tests keep until the request is done.
            unsafe {
                bufs.push(IoBuf::new(at, *len));
                at = at.add(*len);
            }
        }
        bufs
    }
}

/// Memory in pieces that are not neighbours, so that nothing is joined.
pub struct Scattered {
    memory: Memory,
    lens: Vec<usize>,
}

impl Scattered {
    /// Pieces of the given lengths, 512 bytes between them, the first `odd` past a page.
    pub fn new(lens: &[usize], odd: usize) -> Self {
        let len = lens.iter().map(|n| n + 512).sum();
        Scattered { memory: Memory::new(len, odd), lens: lens.to_vec() }
    }
    pub fn set(&mut self, mut data: &[u8]) {
        let mut rest = self.memory.slice_mut();
        for len in &self.lens {
            let (here, after) = rest.split_at_mut(len + 512);
            let (mine, others) = data.split_at(*len);
            here[..*len].copy_from_slice(mine);
            (rest, data) = (after, others);
        }
    }
    /// The pieces' bytes; nothing between them was touched.
    pub fn get(&self) -> Vec<u8> {
        let (mut all, mut rest) = (Vec::new(), self.memory.slice());
        for len in &self.lens {
            let (here, after) = rest.split_at(len + 512);
            all.extend_from_slice(&here[..*len]);
            assert!(here[*len..].iter().all(|b| *b == 0), "written past a piece");
            rest = after;
        }
        all
    }
    pub fn bufs(&mut self) -> Vec<IoBuf> {
        let all: Vec<_> = self.lens.iter().flat_map(|n| [*n, 512]).collect();
        self.memory.bufs(&all).into_iter().step_by(2).collect()
    }
}

pub fn request(op: Op, offset: u64, bufs: &[IoBuf], token: u64) -> Request<'_> {
    Request { op, offset, len: bufs.iter().map(|b| b.len() as u64).sum(), bufs, token }
}

/// Waits for `n` answers.
pub fn finish(queue: &mut dyn DiskQueue, n: usize) -> Vec<Done> {
    let mut done = Vec::new();
    loop {
        queue.poll(&mut done).expect("poll");
        if done.len() >= n {
            return done;
        }
        queue.wait(&[], None).expect("wait");
    }
}

/// Carries out one request: its errno.
pub fn perform(queue: &mut dyn DiskQueue, r: &Request<'_>) -> i32 {
    queue.submit(r).expect("room");
    let done = finish(queue, 1);
    assert_eq!((done.len(), done[0].token), (1, r.token));
    done[0].errno
}

/// Bytes that differ from place to place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}
