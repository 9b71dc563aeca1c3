//! How often each cluster is referred to: a sparse array whose entries are as wide as they need
//! to be, within a limit of memory.
use std::collections::BTreeMap;
use std::ops::Range;

/// Clusters of one chunk.
const CHUNK: u64 = 1 << 16;

/// The counts of one chunk's clusters.
#[derive(Debug)]
enum Chunk {
    /// Two bits each.
    Crumbs(Box<[u8]>),
    Bytes(Box<[u8]>),
    Words(Box<[u32]>),
}

impl Chunk {
    fn new() -> Self {
        Chunk::Crumbs(vec![0; CHUNK as usize / 4].into())
    }

    fn bytes(&self) -> usize {
        match self {
            Chunk::Crumbs(all) | Chunk::Bytes(all) => all.len(),
            Chunk::Words(all) => all.len() * 4,
        }
    }

    fn get(&self, at: usize) -> u32 {
        match self {
            Chunk::Crumbs(all) => u32::from(all[at / 4] >> (at % 4 * 2) & 3),
            Chunk::Bytes(all) => u32::from(all[at]),
            Chunk::Words(all) => all[at],
        }
    }

    fn set(&mut self, at: usize, count: u32) {
        match self {
            Chunk::Crumbs(all) if count <= 3 => {
                let shift = at % 4 * 2;
                all[at / 4] = all[at / 4] & !(3 << shift) | (count as u8) << shift;
            }
            Chunk::Bytes(all) if count <= 0xff => all[at] = count as u8,
            Chunk::Words(all) => all[at] = count,
            Chunk::Crumbs(_) | Chunk::Bytes(_) => {
                self.widen(count);
                self.set(at, count);
            }
        }
    }

    /// Makes room for `count`.
    fn widen(&mut self, count: u32) {
        let all = 0..CHUNK as usize;
        *self = match count <= 0xff {
            true => Chunk::Bytes(all.map(|at| self.get(at) as u8).collect()),
            false => Chunk::Words(all.map(|at| self.get(at)).collect()),
        };
    }
}

/// Counts of a window of clusters. When the memory that they may use is not enough, the window
/// becomes shorter, from its end, and the rest is for another pass.
#[derive(Debug)]
pub(super) struct Counts {
    chunks: BTreeMap<u64, Chunk>,
    window: Range<u64>,
    /// No cluster behind it was counted.
    last: u64,
    bytes: usize,
    limit: usize,
}

impl Counts {
    /// Of the clusters from `start` on, in about `limit` bytes.
    pub(super) fn new(start: u64, limit: usize) -> Self {
        Counts { chunks: BTreeMap::new(), window: start..u64::MAX, last: 0, bytes: 0, limit }
    }

    /// The clusters that are counted.
    pub(super) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Adds `n` to a cluster's count, which stops at `u32::MAX`. Outside of the window: nothing.
    pub(super) fn add(&mut self, cluster: u64, n: u32) {
        if !self.window.contains(&cluster) || n == 0 {
            return;
        }
        self.last = self.last.max(cluster);
        let (chunk, at) = (cluster / CHUNK, (cluster % CHUNK) as usize);
        let chunk = self.chunks.entry(chunk).or_insert_with(|| {
            self.bytes += CHUNK as usize / 4;
            Chunk::new()
        });
        let before = chunk.bytes();
        chunk.set(at, chunk.get(at).saturating_add(n));
        self.bytes += chunk.bytes() - before;
        while self.bytes > self.limit && self.chunks.len() > 1 {
            self.shorten();
        }
    }

    fn shorten(&mut self) {
        if let Some((number, chunk)) = self.chunks.pop_last() {
            self.bytes -= chunk.bytes();
            self.window.end = self.window.end.min(number * CHUNK).max(self.window.start);
        }
    }

    /// A cluster's count; 0 outside of the window.
    pub(super) fn get(&self, cluster: u64) -> u32 {
        match self.chunks.get(&(cluster / CHUNK)) {
            Some(chunk) if self.window.contains(&cluster) => chunk.get((cluster % CHUNK) as usize),
            _ => 0,
        }
    }

    /// Stretches of clusters outside of which nothing was counted, in order.
    pub(super) fn chunks(&self) -> impl Iterator<Item = Range<u64>> {
        self.chunks.keys().map(|number| number * CHUNK..(number + 1) * CHUNK)
    }

    /// The clusters with a count, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u32)> {
        self.chunks.iter().flat_map(|(number, chunk)| {
            let end = (self.last + 1).saturating_sub(number * CHUNK).min(CHUNK);
            (0..end as usize)
                .map(move |at| (number * CHUNK + at as u64, chunk.get(at)))
                .filter(|(_, count)| *count > 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_any_width_are_kept() {
        let mut counts = Counts::new(0, 1 << 30);
        for (cluster, n) in [(0, 1), (1, 3), (2, 4), (3, 255), (4, 256), (5, u32::MAX)] {
            counts.add(cluster, n);
        }
        counts.add(5, 7);
        counts.add(CHUNK * 1000 + 1, 2);
        let all: Vec<_> = counts.iter().collect();
        let far = CHUNK * 1000 + 1;
        assert_eq!(all, [(0, 1), (1, 3), (2, 4), (3, 255), (4, 256), (5, u32::MAX), (far, 2)]);
        assert_eq!((counts.get(2), counts.get(6), counts.get(far)), (4, 0, 2));
    }

    #[test]
    fn a_small_limit_makes_more_windows_and_the_same_counts() {
        let clusters: Vec<u64> = (0..400_000).map(|i| i * 7919 % (CHUNK * 20)).collect();
        let mut whole = Counts::new(0, 1 << 30);
        clusters.iter().for_each(|c| whole.add(*c, 1));
        let (mut start, mut parts, mut windows) = (0, Vec::new(), 0);
        while start < u64::MAX {
            let mut part = Counts::new(start, 70 << 10);
            clusters.iter().for_each(|c| part.add(*c, 1));
            assert!(part.bytes <= 70 << 10);
            assert!(part.window().end > start, "no progress");
            start = part.window().end;
            parts.extend(part.iter());
            windows += 1;
        }
        assert!(windows > 3, "{windows}");
        assert_eq!(parts, whole.iter().collect::<Vec<_>>());
    }
}
