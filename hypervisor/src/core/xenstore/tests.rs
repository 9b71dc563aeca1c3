mod model;
mod transactions;

use super::*;

const OK: &[u8] = b"OK\0";

struct Rig {
    store: Store,
    dom0: ConnId,
    guest: ConnId,
}

fn strings(all: &[&str]) -> Vec<u8> {
    all.iter().flat_map(|s| s.bytes().chain([0])).collect()
}

impl Rig {
    /// Domain 5 owns /d and may read /.
    fn new() -> Rig {
        let mut store = Store::new();
        store.introduce(5);
        store.introduce(6);
        let (dom0, guest) = (store.connect(0), store.connect(5));
        let mut rig = Rig { store, dom0, guest };
        rig.ok(rig.dom0, Kind::SetPerms, &["/", "r0"]);
        rig.ok(rig.dom0, Kind::Mkdir, &["/d"]);
        rig.ok(rig.dom0, Kind::SetPerms, &["/d", "n5"]);
        rig.store.take_events();
        rig
    }
    fn ask_in(&mut self, id: ConnId, tx: u32, kind: Kind, args: &[&str]) -> Result<Vec<u8>, Errno> {
        self.store.handle(id, kind as u32, tx, &strings(args))
    }
    fn ask(&mut self, id: ConnId, kind: Kind, args: &[&str]) -> Result<Vec<u8>, Errno> {
        self.ask_in(id, 0, kind, args)
    }
    fn ok(&mut self, id: ConnId, kind: Kind, args: &[&str]) -> Vec<u8> {
        self.ask(id, kind, args).unwrap_or_else(|e| panic!("{kind:?} {args:?}: {e:?}"))
    }
    fn start(&mut self, id: ConnId) -> u32 {
        let reply = self.ok(id, Kind::TransactionStart, &[""]);
        str::from_utf8(&reply[..reply.len() - 1]).unwrap().parse().unwrap()
    }
    fn events(&mut self) -> Vec<(ConnId, String, String)> {
        let text = |token| String::from_utf8(token).unwrap();
        self.store.take_events().into_iter().map(|e| (e.conn, e.path, text(e.token))).collect()
    }
}

#[test]
fn values_are_bytes_and_folders_are_lists() {
    let mut rig = Rig::new();
    let dom0 = rig.dom0;
    assert_eq!(rig.store.handle(dom0, Kind::Write as u32, 0, b"/a/b\0\0\xffx"), Ok(OK.to_vec()));
    assert_eq!(rig.ok(dom0, Kind::Read, &["/a/b"]), b"\0\xffx");
    rig.ok(dom0, Kind::Mkdir, &["/a/c/d"]);
    assert_eq!(rig.ok(dom0, Kind::Directory, &["/a"]), b"b\0c\0");
    rig.ok(dom0, Kind::Rm, &["/a/c"]);
    assert_eq!(rig.ask(dom0, Kind::Read, &["/a/c/d"]), Err(Errno::ENOENT));
    assert_eq!(rig.ask(dom0, Kind::Rm, &["/"]), Err(Errno::EINVAL));
    assert_eq!(rig.ok(dom0, Kind::Rm, &["/a/nothing"]), OK);
    assert_eq!(rig.ask(dom0, Kind::Rm, &["/x/y/z"]), Err(Errno::ENOENT));
}

#[test]
fn relative_paths_start_in_the_domains_folder() {
    let mut rig = Rig::new();
    rig.ok(rig.dom0, Kind::Write, &["/local/domain/5/x", "1"]);
    rig.ok(rig.dom0, Kind::SetPerms, &["/local/domain/5/x", "n5"]);
    rig.ok(rig.guest, Kind::Watch, &["x", "t"]);
    rig.ok(rig.guest, Kind::Write, &["x", "2"]);
    let x = || (rig.guest, "x".to_owned(), "t".to_owned());
    let expected = [x(), x()];
    assert_eq!(rig.events(), expected);
}

#[test]
fn malformed_payloads_are_refused() {
    let mut rig = Rig::new();
    let kinds = [Kind::Read, Kind::Directory, Kind::Mkdir, Kind::Rm, Kind::GetPerms];
    for kind in kinds {
        for payload in [&b""[..], b"/d", b"/d\0x", b"/d\0x\0", b"/d/\0", b"//d\0", b"/\xc3\0"] {
            let reply = rig.store.handle(rig.dom0, kind as u32, 0, payload);
            assert_eq!(reply, Err(Errno::EINVAL), "{kind:?} {payload:?}");
        }
    }
    let long = format!("/{}", "x".repeat(3072));
    assert_eq!(rig.ask(rig.dom0, Kind::Read, &[&long]), Err(Errno::EINVAL));
    for kind in [16, 15, 18 + 2, 23, u32::MAX] {
        assert_eq!(rig.store.handle(rig.dom0, kind, 0, b"/\0"), Err(Errno::ENOSYS));
    }
    assert_eq!(rig.store.handle(rig.dom0, 2, 0, &[0; PAYLOAD_MAX + 1]), Err(Errno::EINVAL));
}

#[test]
fn a_domain_writes_only_where_it_may() {
    let mut rig = Rig::new();
    let (dom0, guest) = (rig.dom0, rig.guest);
    rig.ok(guest, Kind::Write, &["/d/mine", "1"]);
    assert_eq!(rig.ok(dom0, Kind::GetPerms, &["/d/mine"]), b"n5\0");
    assert_eq!(rig.ask(guest, Kind::Write, &["/other", "1"]), Err(Errno::EACCES));
    assert_eq!(rig.ask(guest, Kind::SetPerms, &["/d/mine", "n6"]), Err(Errno::EPERM));
    assert_eq!(rig.ask(guest, Kind::SetPerms, &["/d", "n77"]), Err(Errno::ENOENT));
    assert_eq!(rig.ask(guest, Kind::SetPerms, &["/", "n5"]), Err(Errno::EACCES));
    rig.ok(guest, Kind::SetPerms, &["/d/mine", "n5", "r6"]);
    let other = rig.store.connect(6);
    assert_eq!(rig.ok(other, Kind::Read, &["/d/mine"]), b"1\0");
    assert_eq!(rig.ask(other, Kind::Write, &["/d/mine", "2"]), Err(Errno::EACCES));
    assert_eq!(rig.ask(other, Kind::Directory, &["/d"]), Err(Errno::EACCES));
    assert_eq!(rig.ask(other, Kind::Read, &["/d/nothing"]), Err(Errno::EACCES));
    assert_eq!(rig.ask(other, Kind::Read, &["/nothing"]), Err(Errno::ENOENT));
    for kind in [Kind::Control, Kind::Introduce, Kind::Release, Kind::Resume, Kind::SetTarget] {
        assert_eq!(rig.ask(guest, kind, &["6"]), Err(Errno::EACCES), "{kind:?}");
    }
}

#[test]
fn a_device_models_domain_has_its_targets_rights() {
    let mut rig = Rig::new();
    let model = rig.store.connect(6);
    assert_eq!(rig.ask(model, Kind::Write, &["/d/x", "1"]), Err(Errno::EACCES));
    rig.ok(rig.dom0, Kind::SetTarget, &["6", "5"]);
    rig.ok(model, Kind::Write, &["/d/x", "1"]);
}

#[test]
fn watches_fire_for_the_node_and_below() {
    let mut rig = Rig::new();
    let (dom0, guest) = (rig.dom0, rig.guest);
    for (path, token) in [("/d", "top"), ("/d/a/b", "deep"), ("/", "root")] {
        rig.ok(dom0, Kind::Watch, &[path, token]);
    }
    assert_eq!(rig.ask(dom0, Kind::Watch, &["/d", "top"]), Err(Errno::EEXIST));
    assert_eq!(rig.events().len(), 3, "each watch fires at once");
    let tokens = |rig: &mut Rig| {
        let mut all: Vec<_> =
            rig.events().into_iter().map(|(_, p, t)| format!("{t} {p}")).collect();
        all.sort();
        all
    };
    rig.ok(guest, Kind::Write, &["/d/a/b/c", "1"]);
    assert_eq!(tokens(&mut rig), ["deep /d/a/b/c", "root /d/a/b/c", "top /d/a/b/c"]);
    rig.ok(guest, Kind::Mkdir, &["/d/a"]);
    assert_eq!(tokens(&mut rig), Vec::<String>::new());
    rig.ok(guest, Kind::Rm, &["/d/a"]);
    assert_eq!(tokens(&mut rig), ["deep /d/a/b", "root /d/a", "top /d/a"]);
    rig.ok(dom0, Kind::Unwatch, &["/d", "top"]);
    assert_eq!(rig.ask(dom0, Kind::Unwatch, &["/d", "top"]), Err(Errno::ENOENT));
    rig.ok(dom0, Kind::SetPerms, &["/d", "b5"]);
    assert_eq!(tokens(&mut rig), ["root /d"]);
}

#[test]
fn a_watch_tells_only_what_its_owner_may_know() {
    let mut rig = Rig::new();
    let other = rig.store.connect(6);
    rig.ok(other, Kind::Watch, &["/", "t"]);
    rig.events();
    rig.ok(rig.guest, Kind::Write, &["/d/secret", "1"]);
    assert_eq!(rig.events(), []);
    rig.ok(rig.guest, Kind::SetPerms, &["/d/secret", "r5"]);
    assert_eq!(rig.events().len(), 1);
    rig.ok(rig.guest, Kind::Rm, &["/d/secret"]);
    assert_eq!(rig.events().len(), 1, "what was readable is known to be gone");
}

#[test]
fn depth_limits_a_watch() {
    let mut rig = Rig::new();
    rig.ok(rig.dom0, Kind::Watch, &["/d", "zero", "0"]);
    rig.ok(rig.dom0, Kind::Watch, &["/d", "one", "1"]);
    rig.ok(rig.dom0, Kind::Watch, &["@releaseDomain", "who", "1"]);
    rig.ok(rig.dom0, Kind::Watch, &["@releaseDomain", "any"]);
    rig.events();
    rig.ok(rig.guest, Kind::Write, &["/d/x/y", "1"]);
    assert_eq!(rig.events(), []);
    rig.ok(rig.guest, Kind::Write, &["/d/x", "1"]);
    assert_eq!(rig.events().into_iter().map(|e| e.2).collect::<Vec<_>>(), ["one"]);
    rig.store.release(6);
    let seen: Vec<_> = rig.events().into_iter().map(|(_, p, t)| format!("{t} {p}")).collect();
    assert_eq!(seen, ["who @releaseDomain/6", "any @releaseDomain"]);
}

#[test]
fn domains_do_not_see_others_come_and_go_unless_allowed() {
    let mut rig = Rig::new();
    rig.ok(rig.guest, Kind::Watch, &["@releaseDomain", "t"]);
    rig.events();
    rig.store.release(6);
    assert_eq!(rig.events(), []);
    rig.store.introduce(6);
    rig.ok(rig.dom0, Kind::SetPerms, &["@releaseDomain", "n0", "r5"]);
    rig.events();
    rig.store.release(6);
    assert_eq!(rig.events().len(), 1);
}

#[test]
fn a_released_domains_nodes_and_rights_are_gone() {
    let mut rig = Rig::new();
    rig.ok(rig.guest, Kind::Write, &["/d/x/y", "1"]);
    rig.ok(rig.dom0, Kind::Write, &["/kept", "1"]);
    rig.ok(rig.dom0, Kind::SetPerms, &["/kept", "n0", "r5", "r6"]);
    rig.store.release(5);
    assert!(!rig.store.exists("/d") && !rig.store.exists("/d/x/y"));
    assert_eq!(rig.ok(rig.dom0, Kind::GetPerms, &["/kept"]), b"n0\0r6\0");
    assert_eq!(rig.ok(rig.dom0, Kind::IsDomainIntroduced, &["5"]), b"F\0");
    assert_eq!(rig.ask(rig.dom0, Kind::Introduce, &["5", "1", "1"]), Err(Errno::EINVAL));
}

#[test]
fn a_long_folder_is_read_in_parts() {
    let mut rig = Rig::new();
    let names: Vec<String> = (0..500).map(|n| format!("a-name-of-some-length-{n}")).collect();
    for name in &names {
        rig.ok(rig.dom0, Kind::Mkdir, &[&format!("/big/{name}")]);
    }
    assert_eq!(rig.ask(rig.dom0, Kind::Directory, &["/big"]), Err(Errno::E2BIG));
    let (mut all, mut parts) = (Vec::new(), 0);
    loop {
        let reply = rig.ok(rig.dom0, Kind::DirectoryPart, &["/big", &all.len().to_string()]);
        assert!(reply.len() <= PAYLOAD_MAX);
        let cut = reply.iter().position(|b| *b == 0).unwrap() + 1;
        all.extend_from_slice(&reply[cut..]);
        parts += 1;
        if all.ends_with(b"\0\0") {
            break;
        }
    }
    assert!(parts > 2);
    let expected: Vec<u8> = strings(&names.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(all[..all.len() - 1], expected);
}

#[test]
fn a_domain_is_held_by_its_limits() {
    let mut rig = Rig::new();
    let guest = rig.guest;
    let fill = |rig: &mut Rig, kind, args: &dyn Fn(usize) -> Vec<String>| {
        (0..5000).find_map(|n| {
            let args = args(n);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            rig.ask(guest, kind, &args).err().map(|e| (n, e))
        })
    };
    let nodes = fill(&mut rig, Kind::Mkdir, &|n| vec![format!("/d/{}/{}", n / 100, n % 100)]);
    assert!(nodes.is_some_and(|(n, e)| (900..1000).contains(&n) && e == Errno::ENOSPC));
    let watches = fill(&mut rig, Kind::Watch, &|n| vec!["/d".into(), n.to_string()]);
    assert_eq!(watches, Some((limits::WATCHES, Errno::E2BIG)));
    let open = fill(&mut rig, Kind::TransactionStart, &|_| vec![String::new()]);
    assert_eq!(open, Some((limits::TRANSACTIONS, Errno::ENOSPC)));
    assert_eq!(rig.ask(guest, Kind::Write, &["/d/0/0", &"x".repeat(2048)]), Err(Errno::ENOSPC));
    let perms = ["/d/0/0", "n5", "r0", "r0", "r0", "r0", "r0"];
    assert_eq!(rig.ask(guest, Kind::SetPerms, &perms), Err(Errno::ENOSPC));
    rig.ok(guest, Kind::ResetWatches, &[""]);
    rig.ok(guest, Kind::Rm, &["/d/0"]);
    rig.ok(guest, Kind::Mkdir, &["/d/again"]);
    rig.ok(guest, Kind::Watch, &["/d", "t"]);
}

#[test]
fn transactions_see_themselves_and_conflict() {
    let mut rig = Rig::new();
    let (dom0, guest) = (rig.dom0, rig.guest);
    let tx = rig.start(guest);
    rig.ask_in(guest, tx, Kind::Write, &["/d/x", "1"]).unwrap();
    assert_eq!(rig.ask(dom0, Kind::Read, &["/d/x"]), Err(Errno::ENOENT));
    assert_eq!(rig.ask_in(guest, tx, Kind::Read, &["/d/x"]), Ok(b"1\0".to_vec()));
    assert_eq!(rig.ask_in(guest, tx, Kind::TransactionStart, &[""]), Err(Errno::EBUSY));
    rig.ask_in(guest, tx, Kind::TransactionEnd, &["T"]).unwrap();
    assert_eq!(rig.ok(dom0, Kind::Read, &["/d/x"]), b"1\0");
    assert_eq!(rig.ask_in(guest, tx, Kind::TransactionEnd, &["T"]), Err(Errno::ENOENT));

    let tx = rig.start(guest);
    rig.ask_in(guest, tx, Kind::Read, &["/d/x"]).unwrap();
    rig.ok(dom0, Kind::Write, &["/d/x", "2"]);
    rig.ask_in(guest, tx, Kind::Write, &["/d/y", "1"]).unwrap();
    assert_eq!(rig.ask_in(guest, tx, Kind::TransactionEnd, &["T"]), Err(Errno::EAGAIN));
    assert_eq!(rig.ask(dom0, Kind::Read, &["/d/y"]), Err(Errno::ENOENT));
}

#[test]
fn a_transactions_watches_fire_once_at_its_end() {
    let mut rig = Rig::new();
    rig.ok(rig.dom0, Kind::Watch, &["/d", "t"]);
    rig.events();
    let tx = rig.start(rig.guest);
    for n in 0..100 {
        rig.ask_in(rig.guest, tx, Kind::Write, &["/d/x", &n.to_string()]).unwrap();
    }
    assert_eq!(rig.events(), []);
    rig.ask_in(rig.guest, tx, Kind::TransactionEnd, &["T"]).unwrap();
    assert_eq!(rig.events().len(), 1);
}

#[test]
fn a_connection_that_ends_leaves_nothing() {
    let mut rig = Rig::new();
    rig.ok(rig.guest, Kind::Watch, &["/d", "t"]);
    let tx = rig.start(rig.guest);
    rig.ask_in(rig.guest, tx, Kind::Write, &["/d/x", "1"]).unwrap();
    rig.events();
    rig.store.disconnect(rig.guest);
    rig.ok(rig.dom0, Kind::Write, &["/d/x", "1"]);
    assert_eq!(rig.events(), []);
    assert_eq!(rig.ask(rig.guest, Kind::Read, &["/d"]), Err(Errno::EINVAL));
    assert_eq!(rig.store.connections(), 1);
}

#[test]
fn deep_trees_need_no_stack() {
    let mut rig = Rig::new();
    let deep = "/d".to_owned() + &"/x".repeat(1000);
    rig.ok(rig.dom0, Kind::Mkdir, &[&deep]);
    rig.ok(rig.dom0, Kind::Rm, &["/d/x"]);
    assert_eq!(rig.ok(rig.dom0, Kind::Directory, &["/d"]), b"");
}
