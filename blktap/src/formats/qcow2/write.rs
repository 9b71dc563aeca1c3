//! Where a change's bytes go, and what its guard does in the end. Nothing here waits for anybody:
//! what is missing is a miss, what somebody owns is busy.
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::formats::{Change, Fresh, Guard, ImageError, Miss, Outcome, Piece, Target, Waiter};
use crate::storage::Access;

use super::entry::{COPIED, L2Entry, OFFSET, Subcluster};
use super::load::Missing;
use super::publish::{Action, State};
use super::{Qcow2, Slice, Version};

/// What a guard is needed for.
pub(super) enum Need {
    /// Nothing: the bytes may be written where they are.
    InPlace,
    /// To fill the cluster that is there, up to this guest byte.
    Same { host: u64, end: u64 },
    /// To take a new cluster; the units that are filled have so many bits.
    New { unit_bits: u32 },
}

/// Resolved: the guard, if one is needed.
type Resolved = Outcome<Option<Guard>>;

pub(super) fn missing<T>(missing: Missing) -> Result<Outcome<T>, ImageError> {
    Ok(Outcome::Miss(Miss::from(missing)))
}

/// A piece that the metadata say it all about.
pub(super) fn nothing(len: u64, out: &mut Vec<Piece>) -> Result<Resolved, ImageError> {
    out.push(Piece { len, target: Target::Nothing });
    Ok(Outcome::Ready(None))
}

impl Qcow2 {
    pub(super) fn change(
        &self,
        range: Range<u64>,
        change: Change,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Resolved, ImageError> {
        if self.access == Access::ReadOnly {
            return Err(ImageError::ReadOnly);
        }
        if self.corrupt.load(Ordering::Acquire) {
            return Err(ImageError::Corrupt("it was found corrupt and is not written".into()));
        }
        let bytes = range.clone();
        let resolved = match change {
            Change::Write => self.write(range, waiter, out),
            Change::Zero => self.write_zeroes(range, waiter, out),
            Change::Discard => self.discard(range, waiter, out),
        };
        if let (Some(bitmaps), Ok(Outcome::Ready(_))) = (&self.bitmaps, &resolved) {
            // Before the data change; the rest of the range follows anyway.
            bitmaps.record(&bytes);
        }
        resolved
    }

    /// What must be loaded before an entry of `at` can be changed.
    pub(super) fn table_missing(&self, at: u64) -> Option<Missing> {
        let entry = self.l1_entry(at);
        let own = entry & COPIED != 0 && entry & OFFSET != 0;
        (!own).then(|| Missing::Table((at >> self.layout.l1_bits()) as u32))
    }

    pub(super) fn write(
        &self,
        range: Range<u64>,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Resolved, ImageError> {
        if let Some(table) = self.table_missing(range.start) {
            return missing(table);
        }
        let number = self.slice_of(range.start);
        match self.cache.with(number, |slice| self.in_place(slice, &range, out)) {
            None => return missing(Missing::Slice(number)),
            Some(found) => {
                if found? > 0 {
                    return Ok(Outcome::Ready(None));
                }
            }
        }
        match self.cache.get(number) {
            None => missing(Missing::Slice(number)),
            Some(slice) => self.allocate(slice, range, waiter, out),
        }
    }

    /// First guest byte behind a slice's.
    pub(super) fn slice_end(&self, slice: &Slice) -> u64 {
        (u64::from(slice.number) + 1) << self.slice_guest_bits()
    }

    /// Appends the start of the range as far as it may be written where it is.
    fn in_place(
        &self,
        slice: &Slice,
        range: &Range<u64>,
        out: &mut Vec<Piece>,
    ) -> Result<u64, ImageError> {
        let end = range.end.min(self.slice_end(slice));
        let first = out.len();
        let mut at = range.start;
        while at < end {
            let words = slice.entry(self.index_of(at));
            let Some((offset, len)) = self.own_bytes(words, at..end)? else { break };
            if slice.suspicious {
                match self.may_write(words.0 & OFFSET) {
                    Err(e) if at == range.start => return Err(e),
                    Err(_) => break,
                    Ok(()) => {}
                }
            }
            at += len;
            match out[first..].last_mut() {
                Some(Piece { len: l, target: Target::InPlace { offset: o, .. } })
                    if *o + *l == offset =>
                {
                    *l += len;
                }
                _ => {
                    let target = Target::InPlace { file: self.data_file(), offset };
                    out.push(Piece { len, target });
                }
            }
        }
        Ok(at - range.start)
    }

    /// Where the start of the range may be written in place, and how much of it.
    fn own_bytes(
        &self,
        (word, bitmap): (u64, u64),
        range: Range<u64>,
    ) -> Result<Option<(u64, u64)>, ImageError> {
        let cluster = self.layout.cluster_size();
        let inside = range.start & (cluster - 1);
        let len = (range.end - range.start).min(cluster - inside);
        let (host, len) = match self.layout.l2(word, bitmap) {
            L2Entry::Data { host, copied: true } => (host, len),
            L2Entry::Subclusters { host: Some(host), copied: true, bits } => {
                let unit = self.layout.subcluster_bits();
                let first = (inside >> unit) as u32;
                let data = |i: &u32| bits.get(*i, Some(host)) == Subcluster::Data;
                let behind = (first..32).find(|i| !data(i)).unwrap_or(32);
                if behind == first {
                    return Ok(None);
                }
                (host, len.min((u64::from(behind) << unit) - inside))
            }
            _ => return Ok(None),
        };
        self.check_host(host, range.start)?;
        Ok(Some((host + inside, len)))
    }

    /// Whether data of the guest's byte `at` can be in the cluster `host`.
    pub(super) fn check_host(&self, host: u64, at: u64) -> Result<(), ImageError> {
        let mask = self.layout.cluster_size() - 1;
        if host & mask != 0 || (self.layout.data_file && host != at & !mask) {
            return Err(self.found_corrupt(format!("data cluster at {host:#x}")));
        }
        Ok(())
    }

    /// What writing the start of a range needs.
    fn need(&self, words: (u64, u64), range: Range<u64>) -> Result<Need, ImageError> {
        if self.own_bytes(words, range.clone())?.is_some() {
            return Ok(Need::InPlace);
        }
        let cluster_bits = self.layout.cluster_bits;
        let cluster_end = ((range.start >> cluster_bits) + 1) << cluster_bits;
        match self.layout.l2(words.0, words.1) {
            L2Entry::Zero { host: Some(host), copied: true } => {
                self.check_host(host, range.start)?;
                Ok(Need::Same { host, end: range.end.min(cluster_end) })
            }
            L2Entry::Subclusters { host: Some(host), copied: true, bits } => {
                self.check_host(host, range.start)?;
                let unit = self.layout.subcluster_bits();
                let first = ((range.start & (self.layout.cluster_size() - 1)) >> unit) as u32;
                // Others may write what has data in place: it is not touched.
                let data = |i: &u32| bits.get(*i, Some(host)) == Subcluster::Data;
                let behind = (first..32).find(data).unwrap_or(32);
                let start = cluster_end - self.layout.cluster_size();
                Ok(Need::Same { host, end: range.end.min(start + (u64::from(behind) << unit)) })
            }
            L2Entry::Subclusters { host: None, .. } => {
                Ok(Need::New { unit_bits: self.layout.subcluster_bits() })
            }
            _ => Ok(Need::New { unit_bits: cluster_bits }),
        }
    }

    /// How many clusters from the start of the range on need new ones; at least 1.
    fn new_clusters(&self, slice: &Slice, range: &Range<u64>) -> u64 {
        let bits = self.layout.cluster_bits;
        let mut clusters = 1;
        let mut at = ((range.start >> bits) + 1) << bits;
        while at < range.end {
            let need = self.need(slice.entry(self.index_of(at)), at..range.end);
            if !matches!(need, Ok(Need::New { .. })) {
                break;
            }
            clusters += 1;
            at += 1 << bits;
        }
        clusters
    }

    /// Takes a guard for what cannot be written in place, and clusters.
    fn allocate(
        &self,
        slice: Arc<Slice>,
        range: Range<u64>,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Resolved, ImageError> {
        let bits = self.layout.cluster_bits;
        let range = range.start..range.end.min(self.slice_end(&slice));
        let first = range.start >> bits;
        let clusters = first..first + self.new_clusters(&slice, &range);
        let Some(owned) = self.guards.take(clusters, waiter) else { return Ok(Outcome::Busy) };
        let range = range.start..range.end.min(owned.clusters().end << bits);
        // Somebody may have owned them until just now.
        let words = slice.entry(self.index_of(range.start));
        let state = match self.need(words, range.clone()) {
            Ok(Need::Same { host, end }) => {
                let unit_bits = self.layout.subcluster_bits();
                Ok(self.fill_same(host, range.start..end, unit_bits, out))
            }
            Ok(Need::New { unit_bits }) => self.fill_new(&slice, range, unit_bits, out),
            Ok(Need::InPlace) => {
                let found = self.in_place(&slice, &range, out);
                self.guards.release(owned);
                found?;
                return Ok(Outcome::Ready(None));
            }
            Err(e) => Err(e),
        };
        match state {
            Ok(Some(action)) => {
                Ok(Outcome::Ready(Some(self.changes.insert(State { owned, slice, action }))))
            }
            Ok(None) => {
                let wanted = owned.clusters();
                self.guards.release(owned);
                missing(Missing::Clusters((wanted.end - wanted.start) as u32))
            }
            Err(e) => {
                self.guards.release(owned);
                Err(e)
            }
        }
    }

    /// Fills a part of a cluster that is there.
    fn fill_same(
        &self,
        host: u64,
        range: Range<u64>,
        unit_bits: u32,
        out: &mut Vec<Piece>,
    ) -> Option<Action> {
        let units = (unit_bits, unit_bits);
        let fresh = Fresh::Unknown;
        Some(self.fill(host, fresh, range, units, None, out))
    }

    /// Fills new clusters; `None` if there are none.
    fn fill_new(
        &self,
        slice: &Slice,
        range: Range<u64>,
        unit_bits: u32,
        out: &mut Vec<Piece>,
    ) -> Result<Option<Action>, ImageError> {
        let bits = self.layout.cluster_bits;
        let first = range.start >> bits;
        let count = self.new_clusters(slice, &range);
        let (host, count, fresh, taken) = if self.layout.data_file {
            (first << bits, count, Fresh::Unknown, None)
        } else {
            let Some(run) = self.pool.take(count) else { return Ok(None) };
            let count = run.clusters.end - run.clusters.start;
            (run.clusters.start << bits, count, run.fresh, Some(run.clusters))
        };
        let range = range.start..range.end.min((first + count) << bits);
        let last = (range.end - 1) & !(self.layout.cluster_size() - 1);
        let last_need = self.need(slice.entry(self.index_of(last)), last..range.end);
        let last_bits = match last_need {
            Ok(Need::New { unit_bits }) => unit_bits,
            _ => unit_bits,
        };
        Ok(Some(self.fill(host, fresh, range, (unit_bits, last_bits), taken, out)))
    }

    fn fill(
        &self,
        host: u64,
        fresh: Fresh,
        range: Range<u64>,
        (first_bits, last_bits): (u32, u32),
        taken: Option<Range<u64>>,
        out: &mut Vec<Piece>,
    ) -> Action {
        let head = range.start & ((1 << first_bits) - 1);
        let tail = range.end.wrapping_neg() & ((1 << last_bits) - 1);
        let inside = range.start & (self.layout.cluster_size() - 1);
        out.push(Piece {
            len: range.end - range.start,
            target: Target::New {
                file: self.data_file(),
                offset: host + inside,
                head: head as u32,
                tail: tail as u32,
                fresh,
            },
        });
        Action::Data { filled: range.start - head..range.end + tail, host, taken }
    }

    /// Whether a guest byte with this entry reads as zero without looking at data.
    pub(super) fn is_zero(&self, (word, bitmap): (u64, u64), subclusters: Range<u32>) -> bool {
        let below = self.backing.is_some();
        match self.layout.l2(word, bitmap) {
            L2Entry::Unallocated => !below,
            L2Entry::Zero { .. } => true,
            L2Entry::Subclusters { host, bits, .. } => {
                subclusters.into_iter().all(|i| match bits.get(i, host) {
                    Subcluster::Zero => true,
                    Subcluster::Unallocated => !below,
                    Subcluster::Data | Subcluster::Invalid => false,
                })
            }
            L2Entry::Data { .. } | L2Entry::Compressed { .. } => false,
        }
    }

    /// Whether zeroing and discarding need data to be written.
    pub(super) fn has_zero_clusters(&self) -> bool {
        self.layout.version == Version::V3 || self.backing.is_none()
    }
}
