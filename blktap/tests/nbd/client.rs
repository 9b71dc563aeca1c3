//! Our client on other people's servers, and on ours; servers that die under it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blktap::{
    Disk, DiskQueue, Kept, MemDisk, NbdDisk, NbdOptions, NbdTarget, Op, Request, blocking,
};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

use super::rig::{Ours, Theirs, nbdkit, patchy, qemu, raw, until};
use super::support::model::{self, SIZE};
use super::support::{Memory, finish, folder, image, pattern, perform, request};

fn target(socket: &Path) -> NbdTarget {
    NbdTarget::parse(&format!("nbd:unix:{}", socket.display())).expect("a target")
}

fn open(socket: &Path) -> Arc<NbdDisk> {
    NbdDisk::open(NbdOptions::new(target(socket))).expect("a disk")
}

/// Random requests on the disk are the same on a model.
fn is_the_model(socket: &Path) {
    let mut runner = TestRunner::deterministic();
    for _ in 0..16 {
        let steps = model::steps(512).new_tree(&mut runner).expect("steps").current();
        let disk = open(socket);
        assert_eq!(disk.geometry().size, SIZE);
        let mut queue = disk.queue(8).expect("a queue");
        blocking::range(&mut *queue, Op::WriteZeroes, 0, SIZE).expect("zeroes");
        model::run(&mut *queue, 512, &steps);
    }
}

#[test]
fn ours_is_the_model() {
    let folder = folder();
    let ours = Ours::disk(folder.path(), MemDisk::new(SIZE as usize));
    is_the_model(&ours.socket);
    ours.end();
}

#[test]
fn qemus_is_the_model() {
    let folder = folder();
    let socket = folder.path().join("qemu.sock");
    let _qemu = qemu(&image(&folder, "disk", SIZE), &socket);
    is_the_model(&socket);
}

#[test]
fn nbdkits_is_the_model() {
    let folder = folder();
    let socket = folder.path().join("nbdkit.sock");
    let _nbdkit = nbdkit(&image(&folder, "disk", SIZE), &socket);
    is_the_model(&socket);
}

#[test]
fn requests_larger_than_the_servers_largest_go_in_pieces() {
    let folder = folder();
    let ours = Ours::disk(folder.path(), MemDisk::new(80 << 20));
    let disk = open(&ours.socket);
    let mut queue = disk.queue(4).expect("a queue");
    let data = pattern(3, 70 << 20);
    blocking::write_at(&mut *queue, 4096, &data).expect("a write");
    let mut back = vec![0; data.len()];
    blocking::read_at(&mut *queue, 4096, &mut back).expect("a read");
    assert!(back == data);
    drop((queue, disk));
    ours.end();
}

#[test]
fn holes_are_seen_through_it() {
    let folder = folder();
    let path = folder.path().join("disk");
    patchy(&path, 8 << 20);
    let socket = folder.path().join("qemu.sock");
    let theirs = qemu(&path, &socket);
    let map = |socket: &Path| {
        let (disk, mut regions) = (open(socket), Vec::new());
        disk.map(0..8 << 20, &mut regions).expect("a map");
        regions.iter().map(|r| (r.len, r.kept)).collect::<Vec<_>>()
    };
    let qemus = map(&socket);
    assert_eq!(qemus[..2], [(4096, Kept::Data), ((1 << 20) - 4096, Kept::Hole)]);
    theirs.kill();
    let ours = Ours::disk(folder.path(), raw(&path));
    assert_eq!(map(&ours.socket), qemus);
    ours.end();
}

/// Stamps of cells that were written by FUA, kept up by a thread until told to end.
struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Vec<u64>>,
}

const CELL: u64 = 4096;
const CELLS: u64 = SIZE / CELL;

impl Load {
    fn start(disk: &Arc<NbdDisk>) -> Load {
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let mut queue = disk.queue(16).expect("a queue");
        let (told, counted) = (stop.clone(), rounds.clone());
        let run = move || {
            let mut stamps = vec![0u64; CELLS as usize];
            let mut serial = 0;
            while !told.load(Ordering::Relaxed) {
                // Sixteen cells at once, of which each is verified a round later.
                let first = serial * 16 % CELLS;
                let mut memory: Vec<Memory> = Vec::new();
                for n in first..first + 16 {
                    memory.push(Memory::new(CELL as usize, 0));
                    let m = memory.last_mut().expect("pushed");
                    let bufs = [m.buf()];
                    queue.submit(&request(Op::Read, n * CELL, &bufs, n)).expect("room");
                }
                finish_all(&mut *queue, 16);
                for (n, m) in (first..).zip(&memory) {
                    let stamp = stamps[n as usize];
                    let right = if stamp == 0 { vec![0; CELL as usize] } else { cell(n, stamp) };
                    assert!(m.slice() == right, "cell {n} is not what was written");
                }
                serial += 1;
                for (n, m) in (first..).zip(&mut memory) {
                    m.slice_mut().copy_from_slice(&cell(n, serial));
                    let bufs = [m.buf()];
                    queue.submit(&request(Op::WriteFua, n * CELL, &bufs, n)).expect("room");
                    stamps[n as usize] = serial;
                }
                finish_all(&mut *queue, 16);
                blocking::flush(&mut *queue).expect("nothing is lost: all was forced");
                counted.fetch_add(1, Ordering::Relaxed);
            }
            stamps
        };
        Load { stop, rounds, thread: std::thread::spawn(run) }
    }

    fn wait_for(&self, more: u64) {
        let aim = self.rounds.load(Ordering::Relaxed) + more;
        until("rounds of the load", || {
            self.rounds.load(Ordering::Relaxed) >= aim || self.thread.is_finished()
        });
        assert!(!self.thread.is_finished(), "the load has ended early");
    }

    fn end(self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("all was verified")
    }
}

fn cell(number: u64, stamp: u64) -> Vec<u8> {
    pattern(number << 32 | stamp, CELL as usize)
}

fn finish_all(queue: &mut dyn DiskQueue, n: usize) {
    let done = finish(queue, n);
    assert!(done.iter().all(|d| d.errno == 0), "{done:?}");
}

/// Kills and restarts a server under I/O, again and again, and compares the file at the end.
fn survives(start: impl Fn(&Path, &Path) -> Theirs) {
    let folder = folder();
    let (path, socket) = (image(&folder, "disk", SIZE), folder.path().join("their.sock"));
    let mut server = start(&path, &socket);
    let disk = open(&socket);
    let load = Load::start(&disk);
    for round in 0..5u64 {
        load.wait_for(3);
        std::thread::sleep(Duration::from_micros(700 * round));
        server.kill();
        std::thread::sleep(Duration::from_millis(30));
        server = start(&path, &socket);
    }
    load.wait_for(3);
    let stamps = load.end();
    drop(disk);
    server.kill();
    let bytes = std::fs::read(&path).expect("the image");
    for (n, stamp) in stamps.iter().enumerate().filter(|(_, stamp)| **stamp > 0) {
        let found = &bytes[n * CELL as usize..(n + 1) * CELL as usize];
        assert!(found == cell(n as u64, *stamp), "cell {n} of the image");
    }
}

#[test]
fn qemu_is_killed_and_restarted_under_load() {
    survives(qemu);
}

#[test]
fn nbdkit_is_killed_and_restarted_under_load() {
    survives(nbdkit);
}

#[test]
fn a_restart_with_unflushed_writes_fails_all_flushes_and_no_write() {
    let folder = folder();
    let (path, socket) = (image(&folder, "disk", SIZE), folder.path().join("qemu.sock"));
    let server = qemu(&path, &socket);
    let disk = open(&socket);
    let mut queues = [0, 1].map(|_| disk.queue(4).expect("a queue"));
    for q in &mut queues {
        blocking::write_at(&mut **q, 0, &[1; 512]).expect("a write");
        blocking::flush(&mut **q).expect("nothing is lost");
    }
    // All flushed: a restart is not noticed.
    server.kill();
    let server = qemu(&path, &socket);
    for q in &mut queues {
        blocking::flush(&mut **q).expect("nothing is lost yet");
    }
    blocking::write_at(&mut *queues[0], 0, &[2; 512]).expect("a write");
    server.kill();
    let _server = qemu(&path, &socket);
    // The other queue's flush would cover it.
    for round in 0..2 {
        for q in queues.iter_mut().rev() {
            let error = blocking::flush(&mut **q).expect_err("a write may be lost");
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "round {round}");
            blocking::write_at(&mut **q, 512, &[3; 512]).expect("writes go on");
        }
    }
}

#[test]
fn who_waits_for_too_long_is_told() {
    let folder = folder();
    let (path, socket) = (image(&folder, "disk", SIZE), folder.path().join("qemu.sock"));
    let server = qemu(&path, &socket);
    let patience = Duration::from_secs(1);
    let options = NbdOptions { patience, ..NbdOptions::new(target(&socket)) };
    let disk = NbdDisk::open(options).expect("a disk");
    let mut queue = disk.queue(4).expect("a queue");
    let mut memory = Memory::new(512, 0);
    let bufs = [memory.buf()];
    let read = request(Op::Read, 0, &bufs, 1);
    assert_eq!(perform(&mut *queue, &read), 0);
    server.kill();
    let start = Instant::now();
    assert_eq!(perform(&mut *queue, &read), libc::EIO);
    assert!(start.elapsed() >= patience, "{:?}", start.elapsed());
    let start = Instant::now();
    assert_eq!(perform(&mut *queue, &read), libc::EIO);
    assert!(start.elapsed() < patience, "it waits again: {:?}", start.elapsed());
    let _server = qemu(&path, &socket);
    until("the server's return", || perform(&mut *queue, &read) == 0);
}

#[test]
fn one_queue_where_connections_do_not_see_each_other() {
    let folder = folder();
    let mut export = blktap::export::nbd::Export::new("", MemDisk::new(4096) as Arc<dyn Disk>);
    export.clients = blktap::export::nbd::Clients::One;
    let ours = Ours::start(folder.path(), vec![export]);
    let disk = open(&ours.socket);
    let queue = disk.queue(1).expect("a queue");
    let error = disk.queue(1).err().expect("no second one");
    assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy, "{error}");
    drop(queue);
    let mut queue = disk.queue(1).expect("it is free again");
    let whole = Request { op: Op::Discard, offset: 0, len: 4096, bufs: &[], token: 0 };
    assert_eq!(perform(&mut *queue, &whole), 0);
    drop((queue, disk));
    ours.end();
}

#[test]
fn a_lying_server_is_left() {
    use std::io::{Read, Write};
    let folder = folder();
    for lie in [
        &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
        b"NBDMAGIC",
        &[0; 40],
        b"NBDMAGICIHAVEOPT\0\x03\0\0",
    ] {
        let path = folder.path().join("liar.sock");
        let _ = std::fs::remove_file(&path);
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        let liar = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = stream.write_all(lie);
            let _ = stream.read(&mut [0; 64]);
            let _ = stream.write_all(&[0xff; 64]);
        });
        let options =
            NbdOptions { handshake: Duration::from_secs(1), ..NbdOptions::new(target(&path)) };
        let error = NbdDisk::open(options).err().expect("no disk");
        assert!(!error.to_string().is_empty());
        liar.join().expect("no panic");
    }
}
