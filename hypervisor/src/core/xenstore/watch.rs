//! Watches.

use std::collections::{BTreeMap, HashMap};

use super::perms::{Asker, Perm, Rights};
use super::tree::Tree;
use super::{ConnId, Errno, path};
use crate::DomId;

/// A watch event that is to be sent: path and token, each ended by NUL on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// To whom.
    pub conn: ConnId,
    /// What changed, relative where the watch was.
    pub path: String,
    /// The watch's token.
    pub token: Vec<u8>,
}

/// A change that watches are told of.
#[derive(Clone, Debug)]
pub(super) struct Fire {
    path: String,
    /// Permissions that the node had, where it is gone or they have changed.
    perms: Option<Vec<Perm>>,
    /// Tell only watches on this very node.
    exact: bool,
    /// The domain that an `@` event is about.
    about: Option<DomId>,
}

impl Fire {
    pub(super) fn changed(path: &str) -> Self {
        Fire { path: path.to_owned(), perms: None, exact: false, about: None }
    }
    pub(super) fn perms_changed(path: &str, old: Vec<Perm>) -> Self {
        Fire { perms: Some(old), ..Self::changed(path) }
    }
    pub(super) fn removed(path: &str, old: Vec<Perm>, exact: bool) -> Self {
        Fire { perms: Some(old), exact, ..Self::changed(path) }
    }
    pub(super) fn path(&self) -> &str {
        &self.path
    }
    /// Makes one of two changes of the same node.
    pub(super) fn merge(&mut self, later: Fire) {
        self.exact &= later.exact;
        self.perms = later.perms.or(self.perms.take());
    }
    pub(super) fn special(name: &str, about: DomId) -> Self {
        Fire { exact: true, about: Some(about), ..Self::changed(name) }
    }
}

#[derive(Clone, Debug)]
struct Watch {
    conn: ConnId,
    domid: DomId,
    token: Vec<u8>,
    /// Bytes of the absolute path that the client did not write itself.
    implied: usize,
    depth: Option<usize>,
}

impl Watch {
    fn event(&self, path: &str) -> Event {
        let path = path.get(self.implied..).unwrap_or_default();
        Event { conn: self.conn, path: path.to_owned(), token: self.token.clone() }
    }
    /// The path that an event of this change has, if the watch is deep enough for it.
    fn sees(&self, fire: &Fire, levels: usize) -> Option<Event> {
        if self.depth.is_some_and(|depth| levels > depth) {
            return None;
        }
        match fire.about {
            Some(domid) if self.depth.is_some_and(|depth| depth > 0) => {
                Some(self.event(&format!("{}/{domid}", fire.path)))
            }
            _ => Some(self.event(&fire.path)),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Watches {
    by_path: HashMap<String, Vec<Watch>>,
}

/// What a client asks for.
pub(super) struct Wanted<'a> {
    pub(super) path: String,
    pub(super) token: &'a [u8],
    pub(super) implied: usize,
    pub(super) depth: Option<usize>,
}

impl Watches {
    /// Adds a watch and returns its first event, which every watch gets at once.
    pub(super) fn add(
        &mut self,
        conn: ConnId,
        domid: DomId,
        wanted: Wanted<'_>,
    ) -> Result<Event, Errno> {
        let here = self.by_path.entry(wanted.path.clone()).or_default();
        if here.iter().any(|w| w.conn == conn && w.token == wanted.token) {
            return Err(Errno::EEXIST);
        }
        let (implied, depth) = (wanted.implied, wanted.depth);
        let watch = Watch { conn, domid, token: wanted.token.to_vec(), implied, depth };
        let event = watch.event(&wanted.path);
        here.push(watch);
        Ok(event)
    }

    pub(super) fn remove(&mut self, conn: ConnId, path: &str, token: &[u8]) -> Result<(), Errno> {
        let here = self.by_path.get_mut(path).ok_or(Errno::ENOENT)?;
        let mine = here.iter().position(|w| w.conn == conn && w.token == token);
        here.remove(mine.ok_or(Errno::ENOENT)?);
        if here.is_empty() {
            self.by_path.remove(path);
        }
        Ok(())
    }

    pub(super) fn remove_conn(&mut self, conn: ConnId) {
        self.by_path.retain(|_, here| {
            here.retain(|w| w.conn != conn);
            !here.is_empty()
        });
    }

    /// Appends the events of a change.
    pub(super) fn fire(
        &self,
        fire: &Fire,
        tree: &Tree,
        targets: &BTreeMap<DomId, DomId>,
        events: &mut Vec<Event>,
    ) {
        let (mut at, mut levels) = (fire.path.as_str(), 0);
        loop {
            for watch in self.by_path.get(at).map_or(&[][..], Vec::as_slice) {
                let asker = Asker::new(watch.domid, targets);
                if let Some(event) = watch.sees(fire, levels)
                    && permitted(fire, tree, asker)
                {
                    events.push(event);
                }
            }
            if fire.exact || at == "/" || !at.starts_with('/') {
                return;
            }
            at = path::parent(at);
            levels += 1;
        }
    }
}

/// Whether the change may be known: the node is readable or was before the change, or the
/// folder that it is in is.
fn permitted(fire: &Fire, tree: &Tree, asker: Asker) -> bool {
    let readable = |perms: &[Perm]| asker.rights(perms).covers(Rights::READ);
    let was = fire.perms.as_ref().is_some_and(|old| readable(old));
    let own = was || tree.main(&fire.path).is_some_and(|n| readable(&n.perms));
    let folder = path::parent(&fire.path);
    own || (fire.path.starts_with('/') && tree.main(folder).is_some_and(|n| readable(&n.perms)))
}
