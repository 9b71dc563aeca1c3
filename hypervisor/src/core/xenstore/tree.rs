//! Nodes and transactions on them.
//!
//! A transaction keeps each node as it was when it first looked at it, and its own changes
//! aside; it commits only if all those nodes are still of the same generation.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::perms::{Perm, Rights};
use super::watch::Fire;
use super::{Errno, limits, path};
use crate::DomId;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) data: Vec<u8>,
    pub(super) perms: Vec<Perm>,
    /// Names in the order in which they came.
    pub(super) children: Vec<String>,
    pub(super) generation: u64,
}

impl Node {
    fn empty(perms: Vec<Perm>) -> Self {
        Node { data: Vec::new(), perms, children: Vec::new(), generation: 0 }
    }
    pub(super) fn owner(&self) -> DomId {
        self.perms.first().map_or(0, |p| p.domid)
    }
    /// Bytes as xenstored counts them against a domain's limit.
    pub(super) fn bytes(&self) -> usize {
        let children: usize = self.children.iter().map(|name| name.len() + 1).sum();
        24 + 8 * self.perms.len() + self.data.len() + children
    }
}

#[derive(Clone, Debug)]
pub(super) struct Tree {
    nodes: HashMap<String, Arc<Node>>,
    /// Nodes by owner; domain 0's are not counted.
    owned: BTreeMap<DomId, i64>,
    generation: u64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Transaction {
    seen: HashMap<String, Option<Arc<Node>>>,
    changed: BTreeMap<String, Option<Arc<Node>>>,
    /// One a node, however often it changes.
    fires: Vec<Fire>,
    fire_of: HashMap<String, usize>,
    owned: BTreeMap<DomId, i64>,
}

/// The tree as a request sees it: as it is, or through its transaction.
pub(super) struct View<'a> {
    pub(super) tree: &'a mut Tree,
    pub(super) tx: Option<&'a mut Transaction>,
    pub(super) fires: &'a mut Vec<Fire>,
    /// How many nodes a transaction may touch.
    pub(super) max_nodes: usize,
}

impl Tree {
    pub(super) fn new() -> Self {
        let mut tree = Tree { nodes: HashMap::new(), owned: BTreeMap::new(), generation: 1 };
        let perms = || vec![Perm::new(0, Rights::NONE)];
        let with = |child: &str| Node { children: vec![child.into()], ..Node::empty(perms()) };
        let mut add = |path: &str, node| tree.nodes.insert(path.to_owned(), Arc::new(node));
        add("/", with("tool"));
        add("/tool", with("xenstored"));
        for path in ["/tool/xenstored", path::INTRODUCE, path::RELEASE] {
            add(path, Node::empty(perms()));
        }
        tree
    }

    pub(super) fn main(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path).map(Arc::as_ref)
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    fn count(&mut self, domid: DomId, by: i64) {
        if domid != 0 {
            *self.owned.entry(domid).or_insert(0) += by;
        }
    }

    /// Commits. `EAGAIN`: something that the transaction saw has changed since.
    pub(super) fn commit(&mut self, tx: Transaction, fires: &mut Vec<Fire>) -> Result<(), Errno> {
        let generation = |node: Option<&Arc<Node>>| node.map(|n| n.generation);
        let same = |(path, seen): (&String, &Option<Arc<Node>>)| {
            generation(self.nodes.get(path)) == generation(seen.as_ref())
        };
        if !tx.seen.iter().all(same) {
            return Err(Errno::EAGAIN);
        }
        let over = |(domid, by): (&DomId, &i64)| {
            *by > 0 && self.owned.get(domid).unwrap_or(&0) + by > limits::NODES
        };
        if tx.owned.iter().any(over) {
            return Err(Errno::ENOSPC);
        }
        for (path, node) in tx.changed {
            match node {
                Some(mut node) => {
                    self.generation += 1;
                    Arc::make_mut(&mut node).generation = self.generation;
                    self.nodes.insert(path, node);
                }
                None => {
                    self.nodes.remove(&path);
                }
            }
        }
        for (domid, by) in tx.owned {
            self.count(domid, by);
        }
        fires.extend(tx.fires);
        Ok(())
    }

    /// Removes what a domain owns (with all that is below it) and its entries in permissions
    /// elsewhere: the number may come to mean another domain.
    pub(super) fn forget_domain(&mut self, domid: DomId, fires: &mut Vec<Fire>) {
        let named = |n: &Node| n.perms.iter().any(|p| p.domid == domid);
        let mut paths: Vec<String> =
            self.nodes.iter().filter(|(_, n)| named(n)).map(|(p, _)| p.clone()).collect();
        paths.sort_unstable();
        for path in paths {
            let Some(node) = self.nodes.get_mut(&path) else { continue };
            if node.owner() == domid && path.starts_with('/') && path != "/" {
                let mut view = View { tree: self, tx: None, fires, max_nodes: usize::MAX };
                let _ = view.remove_subtree(&path);
            } else {
                let node = Arc::make_mut(node);
                node.perms.retain(|p| p.domid != domid);
                if node.perms.is_empty() {
                    node.perms.push(Perm::new(0, Rights::NONE));
                }
            }
        }
        self.owned.remove(&domid);
    }
}

impl View<'_> {
    /// A node, if it is there.
    pub(super) fn get(&mut self, path: &str) -> Result<Option<Arc<Node>>, Errno> {
        let Some(tx) = self.tx.as_mut() else { return Ok(self.tree.nodes.get(path).cloned()) };
        if let Some(node) = tx.changed.get(path).or_else(|| tx.seen.get(path)) {
            return Ok(node.clone());
        }
        if tx.seen.len() >= self.max_nodes {
            return Err(Errno::ENOSPC);
        }
        let node = self.tree.nodes.get(path).cloned();
        tx.seen.insert(path.to_owned(), node.clone());
        Ok(node)
    }

    /// Nodes that a domain owns as this view sees it.
    pub(super) fn owned(&self, domid: DomId) -> i64 {
        let main = self.tree.owned.get(&domid).copied().unwrap_or(0);
        let tx = self.tx.as_ref().and_then(|tx| tx.owned.get(&domid)).copied().unwrap_or(0);
        main + tx
    }

    fn count(&mut self, domid: DomId, by: i64) {
        match self.tx.as_mut() {
            Some(tx) if domid != 0 => *tx.owned.entry(domid).or_insert(0) += by,
            Some(_) => {}
            None => self.tree.count(domid, by),
        }
    }

    /// Stores a node, counting it against its owner.
    pub(super) fn put(&mut self, path: &str, mut node: Node) -> Result<(), Errno> {
        if let Some(old) = self.get(path)? {
            self.count(old.owner(), -1);
        }
        self.count(node.owner(), 1);
        self.tree.generation += 1;
        node.generation = self.tree.generation;
        let node = Arc::new(node);
        match self.tx.as_mut() {
            Some(tx) => {
                tx.changed.insert(path.to_owned(), Some(node));
            }
            None => {
                self.tree.nodes.insert(path.to_owned(), node);
            }
        }
        Ok(())
    }

    fn drop_node(&mut self, path: &str, node: &Node) {
        self.count(node.owner(), -1);
        match self.tx.as_mut() {
            Some(tx) => {
                tx.changed.insert(path.to_owned(), None);
            }
            None => {
                self.tree.nodes.remove(path);
            }
        }
    }

    /// Notes that watches are to fire, now or when the transaction commits.
    pub(super) fn fire(&mut self, fire: Fire) {
        match self.tx.as_mut() {
            Some(tx) => match tx.fire_of.get(fire.path()) {
                Some(i) => tx.fires[*i].merge(fire),
                None => {
                    tx.fire_of.insert(fire.path().to_owned(), tx.fires.len());
                    tx.fires.push(fire);
                }
            },
            None => self.fires.push(fire),
        }
    }

    /// Removes a node and all below it, and its name from its parent. Deeper nodes go first;
    /// their watches fire where they are exactly on them.
    pub(super) fn remove_subtree(&mut self, top: &str) -> Result<(), Errno> {
        let folder = path::parent(top);
        let parent = self.get(folder)?;
        let mut order = vec![top.to_owned()];
        let mut next = 0;
        while let Some(path) = order.get(next).cloned() {
            if let Some(node) = self.get(&path)? {
                order.extend(node.children.iter().map(|name| path::join(&path, name)));
            }
            next += 1;
        }
        for path in order.iter().rev() {
            let Some(node) = self.get(path)? else { continue };
            self.drop_node(path, &node);
            self.fire(Fire::removed(path, node.perms.clone(), path != top));
        }
        if let Some(parent) = parent {
            let mut parent = Arc::unwrap_or_clone(parent);
            parent.children.retain(|name| name != path::name(top));
            self.put(folder, parent)?;
        }
        Ok(())
    }

    /// Creates a node and the folders above it that are missing, each with its parent's
    /// permissions; `owner`, where there is one, owns them.
    pub(super) fn create(
        &mut self,
        path: &str,
        data: Vec<u8>,
        owner: Option<DomId>,
    ) -> Result<(), Errno> {
        let mut missing = vec![path];
        let mut folder = path::parent(path);
        let mut parent = loop {
            match self.get(folder)? {
                Some(node) => break Arc::unwrap_or_clone(node),
                // A root that is not there ends the walk instead of going round.
                None if folder == "/" => return Err(Errno::ENOENT),
                None => missing.push(folder),
            }
            folder = path::parent(folder);
        };
        if let Some(owner) = owner
            && self.owned(owner) + missing.len() as i64 > limits::NODES
        {
            return Err(Errno::ENOSPC);
        }
        // All is built and judged before anything is stored.
        let mut built = Vec::with_capacity(missing.len() + 1);
        let mut data = Some(data);
        while let Some(new) = missing.pop() {
            let mut node = Node::empty(parent.perms.clone());
            if let (Some(owner), Some(first)) = (owner, node.perms.first_mut()) {
                first.domid = owner;
            }
            if missing.is_empty() {
                node.data = data.take().unwrap_or_default();
            }
            parent.children.push(path::name(new).to_owned());
            built.push((path::parent(new), parent));
            parent = node;
        }
        built.push((path, parent));
        if owner.is_some() && built.iter().any(|(_, n)| n.bytes() >= limits::NODE_BYTES) {
            return Err(Errno::ENOSPC);
        }
        built.into_iter().try_for_each(|(path, node)| self.put(path, node))
    }
}
