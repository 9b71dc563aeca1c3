//! Paths of nodes.

use crate::DomId;
use crate::store::wire::{ABS_PATH_MAX, REL_PATH_MAX};

/// The event of a domain that was introduced.
pub const INTRODUCE: &str = "@introduceDomain";
/// The event of a domain that was released, or that died.
pub const RELEASE: &str = "@releaseDomain";

/// Whether `@` paths count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// They do.
    Allowed,
    /// They do not.
    Refused,
}

/// A domain's folder.
pub fn domain(domid: DomId) -> String {
    format!("/local/domain/{domid}")
}

/// The folder that a node is in; the root's is the root.
pub fn parent(path: &str) -> &str {
    match path.rfind('/') {
        None | Some(0) => "/",
        Some(i) => &path[..i],
    }
}

/// The last part.
pub fn name(path: &str) -> &str {
    path.rfind('/').map_or(path, |i| &path[i + 1..])
}

/// A node in a folder.
pub fn join(folder: &str, name: &str) -> String {
    if folder == "/" { format!("/{name}") } else { format!("{folder}/{name}") }
}

/// Whether `path` is `folder` or in it; the number of levels between them if so.
pub fn levels_below(path: &str, folder: &str) -> Option<usize> {
    if path == folder {
        return Some(0);
    }
    let rest = match folder {
        "/" => path.strip_prefix('/')?,
        _ => path.strip_prefix(folder)?.strip_prefix('/')?,
    };
    Some(rest.bytes().filter(|b| *b == b'/').count() + 1)
}

/// Whether a path is well formed: absolute, of the characters that names may have, no empty
/// part, no slash at the end, not too long.
pub fn is_valid(path: &str, special: Special) -> bool {
    let starts = match path.as_bytes().first() {
        Some(b'/') => true,
        Some(b'@') => special == Special::Allowed,
        _ => false,
    };
    let chars = path.bytes().all(|b| b.is_ascii_alphanumeric() || b"-/_@".contains(&b));
    let ends = path == "/" || !path.ends_with('/');
    starts && chars && ends && !path.contains("//") && is_short(path)
}

/// A path may have [`REL_PATH_MAX`] bytes after `/local/domain/N/`, and [`ABS_PATH_MAX`] at all.
fn is_short(path: &str) -> bool {
    let tail = path.strip_prefix("/local/domain/").and_then(|rest| {
        let (number, tail) = rest.split_once('/')?;
        (number.len() <= 5 && number.bytes().all(|b| b.is_ascii_digit())).then_some(tail)
    });
    path.len() <= ABS_PATH_MAX && tail.unwrap_or(path).len() <= REL_PATH_MAX
}

/// The absolute form of what a client sent, if it is valid. `home` is where its relative paths
/// start.
pub fn canonical(sent: &str, home: &str, special: Special) -> Option<String> {
    let path = if sent.starts_with('/') || sent.starts_with('@') {
        sent.to_owned()
    } else {
        format!("{home}/{sent}")
    };
    is_valid(&path, special).then_some(path)
}
