//! `ringback export nbd` and `ringback run --nbd` as processes, with other people's clients; and
//! other people's servers as the disks of guests.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use blktap::{Disk, DiskQueue, NbdDisk, NbdOptions, NbdTarget, Op, blocking};
use many::{finish, submit};
use rustix::process::{Pid, Signal, kill_process};

struct Running(Option<Child>);

impl Running {
    /// Starts `ringback` and takes its first line.
    fn start(args: &[&str]) -> (Running, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
        command.args(args).env("RINGBACK_LOG", "warn");
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("ringback");
        let out = child.stdout.take().expect("its output");
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).expect("a line");
        (Running(Some(child)), line.trim().to_owned())
    }
    /// SIGTERM, and a good end.
    fn end(mut self) {
        let mut child = self.0.take().expect("running");
        kill_process(Pid::from_child(&child), Signal::TERM).expect("SIGTERM");
        let status = child.wait().expect("an end");
        assert!(status.success(), "{status}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    output.unwrap_or_else(|e| panic!("{program}: {e}: install it (fio, libnbd-bin, qemu-utils)"))
}

fn well(program: &str, args: &[&str]) {
    let output = run(program, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
}

fn image(folder: &Path, name: &str, size: u64) -> PathBuf {
    let path = folder.join(name);
    std::fs::File::create(&path).expect("a file").set_len(size).expect("its size");
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Bytes that are not all the same.
fn numbers(len: usize) -> Vec<u8> {
    (0..len as u64 / 8).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

const SIZE: usize = 16 << 20;

#[test]
fn an_exported_image_is_written_and_the_command_ends_well() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = image(folder.path(), "disk", SIZE as u64);
    let (socket, source) = (folder.path().join("sock"), folder.path().join("source"));
    std::fs::write(&source, numbers(SIZE)).expect("a file");
    let export = format!("second=raw:{}", text(&image(folder.path(), "other", 4096)));
    let args = ["export", "nbd", "-k", text(&socket), "--export", &export, text(&path)];
    let (server, line) = Running::start(&args);
    assert_eq!(line, format!("listening at {}", text(&socket)));
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    well("nbdcopy", &[text(&source), &uri]);
    well("nbdinfo", &[&format!("nbd+unix:///second?socket={}", text(&socket))]);
    // The image is locked, and the socket taken.
    let locked = run("qemu-io", &["-f", "raw", "-c", "write 0 512", text(&path)]);
    assert!(String::from_utf8_lossy(&locked.stderr).contains("lock"), "{locked:?}");
    let again = run(env!("CARGO_BIN_EXE_ringback"), &args[..4]);
    assert_eq!(again.status.code(), Some(2), "{again:?}");
    let more = image(folder.path(), "more", 4096);
    let again =
        run(env!("CARGO_BIN_EXE_ringback"), &["export", "nbd", "-k", text(&socket), text(&more)]);
    let error = String::from_utf8_lossy(&again.stderr);
    assert!(error.contains("a server is listening there"), "{error}");
    server.end();
    assert!(std::fs::read(&path).expect("the image") == numbers(SIZE));
    assert!(!socket.exists());
}

#[test]
fn clients_work_through_ring_and_backend() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = image(folder.path(), "disk", SIZE as u64);
    let (socket, source) = (folder.path().join("sock"), folder.path().join("source"));
    std::fs::write(&source, numbers(SIZE)).expect("a file");
    let disk = format!("raw:{}", text(&path));
    let args = ["run", "--nbd", text(&socket), "--disk", &disk, "--overwrite"];
    let (server, line) = Running::start(&args);
    assert_eq!(line, format!("nbd+unix:///xvda?socket={}", text(&socket)));
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    let fio = [
        "--name=v",
        "--ioengine=nbd",
        "--rw=randrw",
        "--bs=4k",
        "--size=8M",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ];
    well("fio", &[&fio[..], &[&format!("--uri={uri}")]].concat());
    well("nbdcopy", &[text(&source), &uri]);
    well("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &line]);
    server.end();
    assert!(std::fs::read(&path).expect("the image") == numbers(SIZE));
}

/// Whoever serves the guest's disk.
#[derive(Clone, Copy, Debug)]
enum Server {
    Ringback,
    QemuStorageDaemon,
    Nbdkit,
}

const SERVERS: [Server; 3] = [Server::Ringback, Server::QemuStorageDaemon, Server::Nbdkit];

impl Server {
    /// Serves a raw image.
    fn start(self, path: &Path, socket: &Path) -> Running {
        let _ = std::fs::remove_file(socket);
        let (path, at) = (text(path), text(socket));
        let mut command = match self {
            Server::Ringback => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
                command.args(["export", "nbd", "-k", at, path]).env("RINGBACK_LOG", "warn");
                command
            }
            Server::QemuStorageDaemon => {
                let mut command = Command::new("qemu-storage-daemon");
                let file = format!("file,node-name=disk,filename={path},discard=unmap");
                let server = format!("addr.type=unix,addr.path={at},max-connections=0");
                command.args(["--blockdev", &file, "--nbd-server", &server]);
                command.args(["--export", "nbd,id=e,node-name=disk,name=,writable=on"]);
                command
            }
            Server::Nbdkit => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--exit-with-parent", "--unix", at, "file", path]);
                command
            }
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|e| panic!("{self:?}: {e}: install it"));
        let running = Running(Some(child));
        let end = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(socket).is_err() {
            assert!(Instant::now() < end, "{self:?} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        running
    }
}

/// A guest whose disk is a server's export, and whose own end of the ring is served.
struct Chain {
    folder: tempfile::TempDir,
    image: PathBuf,
    server: Running,
    guest: Running,
    kind: Server,
}

impl Chain {
    fn new(kind: Server) -> Chain {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let image = image(folder.path(), "disk", SIZE as u64);
        let (socket, ring) = (folder.path().join("theirs"), folder.path().join("ring"));
        let server = kind.start(&image, &socket);
        let disk = format!("nbd:unix:{}", text(&socket));
        let args = ["run", "--nbd", text(&ring), "--disk", &disk, "--overwrite"];
        let (guest, line) = Running::start(&args);
        assert!(line.starts_with("nbd+unix:"), "{kind:?}: {line}");
        Chain { folder, image, server, guest, kind }
    }
    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", text(&self.folder.path().join("ring")))
    }
    /// Stops the server; all of its threads have stopped when this returns.
    fn stop(&self) -> Stopped {
        let pid = Pid::from_child(self.server.0.as_ref().expect("running"));
        kill_process(pid, Signal::STOP).expect("SIGSTOP");
        let stopped = Stopped(pid);
        let end = Instant::now() + Duration::from_secs(20);
        while !stopped.has_come() {
            assert!(Instant::now() < end, "{:?} goes on", self.kind);
            std::thread::sleep(Duration::from_millis(1));
        }
        stopped
    }
    /// Kill -9, and another one in its place.
    fn restart(&mut self) {
        let mut child = self.server.0.take().expect("running");
        child.kill().expect("kill -9");
        child.wait().expect("its end");
        self.server = self.kind.start(&self.image, &self.folder.path().join("theirs"));
    }
    /// A client of the guest's.
    fn client(&self) -> Box<dyn DiskQueue> {
        let target = NbdTarget::parse(&self.uri()).expect("a target");
        let disk = NbdDisk::open(NbdOptions::new(target)).expect("a disk");
        disk.queue(32).expect("a queue")
    }
}

/// A server that has been stopped. A test that fails must not wait for it for ever.
struct Stopped(Pid);

impl Stopped {
    fn has_come(&self) -> bool {
        let tasks = format!("/proc/{}/task", self.0.as_raw_nonzero());
        let mut tasks = std::fs::read_dir(tasks).expect("a process").flatten();
        tasks.all(|task| {
            // The state comes after the name, which is in brackets.
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
        })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = kill_process(self.0, Signal::CONT);
        }
    }
}

#[test]
fn servers_are_disks_of_guests() {
    for kind in SERVERS {
        let chain = Chain::new(kind);
        let source = chain.folder.path().join("source");
        std::fs::write(&source, numbers(SIZE)).expect("a file");
        let fio = [
            "--name=v",
            "--ioengine=nbd",
            "--rw=randrw",
            "--bsrange=4k-128k",
            "--size=16M",
            "--iodepth=32",
            "--fsync=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ];
        well("fio", &[&fio[..], &[&format!("--uri={}", chain.uri())]].concat());
        well("nbdcopy", &["--flush", text(&source), &chain.uri()]);
        let uri = chain.uri();
        well("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &uri]);
        chain.guest.end();
        assert!(std::fs::read(&chain.image).expect("the image") == numbers(SIZE), "{kind:?}");
        // The run's own guest, whose every block is verified, in the server's image as well.
        let disk = format!("nbd:unix:{}", text(&chain.folder.path().join("theirs")));
        let said = run(env!("CARGO_BIN_EXE_ringback"), &["run", "--overwrite", "--disk", &disk]);
        assert!(said.status.success(), "{kind:?}: {said:?}");
        // An overlay cannot build on it.
        let said = run(env!("CARGO_BIN_EXE_ringback"), &["run", "--disk", &disk]);
        let error = String::from_utf8_lossy(&said.stderr);
        assert!(!said.status.success() && error.contains("--overwrite"), "{error}");
    }
}

const BLOCK: usize = 65536;
/// Requests that are in flight when the server is killed.
const HELD: usize = 24;

/// Many requests at once.
mod many {
    // A request names its memory by address.
    #![allow(unsafe_code)]

    use blktap::{DiskQueue, Done, IoBuf, Op, Request};

    use super::BLOCK;

    /// Submits a request for each block of memory. The blocks must outlive the queue.
    pub fn submit(queue: &mut dyn DiskQueue, op: Op, blocks: &mut [Vec<u8>], from: usize) {
        for (n, block) in blocks.iter_mut().enumerate() {
            // SAFETY: the caller declares the blocks before the queue, and so keeps them longer.
            let bufs = [unsafe { IoBuf::new(block.as_mut_ptr(), block.len()) }];
            let (offset, token) = (((from + n) * BLOCK) as u64, n as u64);
            let request = Request { op, offset, len: BLOCK as u64, bufs: &bufs, token };
            queue.submit(&request).expect("room");
        }
        queue.submit_all().expect("sent");
    }

    pub fn finish(queue: &mut dyn DiskQueue, n: usize) -> Vec<Done> {
        let mut done = Vec::new();
        while done.len() < n {
            queue.wait(&[], None).expect("wait");
            queue.poll(&mut done).expect("poll");
        }
        done
    }
}

/// The server is stopped, so that what the guest sends stays in flight; then it is killed.
#[test]
fn what_is_in_flight_when_a_server_is_killed_is_carried_out() {
    for kind in SERVERS {
        let mut chain = Chain::new(kind);
        // Dropped after the queue, whatever happens.
        let mut blocks = vec![vec![0; BLOCK]; HELD];
        let mut queue = chain.client();
        let mut wanted = vec![0; SIZE];
        for round in 0..5usize {
            let from = round * HELD / 2;
            let numbers = numbers(HELD * BLOCK + 8 * round);
            let pieces = numbers[8 * round..].chunks(BLOCK);
            blocks.iter_mut().zip(pieces).for_each(|(block, piece)| block.copy_from_slice(piece));
            wanted[from * BLOCK..][..HELD * BLOCK].copy_from_slice(&numbers[8 * round..]);
            let stopped = chain.stop();
            submit(&mut *queue, Op::Write, &mut blocks, from);
            // So that they come as far as they can.
            let mut done = Vec::new();
            let end = Instant::now() + Duration::from_millis(50);
            while Instant::now() < end {
                queue.wait(&[], Some(Duration::from_millis(10))).expect("wait");
                queue.poll(&mut done).expect("poll");
            }
            assert_eq!(done, [], "{kind:?}: a server that is stopped has answered");
            chain.restart();
            drop(stopped);
            let done = finish(&mut *queue, HELD);
            assert!(done.iter().all(|d| d.errno == 0), "{kind:?}, round {round}: {done:?}");
            blocking::flush(&mut *queue).expect("nothing is lost");
            let file = std::fs::File::open(&chain.image).expect("the image");
            let mut bytes = vec![0; SIZE];
            file.read_exact_at(&mut bytes, 0).expect("its bytes");
            assert!(bytes == wanted, "{kind:?}, round {round}: a write is not in the image");
            // Reads that are in flight as well.
            let stopped = chain.stop();
            blocks.iter_mut().for_each(|block| block.fill(0));
            submit(&mut *queue, Op::Read, &mut blocks, from);
            chain.restart();
            drop(stopped);
            let done = finish(&mut *queue, HELD);
            assert!(done.iter().all(|d| d.errno == 0), "{kind:?}, round {round}: {done:?}");
            assert!(blocks.concat() == wanted[from * BLOCK..][..HELD * BLOCK], "{kind:?}");
        }
        drop(queue);
        chain.guest.end();
    }
}

/// What was answered and not flushed may have gone with the server: the guest hears of it.
#[test]
fn what_a_killed_server_may_have_lost_is_told() {
    let mut chain = Chain::new(Server::QemuStorageDaemon);
    let mut queue = chain.client();
    blocking::write_at(&mut *queue, 0, &[1; BLOCK]).expect("a write");
    blocking::flush(&mut *queue).expect("a flush");
    chain.restart();
    blocking::flush(&mut *queue).expect("all was flushed");
    blocking::write_at(&mut *queue, 0, &[2; BLOCK]).expect("a write");
    chain.restart();
    let error = blocking::flush(&mut *queue).expect_err("a write may be lost");
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
}
