//! QEMU's programs, and image files for them.
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use blktap::storage::{Access, Cache, OpenOptions, Storage, open};
use serde_json::Value;
use tempfile::TempDir;

/// Runs a program of qemu-utils.
pub fn run(program: &str, args: &[&str]) -> Output {
    crate::tool::run(Command::new(program).args(args))
}

/// As [`run`]; it must succeed. Gives what it printed.
pub fn run_well(program: &str, args: &[&str]) -> String {
    let out = run(program, args);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A file of `path`, opened and locked as a command does it.
pub fn storage(path: &Path) -> Arc<dyn Storage> {
    let options = OpenOptions::new(path).cache(Cache::Writeback).access(Access::ReadWrite);
    Arc::new(open(&options).unwrap_or_else(|e| panic!("{e}")))
}

/// An image file in a folder of its own.
pub struct Image {
    pub dir: TempDir,
    pub path: PathBuf,
}

impl Image {
    /// An empty file.
    pub fn empty() -> Image {
        Image::of(&[])
    }

    /// With these bytes.
    pub fn of(bytes: &[u8]) -> Image {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let path = dir.path().join("a.qcow2");
        std::fs::write(&path, bytes).expect("write the image");
        Image { dir, path }
    }

    /// Another file in its folder.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Made by `qemu-img create` with these options.
    pub fn create(options: &str, size: &str) -> Image {
        let image = Image::empty();
        image.recreate(options, size);
        image
    }

    /// Made anew by `qemu-img create` with these options.
    pub fn recreate(&self, options: &str, size: &str) {
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([self.name(), size]);
        run_well("qemu-img", &args);
    }

    pub fn name(&self) -> &str {
        text(&self.path)
    }

    pub fn storage(&self) -> Arc<dyn Storage> {
        storage(&self.path)
    }

    /// Commands of qemu-io, which must all succeed.
    pub fn io(&self, commands: &[&str]) -> &Image {
        let mut args = vec!["-f", "qcow2"];
        commands.iter().for_each(|c| args.extend(["-c", c]));
        args.push(self.name());
        let said = run_well("qemu-io", &args);
        assert!(!said.contains("failed") && !said.contains("error"), "{commands:?}: {said}");
        self
    }

    /// `qemu-img` with these arguments and the image's name behind them.
    pub fn img(&self, args: &[&str]) -> String {
        let mut args = args.to_vec();
        args.push(self.name());
        run_well("qemu-img", &args)
    }

    /// Fails unless `qemu-img check` finds nothing.
    pub fn assert_clean(&self, what: &str) {
        let out = run("qemu-img", &["check", "-f", "qcow2", self.name()]);
        let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{what}: {said}");
    }

    /// `qemu-img info`.
    pub fn info(&self) -> Value {
        let json = self.img(&["info", "--output=json", "-f", "qcow2"]);
        serde_json::from_str(&json).expect("JSON")
    }

    /// What the disk reads as.
    pub fn disk(&self) -> Vec<u8> {
        self.convert(&[])
    }

    /// What the disk was when a snapshot was made.
    pub fn snapshot(&self, name: &str) -> Vec<u8> {
        self.convert(&["-l", &format!("snapshot.name={name}")])
    }

    fn convert(&self, options: &[&str]) -> Vec<u8> {
        let raw = self.beside("disk.raw");
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        args.extend(options);
        args.extend([self.name(), text(&raw)]);
        run_well("qemu-img", &args);
        std::fs::read(raw).expect("the raw disk")
    }
}
