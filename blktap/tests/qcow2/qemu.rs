//! QEMU's tools on images in a folder of its own.
use std::path::PathBuf;
use std::process::Command;

pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Folder {
        Folder(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a tool here; what it says is in the panic if it fails.
    pub fn run(&self, tool: &str, args: &[&str]) -> String {
        let out = crate::tool::run(Command::new(tool).args(args).current_dir(self.0.path()));
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{tool} {args:?}: {text}{errors}");
        text
    }

    pub fn img(&self, args: &str) -> String {
        self.run("qemu-img", &args.split(' ').collect::<Vec<_>>())
    }

    /// Commands of qemu-io, one after the other.
    pub fn io(&self, image: &str, commands: &[String]) {
        let mut args = vec!["-f", "qcow2"];
        commands.iter().for_each(|c| args.extend(["-c", c]));
        args.push(image);
        let said = self.run("qemu-io", &args);
        assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    }

    /// All guest bytes as qemu-img has them.
    pub fn bytes(&self, image: &str) -> Vec<u8> {
        self.img(&format!("convert -f qcow2 -O raw {image} all.raw"));
        std::fs::read(self.path("all.raw")).expect("the raw copy")
    }

    /// `qemu-img check` finds neither errors nor leaks.
    pub fn check(&self, image: &str) {
        self.img(&format!("check -f qcow2 {image}"));
    }
}

/// Bytes that look random and are the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A small random number generator.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

/// Where two disks differ first.
pub fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: sizes");
    if let Some(at) = (0..ours.len()).find(|i| ours[*i] != theirs[*i]) {
        panic!("{what}: differs first at {at:#x}: {:#x}, {:#x}", ours[at], theirs[at]);
    }
}
