//! Who is killed, and what the others see of it.

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hypervisor::core::domains::Kind;
use hypervisor::embedded::{Server, Toolstack, sweep};
use hypervisor::store::{Tx, Watched};

use crate::agent::{Rig, readable, until};

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// How many there are once connections that were dropped have been noticed.
fn settled_descriptors(pid: u32) -> usize {
    std::thread::sleep(Duration::from_millis(100));
    descriptors(pid)
}

fn names(dir: &Path) -> Vec<String> {
    let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
    std::fs::read_dir(dir).unwrap().map(|e| name(e).to_string_lossy().into_owned()).collect()
}

#[test]
fn a_killed_guest_ends_its_domain() {
    let rig = Rig::start();
    let toolstack = rig.toolstack();
    let store = toolstack.store().unwrap();
    let before = settled_descriptors(rig.hypervisor.id());
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
    let (mut guest, mut backend) = (rig.guest(domid), rig.backend());
    let refs = guest.ask("grant 0 2 rw");
    let port = guest.ask("alloc 0");
    guest.ask("fill 0 7");
    backend.ask(&format!("map {domid} {refs} rw"));
    backend.ask(&format!("bind {domid} {port}"));
    backend.ask("ack 0");
    store.watch("@releaseDomain", "end").unwrap();
    store.watch(&format!("/local/domain/{domid}/device"), "nodes").unwrap();
    store.inbox().bell().recv_timeout(Duration::from_secs(1)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    store.inbox().take();

    guest.kill();
    assert_eq!(backend.ask("wait 0 1000"), "true");
    assert!(backend.try_ask("ack 0").unwrap_err().contains("broken pipe"));
    assert!(backend.try_ask("notify 0 1").unwrap_err().contains("Broken pipe"));
    until("the domain is gone", || !toolstack.domains().unwrap().contains(&domid));
    assert_eq!(store.get(&format!("/local/domain/{domid}")).unwrap(), None);
    let mut seen = Vec::new();
    until("the watches fired", || {
        seen.extend(store.inbox().take().into_iter().filter_map(|w| match w {
            Watched::Path { token, .. } => Some(token),
            _ => None,
        }));
        seen.contains(&"end".into()) && seen.contains(&"nodes".into())
    });
    // The backend's mapping is memory that nothing can take from under it.
    assert_eq!(backend.ask("look 0 4096"), "7");
    backend.ask("unmap 0");
    backend.kill();
    drop(store);
    until("nothing is held for them", || descriptors(rig.hypervisor.id()) == before - 1);
}

#[test]
fn a_killed_backend_gives_back_what_it_used() {
    let rig = Rig::start();
    let toolstack = rig.toolstack();
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
    let (mut guest, mut first) = (rig.guest(domid), rig.backend());
    let gref = guest.ask("grant 0 1 rw");
    guest.ask("fill 0 66");
    let port = guest.ask("alloc 0");
    first.ask(&format!("map {domid} {gref} rw"));
    first.ask(&format!("bind {domid} {port}"));
    let mut second = rig.backend();
    second.try_ask(&format!("bind {domid} {port}")).expect_err("a port was bound twice");
    // The page cannot be taken from the backend that uses it.
    guest.ask("revoke 0");
    second.ask(&format!("map {domid} {gref} ro"));
    assert_eq!(second.ask("look 0 0"), "66");
    second.ask("unmap 0");

    first.kill();
    // The same channel again, and the guest's end of it works on.
    until("the port is free", || second.try_ask(&format!("bind {domid} {port}")).is_ok());
    assert_eq!(second.ask("ack 0"), "true");
    guest.ask("notify 0 1");
    assert_eq!(second.ask("wait 0 1000"), "true");
    assert_eq!(second.ask("ack 0"), "true");
    second.ask("notify 0 1");
    assert_eq!(guest.ask("wait 0 1000"), "true");
    assert_eq!(guest.ask("ack 0"), "true");
    // Now access can end; the reference means the new page.
    assert_eq!(guest.ask("grant 0 1 rw"), gref);
    second.ask(&format!("map {domid} {gref} ro"));
    assert_eq!(second.ask("look 1 0"), "0");
}

#[test]
fn all_see_a_killed_hypervisor() {
    let mut rig = Rig::start();
    let toolstack = rig.toolstack();
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
    let (mut guest, mut backend) = (rig.guest(domid), rig.backend());
    let lifeline = toolstack.link().lifeline().unwrap();
    assert_eq!(guest.ask("lifeline 0"), "false");
    assert_eq!(backend.ask("lifeline 0"), "false");
    rig.kill_hypervisor();
    assert_eq!(guest.ask("lifeline 1000"), "true");
    assert_eq!(backend.ask("lifeline 1000"), "true");
    assert!(readable(lifeline.as_fd(), 1000));
    assert!(toolstack.domains().unwrap_err().to_string().contains("gone"));
    assert!(guest.try_ask("grant 0 1 rw").is_err());
    sweep(&rig.run_dir()).unwrap();
    assert_eq!(names(&rig.run_dir()), Vec::<String>::new());
}

#[test]
fn a_hypervisor_that_ends_leaves_nothing() {
    let mut rig = Rig::start();
    assert_eq!(names(&rig.run_dir()).len(), 2);
    assert!(sweep(&rig.run_dir()).is_err(), "a living hypervisor was swept away");
    assert!(rig.stop());
    assert_eq!(names(&rig.run_dir()), Vec::<String>::new());
}

#[test]
fn a_folder_has_one_hypervisor_and_no_other_users() {
    let rig = Rig::start();
    let second = Server::new(&rig.run_dir()).map(drop).unwrap_err();
    assert_eq!(second.kind(), std::io::ErrorKind::AddrInUse);
    assert_eq!(rig.toolstack().domains().unwrap(), [0], "the first one was disturbed");
    let open = tempfile::tempdir().unwrap();
    std::fs::set_permissions(open.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let refused = Server::new(open.path()).map(drop).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
}

#[test]
fn a_successor_serves_a_killed_hypervisors_folder() {
    let mut rig = Rig::start();
    rig.kill_hypervisor();
    assert_eq!(names(&rig.run_dir()).len(), 2);
    rig.restart();
    assert_eq!(rig.toolstack().domains().unwrap(), [0]);
}

#[test]
fn a_domain_that_nobody_connected_ends_with_its_maker() {
    let rig = Rig::start();
    let (maker, other) = (rig.toolstack(), rig.toolstack());
    let domid = maker.create_domain(Some(42), Kind::Guest, "guest").unwrap();
    assert_eq!(domid, 42);
    assert!(maker.create_domain(Some(42), Kind::Guest, "again").is_err());
    assert_eq!(other.domains().unwrap(), [0, 42]);
    drop(maker);
    until("the domain is gone", || other.domains().unwrap() == [0]);
}

#[test]
fn a_destroyed_domains_backend_is_asked_to_close() {
    let rig = Rig::start();
    let toolstack = rig.toolstack();
    let store = toolstack.store().unwrap();
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
    let mut guest = rig.guest(domid);
    assert_eq!(guest.ask("lifeline 0"), "false");
    let node = format!("/local/domain/0/backend/vbd/{domid}/51712");
    let fresh = format!("/local/domain/0/backend/vbd/{domid}/51728");
    store.write(Tx::NONE, &format!("{node}/state"), "4").unwrap();
    store.write(Tx::NONE, &format!("{fresh}/state"), "1").unwrap();
    toolstack.destroy_domain(domid).unwrap();
    assert_eq!(guest.ask("lifeline 1000"), "true");
    assert_eq!(store.get(&format!("{node}/state")).unwrap().as_deref(), Some("5"));
    assert_eq!(store.get(&format!("{node}/online")).unwrap().as_deref(), Some("0"));
    until("an untouched device is removed", || store.get(&fresh).unwrap().is_none());
    store.write(Tx::NONE, &format!("{node}/state"), "6").unwrap();
    until("a closed device is removed", || store.get(&node).unwrap().is_none());
    assert_eq!(store.get("/local/domain/0/backend/vbd").unwrap(), None);
}

#[test]
fn the_servers_own_tools_find_no_process_left() {
    let mut rig = Rig::start();
    let toolstack = rig.toolstack();
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
    let mut guest = rig.guest(domid);
    guest.ask("grant 0 1 rw");
    let pid = rig.hypervisor.id();
    let children = Command::new("ps").args(["--ppid", &pid.to_string(), "-o", "pid="]).output();
    assert!(children.unwrap().stdout.is_empty(), "the hypervisor started processes");
    rig.kill_hypervisor();
    assert_eq!(guest.ask("lifeline 1000"), "true");
    assert!(Toolstack::connect(&rig.socket()).is_err());
}
