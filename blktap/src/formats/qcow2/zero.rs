//! Zeroing and discarding: by the entries alone where whole units are concerned.
use std::ops::Range;
use std::sync::Arc;

use crate::formats::{ImageError, Outcome, Piece, Target, Waiter};

use super::entry::{L2Entry, OFFSET, SubBits};
use super::load::Missing;
use super::publish::{Action, State};
use super::write::{missing, nothing};
use super::{Qcow2, Slice, Version};
use crate::formats::Guard;

type Resolved = Outcome<Option<Guard>>;

impl Qcow2 {
    /// A range's end, up to the end of its cluster if it is the disk's: nobody reads beyond.
    fn whole_end(&self, end: u64) -> u64 {
        if end == self.size { end.next_multiple_of(self.layout.cluster_size()) } else { end }
    }

    /// The slice of a byte whose entry is to change; or what is missing; or none is needed, as
    /// all behind this L1 entry reads as zeroes.
    fn slice_to_clear(&self, at: u64) -> Result<Arc<Slice>, Option<Missing>> {
        if self.l1_entry(at) & OFFSET == 0 && self.backing.is_none() {
            return Err(None);
        }
        if let Some(table) = self.table_missing(at) {
            return Err(Some(table));
        }
        let number = self.slice_of(at);
        self.cache.get(number).ok_or(Some(Missing::Slice(number)))
    }

    /// Subclusters of the cluster at `at` that the range has, whole.
    fn subclusters(&self, at: u64, range: &Range<u64>) -> Range<u32> {
        let bits = self.layout.subcluster_bits();
        let start = at & !(self.layout.cluster_size() - 1);
        let from = range.start.max(start) - start;
        let to = range.end.min(start + self.layout.cluster_size()) - start;
        from.div_ceil(1 << bits) as u32..(to >> bits) as u32
    }

    pub(super) fn write_zeroes(
        &self,
        range: Range<u64>,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Resolved, ImageError> {
        if self.raw_data || !self.has_zero_clusters() {
            return self.write(range, waiter, out);
        }
        let slice = match self.slice_to_clear(range.start) {
            Ok(slice) => slice,
            Err(Some(what)) => return missing(what),
            Err(None) => {
                return nothing(range.end.min(self.l1_end(range.start)) - range.start, out);
            }
        };
        let words = slice.entry(self.index_of(range.start));
        let compressed = matches!(self.layout.l2(words.0, words.1), L2Entry::Compressed { .. });
        let unit_bits = if compressed || self.layout.version == Version::V2 {
            self.layout.cluster_bits
        } else {
            self.layout.subcluster_bits()
        };
        let unit_end = ((range.start >> unit_bits) + 1) << unit_bits;
        if range.start.is_multiple_of(1 << unit_bits) && unit_end <= self.whole_end(range.end) {
            return self.zero_units(slice, range, waiter, out);
        }
        let edge = range.start..range.end.min(unit_end);
        let sub = self.layout.subcluster_bits();
        let inside = range.start & (self.layout.cluster_size() - 1);
        let first = (inside >> sub) as u32;
        if self.is_zero(words, first..first + 1) {
            return nothing(edge.end - edge.start, out);
        }
        self.write(edge, waiter, out)
    }

    /// Zeroes whole units from the start of the range on: a run that is all to be changed, or
    /// all zero.
    fn zero_units(
        &self,
        slice: Arc<Slice>,
        range: Range<u64>,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Resolved, ImageError> {
        let whole = range.start..self.whole_end(range.end).min(self.slice_end(&slice));
        let cluster = self.layout.cluster_size();
        let zero = |at: u64| {
            let words = slice.entry(self.index_of(at));
            (self.is_zero(words, self.subclusters(at, &whole)), words)
        };
        let (first, _) = zero(whole.start);
        let mut at = whole.start;
        while at < whole.end {
            let next = (at & !(cluster - 1)) + cluster;
            let (is_zero, words) = zero(at);
            let subclusters = self.subclusters(at, &whole);
            let compressed = matches!(self.layout.l2(words.0, words.1), L2Entry::Compressed { .. });
            let all = subclusters == (0..self.layout.subclusters());
            let is_whole = !compressed && self.layout.version == Version::V3 || all;
            if is_zero != first || subclusters.is_empty() || !is_whole {
                break;
            }
            let unit = self.layout.subcluster_bits();
            at = (at & !(cluster - 1)) + (u64::from(subclusters.end) << unit);
            if at < next {
                break;
            }
        }
        let run = whole.start..at;
        let len = range.end.min(run.end) - range.start;
        if first {
            return nothing(len, out);
        }
        let target = |_| Target::Nothing;
        self.own(slice, (run.clone(), Action::Zero { range: run }), len, waiter, target, out)
    }

    /// Takes a guard for a change of entries. `target` says where a cluster's bytes are.
    fn own(
        &self,
        slice: Arc<Slice>,
        (run, action): (Range<u64>, Action),
        len: u64,
        waiter: &Waiter,
        target: impl Fn(u64) -> Target,
        out: &mut Vec<Piece>,
    ) -> Result<Resolved, ImageError> {
        let bits = self.layout.cluster_bits;
        let clusters = run.start >> bits..run.end.div_ceil(1 << bits);
        let Some(owned) = self.guards.take(clusters, waiter) else { return Ok(Outcome::Busy) };
        let end = run.end.min(owned.clusters().end << bits);
        let action = action.up_to(end);
        let stop = end.min(run.start + len);
        let mut at = run.start;
        while at < stop {
            let next = stop.min(((at >> bits) + 1) << bits);
            let target = target(at);
            match out.last_mut() {
                Some(Piece { len, target: Target::Nothing })
                    if target == Target::Nothing && at > run.start =>
                {
                    *len += next - at;
                }
                _ => out.push(Piece { len: next - at, target }),
            }
            at = next;
        }
        Ok(Outcome::Ready(Some(self.changes.insert(State { owned, slice, action }))))
    }

    pub(super) fn discard(
        &self,
        range: Range<u64>,
        waiter: &Waiter,
        out: &mut Vec<Piece>,
    ) -> Result<Resolved, ImageError> {
        let cluster = self.layout.cluster_size();
        let len = range.end - range.start;
        if !self.has_zero_clusters() {
            // What is below would come back.
            return nothing(len, out);
        }
        let rest = cluster - (range.start & (cluster - 1));
        if rest < cluster || self.whole_end(range.end) - range.start < cluster {
            return nothing(len.min(rest), out);
        }
        let slice = match self.slice_to_clear(range.start) {
            Ok(slice) => slice,
            Err(Some(what)) => return missing(what),
            Err(None) => {
                return nothing(range.end.min(self.l1_end(range.start)) - range.start, out);
            }
        };
        let entry = |at: u64| slice.entry(self.index_of(at));
        let end = self.whole_end(range.end).min(self.slice_end(&slice));
        let first = self.is_discarded(entry(range.start));
        let mut at = range.start + cluster;
        while at + cluster <= end && self.is_discarded(entry(at)) == first {
            at += cluster;
        }
        let len = range.end.min(at) - range.start;
        if first {
            return nothing(len, out);
        }
        let in_file = |at: u64| match self.layout.l2(entry(at).0, entry(at).1) {
            L2Entry::Data { host, .. } | L2Entry::Subclusters { host: Some(host), .. }
                if self.layout.data_file && host == at =>
            {
                Target::InPlace { file: self.data_file(), offset: host }
            }
            _ => Target::Nothing,
        };
        let run = range.start..at;
        if self.raw_data {
            for at in (run.start..run.start + len).step_by(cluster as usize) {
                let len = cluster.min(run.start + len - at);
                out.push(Piece { len, target: in_file(at) });
            }
            return Ok(Outcome::Ready(None));
        }
        let targets: Vec<_> = if self.layout.data_file {
            (run.start..run.end).step_by(cluster as usize).map(in_file).collect()
        } else {
            Vec::new()
        };
        let target = |at: u64| {
            let index = (at - run.start) / cluster;
            targets.get(index as usize).copied().unwrap_or(Target::Nothing)
        };
        let action = Action::Discard { range: run.clone() };
        self.own(Arc::clone(&slice), (run.clone(), action), len, waiter, target, out)
    }

    /// Whether discarding a cluster with this entry changes nothing.
    fn is_discarded(&self, (word, bitmap): (u64, u64)) -> bool {
        match self.layout.l2(word, bitmap) {
            L2Entry::Unallocated => self.backing.is_none(),
            L2Entry::Zero { host, .. } => host.is_none(),
            L2Entry::Subclusters { host: None, bits, .. } => {
                self.backing.is_none() || bits == SubBits::default().with_zero(0..32)
            }
            _ => false,
        }
    }
}
