//! The space of the image's file: reserving clusters, giving them back, and the header that says
//! where the tables are. Under one lock, on threads that may block.
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::formats::{Fresh, ImageError, Leases};
use crate::storage::Storage;

use super::entry::Layout;
use super::header::{Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use super::metadata::{Kind, MetadataMap};
use super::refcounts::{FILE_LIMIT, Refcounts};

/// What becomes of the bytes of clusters that nobody uses any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bytes {
    /// They stay where they are until the cluster is used anew.
    Stay,
    /// The guest gave them up: so does the file.
    Punch,
}

/// Clusters that lost a name.
#[derive(Clone, Debug)]
pub(super) struct Freed {
    pub clusters: Range<u64>,
    pub bytes: Bytes,
}

/// Clusters that were reserved: their refcounts are 1 and nothing names them.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub clusters: Range<u64>,
    pub fresh: Fresh,
}

/// What kind of run is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// Up to so many clusters.
    UpTo(u64),
    /// So many clusters, for metadata of this kind.
    Exactly(u64, Kind),
}

/// The file's space.
pub(super) struct Space {
    pub storage: Arc<dyn Storage>,
    pub header: Header,
    pub layout: Layout,
    pub refcounts: Refcounts,
    pub map: MetadataMap,
    /// No cluster before this one is free.
    hint: u64,
    /// From here on clusters were never used.
    unused_from: u64,
    /// The file has at least so many bytes.
    file_end: u64,
    /// What lost its last durable name, with the leases' stamp of that time.
    waiting: VecDeque<(u64, Vec<Freed>)>,
    /// The first free cluster of the last one with compressed data, as bytes.
    pub packed: Range<u64>,
}

impl Space {
    /// The space of an image of which nothing is reserved.
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        header: Header,
        refcounts: Refcounts,
        map: MetadataMap,
    ) -> Result<Self, ImageError> {
        let layout = header.layout();
        let file_end = storage.size().map_err(ImageError::io("find the size of the file"))?;
        let unused_from = file_end.div_ceil(layout.cluster_size());
        let (hint, waiting, packed) = (0, VecDeque::new(), 0..0);
        Ok(Space {
            storage,
            header,
            layout,
            refcounts,
            map,
            hint,
            unused_from,
            file_end,
            waiting,
            packed,
        })
    }

    /// Reserves clusters.
    pub(super) fn reserve(&mut self, want: Want) -> Result<Run, ImageError> {
        self.before_allocating()?;
        let clusters = match want {
            Want::UpTo(n) => self.take_some(n.max(1))?,
            Want::Exactly(n, kind) => self.take_exactly(n.max(1), kind)?,
        };
        if let Err(e) = self.extend(clusters.end) {
            if let Want::Exactly(..) = want {
                self.map.remove(clusters.clone());
            }
            self.lower(clusters)?;
            return Err(e);
        }
        let fresh = if clusters.start >= self.unused_from { Fresh::Zeroes } else { Fresh::Unknown };
        self.unused_from = self.unused_from.max(clusters.end);
        Ok(Run { clusters, fresh })
    }

    /// Refcounts that are written late are announced by the dirty bit.
    fn before_allocating(&mut self) -> Result<(), ImageError> {
        if !self.header.has_lazy_refcounts() || self.header.is_dirty() {
            return Ok(());
        }
        self.header.incompatible |= INCOMPAT_DIRTY;
        self.write_header()
    }

    /// Writes the header and waits until it is durable.
    pub(super) fn write_header(&mut self) -> Result<(), ImageError> {
        self.header.write_fields(&*self.storage)?;
        self.storage.sync().map_err(ImageError::io("flush the header"))
    }

    /// Marks the image corrupt, as far as that is possible.
    pub(super) fn mark_corrupt(&mut self) -> Result<(), ImageError> {
        use super::header::Version;
        if self.header.is_corrupt() || self.header.version == Version::V2 {
            return Ok(());
        }
        self.header.incompatible |= INCOMPAT_CORRUPT;
        self.write_header()
    }

    fn take_some(&mut self, most: u64) -> Result<Range<u64>, ImageError> {
        let mut start = self.hint;
        while !self.is_free(start)? {
            start += 1;
        }
        self.hint = start;
        let mut end = start;
        while end - start < most && self.has_room(end) && self.is_free(end)? {
            self.map.check(end..end + 1, "a free cluster")?;
            self.refcounts.change(end, 1)?;
            end += 1;
            self.hint = end;
        }
        if end == start {
            return Err(ImageError::NoSpace("no cluster is left".into()));
        }
        Ok(start..end)
    }

    fn has_room(&self, cluster: u64) -> bool {
        cluster < self.refcounts.end()
    }

    /// Whether a cluster is free, once it has a block.
    fn is_free(&mut self, cluster: u64) -> Result<bool, ImageError> {
        if (cluster + 1) << self.layout.cluster_bits >= FILE_LIMIT {
            return Err(ImageError::NoSpace("the file is as large as it can be".into()));
        }
        if !self.has_room(cluster) {
            self.grow_table()?;
        }
        self.refcounts.ensure_block(cluster, &mut self.map)?;
        Ok(self.refcounts.get(cluster)? == 0)
    }

    fn take_exactly(&mut self, count: u64, kind: Kind) -> Result<Range<u64>, ImageError> {
        let mut run = self.hint..self.hint;
        while run.end - run.start < count && self.refcounts.has_block(run.end) {
            let free = self.refcounts.get(run.end)? == 0;
            run.end += 1;
            if !free {
                run.start = run.end;
            }
        }
        if run.end - run.start == count {
            self.map.add(run.clone(), kind)?;
            for cluster in run.clone() {
                self.refcounts.change(cluster, 1)?;
            }
            return Ok(run);
        }
        while !self.refcounts.has_tail(count) {
            self.grow_table()?;
        }
        self.refcounts.take_tail(count, Some(kind), &mut self.map)
    }

    /// Makes the refcount table longer, and names it.
    fn grow_table(&mut self) -> Result<(), ImageError> {
        let new = self.refcounts.grow(&mut self.map)?;
        self.extend(new.offset.div_ceil(self.layout.cluster_size()) + u64::from(new.clusters))?;
        self.header.refcount_table_offset = new.offset;
        self.header.refcount_table_clusters = new.clusters;
        self.write_header()?;
        self.map.remove(new.old.clone());
        self.lower(new.old)
    }

    /// Makes the file reach up to a cluster. Whoever writes payload stays within the file, so
    /// nobody else makes it longer.
    fn extend(&mut self, cluster: u64) -> Result<(), ImageError> {
        let end = cluster << self.layout.cluster_bits;
        if end > self.file_end {
            let size = self.storage.size().map_err(ImageError::io("find the size of the file"))?;
            if size < end {
                self.storage.set_size(end).map_err(ImageError::io("make the file longer"))?;
            }
            self.file_end = size.max(end);
        }
        Ok(())
    }

    /// Lowers refcounts of clusters that nobody uses.
    pub(super) fn lower(&mut self, clusters: Range<u64>) -> Result<(), ImageError> {
        for cluster in clusters {
            if self.refcounts.change(cluster, -1)? == 0 {
                self.hint = self.hint.min(cluster);
            }
        }
        Ok(())
    }

    fn give_back(&mut self, freed: Freed) -> Result<(), ImageError> {
        let bits = self.layout.cluster_bits;
        let mut punch: Option<Range<u64>> = None;
        for cluster in freed.clusters {
            if self.refcounts.get(cluster)? == 1 && freed.bytes == Bytes::Punch {
                let at = cluster << bits..(cluster + 1) << bits;
                match &mut punch {
                    Some(p) if p.end == at.start => p.end = at.end,
                    p => {
                        // Only a service to the file system.
                        p.replace(at).map(|p| self.storage.punch(p).ok());
                    }
                }
            }
            if self.refcounts.get(cluster)? == 1 && self.packed.end > 0 {
                let packed = (self.packed.end - 1) >> bits;
                if packed == cluster {
                    self.packed = 0..0;
                }
            }
            self.lower(cluster..cluster + 1)?;
        }
        punch.map(|p| self.storage.punch(p).ok());
        Ok(())
    }

    /// Takes what lost its last durable name; `stamp` is from after it lost its last name in
    /// memory.
    pub(super) fn retire(&mut self, stamp: u64, freed: Vec<Freed>) {
        if !freed.is_empty() {
            self.waiting.push_back((stamp, freed));
        }
    }

    /// Gives back what no lease can have come across.
    pub(super) fn recycle(&mut self, leases: &Leases) -> Result<(), ImageError> {
        while self.waiting.front().is_some_and(|(stamp, _)| leases.ended(*stamp)) {
            let Some((_, list)) = self.waiting.pop_front() else { break };
            for freed in list {
                self.give_back(freed)?;
            }
        }
        Ok(())
    }

    /// Cuts what is reserved and unused off the end of the file.
    pub(super) fn cut(&mut self, mut unused: Vec<Range<u64>>) -> Result<(), ImageError> {
        unused.sort_unstable_by_key(|r| r.start);
        let bits = self.layout.cluster_bits;
        let mut end = self.storage.size().map_err(ImageError::io("find the size of the file"))?;
        let before = end;
        for run in unused.iter().rev().take_while(|r| !r.is_empty()) {
            if run.end << bits != end {
                break;
            }
            end = run.start << bits;
        }
        for run in unused {
            self.lower(run)?;
        }
        if end < before && self.storage.set_size(end).is_ok() {
            self.file_end = end;
        }
        Ok(())
    }
}
