//! The example of a backend of one's own serves a guest.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkback::{BlkFront, FrontOptions};
use blktap::{Disk, blocking};
use hypervisor::core::domains::Kind;
use hypervisor::embedded::{Frontend, Link, Toolstack};
use hypervisor::xenbus::DeviceId;
use hypervisor::xenbus::keys::key;
use hypervisor::xenbus::toolstack::{self, Device};

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn attach(toolstack: &Toolstack, domid: u16, devid: u32, params: &str) {
    let device = Device {
        id: DeviceId { kind: "vbd", domid, devid },
        backend: 0,
        backend_keys: vec![key("params", params), key("mode", "w")],
        frontend_keys: vec![key("virtual-device", devid)],
    };
    toolstack::attach(&toolstack.store().expect("a store"), &device).expect("attach");
}

/// The example's program: `cargo test` builds it beside the tests, `cargo test --test` does not.
fn example() -> PathBuf {
    let mut path = std::env::current_exe().expect("this program");
    path.pop();
    path.pop();
    let release = path.ends_with("release");
    let path = path.join("examples/ramdisk");
    if !path.exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--example", "ramdisk"]).args(release.then_some("--release"));
        build.current_dir(env!("CARGO_MANIFEST_DIR"));
        assert!(build.status().expect("cargo").success());
    }
    path
}

#[test]
fn the_ram_disk_of_the_example_serves_a_guest() {
    let dir = tempfile::tempdir().expect("a folder");
    let run = dir.path().join("run");
    let hypervisor = Command::new(env!("CARGO_BIN_EXE_ringback"))
        .arg("--run-dir")
        .arg(&run)
        .arg("hypervisor")
        .stdin(Stdio::null())
        .spawn();
    let _hypervisor = Ended(hypervisor.expect("the hypervisor"));
    let socket = run.join("hypervisor.sock");
    let end = Instant::now() + Duration::from_secs(10);
    let toolstack = loop {
        match Toolstack::connect(&socket) {
            Ok(toolstack) => break toolstack,
            Err(e) => assert!(Instant::now() < end, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let backend = Command::new(example()).arg("--hypervisor").arg(&socket).arg(&run).spawn();
    let _backend = Ended(backend.expect("the example"));
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").expect("a domain");
    let link = Link::new(toolstack.connect_domain(domid).expect("an identity")).expect("a link");
    let guest = Arc::new(Frontend::new(link));

    attach(&toolstack, domid, 51712, "ram:kept=8M");
    for round in 0..2 {
        let front = BlkFront::connect(guest.clone(), 51712, FrontOptions::default());
        let front = front.expect("a disk");
        assert_eq!(front.geometry().size, 8 << 20);
        let mut queue = front.queue(8).expect("a queue");
        let mut found = vec![1; 1 << 20];
        blocking::read_at(&mut *queue, 4096, &mut found).expect("read");
        // The second time it finds what was left by the first.
        assert!(found.iter().all(|b| *b == round * 7), "round {round}");
        blocking::write_at(&mut *queue, 4096, &vec![7; 1 << 20]).expect("write");
        blocking::flush(&mut *queue).expect("flush");
        drop(queue);
        front.close().expect("close");
    }

    attach(&toolstack, domid, 51728, "ram:lots");
    let refused = BlkFront::connect(guest, 51728, FrontOptions::default());
    let refused = refused.err().expect("no disk").to_string();
    assert!(refused.contains("device/vbd/51728"), "{refused}");
}

#[test]
fn the_example_has_less_than_100_lines() {
    let text = include_str!("../examples/ramdisk.rs");
    assert!(text.lines().count() < 100);
}
