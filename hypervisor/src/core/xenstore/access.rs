//! Who may reach which node.

use std::sync::Arc;

use super::perms::{Asker, Rights};
use super::tree::{Node, View};
use super::{Errno, path};

/// The node, if `asker` has the rights. Where it is not there, `ENOENT` only for who has them on
/// the nearest folder that is: others are not told.
pub(super) fn get(
    view: &mut View<'_>,
    asker: Asker,
    path: &str,
    wanted: Rights,
) -> Result<Arc<Node>, Errno> {
    match view.get(path)? {
        Some(node) if asker.rights(&node.perms).covers(wanted) => Ok(node),
        Some(_) => Err(Errno::EACCES),
        None => Err(absent(view, asker, path, wanted)?),
    }
}

fn absent(view: &mut View<'_>, asker: Asker, path: &str, wanted: Rights) -> Result<Errno, Errno> {
    let mut folder = path;
    while folder != "/" {
        folder = path::parent(folder);
        if let Some(node) = view.get(folder)? {
            let may = asker.rights(&node.perms).covers(wanted);
            return Ok(if may { Errno::ENOENT } else { Errno::EACCES });
        }
    }
    Ok(Errno::EACCES)
}
