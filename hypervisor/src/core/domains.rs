//! Who exists: domains with their grant tables and event channels.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use super::events::Events;
use super::grants::{DEFAULT_FRAMES, GrantError, GrantTable};
use crate::{Access, DomId, GrantRef};

/// The first number that is not a domain's (DOMID_FIRST_RESERVED in xen.h).
pub const FIRST_RESERVED: DomId = 0x7ff0;
/// Domains at a time.
pub const MAX_DOMAINS: usize = 1024;

/// What a domain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Has frontends.
    Guest,
    /// Has backends and is not domain 0.
    Driver,
}

/// Why a domain cannot be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    /// EEXIST.
    #[error("the domain exists")]
    Exists,
    /// EINVAL.
    #[error("not a domain's number")]
    BadNumber,
    /// ENOSPC.
    #[error("too many domains")]
    Full,
}

/// One domain.
#[derive(Debug)]
pub struct Domain {
    /// Tells this domain from an earlier one of the same number.
    pub serial: u64,
    /// What it is for.
    pub kind: Kind,
    /// What it grants.
    pub grants: GrantTable,
}

/// One use of granted pages, as [`Domains::map`] noted it.
#[derive(Debug)]
pub struct Mapped {
    domid: DomId,
    serial: u64,
    refs: Vec<GrantRef>,
    access: Access,
}

impl Mapped {
    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.refs.len()
    }
}

/// All domains. Domain 0 always exists.
#[derive(Debug)]
pub struct Domains {
    domains: BTreeMap<DomId, Domain>,
    /// Their event channels.
    pub events: Events,
    next: DomId,
    serial: u64,
}

impl Default for Domains {
    fn default() -> Self {
        Self::new()
    }
}

impl Domains {
    /// Domain 0 alone.
    pub fn new() -> Self {
        let mut all =
            Domains { domains: BTreeMap::new(), events: Events::new(), next: 1, serial: 0 };
        all.insert(0, Kind::Driver);
        all
    }

    fn insert(&mut self, domid: DomId, kind: Kind) {
        self.serial += 1;
        let grants = GrantTable::new(DEFAULT_FRAMES);
        self.domains.insert(domid, Domain { serial: self.serial, kind, grants });
        self.events.add_domain(domid);
    }

    /// Creates a domain with the number wanted, or with the next one, as Xen counts: upwards,
    /// so that a number is not used again soon.
    pub fn create(&mut self, wanted: Option<DomId>, kind: Kind) -> Result<DomId, CreateError> {
        if self.domains.len() >= MAX_DOMAINS {
            return Err(CreateError::Full);
        }
        let domid = match wanted {
            Some(domid) if domid == 0 || domid >= FIRST_RESERVED => {
                return Err(CreateError::BadNumber);
            }
            Some(domid) if self.domains.contains_key(&domid) => return Err(CreateError::Exists),
            Some(domid) => domid,
            None => {
                while self.domains.contains_key(&self.next) {
                    self.next = self.next % (FIRST_RESERVED - 1) + 1;
                }
                let domid = self.next;
                self.next = self.next % (FIRST_RESERVED - 1) + 1;
                domid
            }
        };
        self.insert(domid, kind);
        Ok(domid)
    }

    /// Ends a domain: its ports close, its grants are gone. Says whether there was one.
    pub fn destroy(&mut self, domid: DomId) -> bool {
        if domid == 0 || self.domains.remove(&domid).is_none() {
            return false;
        }
        self.events.remove_domain(domid);
        true
    }

    /// Looks a domain up.
    pub fn get(&self, domid: DomId) -> Option<&Domain> {
        self.domains.get(&domid)
    }

    /// Looks a domain up.
    pub fn get_mut(&mut self, domid: DomId) -> Option<&mut Domain> {
        self.domains.get_mut(&domid)
    }

    /// All numbers, ascending.
    pub fn numbers(&self) -> Vec<DomId> {
        self.domains.keys().copied().collect()
    }

    /// Takes a batch of `domid`'s references in use for `caller`, all or nothing, and appends
    /// their frames. On an error the index of the reference that was refused.
    pub fn map(
        &mut self,
        caller: DomId,
        domid: DomId,
        refs: &[GrantRef],
        access: Access,
        frames: &mut Vec<u32>,
    ) -> Result<Mapped, (usize, GrantError)> {
        let domain = self.domains.get_mut(&domid).ok_or((0, GrantError::BadDomain))?;
        for (i, gref) in refs.iter().enumerate() {
            match domain.grants.map(caller, *gref, access) {
                Ok(frame) => frames.push(frame),
                Err(e) => {
                    for done in &refs[..i] {
                        let _ = domain.grants.unmap(*done, access);
                    }
                    frames.truncate(frames.len() - i);
                    return Err((i, e));
                }
            }
        }
        Ok(Mapped { domid, serial: domain.serial, refs: refs.to_vec(), access })
    }

    /// Gives a batch back. Nothing happens where the domain is gone.
    pub fn unmap(&mut self, mapped: &Mapped) {
        let Some(domain) = self.domains.get_mut(&mapped.domid) else { return };
        if domain.serial != mapped.serial {
            return;
        }
        for gref in &mapped.refs {
            let _ = domain.grants.unmap(*gref, mapped.access);
        }
    }
}
