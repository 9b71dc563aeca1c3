//! `ringback export nbd` and `ringback run --nbd` as processes, with other people's clients.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

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
