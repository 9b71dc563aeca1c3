//! QEMU's programs, and the images that they make.
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blktap::storage::MemStorage;
use serde_json::Value;
use tempfile::TempDir;

/// Runs a program of qemu-utils. What it says goes into the failure.
pub fn run(program: &str, args: &[&str]) -> Output {
    match Command::new(program).args(args).output() {
        Ok(output) => output,
        Err(e) => panic!("cannot run {program} (Debian: qemu-utils): {e}"),
    }
}

/// As [`run`]; it must succeed. Gives what it printed.
pub fn run_well(program: &str, args: &[&str]) -> String {
    let out = run(program, args);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// An image file in a folder of its own.
pub struct Image {
    pub dir: TempDir,
    pub path: PathBuf,
}

impl Image {
    /// `qemu-img create` with these options.
    pub fn create(options: &str, size: &str) -> Image {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let path = dir.path().join("a.qcow2");
        let image = Image { dir, path };
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([image.name(), size]);
        run_well("qemu-img", &args);
        image
    }

    /// With these bytes.
    pub fn of(bytes: &[u8]) -> Image {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let path = dir.path().join("a.qcow2");
        std::fs::write(&path, bytes).expect("write the image");
        Image { dir, path }
    }

    pub fn name(&self) -> &str {
        self.path.to_str().expect("UTF-8")
    }

    /// Commands of qemu-io, which must all succeed.
    pub fn io(&self, commands: &[&str]) -> &Image {
        let mut args = vec!["-t", "unsafe", "-f", "qcow2"];
        commands.iter().for_each(|c| args.extend(["-c", c]));
        args.push(self.name());
        let said = run_well("qemu-io", &args);
        assert!(!said.contains("failed") && !said.contains("error"), "{commands:?}: {said}");
        self
    }

    /// `qemu-img` with these arguments and the image's name behind them.
    pub fn img(&self, args: &[&str]) -> &Image {
        let mut args = args.to_vec();
        args.push(self.name());
        run_well("qemu-img", &args);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).expect("read the image")
    }

    pub fn memory(&self) -> MemStorage {
        MemStorage::new(self.bytes())
    }

    pub fn put(&self, storage: &MemStorage) {
        std::fs::write(&self.path, storage.bytes()).expect("write the image");
    }

    /// Exit status and numbers of `qemu-img check`.
    pub fn check(&self) -> (i32, Value) {
        check(&self.path)
    }

    /// What a snapshot reads as; nothing where there is none.
    pub fn snapshot(&self, name: &str) -> Option<Vec<u8>> {
        let raw = self.dir.path().join("snapshot.raw");
        let to = raw.to_str().expect("UTF-8");
        let of = format!("snapshot.name={name}");
        let args =
            ["convert", "-t", "unsafe", "-f", "qcow2", "-l", &of, "-O", "raw", self.name(), to];
        run("qemu-img", &args).status.success().then(|| std::fs::read(raw).expect("a raw disk"))
    }

    /// What the disk reads as, by `qemu-img convert`.
    pub fn disk(&self) -> Vec<u8> {
        let raw = self.dir.path().join("disk.raw");
        let raw = raw.to_str().expect("UTF-8");
        run_well(
            "qemu-img",
            &["convert", "-t", "unsafe", "-f", "qcow2", "-O", "raw", self.name(), raw],
        );
        std::fs::read(raw).expect("the raw disk")
    }
}

/// Exit status and numbers of `qemu-img check`.
pub fn check(path: &Path) -> (i32, Value) {
    let name = path.to_str().expect("UTF-8");
    let out = run("qemu-img", &["check", "-f", "qcow2", "--output=json", name]);
    let json = serde_json::from_slice(&out.stdout).unwrap_or_default();
    (out.status.code().unwrap_or(-1), json)
}
