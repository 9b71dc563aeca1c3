//! The disks of running guests under `ringback disk ... --live`, while fio verifies what it
//! writes through ring and backend.

mod full;
mod jobs;
mod targets;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const RINGBACK: &str = env!("CARGO_BIN_EXE_ringback");
/// Bytes of a disk.
const SIZE: u64 = 64 << 20;

/// Runs a program, which must be there.
fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    output.unwrap_or_else(|e| panic!("{program}: {e}: install it (fio, qemu-utils)"))
}

/// Runs a program, which must succeed; what it has said.
fn well(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A guest whose end of the ring is served by NBD.
struct Guest {
    folder: tempfile::TempDir,
    child: Option<Child>,
    run_dir: PathBuf,
}

impl Guest {
    /// With a disk, from xvda on, of each of these images, which are made in its folder before.
    fn start(folder: tempfile::TempDir, disks: &[&str]) -> Guest {
        let mut settings = String::new();
        for (disk, letter) in disks.iter().zip('a'..) {
            let (format, name) = disk.split_once(':').expect("FORMAT:NAME");
            let path = folder.path().join(name);
            let target = format!("{format}:{}", text(&path));
            settings += &format!("[[disk]]\nvdev = \"xvd{letter}\"\ntarget = \"{target}\"\n");
        }
        let file = folder.path().join("guest.toml");
        std::fs::write(&file, settings).expect("a file");
        let mut command = Command::new(RINGBACK);
        // Where its run folder is made.
        command.env("TMPDIR", folder.path()).env("RINGBACK_LOG", "warn");
        command.args(["run", "--overwrite", "--nbd"]).arg(folder.path().join("ring")).arg(file);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("ringback");
        let out = child.stdout.take().expect("its output");
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).expect("a line");
        assert!(line.starts_with("nbd+unix:"), "{line}");
        let mut guest = Guest { folder, child: Some(child), run_dir: PathBuf::new() };
        guest.run_dir = guest.find_run_dir();
        guest
    }

    fn find_run_dir(&self) -> PathBuf {
        let entries = std::fs::read_dir(self.folder.path()).expect("the folder");
        let run = entries.flatten().map(|e| e.path().join("run")).find(|run| run.is_dir());
        run.expect("a run folder")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
    fn uri(&self, vdev: &str) -> String {
        format!("nbd+unix:///{vdev}?socket={}", text(&self.path("ring")))
    }
    /// `ringback disk ARGS` in the folder.
    fn disk(&self, args: &[&str]) -> Output {
        let mut command = Command::new(RINGBACK);
        command.current_dir(self.folder.path()).arg("--run-dir").arg(&self.run_dir);
        command.arg("disk").args(args).env("RINGBACK_LOG", "warn").stdin(Stdio::null());
        command.output().expect("ringback")
    }
    /// The same, which must succeed.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.disk(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
    /// The same, which must fail; what it says.
    fn refused(&self, args: &[&str]) -> String {
        let output = self.disk(args);
        assert!(!output.status.success(), "{args:?} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
    fn job(&self, device: &str) -> serde_json::Value {
        let said = self.ok(&["job", "--live", device, "--json"]);
        serde_json::from_str::<serde_json::Value>(&said).expect("JSON")["job"].clone()
    }
    /// fio that writes and verifies for some seconds.
    fn fio(&self, vdev: &str, seconds: u32, seed: u32) -> Fio {
        let job = [
            "--name=v".to_owned(),
            "--ioengine=nbd".to_owned(),
            format!("--uri={}", self.uri(vdev)),
            "--rw=randrw".to_owned(),
            "--bsrange=4k-128k".to_owned(),
            "--blockalign=4k".to_owned(),
            format!("--size={SIZE}"),
            "--iodepth=32".to_owned(),
            "--verify=crc32c".to_owned(),
            "--verify_fatal=1".to_owned(),
            "--verify_state_save=0".to_owned(),
            "--verify_backlog=256".to_owned(),
            "--fsync=64".to_owned(),
            "--time_based".to_owned(),
            format!("--runtime={seconds}"),
            format!("--randseed={seed}"),
        ];
        let mut command = Command::new("fio");
        command.current_dir(self.folder.path()).args(job);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|e| panic!("fio: {e}: install it"));
        // So that it is at work when this returns.
        std::thread::sleep(Duration::from_millis(700));
        Fio { child: Some(child) }
    }
    /// What the guest reads now, in a file of the folder.
    fn copy(&self, vdev: &str, name: &str) -> PathBuf {
        let path = self.path(name);
        let args = ["convert", "-f", "raw", "-O", "raw", &self.uri(vdev), text(&path)];
        well("qemu-img", &args);
        path
    }
    /// SIGTERM, and a good end; the folder.
    fn end(mut self) -> tempfile::TempDir {
        let mut child = self.child.take().expect("running");
        kill_process(Pid::from_child(&child), Signal::TERM).expect("SIGTERM");
        let begun = Instant::now();
        let status = child.wait().expect("an end");
        assert!(status.success(), "{status}");
        assert!(begun.elapsed() < Duration::from_secs(15), "it took {:?} to end", begun.elapsed());
        std::mem::replace(&mut self.folder, folder())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A client that verifies.
struct Fio {
    child: Option<Child>,
}

impl Fio {
    /// Waits for its end: it has found what it wrote.
    fn well(mut self) {
        let output = self.child.take().expect("running").wait_with_output().expect("an end");
        let said = String::from_utf8_lossy(&output.stdout);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "fio: {said} {error}");
    }
    fn runs(&mut self) -> bool {
        self.child.as_mut().is_some_and(|c| c.try_wait().expect("its state").is_none())
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

/// An image in a folder.
fn image(folder: &Path, format: &str, name: &str, backing: Option<(&str, &str)>) {
    let path = folder.join(name);
    let size = SIZE.to_string();
    let mut args = vec!["disk", "create", "-f", format];
    if let Some((name, format)) = backing {
        args.extend(["-b", name, "-F", format]);
    }
    args.extend([text(&path), &size]);
    well(RINGBACK, &args);
}

fn check(path: &Path, format: &str) {
    well(RINGBACK, &["disk", "check", "-f", format, text(path)]);
    if format == "qcow2" {
        well("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
    }
}

fn same(a: (&Path, &str), b: (&Path, &str)) {
    let args = ["compare", "-f", a.1, "-F", b.1, text(a.0), text(b.0)];
    match a.1 == "vpc" || b.1 == "vpc" {
        // qemu-img knows no differencing VHD.
        true => well(RINGBACK, &[&["disk"], &args[..]].concat()),
        false => well("qemu-img", &args),
    };
}
