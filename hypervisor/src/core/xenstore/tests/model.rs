//! The wire against a model: for any bytes, whether a request is accepted and what comes back.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// A node of the model: value, then permissions as on the wire.
type Entry = (Vec<u8>, Vec<String>);

/// The tree as a map from whole paths; folders are whatever has longer paths.
struct Model(BTreeMap<String, Entry>);

fn parts(payload: &[u8]) -> Option<Vec<String>> {
    // What is no text becomes a character that no name may have.
    let text = String::from_utf8_lossy(payload);
    let text = text.strip_suffix('\0')?;
    Some(text.split('\0').map(str::to_owned).collect())
}

fn good_path(sent: &str, domid: u16) -> Option<String> {
    let full = if sent.starts_with('/') {
        sent.to_owned()
    } else {
        format!("/local/domain/{domid}/{sent}")
    };
    let names: Vec<&str> = full[1..].split('/').collect();
    let good = |c: char| c.is_ascii_alphanumeric() || "-_@".contains(c);
    let fine = full == "/" || names.iter().all(|n| !n.is_empty() && n.chars().all(good));
    (fine && full.len() <= 2048 && !sent.starts_with('@')).then_some(full)
}

fn up(path: &str) -> String {
    let cut = path.rfind('/').unwrap();
    if cut == 0 { "/".into() } else { path[..cut].to_owned() }
}

fn letter(perms: &[String], domid: u16) -> char {
    let owner = &perms[0];
    if domid == 0 || owner[1..] == domid.to_string() {
        return 'b';
    }
    let named = perms[1..].iter().find(|p| p[1..] == domid.to_string());
    named.unwrap_or(owner).chars().next().unwrap()
}

fn may(perms: &[String], domid: u16, right: char) -> bool {
    let has = letter(perms, domid);
    has == 'b' || has == right
}

impl Model {
    fn find(&self, path: &str, domid: u16, right: char) -> Result<&Entry, Errno> {
        if let Some(entry) = self.0.get(path) {
            return if may(&entry.1, domid, right) { Ok(entry) } else { Err(Errno::EACCES) };
        }
        let mut at = up(path);
        while !self.0.contains_key(&at) {
            at = up(&at);
        }
        Err(if may(&self.0[&at].1, domid, right) { Errno::ENOENT } else { Errno::EACCES })
    }

    fn make(&mut self, path: &str, domid: u16, data: Vec<u8>) {
        if path != "/" && !self.0.contains_key(&up(path)) {
            self.make(&up(path), domid, Vec::new());
        }
        let mut perms = self.0[&up(path)].1.clone();
        if domid != 0 {
            perms[0] = format!("{}{domid}", &perms[0][..1]);
        }
        self.0.insert(path.to_owned(), (data, perms));
    }

    fn children(&self, path: &str) -> Vec<String> {
        let own = |p: &&String| p.as_str() != "/" && up(p) == path;
        self.0.keys().filter(own).map(|p| p.rsplit('/').next().unwrap().to_owned()).collect()
    }

    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.0.retain(|p, _| p != path && !p.starts_with(&below));
    }

    fn set_perms(&mut self, args: &[String], domid: u16) -> Result<Vec<u8>, Errno> {
        let (sent, perms) = args.split_first().ok_or(Errno::EINVAL)?;
        if perms.is_empty() {
            return Err(Errno::EINVAL);
        }
        if domid != 0 && perms.len() > 5 {
            return Err(Errno::ENOSPC);
        }
        let fine = |p: &String| {
            "nrwb".contains(p.chars().next().unwrap_or('x'))
                && !p[1..].is_empty()
                && p[1..].chars().all(|c| c.is_ascii_digit())
                && p[1..].parse::<u16>().is_ok()
        };
        if !perms.iter().all(fine) {
            return Err(Errno::EINVAL);
        }
        let perms: Vec<String> = perms
            .iter()
            .map(|p| format!("{}{}", &p[..1], p[1..].parse::<u16>().unwrap()))
            .collect();
        if !["0", "5", "6"].contains(&&perms[0][1..]) {
            return Err(Errno::ENOENT);
        }
        let path = good_path(sent, domid).ok_or(Errno::EINVAL)?;
        let old = self.find(&path, domid, 'w')?.1[0][1..].to_owned();
        if domid != 0 && old != domid.to_string() {
            return Err(Errno::EACCES);
        }
        if domid != 0 && perms[0][1..] != old {
            return Err(Errno::EPERM);
        }
        self.0.get_mut(&path).unwrap().1 = perms;
        Ok(OK.to_vec())
    }

    fn write(&mut self, payload: &[u8], domid: u16) -> Result<Vec<u8>, Errno> {
        let cut = payload.iter().position(|b| *b == 0).ok_or(Errno::EINVAL)?;
        let sent = str::from_utf8(&payload[..cut]).map_err(|_| Errno::EINVAL)?;
        let path = good_path(sent, domid).ok_or(Errno::EINVAL)?;
        let data = payload[cut + 1..].to_vec();
        match self.find(&path, domid, 'w').map(drop) {
            Ok(()) => self.0.get_mut(&path).unwrap().0 = data,
            Err(Errno::ENOENT) => self.make(&path, domid, data),
            Err(e) => return Err(e),
        }
        Ok(OK.to_vec())
    }

    fn handle(&mut self, kind: Kind, payload: &[u8], domid: u16) -> Result<Vec<u8>, Errno> {
        if kind == Kind::Write {
            return self.write(payload, domid);
        }
        let args = parts(payload).ok_or(Errno::EINVAL)?;
        if kind == Kind::SetPerms {
            return self.set_perms(&args, domid);
        }
        let [sent] = &args[..] else { return Err(Errno::EINVAL) };
        let path = good_path(sent, domid).ok_or(Errno::EINVAL)?;
        match kind {
            Kind::Read => Ok(self.find(&path, domid, 'r')?.0.clone()),
            Kind::GetPerms => {
                let perms = &self.find(&path, domid, 'r')?.1;
                Ok(perms.iter().flat_map(|p| p.bytes().chain([0])).collect())
            }
            Kind::Directory => {
                self.find(&path, domid, 'r')?;
                Ok(self.children(&path).iter().flat_map(|n| n.bytes().chain([0])).collect())
            }
            Kind::Mkdir => match self.find(&path, domid, 'w').map(drop) {
                Err(Errno::ENOENT) => {
                    self.make(&path, domid, Vec::new());
                    Ok(OK.to_vec())
                }
                other => other.map(|()| OK.to_vec()),
            },
            _ => match self.find(&path, domid, 'w').map(drop) {
                Ok(()) if path == "/" => Err(Errno::EINVAL),
                Ok(()) => {
                    self.remove(&path);
                    Ok(OK.to_vec())
                }
                Err(Errno::ENOENT) if self.0.contains_key(&up(&path)) => Ok(OK.to_vec()),
                Err(e) => Err(e),
            },
        }
    }
}

const KINDS: [Kind; 7] = [
    Kind::Read,
    Kind::GetPerms,
    Kind::Directory,
    Kind::Mkdir,
    Kind::Rm,
    Kind::Write,
    Kind::SetPerms,
];

/// Pieces that make meaningful payloads likely.
const PIECES: [&[u8]; 20] = [
    b"/",
    b"\0",
    b"d",
    b"/d",
    b"/d/a",
    b"/d/a/b",
    b"a",
    b"/d\0",
    b"/d/a\0",
    b"/\0",
    b"n5\0",
    b"b5\0",
    b"r6\0",
    b"w0\0",
    b"/d/e\0",
    b"/local/domain/5/x\0",
    b"@",
    b"\xff",
    b"x\0",
    b"n9\0",
];

/// Reads requests out of bytes (connection and kind, number of pieces, pieces) and has the
/// store and the model answer each.
fn run(mut input: &[u8]) {
    let mut rig = Rig::new();
    let conns = [(rig.dom0, 0), (rig.guest, 5), (rig.store.connect(6), 6)];
    let mut model = Model(BTreeMap::new());
    for path in ["/", "/tool", "/tool/xenstored", "/d"] {
        let perms = rig.ok(rig.dom0, Kind::GetPerms, &[path]);
        model.0.insert(path.to_owned(), (Vec::new(), parts(&perms).unwrap()));
    }
    let mut byte = || {
        let (first, rest) = input.split_first()?;
        input = rest;
        Some(usize::from(*first))
    };
    while let (Some(who), Some(count)) = (byte(), byte()) {
        let (id, domid) = conns[who % 3];
        let kind = KINDS[who / 3 % KINDS.len()];
        let mut payload = Vec::new();
        for _ in 0..count % 5 {
            match byte() {
                Some(piece) if piece < 240 => payload.extend(PIECES[piece % PIECES.len()]),
                Some(raw) => payload.push(raw as u8),
                None => break,
            }
        }
        let mut ours = rig.store.handle(id, kind as u32, 0, &payload);
        if let (Kind::Directory, Ok(list)) = (kind, &mut ours) {
            let mut names = if list.is_empty() { Vec::new() } else { parts(list).unwrap() };
            names.sort();
            *list = names.iter().flat_map(|n| n.bytes().chain([0])).collect();
        }
        let theirs = model.handle(kind, &payload, domid);
        assert_eq!(ours, theirs, "{kind:?} by {domid}: {:?}", payload.escape_ascii().to_string());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn the_store_answers_as_the_model(input in prop::collection::vec(any::<u8>(), 0..400)) {
        run(&input);
    }

    /// Any request at all, of any kind and in any transaction, leaves a tree that is whole.
    #[test]
    fn nothing_breaks_the_store(
        requests in prop::collection::vec(
            (0..3usize, 0..25u32, 0..3u32, prop::collection::vec(0..PIECES.len(), 0..5)), 0..60)
    ) {
        let mut rig = Rig::new();
        let conns = [rig.dom0, rig.guest, rig.store.connect(6)];
        for (who, kind, tx, pieces) in requests {
            let payload = pieces.iter().map(|p| PIECES[*p]).collect::<Vec<_>>().concat();
            if let Ok(reply) = rig.store.handle(conns[who], kind, tx, &payload) {
                prop_assert!(reply.len() <= PAYLOAD_MAX);
            }
            rig.store.take_events();
        }
        prop_assert!(rig.store.exists("/"));
    }
}
