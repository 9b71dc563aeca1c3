//! The snapshot table.
use crate::formats::ImageError;
use crate::formats::qcow2::header::{Header, MAX_L1_BYTES, be32, be64};
use crate::storage::Storage;

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Extra data that is known: size of the state, size of the disk, icount.
const EXTRA: usize = 24;
/// Most extra data that is accepted, as QEMU has it.
const MAX_EXTRA: usize = 1024;
/// Most bytes of a table, as QEMU has it.
const MAX_TABLE: u64 = 64 << 20;
/// There is no icount.
const NO_ICOUNT: u64 = u64::MAX;

/// A snapshot as the table has it. Names are bytes: nothing says how they are encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    pub(super) id: Vec<u8>,
    pub(super) name: Vec<u8>,
    pub(super) date_sec: u32,
    pub(super) date_nsec: u32,
    pub(super) vm_clock: u64,
    pub(super) vm_state_size: u64,
    /// Old entries do not say it.
    pub(super) disk_size: Option<u64>,
    pub(super) icount: Option<u64>,
    /// Extra data that is not known, kept.
    pub(super) more: Vec<u8>,
}

impl Entry {
    fn parse(fixed: &[u8], extra: &[u8], id: &[u8], name: &[u8]) -> Entry {
        let known = |at: usize| (extra.len() >= at + 8).then(|| be64(extra, at));
        Entry {
            l1_offset: be64(fixed, 0),
            l1_entries: be32(fixed, 8),
            id: id.to_vec(),
            name: name.to_vec(),
            date_sec: be32(fixed, 16),
            date_nsec: be32(fixed, 20),
            vm_clock: be64(fixed, 24),
            vm_state_size: known(0).unwrap_or_else(|| u64::from(be32(fixed, 32))),
            disk_size: known(8),
            icount: known(16).filter(|n| *n != NO_ICOUNT),
            more: extra.get(EXTRA..).unwrap_or_default().to_vec(),
        }
    }

    fn append(&self, disk_size: u64, out: &mut Vec<u8>) {
        let start = out.len();
        // A reader that knows 32 bits alone must not take a part of the state for all of it.
        let short_state = u32::try_from(self.vm_state_size).unwrap_or(0);
        out.extend_from_slice(&self.l1_offset.to_be_bytes());
        out.extend_from_slice(&self.l1_entries.to_be_bytes());
        out.extend_from_slice(&(self.id.len() as u16).to_be_bytes());
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock.to_be_bytes());
        out.extend_from_slice(&short_state.to_be_bytes());
        out.extend_from_slice(&((EXTRA + self.more.len()) as u32).to_be_bytes());
        out.extend_from_slice(&self.vm_state_size.to_be_bytes());
        out.extend_from_slice(&self.disk_size.unwrap_or(disk_size).to_be_bytes());
        out.extend_from_slice(&self.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        out.extend_from_slice(&self.more);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.resize(start + (out.len() - start).next_multiple_of(8), 0);
    }
}

/// The table in the file.
pub(super) struct Table {
    pub(super) entries: Vec<Entry>,
    /// Bytes that it takes in the file.
    pub(super) bytes: u64,
}

/// Reads the snapshot table that the header names.
pub(super) fn read(storage: &dyn Storage, header: &Header) -> Result<Table, ImageError> {
    let file = storage.size().map_err(ImageError::io("find the size of the file"))?;
    let (start, mut at) = (header.snapshots_offset, header.snapshots_offset);
    let bytes = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        let what = "read the snapshot table";
        storage.read_at(at, &mut bytes).map_err(ImageError::io(what)).map(|()| bytes)
    };
    let mut entries = Vec::new();
    for index in 0..header.snapshot_count {
        let fixed = bytes(at, FIXED)?;
        let (id, name) = (be32(&fixed, 12) >> 16, be32(&fixed, 12) & 0xffff);
        let (id, extra) = (id as usize, be32(&fixed, 36) as usize);
        let rest = extra.saturating_add(id).saturating_add(name as usize);
        let end = at.saturating_add((FIXED + rest.min(1 << 20)) as u64);
        if extra > MAX_EXTRA {
            let text = format!("snapshot {index} has {extra} bytes of extra data");
            return Err(ImageError::Corrupt(text));
        }
        if end - start > MAX_TABLE || end > file {
            let text = format!("the snapshot table has no room for snapshot {index}");
            return Err(ImageError::Corrupt(text));
        }
        let rest = bytes(at + FIXED as u64, rest)?;
        let (extra, text) = rest.split_at(extra);
        let (id, name) = text.split_at(id);
        let entry = Entry::parse(&fixed, extra, id, name);
        if u64::from(entry.l1_entries) * 8 > MAX_L1_BYTES {
            let text = format!("snapshot {index} has {} L1 entries", entry.l1_entries);
            return Err(ImageError::Corrupt(text));
        }
        entries.push(entry);
        at = end.next_multiple_of(8);
    }
    Ok(Table { entries, bytes: at - start })
}

/// The bytes of a table. Entries that do not say how large their disk is say so then.
pub(super) fn serialise(entries: &[Entry], disk_size: u64) -> Result<Vec<u8>, ImageError> {
    let mut out = Vec::new();
    entries.iter().for_each(|entry| entry.append(disk_size, &mut out));
    if out.len() as u64 > MAX_TABLE {
        return Err(ImageError::NoSpace("the snapshot table is full".into()));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_any_age_are_read_and_unknown_data_kept() {
        let entry = Entry {
            l1_offset: 0x50000,
            l1_entries: 3,
            id: b"12".to_vec(),
            name: b"a name \xff".to_vec(),
            date_sec: 1,
            date_nsec: 2,
            vm_clock: 3,
            vm_state_size: 1 << 40,
            disk_size: Some(1 << 30),
            icount: Some(7),
            more: vec![9; 5],
        };
        let bytes = serialise(std::slice::from_ref(&entry), 0).expect("small");
        assert_eq!((bytes.len() % 8, be32(&bytes, 32), be32(&bytes, 36)), (0, 0, 29));
        let extra = &bytes[40..69];
        let parse = |extra: &[u8]| Entry::parse(&bytes, extra, b"12", b"a name \xff");
        assert_eq!(parse(extra), entry);
        let old = parse(&extra[..8]);
        assert_eq!((old.vm_state_size, old.disk_size, old.icount), (1 << 40, None, None));
        let bytes = serialise(&[Entry { vm_state_size: 5, ..old }], 77).expect("small");
        let oldest = Entry::parse(&bytes, &[], b"", b"");
        assert_eq!((oldest.vm_state_size, be64(&bytes, 48), be64(&bytes, 56)), (5, 77, u64::MAX));
    }
}
