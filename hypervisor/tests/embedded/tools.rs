//! Debian's xenstore tools (package xenstore-utils) on our store.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use hypervisor::core::domains::Kind;
use hypervisor::xenbus::{
    DeviceId,
    toolstack::{Device, attach},
};

use crate::agent::{Rig, until};

/// Runs a tool; its output, and whether it succeeded.
fn run(socket: &Path, tool: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new(tool)
        .args(args)
        .env("XENSTORED_PATH", socket)
        .output()
        .unwrap_or_else(|e| panic!("{tool} (package xenstore-utils is needed): {e}"));
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn read_write_list_exists_rm_ls_chmod() {
    let rig = Rig::start();
    let socket = rig.store_socket();
    let toolstack = rig.toolstack();
    for domid in [3, 5, 7] {
        toolstack.create_domain(Some(domid), Kind::Guest, "guest").unwrap();
    }
    let ok = |tool: &str, args: &[&str]| {
        let (success, text) = run(&socket, tool, args);
        assert!(success, "{tool} {args:?}: {text}");
        text
    };
    ok("xenstore-write", &["/a/b", "hello", "/a/c", "world"]);
    assert_eq!(ok("xenstore-read", &["/a/b", "/a/c"]), "hello\nworld\n");
    assert_eq!(ok("xenstore-list", &["/a"]), "b\nc\n");
    ok("xenstore-exists", &["/a/b"]);
    assert!(!run(&socket, "xenstore-exists", &["/a/nothing"]).0);
    assert!(!run(&socket, "xenstore-read", &["/a/nothing"]).0);
    ok("xenstore-chmod", &["/a/b", "b3", "r5"]);
    assert_eq!(
        ok("xenstore-ls", &["-f", "-p", "/a"]),
        "/a/b = \"hello\"   (b3,r5)\n/a/c = \"world\"   (n0)\n"
    );
    ok("xenstore-chmod", &["-r", "/a", "n0", "r7"]);
    assert_eq!(ok("xenstore-ls", &["/a"]), "b = \"hello\"\nc = \"world\"\n");
    ok("xenstore-rm", &["/a/b"]);
    assert_eq!(ok("xenstore-list", &["/a"]), "c\n");
    ok("xenstore-rm", &["-t", "/a/c"]);
    assert!(!run(&socket, "xenstore-exists", &["/a/c"]).0);
}

#[test]
fn a_large_folder_is_listed_in_parts() {
    let rig = Rig::start();
    let socket = rig.store_socket();
    let store = rig.toolstack().store().unwrap();
    let names: Vec<String> = (0..900).map(|n| format!("a-rather-long-name-{n}")).collect();
    for name in &names {
        store.write(hypervisor::store::Tx::NONE, &format!("/big/{name}"), "x").unwrap();
    }
    let (success, text) = run(&socket, "xenstore-list", &["/big"]);
    assert!(success, "{text}");
    assert_eq!(text.lines().collect::<Vec<_>>(), names);
    assert_eq!(store.list(hypervisor::store::Tx::NONE, "/big").unwrap(), names);
}

#[test]
fn watch_sees_nodes_and_domains() {
    let rig = Rig::start();
    let socket = rig.store_socket();
    let mut watch = Command::new("xenstore-watch")
        .args(["-n", "6", "/w", "@introduceDomain", "@releaseDomain"])
        .env("XENSTORED_PATH", &socket)
        .stdout(Stdio::piped())
        .spawn()
        .expect("xenstore-watch (package xenstore-utils is needed)");
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    let first = [next(), next(), next()];
    assert_eq!(first, ["/w", "@introduceDomain", "@releaseDomain"]);
    assert!(run(&socket, "xenstore-write", &["/w/x", "1"]).0);
    assert_eq!(next(), "/w/x");
    let toolstack = rig.toolstack();
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
    assert_eq!(next(), "@introduceDomain");
    toolstack.destroy_domain(domid).unwrap();
    assert_eq!(next(), "@releaseDomain");
    assert!(watch.wait().unwrap().success());
}

#[test]
fn a_domain_has_its_nodes_and_no_others() {
    let rig = Rig::start();
    let socket = rig.store_socket();
    let toolstack = rig.toolstack();
    let domid = toolstack.create_domain(Some(5), Kind::Guest, "five").unwrap();
    let mut guest = rig.guest(domid);
    assert_eq!(guest.ask("read name"), "five");
    guest.ask("write data/mine 1");
    guest.try_ask("write /data 1").expect_err("the root was written");
    guest.try_ask("write name six").expect_err("the name was written");
    guest.try_ask("read /local/domain/0/name").expect_err("domain 0's name was read");
    let (_, text) = run(&socket, "xenstore-ls", &["-f", "-p", "/local/domain/5"]);
    for line in
        ["/local/domain/5/name = \"five\"   (n0,r5)", "/local/domain/5/data/mine = \"1\"   (n5)"]
    {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn a_device_is_attached_and_both_ends_see_it() {
    let rig = Rig::start();
    let toolstack = rig.toolstack();
    let store = toolstack.store().unwrap();
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
    let other = toolstack.create_domain(None, Kind::Guest, "other").unwrap();
    let (mut guest, mut stranger) = (rig.guest(domid), rig.guest(other));
    let device = Device {
        id: DeviceId { domid, kind: "vbd", devid: 51712 },
        backend: 0,
        backend_keys: vec![("params".into(), "raw:/dev/null".into())],
        frontend_keys: Vec::new(),
    };
    attach(&store, &device).unwrap();
    let back = guest.ask("read device/vbd/51712/backend");
    assert_eq!(back, format!("/local/domain/0/backend/vbd/{domid}/51712"));
    assert_eq!(guest.ask(&format!("read {back}/params")), "raw:/dev/null");
    guest.ask("write device/vbd/51712/ring-ref 8");
    let front = format!("/local/domain/{domid}/device/vbd/51712");
    assert_eq!(store.get(&format!("{front}/ring-ref")).unwrap().as_deref(), Some("8"));
    guest.try_ask(&format!("write {back}/state 4")).expect_err("a guest wrote its backend's node");
    stranger.try_ask(&format!("read {front}/state")).expect_err("a stranger read a frontend");
    stranger.try_ask(&format!("read {back}/state")).expect_err("a stranger read a backend");
    guest.kill();
    until("both directories are gone", || {
        [&front, &back].iter().all(|path| store.get(path).unwrap().is_none())
    });
}
