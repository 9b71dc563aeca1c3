//! The hotplug script `scripts/block-ringback`, run with stand-ins for the xenstore commands: what it says about a target
//! to the toolstack, and that it never writes the key on which the kernel's backend would take the device.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const NODE: &str = "local/domain/0/backend/vbd/7/51712";

/// A store in a folder: a key is a file, and the three commands that the script calls.
struct Store {
    dir: tempfile::TempDir,
}

impl Store {
    fn new(params: &str, mode: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = Self { dir };
        store.command("xenstore-read", "cat \"$ROOT/store/$1\" 2>/dev/null");
        store.command(
            "xenstore-write",
            "while [ $# -gt 1 ]; do mkdir -p \"$ROOT/store/${1%/*}\"; printf %s \"$2\" > \"$ROOT/store/$1\"; shift 2; done",
        );
        store.command("xenstore-rm", "for k; do rm -r \"$ROOT/store/$k\" || exit 1; done");
        store.command("logger", ":");
        fs::create_dir_all(store.path().join("store").join(NODE)).expect("the node");
        store.write("params", params);
        store.write("mode", mode);
        store
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn command(&self, name: &str, body: &str) {
        let file = self.path().join("bin").join(name);
        fs::create_dir_all(file.parent().expect("a folder")).expect("bin");
        fs::write(&file, format!("#!/bin/sh\nROOT={}\n{body}\n", self.path().display()))
            .expect("a command");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("its mode");
    }

    fn write(&self, key: &str, value: &str) {
        fs::write(self.path().join("store").join(NODE).join(key), value).expect("a key");
    }

    fn read(&self, key: &str) -> Option<String> {
        fs::read_to_string(self.path().join("store").join(NODE).join(key)).ok()
    }

    /// Runs the script with the command and says whether it succeeded.
    fn run(&self, command: &str) -> bool {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/block-ringback");
        // The script puts the system's folders first, as a hotplug script must; here the stand-ins go before them.
        let text = fs::read_to_string(script).expect("the script");
        let mine = format!("PATH={}:", self.path().join("bin").display());
        assert!(text.contains("\nPATH="), "the script sets its PATH");
        let copy = self.path().join("block-ringback");
        fs::write(&copy, text.replacen("\nPATH=", &format!("\n{mine}"), 1)).expect("a copy");
        Command::new("sh")
            .arg(&copy)
            .arg(command)
            .env("XENBUS_PATH", NODE)
            .env("XEN_BACKEND_DRIVERS", self.path().join("drivers"))
            .status()
            .expect("sh")
            .success()
    }

    fn image(&self, name: &str) -> PathBuf {
        let file = self.path().join(name);
        fs::write(&file, b"disk").expect("an image");
        file
    }
}

fn refused(store: &Store, reason: &str) {
    assert!(!store.run("add"), "add succeeded");
    assert_eq!(store.read("hotplug-status").as_deref(), Some("error"));
    let error = store.read("hotplug-error").expect("hotplug-error");
    assert!(error.contains(reason), "'{error}' does not say '{reason}'");
}

#[test]
fn an_image_of_each_format_is_connected() {
    for format in ["raw:", "qcow:", "qcow2:", "vhd:", "vpc:", "vhdx:", ""] {
        let store = Store::new("", "w");
        let image = store.image("a.img");
        store.write("params", &format!("{format}{}", image.display()));
        assert!(store.run("add"), "add failed for '{format}'");
        assert_eq!(store.read("hotplug-status").as_deref(), Some("connected"));
        assert_eq!(store.read("hotplug-error"), None);
        assert_eq!(store.read("physical-device"), None, "the kernel's backend would take it");
    }
}

#[test]
fn a_network_disk_needs_no_file() {
    let store = Store::new("nbd:unix:/run/nbd.sock", "w");
    assert!(store.run("add"));
    assert_eq!(store.read("hotplug-status").as_deref(), Some("connected"));
}

#[test]
fn what_cannot_be_served_is_refused_with_its_reason() {
    refused(&Store::new("raw:/nowhere/a.img", "w"), "/nowhere/a.img: does not exist");
    refused(&Store::new("raw:a.img", "w"), "not an absolute path");
    refused(&Store::new("raw:", "w"), "no target");
    refused(&Store::new("vmdk:/a.vmdk", "w"), "unknown image format 'vmdk'");
    refused(&Store::new("raw:/", "w"), "neither a file nor a block device");
}

#[test]
fn a_device_of_the_kernels_backend_is_refused() {
    let store = Store::new("", "w");
    let image = store.image("a.img");
    store.write("params", &format!("raw:{}", image.display()));
    fs::create_dir_all(store.path().join("drivers/vbd/vbd-7-51712")).expect("a bound device");
    refused(&store, "blacklist the module xen-blkback");
}

#[test]
fn remove_takes_its_keys_and_makes_no_node() {
    let store = Store::new("", "w");
    let image = store.image("a.img");
    store.write("params", &format!("raw:{}", image.display()));
    assert!(store.run("add"));
    assert!(store.run("remove"));
    assert_eq!(store.read("hotplug-status"), None);
    fs::remove_dir_all(store.path().join("store/local")).expect("the toolstack's removal");
    assert!(store.run("remove"));
    assert!(!store.path().join("store/local").exists(), "the node is back");
}

#[test]
fn an_unknown_command_fails() {
    let store = Store::new("raw:/a", "w");
    assert!(!store.run("online"));
    assert_eq!(store.read("hotplug-status"), None);
}

/// Runs `vif-ringback` for a vif with this `bridge`; whether it succeeded.
fn vif(store: &Store, bridge: &str, command: &str) -> bool {
    const NODE: &str = "local/domain/0/backend/vif/7/0";
    fs::create_dir_all(store.path().join("store").join(NODE)).expect("the node");
    fs::write(store.path().join("store").join(NODE).join("bridge"), bridge).expect("a key");
    let path = std::env::var("PATH").expect("PATH");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/vif-ringback");
    let mut run = Command::new("bash");
    run.arg(script).arg(command).env("XENBUS_PATH", NODE);
    run.env("PATH", format!("{}:{path}", store.path().join("bin").display()));
    run.env("XEN_BACKEND_DRIVERS", store.path().join("drivers"));
    run.env("RINGBACK_SYS_NET", store.path().join("net"));
    run.status().expect("bash").success()
}

#[test]
fn a_vif_without_a_device_of_the_host_is_connected_at_once() {
    let status = |store: &Store| {
        let node = "store/local/domain/0/backend/vif/7/0/hotplug-status";
        fs::read_to_string(store.path().join(node)).ok()
    };
    for bridge in [
        "packet:eth1",
        "xdp:eth1",
        "stream:/run/net.sock",
        "stream-server:[::1]:5000",
        "switch:lan",
        "vhost-user:/run/vhost.sock",
        "vhost-user-server:/run/vhost.sock",
    ] {
        let store = Store::new("", "w");
        assert!(vif(&store, bridge, "online"), "{bridge}");
        assert_eq!(status(&store).as_deref(), Some("connected"));
        assert!(vif(&store, bridge, "offline"), "{bridge}");
    }
    // Of a bridge there has to be a TAP device.
    let store = Store::new("", "w");
    assert!(!vif(&store, "xenbr0", "online"));
    assert_eq!(status(&store).as_deref(), Some("error"));
}
