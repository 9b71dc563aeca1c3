//! Permissions of nodes. The first entry names the owner, and what everybody may do who is not
//! named after it.

use std::collections::BTreeMap;

use super::Errno;
use crate::DomId;

/// What one entry allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// `r`
    pub read: bool,
    /// `w`
    pub write: bool,
}

impl Rights {
    /// `n`
    pub const NONE: Rights = Rights { read: false, write: false };
    /// `r`
    pub const READ: Rights = Rights { read: true, write: false };
    /// `w`
    pub const WRITE: Rights = Rights { read: false, write: true };
    /// `b`
    pub const BOTH: Rights = Rights { read: true, write: true };

    /// Whether all of `wanted` is in it.
    pub fn covers(self, wanted: Rights) -> bool {
        (self.read || !wanted.read) && (self.write || !wanted.write)
    }
    fn letter(self) -> char {
        match (self.read, self.write) {
            (false, false) => 'n',
            (true, false) => 'r',
            (false, true) => 'w',
            (true, true) => 'b',
        }
    }
    fn from_letter(letter: u8) -> Option<Self> {
        Some(match letter {
            b'n' => Rights::NONE,
            b'r' => Rights::READ,
            b'w' => Rights::WRITE,
            b'b' => Rights::BOTH,
            _ => return None,
        })
    }
}

/// One entry, `r5` on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Perm {
    /// Who.
    pub domid: DomId,
    /// What.
    pub rights: Rights,
}

impl Perm {
    /// An entry.
    pub fn new(domid: DomId, rights: Rights) -> Self {
        Perm { domid, rights }
    }
    /// From its form on the wire.
    pub fn parse(text: &[u8]) -> Result<Self, Errno> {
        let (letter, number) = text.split_first().ok_or(Errno::EINVAL)?;
        let rights = Rights::from_letter(*letter).ok_or(Errno::EINVAL)?;
        Ok(Perm { domid: parse_domid(number)?, rights })
    }
}

impl std::fmt::Display for Perm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.rights.letter(), self.domid)
    }
}

/// A domain's number in decimal digits.
pub(super) fn parse_domid(text: &[u8]) -> Result<DomId, Errno> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let text = str::from_utf8(text).map_err(|_| Errno::EINVAL)?;
    text.parse().ok().filter(|_| digits).ok_or(Errno::EINVAL)
}

/// Who asks: the domain, and the domain that it serves as a device model, if any.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker {
    pub(super) domid: DomId,
    pub(super) target: Option<DomId>,
}

impl Asker {
    pub(super) fn new(domid: DomId, targets: &BTreeMap<DomId, DomId>) -> Self {
        Asker { domid, target: targets.get(&domid).copied() }
    }
    pub(super) fn is_privileged(self) -> bool {
        self.domid == 0
    }
    fn is(self, domid: DomId) -> bool {
        self.domid == domid || self.target == Some(domid)
    }
    /// What this domain may do where these permissions stand.
    pub(super) fn rights(self, perms: &[Perm]) -> Rights {
        let Some(owner) = perms.first() else { return Rights::NONE };
        if self.owns(perms) {
            return Rights::BOTH;
        }
        perms[1..].iter().find(|p| self.is(p.domid)).unwrap_or(owner).rights
    }
    pub(super) fn owns(self, perms: &[Perm]) -> bool {
        self.is_privileged() || perms.first().is_some_and(|p| self.is(p.domid))
    }
}
