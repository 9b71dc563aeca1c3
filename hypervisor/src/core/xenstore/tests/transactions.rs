//! Transactions are serialisable: one that commits answered all along what it would have been
//! answered had it run whole at the moment of its commit, and leaves the same tree.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Start(usize),
    /// Connection, whether in its transaction, kind, path, value.
    Do(usize, bool, usize, usize, u8),
    End(usize, bool),
}

const PATHS: [&str; 8] =
    ["/d", "/d/a", "/d/a/b", "/d/a/b/c", "/d/e", "/d/e/f", "/elsewhere", "/d/a/g"];
const KINDS: [Kind; 6] =
    [Kind::Read, Kind::Directory, Kind::Write, Kind::Mkdir, Kind::Rm, Kind::SetPerms];

fn any_step() -> impl Strategy<Value = Step> {
    let place = (0..3usize, any::<bool>(), 0..KINDS.len(), 0..PATHS.len(), any::<u8>());
    prop_oneof![
        1 => (0..3usize).prop_map(Step::Start),
        6 => place.prop_map(|(c, tx, k, p, v)| Step::Do(c, tx, k, p, v)),
        1 => (0..3usize, prop::bool::weighted(0.8)).prop_map(|(c, how)| Step::End(c, how)),
    ]
}

fn request(kind: usize, path: usize, value: u8) -> (Kind, Vec<u8>) {
    let (kind, path) = (KINDS[kind], PATHS[path]);
    let payload = match kind {
        Kind::Write => [path.as_bytes(), &[0, value]].concat(),
        Kind::SetPerms => strings(&[path, ["n5", "b5", "r5"][value as usize % 3]]),
        _ => strings(&[path]),
    };
    (kind, payload)
}

/// Every node with its value, permissions and sorted children.
fn dump(store: &Store) -> Vec<String> {
    let mut all = Vec::new();
    let mut next = vec!["/".to_owned()];
    while let Some(path) = next.pop() {
        let node = store.tree.main(&path).unwrap_or_else(|| panic!("{path} is only a name"));
        all.push(format!("{path} {:?} {:?}", node.data, node.perms));
        let mut children = node.children.clone();
        children.sort();
        let count = children.len();
        children.dedup();
        assert_eq!(children.len(), count, "{path} has a child twice");
        next.extend(children.iter().map(|name| path::join(&path, name)));
    }
    assert_eq!(all.len() + 2, store.nodes(), "a node is in no folder");
    all
}

type Log = Vec<((Kind, Vec<u8>), Result<Vec<u8>, Errno>)>;

proptest! {
    #[test]
    fn a_commit_is_as_if_it_ran_at_once(steps in prop::collection::vec(any_step(), 1..120)) {
        let mut rig = Rig::new();
        let conns = [rig.dom0, rig.guest, rig.store.connect(5)];
        let mut open: [Option<(u32, Log)>; 3] = [None, None, None];
        for step in steps {
            match step {
                Step::Start(c) if open[c].is_none() => {
                    open[c] = Some((rig.start(conns[c]), Vec::new()));
                }
                Step::Start(_) => {}
                Step::Do(c, inside, kind, path, value) => {
                    let (kind, payload) = request(kind, path, value);
                    match open[c].as_mut().filter(|_| inside) {
                        Some((tx, log)) => {
                            let reply = rig.store.handle(conns[c], kind as u32, *tx, &payload);
                            log.push(((kind, payload), reply));
                        }
                        None => drop(rig.store.handle(conns[c], kind as u32, 0, &payload)),
                    }
                }
                Step::End(c, commit) => {
                    let Some((tx, log)) = open[c].take() else { continue };
                    let mut before = rig.store.clone();
                    let how = if commit { "T" } else { "F" };
                    let ended = rig.ask_in(conns[c], tx, Kind::TransactionEnd, &[how]);
                    if ended.is_ok() && commit {
                        for ((kind, payload), reply) in log {
                            let again = before.handle(conns[c], kind as u32, 0, &payload);
                            prop_assert_eq!(again, reply, "{:?} {:?}", kind, payload);
                        }
                    } else {
                        prop_assert!(matches!(ended, Ok(_) | Err(Errno::EAGAIN)));
                    }
                    prop_assert_eq!(dump(&rig.store), dump(&before));
                }
            }
            dump(&rig.store);
        }
    }
}
