//! Internal snapshots of an image that nobody has open.
//!
//! The order of all changes is such that refcounts are never lower than what the image's tables
//! refer to, and that the disk and its snapshots are whole, after a crash at any point: what is
//! new is counted and durable before one sector of the header names it, and what that leaves
//! behind is given up afterwards. A crash or an error in between leaves leaks, which a repair
//! frees, and copied flags that say less, or more, than refcounts that are too high.
mod table;
mod view;

use std::collections::HashSet;
use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use super::check::references::{self, Tree};
use super::entry::OFFSET;
use super::header::{AUTOCLEAR_BITMAPS, Header, MAX_L1_BYTES, MAX_SNAPSHOTS, Version};
use super::offline::Offline;
use crate::formats::ImageError;
use crate::storage::Storage;
use table::Entry;
pub use view::SnapshotView;

/// Longest name of a snapshot that QEMU takes, in bytes.
pub const MAX_NAME: usize = 255;
/// Where in the header: the disk's size, encryption, and the L1 table's entries and place.
const DISK_IN_HEADER: u64 = 24;
/// Number of snapshots, and the place of their table.
const SNAPSHOTS_IN_HEADER: u64 = 60;
const AUTOCLEAR_IN_HEADER: u64 = 88;
/// So many stretches of freed clusters are given back to the file system.
const PUNCHES: usize = 1 << 16;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id, a number in most cases.
    pub id: String,
    /// Its name, not always the only one of that name.
    pub name: String,
    /// When it was made: seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// The guest's clock in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of the guest's state, which lie behind the disk; 0: it is of the disk alone.
    pub vm_state_size: u64,
    /// Guest bytes of the disk then.
    pub disk_size: u64,
    /// The guest's count of instructions, if there is one.
    pub icount: Option<u64>,
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// Entries of that.
    pub l1_entries: u32,
}

/// A snapshot that is looked for. Of several the first is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which<'a> {
    /// By its id.
    Id(&'a str),
    /// By its name: what `qemu-img snapshot -d` does.
    Name(&'a str),
    /// By its id, and by its name if no id is so: what `qemu-img snapshot -a` does.
    IdOrName(&'a str),
}

impl Which<'_> {
    fn find(self, entries: &[Entry]) -> Result<usize, ImageError> {
        let by_id = |id: &str| entries.iter().position(|e| e.id == id.as_bytes());
        let by_name = |name: &str| entries.iter().position(|e| e.name == name.as_bytes());
        let (found, what) = match self {
            Which::Id(id) => (by_id(id), id),
            Which::Name(name) => (by_name(name), name),
            Which::IdOrName(text) => (by_id(text).or_else(|| by_name(text)), text),
        };
        found.ok_or_else(|| ImageError::Invalid(format!("there is no snapshot {what:?}")))
    }
}

/// The snapshots of an image, whatever state it is in.
pub fn list(storage: &dyn Storage) -> Result<Vec<Snapshot>, ImageError> {
    let header = Header::read(storage)?;
    header.check_tables()?;
    let entries = table::read(storage, &header)?.entries;
    Ok(entries.iter().map(|entry| snapshot(entry, &header)).collect())
}

/// Bytes of the snapshot table, and where the snapshots' L1 tables are: (first byte, bytes).
pub(super) fn tables(
    storage: &dyn Storage,
    header: &Header,
) -> Result<(u64, Vec<(u64, u64)>), ImageError> {
    let table = table::read(storage, header)?;
    let l1 = table.entries.iter().map(|e| (e.l1_offset, u64::from(e.l1_entries) * 8));
    Ok((table.bytes, l1.collect()))
}

fn snapshot(entry: &Entry, header: &Header) -> Snapshot {
    Snapshot {
        id: String::from_utf8_lossy(&entry.id).into_owned(),
        name: String::from_utf8_lossy(&entry.name).into_owned(),
        date_sec: entry.date_sec,
        date_nsec: entry.date_nsec,
        vm_clock: entry.vm_clock,
        vm_state_size: entry.vm_state_size,
        disk_size: entry.disk_size.unwrap_or_else(|| header.disk_size()),
        icount: entry.icount,
        l1_offset: entry.l1_offset,
        l1_entries: entry.l1_entries,
    }
}

/// Keeps the disk as it is now under a name, dated `date`. Gives the new snapshot, with the id
/// that QEMU would give it.
///
/// Refused, before anything is changed: images that are dirty or corrupt or have an external data
/// file, and refcounts that would not fit their width.
pub fn create(storage: &dyn Storage, name: &str, date: SystemTime) -> Result<Snapshot, ImageError> {
    if name.is_empty() || name.len() > MAX_NAME || name.contains('\0') {
        let text = format!("a snapshot's name must have 1 to {MAX_NAME} bytes, none of them 0");
        return Err(ImageError::Invalid(text));
    }
    let mut job = Job::begin(storage)?;
    if job.entries.len() >= MAX_SNAPSHOTS as usize {
        return Err(ImageError::NoSpace(format!("there are {MAX_SNAPSHOTS} snapshots already")));
    }
    let active = job.active();
    job.assert_room(active)?;
    job.clear_autoclear()?;
    let l1 = job.copy_l1(active, active.entries)?;
    let date = date.duration_since(UNIX_EPOCH).unwrap_or_default();
    let entry = Entry {
        l1_offset: l1.offset,
        l1_entries: l1.entries,
        id: new_id(&job.entries).into_bytes(),
        name: name.as_bytes().to_vec(),
        date_sec: u32::try_from(date.as_secs()).unwrap_or(u32::MAX),
        date_nsec: date.subsec_nanos(),
        vm_clock: 0,
        vm_state_size: 0,
        disk_size: Some(job.offline.header().disk_size()),
        icount: None,
        more: Vec::new(),
    };
    let made = snapshot(&entry, job.offline.header());
    job.entries.push(entry);
    job.raise(active)?;
    // All of the disk is shared now, and must not be written in place any more.
    references::set_copied(&job.offline, active)?;
    job.switch_table()?;
    job.offline.sync()?;
    Ok(made)
}

/// Makes the disk what it was when the snapshot was made, with the size that it had.
///
/// Refused, before anything is changed: what [`create`] refuses; images with dirty bitmaps, as
/// these would not say what has changed; another size of the disk in version 2, as QEMU has it.
pub fn apply(storage: &dyn Storage, which: Which<'_>) -> Result<(), ImageError> {
    let mut job = Job::begin(storage)?;
    let entry = job.entries[which.find(&job.entries)?].clone();
    let header = job.offline.header();
    if header.bitmaps.is_some() && header.autoclear & AUTOCLEAR_BITMAPS != 0 {
        return Err(ImageError::Invalid("the image has dirty bitmaps: remove them first".into()));
    }
    let size = size_after(&entry, header, &job.entries)?;
    let tree = tree_of(&entry);
    let entries = header.layout().l1_entries(size).max(u64::from(tree.entries)) as u32;
    job.assert_room(tree)?;
    job.clear_autoclear()?;
    let old = job.active();
    let new = job.copy_l1(tree, entries)?;
    job.raise(tree)?;
    references::set_copied(&job.offline, new)?;
    let mut fields = size.to_be_bytes().to_vec();
    fields.extend_from_slice(&[0; 4]);
    fields.extend_from_slice(&new.entries.to_be_bytes());
    fields.extend_from_slice(&new.offset.to_be_bytes());
    job.offline.switch(DISK_IN_HEADER, &fields)?;
    job.give_up(old)
}

/// Forgets a snapshot and frees what it alone used.
///
/// Refused, before anything is changed: images that are dirty or corrupt or have an external data
/// file.
pub fn delete(storage: &dyn Storage, which: Which<'_>) -> Result<(), ImageError> {
    let mut job = Job::begin(storage)?;
    let index = which.find(&job.entries)?;
    job.clear_autoclear()?;
    let entry = job.entries.remove(index);
    job.switch_table()?;
    job.give_up(tree_of(&entry))?;
    // What the disk has for itself now may be written in place again.
    references::set_copied(&job.offline, job.active())?;
    job.offline.sync()
}

fn tree_of(entry: &Entry) -> Tree {
    Tree { offset: entry.l1_offset, entries: entry.l1_entries }
}

/// The disk's size once a snapshot was applied.
fn size_after(entry: &Entry, header: &Header, all: &[Entry]) -> Result<u64, ImageError> {
    let now = header.disk_size();
    let size = entry.disk_size.unwrap_or(now);
    if size == now {
        return Ok(header.size);
    }
    if header.version == Version::V2 {
        let text = format!("the snapshot's disk has {size} bytes and the disk {now}");
        return Err(ImageError::Unsupported(format!("{text}: version 2 with snapshots keeps it")));
    }
    // Others would be taken to have the disk's size.
    if all.iter().any(|e| e.disk_size.is_none()) {
        let text = "a snapshot does not say how large its disk is: check and repair it";
        return Err(ImageError::Corrupt(text.into()));
    }
    let most = MAX_L1_BYTES / 8;
    if !size.is_multiple_of(512)
        || size > i64::MAX as u64
        || header.layout().l1_entries(size) > most
    {
        return Err(ImageError::Corrupt(format!("the snapshot has a disk of {size} bytes")));
    }
    Ok(size)
}

/// One more than the largest number that an id begins with, as QEMU counts.
fn new_id(entries: &[Entry]) -> String {
    let number = |e: &Entry| {
        let digits: String =
            e.id.iter().take_while(|b| b.is_ascii_digit()).map(|b| char::from(*b)).collect();
        digits.parse::<u64>().unwrap_or(if digits.is_empty() { 0 } else { u64::MAX })
    };
    let numbers: HashSet<u64> = entries.iter().map(number).collect();
    let next = numbers.iter().max().map_or(Some(1), |most| most.checked_add(1));
    let free = || (1..).find(|n| !numbers.contains(n));
    next.or_else(free).unwrap_or(1).to_string()
}

/// An image whose snapshots are changed.
struct Job<'a> {
    offline: Offline<'a>,
    entries: Vec<Entry>,
    /// Bytes of the table in the file.
    table_bytes: u64,
}

impl<'a> Job<'a> {
    /// With an image on which such changes are safe.
    fn begin(storage: &'a dyn Storage) -> Result<Self, ImageError> {
        let mut offline = Offline::open(storage)?;
        if offline.header().has_data_file() {
            let text = "internal snapshots of an image with an external data file";
            return Err(ImageError::Unsupported(text.into()));
        }
        let table = table::read(storage, offline.header())?;
        references::assert_sound(&mut offline)?;
        Ok(Job { offline, entries: table.entries, table_bytes: table.bytes })
    }

    fn active(&self) -> Tree {
        let header = self.offline.header();
        Tree { offset: header.l1_offset, entries: header.l1_size }
    }

    /// Fails if one more user of all that `tree` refers to does not fit the refcounts.
    fn assert_room(&mut self, tree: Tree) -> Result<(), ImageError> {
        let most = self.offline.layout().max_refcount();
        references::each(&mut self.offline, tree, &mut |offline, cluster, uses| {
            let count = offline.refcount(cluster)?;
            if most - count >= uses {
                return Ok(());
            }
            let text = format!(
                "cluster {cluster} has refcount {count}, {uses} more do not fit refcounts up to {most}"
            );
            Err(ImageError::NoSpace(text))
        })
    }

    /// Clears the bits of features that are not known and so not kept right.
    fn clear_autoclear(&mut self) -> Result<(), ImageError> {
        let mut header = self.offline.header().clone();
        match header.clear_unknown_autoclear() {
            true => self.offline.switch(AUTOCLEAR_IN_HEADER, &header.autoclear.to_be_bytes()),
            false => Ok(()),
        }
    }

    /// Writes a copy of an L1 table with `entries` entries, without copied flags.
    fn copy_l1(&mut self, tree: Tree, entries: u32) -> Result<Tree, ImageError> {
        if entries == 0 {
            return Ok(Tree { offset: 0, entries });
        }
        let what = "read an L1 table";
        let mut l1 = self.offline.read_table(tree.offset, tree.entries as usize, what)?;
        l1.iter_mut().for_each(|entry| *entry &= OFFSET);
        l1.resize(entries as usize, 0);
        let offset = self.offline.allocate(u64::from(entries) * 8)?;
        self.offline.write_table(offset, &l1, "write an L1 table")?;
        Ok(Tree { offset, entries })
    }

    /// Counts one more user of all that `tree` refers to, durably.
    fn raise(&mut self, tree: Tree) -> Result<(), ImageError> {
        let raise = &mut |offline: &mut Offline<'_>, cluster, n| offline.add_users(cluster, n);
        references::each(&mut self.offline, tree, raise)?;
        self.offline.sync()
    }

    /// Writes the table anew and has the header name it, then frees the old one.
    fn switch_table(&mut self) -> Result<(), ImageError> {
        let old = self.offline.header().snapshots_offset;
        let disk_size = self.offline.header().disk_size();
        let bytes = table::serialise(&self.entries, disk_size)?;
        let offset = match bytes.len() {
            0 => 0,
            len => self.offline.allocate(len as u64)?,
        };
        self.offline.write(offset, &bytes, "write the snapshot table")?;
        let mut fields = (self.entries.len() as u32).to_be_bytes().to_vec();
        fields.extend_from_slice(&offset.to_be_bytes());
        self.offline.switch(SNAPSHOTS_IN_HEADER, &fields)?;
        self.offline.free(old, self.table_bytes)
    }

    /// Counts one user less of an L1 table, which nothing names any more, and of all that it
    /// refers to, durably; gives the space of what nobody uses back.
    fn give_up(&mut self, tree: Tree) -> Result<(), ImageError> {
        let mut freed: Vec<Range<u64>> = Vec::new();
        references::each(&mut self.offline, tree, &mut |offline, cluster, n| {
            if offline.drop_users(cluster, n)? > 0 {
                return Ok(());
            }
            let full = freed.len() >= PUNCHES;
            match freed.last_mut() {
                Some(last) if last.end == cluster => last.end += 1,
                _ if full => {}
                _ => freed.push(cluster..cluster + 1),
            }
            Ok(())
        })?;
        self.offline.free(tree.offset, u64::from(tree.entries) * 8)?;
        self.offline.sync()?;
        let bits = self.offline.layout().cluster_bits;
        for run in freed {
            // Only a saving of space.
            let _ = self.offline.storage().punch(run.start << bits..run.end << bits);
        }
        Ok(())
    }
}
