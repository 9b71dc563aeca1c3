//! Servers, ours and others', that end with the test.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blktap::Disk;
use blktap::RawDisk;
use blktap::export::nbd::{Export, Limits, Server};
use blktap::storage::{Cache, OpenOptions};

/// How long anything may take to be there.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `is` says so.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A raw disk through the page cache.
pub fn raw(path: &Path) -> Arc<RawDisk> {
    RawDisk::open(&OpenOptions::new(path).cache(Cache::Writeback)).expect("an image")
}

/// Our server, in threads of this process.
pub struct Ours {
    pub socket: PathBuf,
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Ours {
    pub fn start(folder: &Path, exports: Vec<Export>) -> Ours {
        let server = Server::new(exports, None, Limits::default()).expect("a server");
        Ours::run(folder, server)
    }
    pub fn disk(folder: &Path, disk: Arc<dyn Disk>) -> Ours {
        Ours::start(folder, vec![Export::new("", disk)])
    }
    pub fn run(folder: &Path, mut server: Server) -> Ours {
        let socket = folder.join("ours.sock");
        server.listen_unix(&socket).expect("a socket");
        Ours::serve(socket, server)
    }
    pub fn serve(socket: PathBuf, server: Server) -> Ours {
        let (end, hold) = rustix::pipe::pipe().expect("a pipe");
        let thread = std::thread::spawn(move || server.serve(end.as_fd()));
        Ours { socket, stop: Some(hold), thread: Some(thread) }
    }
    pub fn uri(&self) -> String {
        self.named("")
    }
    pub fn named(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }
    /// Ends it in peace.
    pub fn end(mut self) {
        self.stop = None;
        let thread = self.thread.take().expect("running");
        thread.join().expect("no panic").expect("a good end");
        assert!(!self.socket.exists(), "the socket is left");
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Another's server.
pub struct Theirs(pub Child);

impl Theirs {
    pub fn start(command: &mut Command, socket: &Path) -> Theirs {
        let child = command.stdin(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|e| panic!("{:?}: {e}", command.get_program()));
        let theirs = Theirs(child);
        until("a server's socket", || std::os::unix::net::UnixStream::connect(socket).is_ok());
        theirs
    }
    /// Kill -9, and gone when this returns.
    pub fn kill(mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("wait");
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// qemu-storage-daemon with one file under the empty name.
pub fn qemu(file: &Path, socket: &Path) -> Theirs {
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new("qemu-storage-daemon");
    command
        .arg("--blockdev")
        .arg(format!("file,node-name=disk,filename={},discard=unmap,locking=off", file.display()));
    command
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={},max-connections=0", socket.display()));
    command.args(["--export", "nbd,id=export,node-name=disk,name=,writable=on"]);
    Theirs::start(&mut command, socket)
}

/// nbdkit with its file plugin.
pub fn nbdkit(file: &Path, socket: &Path) -> Theirs {
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(socket);
    command.arg("file").arg(file);
    Theirs::start(&mut command, socket)
}

/// Runs a program to its end, which is not before `PATIENCE`'s.
pub fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    output.unwrap_or_else(|e| panic!("{program}: {e}: install it (fio, libnbd-bin, qemu-utils)"))
}

/// As [`run`], and it must go well: what it has said.
pub fn well(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}{error}", output.status);
    text
}

/// A file of `len` bytes with data here and there.
pub fn patchy(path: &Path, len: u64) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut file = File::create(path).expect("a file");
    file.set_len(len).expect("its size");
    for (at, n) in [(0, 4096), (1 << 20, 300_000), (len - 8192, 8192)] {
        file.write_all_at(&super::support::pattern(at + 1, n), at).expect("data");
    }
    file.flush().expect("flush");
    std::fs::read(path).expect("the bytes")
}
