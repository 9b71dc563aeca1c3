//! The bundled hypervisor with real processes.

mod agent;
mod handshake;
mod hostile;
mod liveness;
mod tools;

use agent::Rig;
use hypervisor::core::domains::Kind;

#[test]
fn role() {
    agent::role();
}

#[test]
fn maps_copies_and_events() {
    let rig = Rig::start();
    let toolstack = rig.toolstack();
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
    let (mut guest, mut backend) = (rig.guest(domid), rig.backend());
    let rw = guest.ask("grant 0 3 rw");
    let ro = guest.ask("grant 0 2 ro");
    guest.ask("fill 0 17");
    guest.ask("fill 1 18");
    backend.ask(&format!("map {domid} {rw} rw"));
    backend.ask(&format!("map {domid} {ro},{rw} ro"));
    assert_eq!(backend.ask("look 0 8192"), "17");
    assert_eq!(backend.ask("look 1 4096"), "18");
    assert_eq!(backend.ask("look 1 8192"), "17");
    backend.ask("poke 0 4096 99");
    assert_eq!(guest.ask("peek 0 4096"), "99");
    assert_eq!(backend.ask(&format!("copy {domid} {ro},{rw} from 0")), "0,0,0,0,0 18,18,17,99,17");
    assert_eq!(
        backend.ask(&format!("copy {domid} {rw},{ro} to 5")).split(' ').next(),
        Some("0,0,0,-1,-1")
    );
    assert_eq!(guest.ask("peek 0 8195"), "5");
    assert_eq!(guest.ask("peek 1 0"), "18");

    let port = guest.ask("alloc 0");
    backend.ask(&format!("bind {domid} {port}"));
    assert_eq!(backend.ask("ack 0"), "true");
    assert_eq!(backend.ask("ack 0"), "false");
    guest.ask("notify 0 3");
    assert_eq!(backend.ask("wait 0 1000"), "true");
    assert_eq!(backend.ask("ack 0"), "true");
    assert_eq!(backend.ask("wait 0 0"), "false");
    backend.ask("notify 0 1");
    assert_eq!(guest.ask("wait 0 1000"), "true");
    assert_eq!(guest.ask("ack 0"), "true");

    guest.ask("write data/x hello");
    assert_eq!(backend.ask(&format!("read /local/domain/{domid}/data/x")), "hello");
    assert_eq!(backend.ask("maps"), "3");
    backend.ask("unmap 0");
    backend.ask("unmap 1");
    assert_eq!(backend.ask("maps"), "0");
}

/// From a page of one guest into a page of another one, if both have granted it for that.
#[test]
fn pages_go_from_guest_to_guest() {
    let rig = Rig::start();
    let toolstack = rig.toolstack();
    let create = |name| toolstack.create_domain(None, Kind::Guest, name).unwrap();
    let (one, two) = (create("one"), create("two"));
    let (mut sender, mut receiver, mut backend) = (rig.guest(one), rig.guest(two), rig.backend());
    let from = sender.ask("grant 0 2 ro");
    let others = sender.ask("grant 9 1 rw");
    let to = receiver.ask("grant 0 2 rw");
    let readable = receiver.ask("grant 0 1 ro");
    sender.ask("fill 0 17");
    assert_eq!(backend.ask(&format!("transfer {one} {from} {two} {to} 96 0")), "0,0");
    assert_eq!(receiver.ask("peek 0 3999"), "17");
    assert_eq!(receiver.ask("peek 0 4000"), "0", "beyond what was copied");
    let refused = [
        (&from, &readable, "-1", "a page that may only be read is written"),
        (&others, &to, "-1", "a page of somebody else's is read"),
    ];
    for (from, to, status, what) in refused {
        let asked = backend.ask(&format!("transfer {one} {from} {two} {to} 0 0"));
        assert_eq!(asked, status, "{what}");
    }
    // The references are each guest's own, and so is what is written.
    assert_eq!(backend.ask(&format!("transfer 77 {from} {two} {to} 0 0")).split(',').count(), 2);
    let first = to.split(',').next().unwrap();
    receiver.ask("fill 0 33");
    // A page onto itself, as a guest with two devices may have it.
    assert_eq!(backend.ask(&format!("transfer {two} {first} {two} {first} 8 8")), "0");
    assert_eq!(receiver.ask("peek 0 5"), "33");
    receiver.ask("revoke 0");
    assert_eq!(backend.ask(&format!("transfer {one} {from} {two} {to} 0 0")), "-1,-1");
}

#[test]
fn a_backend_maps_only_what_its_guest_grants_to_it() {
    let rig = Rig::start();
    let toolstack = rig.toolstack();
    let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
    let other = toolstack.create_domain(None, Kind::Driver, "driver").unwrap();
    let (mut guest, mut backend, mut driver) = (rig.guest(domid), rig.backend(), rig.driver(other));
    let mine = guest.ask("grant 0 1 rw");
    let theirs = guest.ask(&format!("grant {other} 1 rw"));
    let readable = guest.ask("grant 0 1 ro");
    guest.ask("fill 1 66");
    let refused = |e: Result<String, String>, why: &str| {
        let e = e.expect_err("it was allowed");
        assert!(e.contains(why), "{e}");
    };
    refused(backend.try_ask(&format!("map {domid} {theirs} ro")), "another domain");
    refused(backend.try_ask(&format!("map {domid} {mine},{theirs} ro")), "another domain");
    refused(driver.try_ask(&format!("map {domid} {mine} ro")), "another domain");
    refused(backend.try_ask(&format!("map {domid} 500 ro")), "outside the table");
    refused(backend.try_ask(&format!("map {domid} 3 ro")), "not granted");
    refused(backend.try_ask("map 77 8 ro"), "no such domain");
    refused(backend.try_ask(&format!("map {domid} {readable} rw")), "read-only");
    assert_eq!(backend.ask(&format!("copy {domid} {theirs},{mine} from 0")), "-1,0 0,0");
    assert_eq!(driver.ask(&format!("copy {domid} {theirs},{mine} from 0")), "0,-1 66,0");
    // Nothing of the refused batches is left in use.
    guest.ask("revoke 0");
    refused(backend.try_ask(&format!("map {domid} {mine} ro")), "not granted");
    assert_eq!(backend.ask(&format!("copy {domid} {mine} from 0")).split(' ').next(), Some("-1"));
    // What is read-only stays so, whatever is tried with the descriptor and the mapping.
    backend.ask(&format!("map {domid} {readable} ro"));
    backend.ask("harden 0");
    assert_eq!(backend.ask("look 0 0"), "0");
}
