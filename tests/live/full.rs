//! A file system that fills up under a guest, and is made larger.

use std::process::Stdio;
use std::time::{Duration, Instant};

use super::*;

/// A file system of its own, gone with this.
struct Small(PathBuf);

impl Small {
    fn new(at: &Path, mib: u32) -> Small {
        std::fs::create_dir(at).expect("a folder");
        let options = format!("size={mib}m");
        let mounted = run("mount", &["-t", "tmpfs", "-o", &options, "none", text(at)]);
        let error = String::from_utf8_lossy(&mounted.stderr);
        assert!(mounted.status.success(), "mounting a tmpfs (needs root): {error}");
        Small(at.to_owned())
    }
    fn resize(&self, mib: u32) {
        well("mount", &["-o", &format!("remount,size={mib}m"), text(&self.0)]);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn listed(guest: &Guest) -> String {
    let mut command = Command::new(RINGBACK);
    command.arg("--run-dir").arg(&guest.run_dir).arg("list");
    let output = command.stdin(Stdio::null()).output().expect("ringback");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn until_full(guest: &Guest) {
    let end = Instant::now() + Duration::from_secs(30);
    while !listed(guest).contains("paused by an error") {
        assert!(Instant::now() < end, "it is not full: {}", listed(guest));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Fills 48 MiB of a disk whose file has room for 20, under verification.
fn filled(format: &str) {
    let folder = folder();
    let small = Small::new(&folder.path().join("small"), 20);
    image(folder.path(), format, &format!("small/disk.{format}"), None);
    let guest = Guest::start(folder, &[&format!("{format}:small/disk.{format}")]);
    let job = [
        "--name=fill".to_owned(),
        "--ioengine=nbd".to_owned(),
        format!("--uri={}", guest.uri("xvda")),
        "--rw=write".to_owned(),
        "--bs=64k".to_owned(),
        "--size=48m".to_owned(),
        "--iodepth=16".to_owned(),
        "--verify=crc32c".to_owned(),
        "--verify_fatal=1".to_owned(),
        "--verify_state_save=0".to_owned(),
        "--fsync=100".to_owned(),
    ];
    let mut command = Command::new("fio");
    command.current_dir(guest.folder.path()).args(job);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap_or_else(|e| panic!("fio: {e}: install it"));
    let mut fio = Fio { child: Some(child) };
    until_full(&guest);
    let device = "1/xvda";
    let told = guest.ok(&["job", "--live", device]);
    assert!(told.contains("paused by an error: No space left on device"), "{told}");
    // Nothing has changed: it stops once more.
    guest.ok(&["resume", "--live", device]);
    until_full(&guest);
    // A little, and then enough.
    for mib in [30, 100] {
        assert!(fio.runs(), "it has ended in spite of a full disk");
        small.resize(mib);
        guest.ok(&["resume", "--live", device]);
        if mib == 30 {
            until_full(&guest);
        }
    }
    fio.well();
    assert!(listed(&guest).contains("served"));
    let folder = guest.end();
    if format != "raw" {
        check(&folder.path().join(format!("small/disk.{format}")), format);
    }
    drop(small);
}

#[test]
fn a_full_file_system_is_made_larger_under_a_raw_file() {
    filled("raw");
}

#[test]
fn a_full_file_system_is_made_larger_under_qcow2() {
    filled("qcow2");
}

#[test]
fn a_full_file_system_is_made_larger_under_a_vhd() {
    filled("vhd");
}
