//! Grant tables, version 1 (grant_table.h).
//!
//! The entry that a guest sees (flags, domid, frame) is kept apart from the active entry that
//! says who uses it: what was true when a page was mapped stays true until it is unmapped,
//! whatever happens to the entry.

#[cfg(test)]
mod tests;

use crate::{Access, DomId, GrantRef};

/// Entries in one 4096-byte frame of a version 1 table.
pub const ENTRIES_PER_FRAME: usize = 512;
/// Frames of a table where the toolstack says nothing else (Xen's default).
pub const DEFAULT_FRAMES: usize = 64;
/// References below this one are never handed out (GNTTAB_NR_RESERVED_ENTRIES).
pub const RESERVED: GrantRef = 8;
/// How often one reference can be in use at a time (Xen counts pins in eight bits).
pub const MAX_PINS: u32 = 255;

/// GTF_permit_access.
pub const GTF_PERMIT_ACCESS: u16 = 1;
/// GTF_readonly.
pub const GTF_READONLY: u16 = 1 << 2;
/// GTF_reading: somebody has the page mapped.
pub const GTF_READING: u16 = 1 << 3;
/// GTF_writing: somebody has the page mapped writable.
pub const GTF_WRITING: u16 = 1 << 4;

/// Why a grant operation was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// No such domain.
    #[error("no such domain")]
    BadDomain,
    /// The reference is outside the table.
    #[error("reference outside the table")]
    BadReference,
    /// The entry grants nothing (never did, or was revoked).
    #[error("not granted")]
    NotGranted,
    /// The entry grants to another domain.
    #[error("granted to another domain")]
    WrongDomain,
    /// A writable use of a read-only grant.
    #[error("granted read-only")]
    ReadOnly,
    /// The page is mapped, so access to it cannot end.
    #[error("in use")]
    InUse,
    /// Too many uses of one reference.
    #[error("used too often")]
    TooManyPins,
    /// The table is full.
    #[error("no free reference")]
    Full,
    /// A copy outside its page or buffer.
    #[error("copy crosses the page or the buffer")]
    BadCopy,
}

impl GrantError {
    /// The GNTST_* code that Xen answers in this case.
    pub fn gntst(self) -> i16 {
        match self {
            GrantError::BadDomain => -2,
            GrantError::BadReference => -3,
            GrantError::BadCopy => -10,
            GrantError::InUse => -12,
            GrantError::Full => -13,
            GrantError::NotGranted
            | GrantError::WrongDomain
            | GrantError::ReadOnly
            | GrantError::TooManyPins => -1,
        }
    }
    /// A number for the wire between processes; [`from_code`](Self::from_code) takes it back.
    pub fn code(self) -> u16 {
        match self {
            GrantError::BadDomain => 1,
            GrantError::BadReference => 2,
            GrantError::NotGranted => 3,
            GrantError::WrongDomain => 4,
            GrantError::ReadOnly => 5,
            GrantError::InUse => 6,
            GrantError::TooManyPins => 7,
            GrantError::Full => 8,
            GrantError::BadCopy => 9,
        }
    }
    /// The error of a [`code`](Self::code), if it is one.
    pub fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            1 => GrantError::BadDomain,
            2 => GrantError::BadReference,
            3 => GrantError::NotGranted,
            4 => GrantError::WrongDomain,
            5 => GrantError::ReadOnly,
            6 => GrantError::InUse,
            7 => GrantError::TooManyPins,
            8 => GrantError::Full,
            9 => GrantError::BadCopy,
            _ => return None,
        })
    }
}

/// An entry as its guest sees it (`struct grant_entry_v1`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// GTF_* flags; 0 where nothing is granted.
    pub flags: u16,
    /// To whom.
    pub domid: DomId,
    /// Which page; the platform gives the number its meaning.
    pub frame: u32,
}

/// Who uses an entry at the moment.
#[derive(Clone, Copy, Debug, Default)]
struct Active {
    readers: u32,
    writers: u32,
}

/// One domain's grant table.
#[derive(Debug)]
pub struct GrantTable {
    entries: Vec<Entry>,
    active: Vec<Active>,
    free: Vec<GrantRef>,
    max_entries: usize,
}

impl GrantTable {
    /// An empty table that grows to at most `max_frames` frames.
    pub fn new(max_frames: usize) -> Self {
        GrantTable {
            entries: vec![Entry::default(); RESERVED as usize],
            active: vec![Active::default(); RESERVED as usize],
            free: Vec::new(),
            max_entries: max_frames * ENTRIES_PER_FRAME,
        }
    }

    /// Grants `frame` to `peer` and returns the reference.
    pub fn grant(
        &mut self,
        peer: DomId,
        frame: u32,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        let gref = match self.free.pop() {
            Some(gref) => gref,
            None if self.entries.len() < self.max_entries => {
                self.entries.push(Entry::default());
                self.active.push(Active::default());
                (self.entries.len() - 1) as GrantRef
            }
            None => return Err(GrantError::Full),
        };
        let readonly = match access {
            Access::ReadOnly => GTF_READONLY,
            Access::ReadWrite => 0,
        };
        self.entries[gref as usize] =
            Entry { flags: GTF_PERMIT_ACCESS | readonly, domid: peer, frame };
        Ok(gref)
    }

    /// Ends access and frees the reference; refused while the page is in use.
    pub fn end_access(&mut self, gref: GrantRef) -> Result<(), GrantError> {
        let entry = self.entries.get_mut(gref as usize).ok_or(GrantError::BadReference)?;
        if entry.flags & GTF_PERMIT_ACCESS == 0 {
            return Err(GrantError::NotGranted);
        }
        if entry.flags & (GTF_READING | GTF_WRITING) != 0 {
            return Err(GrantError::InUse);
        }
        *entry = Entry::default();
        self.free.push(gref);
        Ok(())
    }

    /// Whether `caller` may use `gref` so; the frame if it may. This is all that a copy needs.
    pub fn check(&self, caller: DomId, gref: GrantRef, access: Access) -> Result<u32, GrantError> {
        let entry = self.entries.get(gref as usize).ok_or(GrantError::BadReference)?;
        if entry.flags & GTF_PERMIT_ACCESS == 0 {
            return Err(GrantError::NotGranted);
        }
        if entry.domid != caller {
            return Err(GrantError::WrongDomain);
        }
        if access == Access::ReadWrite && entry.flags & GTF_READONLY != 0 {
            return Err(GrantError::ReadOnly);
        }
        Ok(entry.frame)
    }

    /// Takes `gref` in use for `caller` and returns its frame.
    pub fn map(
        &mut self,
        caller: DomId,
        gref: GrantRef,
        access: Access,
    ) -> Result<u32, GrantError> {
        let frame = self.check(caller, gref, access)?;
        let active = &mut self.active[gref as usize];
        if active.readers + active.writers >= MAX_PINS {
            return Err(GrantError::TooManyPins);
        }
        match access {
            Access::ReadOnly => active.readers += 1,
            Access::ReadWrite => active.writers += 1,
        }
        self.show_use(gref);
        Ok(frame)
    }

    /// Gives back one use that [`map`](Self::map) took. `access` is as it was then.
    pub fn unmap(&mut self, gref: GrantRef, access: Access) -> Result<(), GrantError> {
        let active = self.active.get_mut(gref as usize).ok_or(GrantError::BadReference)?;
        let count = match access {
            Access::ReadOnly => &mut active.readers,
            Access::ReadWrite => &mut active.writers,
        };
        *count = count.checked_sub(1).ok_or(GrantError::NotGranted)?;
        self.show_use(gref);
        Ok(())
    }

    fn show_use(&mut self, gref: GrantRef) {
        let active = self.active[gref as usize];
        let entry = &mut self.entries[gref as usize];
        entry.flags &= !(GTF_READING | GTF_WRITING);
        if active.readers + active.writers > 0 {
            entry.flags |= GTF_READING;
        }
        if active.writers > 0 {
            entry.flags |= GTF_WRITING;
        }
    }

    /// The entry as its guest sees it.
    pub fn entry(&self, gref: GrantRef) -> Option<Entry> {
        self.entries.get(gref as usize).copied()
    }

    /// How often `gref` is in use, readers and writers.
    pub fn pins(&self, gref: GrantRef) -> u32 {
        self.active.get(gref as usize).map_or(0, |a| a.readers + a.writers)
    }

    /// References that grant something.
    pub fn granted(&self) -> usize {
        self.entries.iter().filter(|e| e.flags & GTF_PERMIT_ACCESS != 0).count()
    }

    /// References that are in use.
    pub fn in_use(&self) -> usize {
        self.active.iter().filter(|a| a.readers + a.writers > 0).count()
    }
}
