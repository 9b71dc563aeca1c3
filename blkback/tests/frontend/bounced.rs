//! A disk that refuses the guest's own pages, as the kernel can: requests are done again with
//! copied data, and the guest does not notice.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use blkback::frontend::FrontOptions;
use blktap::{Disk, DiskQueue, Done, Full, Geometry, IoBuf, MemDisk, Op, Request};
use rustix::io::Errno;

use crate::rig::{Rig, answers, memory, pattern, perform, read, same};

/// Which data a disk refuses, and with what.
#[derive(Clone, Copy)]
struct Refusal {
    errno: Errno,
    /// Also data that the backend has copied.
    all: bool,
}

impl Refusal {
    fn refuses(self, buf: &IoBuf) -> bool {
        self.all || !mapping_of(buf.addr() as usize).contains("memfd:ringback-buffer")
    }
}

/// The line of this process's memory map that has an address.
fn mapping_of(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let hex = |text: &str| usize::from_str_radix(text, 16).unwrap();
    let has = |line: &&str| {
        let (first, rest) = line.split_once('-').unwrap();
        (hex(first)..hex(rest.split(' ').next().unwrap())).contains(&address)
    };
    maps.lines().find(has).unwrap().to_owned()
}

struct Refusing(Arc<MemDisk>, Refusal);

struct RefusingQueue {
    queue: Box<dyn DiskQueue>,
    refusal: Refusal,
    refused: Vec<Done>,
}

impl Disk for Refusing {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn refresh(&self) -> io::Result<Geometry> {
        self.0.refresh()
    }
    fn queue(&self, depth: u32) -> io::Result<Box<dyn DiskQueue>> {
        let queue = self.0.queue(depth)?;
        Ok(Box::new(RefusingQueue { queue, refusal: self.1, refused: Vec::new() }))
    }
}

impl DiskQueue for RefusingQueue {
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if request.bufs.iter().any(|buf| self.refusal.refuses(buf)) {
            let errno = self.refusal.errno.raw_os_error();
            self.refused.push(Done { token: request.token, errno });
            return Ok(());
        }
        self.queue.submit(request)
    }
    fn submit_all(&mut self) -> io::Result<()> {
        self.queue.submit_all()
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        done.append(&mut self.refused);
        self.queue.poll(done)
    }
    fn wait(&mut self, fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
        let timeout = if self.refused.is_empty() { timeout } else { Some(Duration::ZERO) };
        self.queue.wait(fds, timeout)
    }
    fn in_flight(&self) -> u32 {
        self.queue.in_flight() + self.refused.len() as u32
    }
}

fn refusing(errno: Errno, all: bool) -> (Rig, Arc<MemDisk>) {
    let disk = memory(10);
    let refusing = Refusing(disk.clone(), Refusal { errno, all });
    (Rig::with_disk(Arc::new(refusing), "", &[]), disk)
}

#[test]
fn what_the_kernel_refuses_of_a_guests_pages_is_copied() {
    for errno in [Errno::NOMEM, Errno::FAULT] {
        let (rig, disk) = refusing(errno, false);
        let front = rig.connect(FrontOptions { max_queues: 1, ..FrontOptions::default() });
        let mut queue = front.queue(32).unwrap();
        for (n, op) in [(0, Op::Write), (1, Op::WriteFua)] {
            for (seed, len) in [(1, 512), (2, 4096), (3, 40960), (4, 262_144)] {
                let (at, mut bytes) = (n << 22 | seed << 19, pattern(len, seed + n));
                assert_eq!(perform(&mut *queue, op, at, &mut bytes, len as u64), 0);
                disk.with_bytes(|disk| same(&disk[at as usize..at as usize + len], &bytes));
                same(&read(&mut *queue, at, len), &bytes);
            }
        }
        // Each was mapped, refused once, and copied: both writes and both reads of each length.
        rig.until_counted("queue-", "bounced", |n| n == 16);
        assert_eq!(rig.counter("queue-", "errors"), 0);
        assert!(rig.counter("queue-", "grants_mapped") > 0);
    }
}

#[test]
fn many_at_once_share_the_memory_for_copies() {
    let (rig, disk) = refusing(Errno::NOMEM, false);
    let options = FrontOptions {
        max_queues: 1,
        max_ring_page_order: 2,
        pool_pages: 4096,
        ..FrontOptions::default()
    };
    let front = rig.connect(options);
    let mut queue = front.queue(64).unwrap();
    // 64 requests of 40 pages are more than a queue's 2048 pages for copies: some wait.
    let len = 160 << 10;
    let mut data: Vec<_> = (0..64).map(|n| pattern(len, n)).collect();
    for (n, bytes) in data.iter_mut().enumerate() {
        // SAFETY: `data` lives until all is answered, below.
        let bufs = [unsafe { IoBuf::new(bytes.as_mut_ptr(), len) }];
        let (offset, token) = ((n * len) as u64, n as u64);
        queue
            .submit(&Request { op: Op::Write, offset, len: len as u64, bufs: &bufs, token })
            .unwrap();
    }
    queue.submit_all().unwrap();
    let done = answers(&mut *queue, 64);
    assert!(done.iter().all(|d| d.errno == 0), "{done:?}");
    disk.with_bytes(|disk| same(disk, &data.concat()));
    rig.until_counted("queue-", "bounced", |n| n >= 20);
}

#[test]
fn copied_data_that_are_refused_too_are_an_error() {
    let (rig, _) = refusing(Errno::NOMEM, true);
    let front = rig.connect(FrontOptions { max_queues: 1, ..FrontOptions::default() });
    let mut queue = front.queue(32).unwrap();
    for op in [Op::Read, Op::Write] {
        assert_ne!(perform(&mut *queue, op, 0, &mut [0; 4096], 4096), 0);
    }
    rig.until_counted("queue-", "errors", |n| n == 2);
    assert_eq!(rig.counter("queue-", "bounced"), 2);
    assert_eq!(perform(&mut *queue, Op::Flush, 0, &mut [], 0), 0);
}

#[test]
fn other_errors_are_the_guests_to_know() {
    let (rig, _) = refusing(Errno::IO, false);
    let front = rig.connect(FrontOptions { max_queues: 1, ..FrontOptions::default() });
    let mut queue = front.queue(32).unwrap();
    assert_ne!(perform(&mut *queue, Op::Read, 0, &mut [0; 4096], 4096), 0);
    rig.until_counted("queue-", "errors", |n| n == 1);
    assert_eq!(rig.counter("queue-", "bounced"), 0);
}
