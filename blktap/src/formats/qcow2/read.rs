//! Where a read's bytes are. Nothing here waits for anybody.
use std::ops::Range;

use crate::formats::{Extent, ImageError, Outcome, Place};

use super::entry::{L2Entry, OFFSET, Subcluster};
use super::load::Missing;
use super::{Qcow2, Slice};

impl Qcow2 {
    pub(super) fn read(
        &self,
        range: Range<u64>,
        out: &mut Vec<Extent>,
    ) -> Result<Outcome<()>, ImageError> {
        if self.l1_entry(range.start) & OFFSET == 0 {
            let end = range.end.min(self.l1_end(range.start));
            out.push(Extent { len: end - range.start, place: Place::Absent });
            return Ok(Outcome::Ready(()));
        }
        let number = self.slice_of(range.start);
        match self.cache.with(number, |slice| self.read_slice(slice, range, out)) {
            Some(result) => result.map(Outcome::Ready),
            None => Ok(Outcome::Miss(Missing::Slice(number).into())),
        }
    }

    fn read_slice(
        &self,
        slice: &Slice,
        range: Range<u64>,
        out: &mut Vec<Extent>,
    ) -> Result<(), ImageError> {
        let bits = self.slice_guest_bits();
        let end = range.end.min((u64::from(slice.number) + 1) << bits);
        let mut at = range.start;
        let mut last: Option<Extent> = None;
        while at < end {
            let extent = match self.extent(slice.entry(self.index_of(at)), at..end) {
                Ok(extent) => extent,
                Err(_) if at > range.start => break,
                Err(e) => return Err(e),
            };
            at += extent.len;
            match &mut last {
                Some(l) if follows(l, &extent) => l.len += extent.len,
                l => out.extend(l.replace(extent)),
            }
        }
        out.extend(last);
        Ok(())
    }

    /// The start of `range` that has one place by its entry.
    fn extent(&self, words: (u64, u64), range: Range<u64>) -> Result<Extent, ImageError> {
        let cluster = self.layout.cluster_size();
        let inside = range.start & (cluster - 1);
        let len = (range.end - range.start).min(cluster - inside);
        let place = match self.layout.l2(words.0, words.1) {
            L2Entry::Data { host, .. } => self.data(host, range.start)?,
            L2Entry::Unallocated => Place::Absent,
            L2Entry::Zero { .. } => self.zero(range.start)?,
            L2Entry::Compressed { descriptor } => {
                if self.layout.data_file {
                    let text = format!("compressed cluster at {:#x}", range.start);
                    return Err(self.found_corrupt(text));
                }
                Place::Compressed { cluster: descriptor, skip: inside as u32 }
            }
            L2Entry::Subclusters { host, bits, .. } => {
                let unit = self.layout.subcluster_bits();
                let first = (inside >> unit) as u32;
                let kind = bits.get(first, host);
                let mut behind = first + 1;
                while behind < 32 && bits.get(behind, host) == kind {
                    behind += 1;
                }
                let len = len.min((u64::from(behind) << unit) - inside);
                let place = match kind {
                    Subcluster::Unallocated => Place::Absent,
                    Subcluster::Zero => Place::Zero,
                    Subcluster::Data => self.data(host.unwrap_or(0), range.start)?,
                    Subcluster::Invalid => {
                        let text = format!("subclusters of {:#x}", range.start);
                        return Err(self.found_corrupt(text));
                    }
                };
                return Ok(Extent { len, place });
            }
        };
        Ok(Extent { len, place })
    }

    /// The place of the guest's byte `at` in a data cluster.
    fn data(&self, host: u64, at: u64) -> Result<Place, ImageError> {
        self.check_host(host, at)?;
        let inside = at & (self.layout.cluster_size() - 1);
        Ok(Place::Data { file: self.data_file(), offset: host + inside })
    }

    fn zero(&self, at: u64) -> Result<Place, ImageError> {
        match self.layout.version {
            super::Version::V3 => Ok(Place::Zero),
            super::Version::V2 => {
                Err(self.found_corrupt(format!("zero cluster at {at:#x} in version 2")))
            }
        }
    }
}

/// Whether an extent goes on where another ends.
fn follows(before: &Extent, extent: &Extent) -> bool {
    match (before.place, extent.place) {
        (Place::Data { file: a, offset }, Place::Data { file: b, offset: next }) => {
            a == b && offset + before.len == next
        }
        (Place::Zero, Place::Zero) | (Place::Absent, Place::Absent) => true,
        _ => false,
    }
}
