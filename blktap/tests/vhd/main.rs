//! VHD images: against QEMU, against a model, and hostile ones. Needs qemu-img and qemu-io
//! (Debian's qemu-utils).
mod chains;
mod driver;
mod hostile;
mod model;
mod qemu;
mod rebase;
mod repair;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use blktap::formats::vhd::{CreateOptions, Shape, Vhd};
use blktap::storage::{Access, Cache, Lock, OpenOptions, Storage, open};

use driver::Driver;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

/// Runs one of QEMU's programs; what it says.
fn qemu(program: &str, args: &[&str]) -> String {
    let out = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program} (Debian: qemu-utils): {e}"));
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "{program} {args:?}: {said}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    said
}

fn storage(path: &Path, access: Access) -> Arc<dyn Storage> {
    let options = OpenOptions::new(path).cache(Cache::Writeback).access(access).lock(Lock::Off);
    Arc::new(open(&options).unwrap_or_else(|e| panic!("{e}")))
}

fn create(path: &Path, size: u64, shape: Shape) {
    std::fs::write(path, []).expect("a file");
    let options = CreateOptions::new(size, shape).expect("options");
    Vhd::create(&*storage(path, Access::ReadWrite), &options).unwrap_or_else(|e| panic!("{e}"));
}

fn open_vhd(path: &Path, access: Access) -> Arc<Vhd> {
    Arc::new(Vhd::open(storage(path, access)).unwrap_or_else(|e| panic!("{e}")))
}

fn drive(path: &Path, access: Access) -> Driver {
    Driver::new(vec![open_vhd(path, access)])
}

/// Numbers that are the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 20) % n
    }
}

/// Bytes that differ from place to place.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8 | 1
        })
        .collect()
}
