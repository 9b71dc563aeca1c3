//! The requests.

use std::sync::Arc;

use super::path::Special;
use super::perms::{Asker, Perm, Rights, parse_domid};
use super::tree::{Transaction, View};
use super::watch::{Fire, Wanted};
use super::{Conn, ConnId, Errno, Store, access, limits, path};
use crate::store::wire::{Kind, PAYLOAD_MAX, REL_PATH_MAX};

const ACK: &[u8] = b"OK\0";

/// Splits strings that each end in NUL; `EINVAL` where the last does not, or where there is
/// none.
fn strings(payload: &[u8]) -> Result<Vec<&[u8]>, Errno> {
    let body = payload.strip_suffix(b"\0").ok_or(Errno::EINVAL)?;
    Ok(body.split(|b| *b == 0).collect())
}

/// The one string of a payload.
fn one(payload: &[u8]) -> Result<&[u8], Errno> {
    match strings(payload)?[..] {
        [only] => Ok(only),
        _ => Err(Errno::EINVAL),
    }
}

fn text(bytes: &[u8]) -> Result<&str, Errno> {
    str::from_utf8(bytes).map_err(|_| Errno::EINVAL)
}

fn privileged(asker: Asker) -> Result<(), Errno> {
    if asker.is_privileged() { Ok(()) } else { Err(Errno::EACCES) }
}

/// Whether a request of this kind happens in the transaction that its header names; of the
/// others the number is ignored.
fn uses_transaction(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Directory
            | Kind::DirectoryPart
            | Kind::Read
            | Kind::GetPerms
            | Kind::SetPerms
            | Kind::Write
            | Kind::Mkdir
            | Kind::Rm
            | Kind::TransactionStart
            | Kind::TransactionEnd
    )
}

/// What a request on the tree is done with.
struct Call<'a> {
    view: View<'a>,
    asker: Asker,
    home: &'a str,
}

impl Store {
    pub(super) fn dispatch(
        &mut self,
        id: ConnId,
        kind: Kind,
        tx_id: u32,
        payload: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        if let Some(conn) = self.conns.get(&id)
            && uses_transaction(kind)
            && tx_id != 0
            && !conn.transactions.contains_key(&tx_id)
        {
            return Err(Errno::ENOENT);
        }
        match kind {
            Kind::Watch => self.watch(id, payload),
            Kind::Unwatch => self.unwatch(id, payload),
            Kind::ResetWatches => self.reset_watches(id),
            Kind::TransactionStart => self.start(id, tx_id),
            Kind::TransactionEnd => self.end(id, tx_id, payload),
            Kind::GetDomainPath => {
                let domid = parse_domid(one(payload)?)?;
                Ok(format!("{}\0", path::domain(domid)).into_bytes())
            }
            Kind::IsDomainIntroduced => {
                privileged(self.asker(id)?)?;
                let domid = parse_domid(one(payload)?)?;
                Ok(if self.is_introduced(domid) { b"T\0".to_vec() } else { b"F\0".to_vec() })
            }
            Kind::Introduce | Kind::Release | Kind::Resume | Kind::SetTarget | Kind::Control => {
                privileged(self.asker(id)?)?;
                self.domain_request(kind, payload)
            }
            Kind::WatchEvent | Kind::Error => Err(Errno::ENOSYS),
            Kind::SetPerms => {
                let (path, perms) = self.set_perms_args(id, payload)?;
                self.call(id, tx_id)?.set_perms(path, perms)
            }
            _ => self.call(id, tx_id)?.run(kind, payload),
        }
    }

    fn conn(&mut self, id: ConnId) -> Result<&mut Conn, Errno> {
        self.conns.get_mut(&id).ok_or(Errno::EINVAL)
    }

    fn asker(&self, id: ConnId) -> Result<Asker, Errno> {
        let conn = self.conns.get(&id).ok_or(Errno::EINVAL)?;
        Ok(Asker::new(conn.domid, &self.targets))
    }

    /// Path and permissions of XS_SET_PERMS. Their owner exists, and a domain sets not
    /// many.
    fn set_perms_args<'a>(
        &self,
        id: ConnId,
        payload: &'a [u8],
    ) -> Result<(&'a [u8], Vec<Perm>), Errno> {
        let args = strings(payload)?;
        let (path, list) = args.split_first().ok_or(Errno::EINVAL)?;
        let limited = !self.asker(id)?.is_privileged();
        if list.is_empty() {
            return Err(Errno::EINVAL);
        }
        if limited && list.len() > limits::PERMS {
            return Err(Errno::ENOSPC);
        }
        let perms = list.iter().map(|p| Perm::parse(p)).collect::<Result<Vec<_>, _>>()?;
        if !self.known.contains(&perms[0].domid) {
            return Err(Errno::ENOENT);
        }
        Ok((path, perms))
    }

    fn call(&mut self, id: ConnId, tx_id: u32) -> Result<Call<'_>, Errno> {
        let asker = self.asker(id)?;
        let conn = self.conns.get_mut(&id).ok_or(Errno::EINVAL)?;
        let tx = match tx_id {
            0 => None,
            _ => Some(conn.transactions.get_mut(&tx_id).ok_or(Errno::ENOENT)?),
        };
        let max_nodes = if asker.is_privileged() { usize::MAX } else { limits::TRANSACTION_NODES };
        let view = View { tree: &mut self.tree, tx, fires: &mut self.fires, max_nodes };
        Ok(Call { view, asker, home: &conn.home })
    }

    fn start(&mut self, id: ConnId, tx_id: u32) -> Result<Vec<u8>, Errno> {
        if tx_id != 0 {
            return Err(Errno::EBUSY);
        }
        let limit = match self.asker(id)?.is_privileged() {
            true => limits::PRIVILEGED_TRANSACTIONS,
            false => limits::TRANSACTIONS,
        };
        let conn = self.conn(id)?;
        if conn.transactions.len() >= limit {
            return Err(Errno::ENOSPC);
        }
        while conn.next_tx == 0 || conn.transactions.contains_key(&conn.next_tx) {
            conn.next_tx = conn.next_tx.wrapping_add(1);
        }
        let new = conn.next_tx;
        conn.next_tx = new.wrapping_add(1);
        conn.transactions.insert(new, Transaction::default());
        Ok(format!("{new}\0").into_bytes())
    }

    fn end(&mut self, id: ConnId, tx_id: u32, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let how = one(payload)?;
        if how != b"T" && how != b"F" {
            return Err(Errno::EINVAL);
        }
        let tx = self.conn(id)?.transactions.remove(&tx_id).ok_or(Errno::ENOENT)?;
        if how == b"T" {
            self.tree.commit(tx, &mut self.fires)?;
        }
        Ok(ACK.to_vec())
    }

    /// The absolute path that a watch is on, and how much of it the client left out.
    fn watch_path(&mut self, id: ConnId, sent: &[u8]) -> Result<(String, usize), Errno> {
        let sent = text(sent)?;
        let home = &self.conn(id)?.home;
        let path = path::canonical(sent, home, Special::Allowed).ok_or(Errno::EINVAL)?;
        if path.starts_with('@') && path.len() > REL_PATH_MAX {
            return Err(Errno::EINVAL);
        }
        let implied = path.len() - sent.len();
        Ok((path, implied))
    }

    fn watch(&mut self, id: ConnId, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let (sent, token, depth) = match strings(payload)?[..] {
            [sent, token] => (sent, token, None),
            [sent, token, depth] => {
                (sent, token, Some(text(depth)?.parse().map_err(|_| Errno::EINVAL)?))
            }
            _ => return Err(Errno::EINVAL),
        };
        let (path, implied) = self.watch_path(id, sent)?;
        let limit = match self.asker(id)?.is_privileged() {
            true => limits::PRIVILEGED_WATCHES,
            false => limits::WATCHES,
        };
        let conn = self.conns.get_mut(&id).ok_or(Errno::EINVAL)?;
        if conn.watches >= limit {
            return Err(Errno::E2BIG);
        }
        let wanted = Wanted { path, token, implied, depth };
        let first = self.watches.add(id, conn.domid, wanted)?;
        conn.watches += 1;
        self.events.push(first);
        Ok(ACK.to_vec())
    }

    fn unwatch(&mut self, id: ConnId, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let [sent, token] = strings(payload)?[..] else { return Err(Errno::EINVAL) };
        let (path, _) = self.watch_path(id, sent).map_err(|_| Errno::ENOENT)?;
        self.watches.remove(id, &path, token)?;
        self.conn(id)?.watches -= 1;
        Ok(ACK.to_vec())
    }

    fn reset_watches(&mut self, id: ConnId) -> Result<Vec<u8>, Errno> {
        self.watches.remove_conn(id);
        let conn = self.conn(id)?;
        conn.watches = 0;
        conn.transactions.clear();
        Ok(ACK.to_vec())
    }

    fn domain_request(&mut self, kind: Kind, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let args = strings(payload)?;
        let domid = parse_domid(args[0])?;
        match (kind, &args[1..]) {
            // The ring's frame and port mean nothing here: a domain's connection is made by the
            // platform.
            (Kind::Introduce, [_, _]) if self.known.contains(&domid) => self.introduce(domid),
            (Kind::Release, []) if domid == 0 => return Err(Errno::EINVAL),
            (Kind::Release, []) if self.is_introduced(domid) => self.release(domid),
            (Kind::Resume, []) if self.is_introduced(domid) => {}
            (Kind::SetTarget, [target]) if self.is_introduced(domid) => {
                let target = parse_domid(target)?;
                if !self.is_introduced(target) {
                    return Err(Errno::ENOENT);
                }
                self.targets.insert(domid, target);
            }
            (Kind::Release | Kind::Resume, []) | (Kind::SetTarget, [_]) => {
                return Err(Errno::ENOENT);
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(ACK.to_vec())
    }
}

impl Call<'_> {
    fn run(mut self, kind: Kind, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        match kind {
            Kind::Read => {
                let path = self.path(one(payload)?)?;
                Ok(access::get(&mut self.view, self.asker, &path, Rights::READ)?.data.clone())
            }
            Kind::Directory => self.directory(one(payload)?),
            Kind::DirectoryPart => self.directory_part(payload),
            Kind::GetPerms => self.get_perms(one(payload)?),
            Kind::Write => self.write(payload),
            Kind::Mkdir => self.mkdir(one(payload)?),
            Kind::Rm => self.rm(one(payload)?),
            _ => Err(Errno::ENOSYS),
        }
    }

    fn path(&self, sent: &[u8]) -> Result<String, Errno> {
        path::canonical(text(sent)?, self.home, Special::Refused).ok_or(Errno::EINVAL)
    }

    fn owner(&self) -> Option<crate::DomId> {
        (!self.asker.is_privileged()).then_some(self.asker.domid)
    }

    fn directory(&mut self, sent: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = self.path(sent)?;
        let node = access::get(&mut self.view, self.asker, &path, Rights::READ)?;
        Ok(names(&node.children))
    }

    /// Generation, then the names from a byte offset on, as many as fit, each whole; after the
    /// last one an empty one.
    fn directory_part(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let [sent, offset] = strings(payload)?[..] else { return Err(Errno::EINVAL) };
        let path = self.path(sent)?;
        let offset: usize = text(offset)?.parse().map_err(|_| Errno::EINVAL)?;
        let node = access::get(&mut self.view, self.asker, &path, Rights::READ)?;
        let all = names(&node.children);
        let mut reply = format!("{}\0", node.generation).into_bytes();
        let rest = all.get(offset..).unwrap_or_default();
        let room = PAYLOAD_MAX - reply.len();
        if rest.len() < room {
            reply.extend_from_slice(rest);
            reply.push(0);
        } else {
            let whole = rest[..room].iter().rposition(|b| *b == 0).map_or(0, |i| i + 1);
            reply.extend_from_slice(&rest[..whole]);
        }
        Ok(reply)
    }

    fn write(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let end = payload.iter().position(|b| *b == 0).ok_or(Errno::EINVAL)?;
        let path = self.path(&payload[..end])?;
        let data = payload[end + 1..].to_vec();
        match access::get(&mut self.view, self.asker, &path, Rights::WRITE) {
            Ok(node) => {
                let mut node = Arc::unwrap_or_clone(node);
                node.data = data;
                if self.owner().is_some() && node.bytes() >= limits::NODE_BYTES {
                    return Err(Errno::ENOSPC);
                }
                self.view.put(&path, node)?;
            }
            Err(Errno::ENOENT) => self.create(&path, data)?,
            Err(e) => return Err(e),
        }
        self.view.fire(Fire::changed(&path));
        Ok(ACK.to_vec())
    }

    fn create(&mut self, path: &str, data: Vec<u8>) -> Result<(), Errno> {
        let owner = self.owner();
        self.view.create(path, data, owner)
    }

    fn mkdir(&mut self, sent: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = self.path(sent)?;
        match access::get(&mut self.view, self.asker, &path, Rights::WRITE) {
            Ok(_) => return Ok(ACK.to_vec()),
            Err(Errno::ENOENT) => self.create(&path, Vec::new())?,
            Err(e) => return Err(e),
        }
        self.view.fire(Fire::changed(&path));
        Ok(ACK.to_vec())
    }

    fn rm(&mut self, sent: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = self.path(sent)?;
        match access::get(&mut self.view, self.asker, &path, Rights::WRITE) {
            Ok(_) if path == "/" => Err(Errno::EINVAL),
            Ok(_) => self.view.remove_subtree(&path).map(|()| ACK.to_vec()),
            Err(Errno::ENOENT) => match self.view.get(path::parent(&path))? {
                Some(_) => Ok(ACK.to_vec()),
                None => Err(Errno::ENOENT),
            },
            Err(e) => Err(e),
        }
    }

    /// The path of a node, or of one of the two events that have permissions.
    fn special(&self, sent: &[u8]) -> Result<String, Errno> {
        let path = path::canonical(text(sent)?, self.home, Special::Allowed);
        let known = |p: &String| p.starts_with('/') || p == path::INTRODUCE || p == path::RELEASE;
        path.filter(known).ok_or(Errno::EINVAL)
    }

    fn get_perms(&mut self, sent: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = self.special(sent)?;
        let node = access::get(&mut self.view, self.asker, &path, Rights::READ)?;
        let list: String = node.perms.iter().map(|p| format!("{p}\0")).collect();
        Ok(list.into_bytes())
    }

    fn set_perms(&mut self, sent: &[u8], perms: Vec<Perm>) -> Result<Vec<u8>, Errno> {
        let path = self.special(sent)?;
        let node = access::get(&mut self.view, self.asker, &path, Rights::WRITE)?;
        if !self.asker.owns(&node.perms) {
            return Err(Errno::EACCES);
        }
        if self.owner().is_some() && perms[0].domid != node.owner() {
            return Err(Errno::EPERM);
        }
        let mut node = Arc::unwrap_or_clone(node);
        let old = std::mem::replace(&mut node.perms, perms);
        self.view.put(&path, node)?;
        self.view.fire(Fire::perms_changed(&path, old));
        Ok(ACK.to_vec())
    }
}

fn names(children: &[String]) -> Vec<u8> {
    children.iter().flat_map(|name| name.bytes().chain([0])).collect()
}
