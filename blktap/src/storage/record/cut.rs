//! The states that a power cut may leave.
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use super::{Action, Entry, Recording, SECTOR, SparseBytes};

/// Writes of more sectors are torn into so many pieces at most.
const PIECES: u64 = 64;

/// How many states of one cut are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Up to so many, all of them.
    pub all: usize,
    /// Where there are more: so many at random with each write lost or kept as a whole, and so
    /// many with torn writes; besides, each of the last so many writes alone and left out.
    pub sample: usize,
}

/// What of the pending entries is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    bits: Vec<u64>,
}

impl Choice {
    fn none(units: usize) -> Self {
        Choice { bits: vec![0; units.div_ceil(64)] }
    }
    fn keep(&mut self, unit: usize) {
        self.bits[unit / 64] |= 1 << (unit % 64);
    }
    fn kept(&self, unit: usize) -> bool {
        self.bits[unit / 64] & (1 << (unit % 64)) != 0
    }
    /// Whether nothing is.
    pub fn is_none(&self) -> bool {
        self.bits.iter().all(|b| *b == 0)
    }
}

/// A part of an entry, lost or kept as one.
#[derive(Clone, Debug)]
enum Part {
    /// Sectors, with where they lie among the slots: (slot, hash).
    Sectors { sectors: Range<u64>, slots: Vec<(usize, u64)> },
    /// The file's new size alone.
    Size,
}

#[derive(Clone, Debug)]
struct Unit {
    entry: usize,
    part: Part,
}

/// A walk through a [`Recording`], one entry at a time. At each position stands a power cut: what
/// was synced is there, and of the entries since then any part may be.
pub struct Cuts<'a> {
    entries: &'a [Entry],
    position: usize,
    /// The files as of their last sync, and the sum of their sectors' hashes.
    durable: Vec<SparseBytes>,
    durable_sum: u64,
    /// Their sizes with all entries up to here.
    sizes: Vec<u64>,
    pending: Vec<Unit>,
    /// Sectors that pending units touch, with the hash of what is durable in them.
    slots: HashMap<(usize, u64), usize>,
    below: Vec<u64>,
}

impl<'a> Cuts<'a> {
    pub(super) fn new(recording: &'a Recording) -> Self {
        let durable = recording.initial.clone();
        Cuts {
            entries: &recording.entries,
            position: 0,
            durable_sum: sum_of(&durable),
            sizes: durable.iter().map(SparseBytes::len).collect(),
            durable,
            pending: Vec::new(),
            slots: HashMap::new(),
            below: Vec::new(),
        }
    }

    /// How many entries lie before the cut.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Goes behind the next entry; false at the end.
    pub fn step(&mut self) -> bool {
        let Some(entry) = self.entries.get(self.position) else { return false };
        match entry.action {
            Action::Sync => self.sync(entry.file),
            _ => self.add(self.position),
        }
        self.position += 1;
        true
    }

    fn sync(&mut self, file: usize) {
        let (done, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|unit| self.entries[unit.entry].file == file);
        for unit in &done {
            apply(&self.entries[unit.entry], &unit.part, &mut self.durable[file]);
        }
        self.durable_sum = match self.shrinks(&done) {
            true => sum_of(&self.durable),
            false => self.sum(done.iter()),
        };
        self.slots.clear();
        self.below.clear();
        let mut entries: Vec<_> = left.iter().map(|unit| unit.entry).collect();
        entries.dedup();
        // Which of them grow the file is known from the first time.
        let grows: Vec<_> = left.iter().filter(|u| matches!(u.part, Part::Size)).collect();
        for entry in entries {
            self.add_sectors(entry);
            self.pending.extend(grows.iter().filter(|u| u.entry == entry).map(|u| (*u).clone()));
        }
    }

    fn add(&mut self, entry: usize) {
        self.add_sectors(entry);
        let Entry { file, action } = &self.entries[entry];
        let size = &mut self.sizes[*file];
        let new = match action {
            Action::Write { size: end, .. } => (*end).max(*size),
            Action::Size { size } => *size,
            Action::Zero { .. } | Action::Sync => *size,
        };
        if new != *size {
            *size = new;
            self.pending.push(Unit { entry, part: Part::Size });
        }
    }

    fn add_sectors(&mut self, entry: usize) {
        let Entry { file, action } = &self.entries[entry];
        let (sectors, bytes) = match action {
            Action::Write { offset, bytes, .. } => {
                (offset / SECTOR..(offset + bytes.len() as u64) / SECTOR, Some(bytes))
            }
            Action::Zero { range } => (range.start / SECTOR..range.end / SECTOR, None),
            Action::Size { .. } | Action::Sync => return,
        };
        let piece = (sectors.end - sectors.start).div_ceil(PIECES).max(1);
        for start in sectors.clone().step_by(piece as usize) {
            let piece = start..(start + piece).min(sectors.end);
            let slot_of = |sector: u64| {
                let at = ((sector - sectors.start) * SECTOR) as usize;
                let hash = bytes.map_or(0, |b| hash(*file, sector, &b[at..at + SECTOR as usize]));
                (self.slot(*file, sector), hash)
            };
            let slots = piece.clone().map(slot_of).collect();
            self.pending.push(Unit { entry, part: Part::Sectors { sectors: piece, slots } });
        }
    }

    fn slot(&mut self, file: usize, sector: u64) -> usize {
        let durable = &self.durable[file];
        *self.slots.entry((file, sector)).or_insert_with(|| {
            let mut bytes = [0; SECTOR as usize];
            durable.read(sector * SECTOR, &mut bytes);
            self.below.push(hash(file, sector, &bytes));
            self.below.len() - 1
        })
    }

    /// The sum of the hashes of what is durable with `units` on top; none of them shrinks a file.
    fn sum<'u>(&self, units: impl Iterator<Item = &'u Unit>) -> u64 {
        let mut above = self.below.clone();
        for unit in units {
            if let Part::Sectors { slots, .. } = &unit.part {
                slots.iter().for_each(|(slot, hash)| above[*slot] = *hash);
            }
        }
        let sum = |hashes: &[u64]| hashes.iter().fold(0u64, |sum, h| sum.wrapping_add(*h));
        self.durable_sum.wrapping_sub(sum(&self.below)).wrapping_add(sum(&above))
    }

    fn shrinks(&self, units: &[Unit]) -> bool {
        units.iter().any(|u| matches!(self.entries[u.entry].action, Action::Size { .. }))
    }

    /// What is kept of the pending entries, `effort` times differently.
    pub fn choices(&self, effort: Effort, seed: u64) -> Vec<Choice> {
        let units = self.pending.len();
        let mut random = Random(seed ^ (self.position as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if units < 24 && 1 << units <= effort.all {
            return all(&(0..units).map(|unit| unit..unit + 1).collect::<Vec<_>>(), units);
        }
        let entries = self.pending_entries();
        let mut choices = match entries.len() < 24 && 1 << entries.len() <= effort.all {
            true => all(&entries, units),
            false => some(&entries, units, effort, &mut random),
        };
        for _ in 0..effort.sample {
            choices.push(random.choice((0..units).map(|unit| unit..unit + 1), units));
        }
        choices
    }

    /// The pending units of each entry.
    fn pending_entries(&self) -> Vec<Range<usize>> {
        let mut entries: Vec<Range<usize>> = Vec::new();
        for (n, unit) in self.pending.iter().enumerate() {
            match entries.last_mut() {
                Some(last) if self.pending[last.start].entry == unit.entry => last.end = n + 1,
                _ => entries.push(n..n + 1),
            }
        }
        entries
    }

    fn chosen(&self, choice: &Choice) -> impl Iterator<Item = &Unit> {
        let kept: Vec<_> = (0..self.pending.len()).filter(|n| choice.kept(*n)).collect();
        kept.into_iter().map(|n| &self.pending[n])
    }

    /// The files after the cut.
    pub fn state(&self, choice: &Choice) -> Vec<SparseBytes> {
        let mut state = self.durable.clone();
        for unit in self.chosen(choice) {
            let entry = &self.entries[unit.entry];
            apply(entry, &unit.part, &mut state[entry.file]);
        }
        state
    }

    /// A number for the files' bytes and sizes after the cut: where it differs they do, where it
    /// is the same they are, but for an accident of 64 bits.
    pub fn fingerprint(&self, choice: &Choice) -> u64 {
        if self.shrinks(&self.pending) {
            return fingerprint(&self.state(choice));
        }
        let mut sizes: Vec<_> = self.durable.iter().map(SparseBytes::len).collect();
        for unit in self.chosen(choice) {
            let Entry { file, action } = &self.entries[unit.entry];
            sizes[*file] = grown(action, &unit.part, sizes[*file]);
        }
        with_sizes(self.sum(self.chosen(choice)), sizes)
    }
}

/// The size of a file of `size` bytes once a part of `action` is in it.
fn grown(action: &Action, part: &Part, size: u64) -> u64 {
    match (action, part) {
        (Action::Write { size: end, .. }, Part::Sectors { sectors, .. }) => {
            size.max((*end).min(sectors.end * SECTOR))
        }
        (Action::Write { size: end, .. }, Part::Size) => size.max(*end),
        (Action::Size { size }, _) => *size,
        (Action::Zero { .. } | Action::Sync, _) => size,
    }
}

fn apply(entry: &Entry, part: &Part, bytes: &mut SparseBytes) {
    let size = grown(&entry.action, part, bytes.len());
    if let Part::Sectors { sectors, .. } = part {
        let (start, len) = (sectors.start * SECTOR, (sectors.end - sectors.start) * SECTOR);
        match &entry.action {
            Action::Write { offset, bytes: from, .. } => {
                let at = (start - offset) as usize;
                // What was recorded is small enough to be kept.
                let _ = bytes.write(start, &from[at..at + len as usize]);
            }
            Action::Zero { .. } => bytes.zero(start, len),
            Action::Size { .. } | Action::Sync => {}
        }
    }
    let _ = bytes.set_len(size);
}

/// All ways to keep some of `groups` of `units`.
fn all(groups: &[Range<usize>], units: usize) -> Vec<Choice> {
    let choice = |bits: u64| {
        let mut choice = Choice::none(units);
        let kept = groups.iter().enumerate().filter(|(n, _)| bits & (1 << n) != 0);
        kept.flat_map(|(_, group)| group.clone()).for_each(|unit| choice.keep(unit));
        choice
    };
    (0..1 << groups.len()).map(choice).collect()
}

/// None, all, each of the last alone and left out, and some at random.
fn some(groups: &[Range<usize>], units: usize, effort: Effort, random: &mut Random) -> Vec<Choice> {
    let keep = |which: &dyn Fn(usize) -> bool| {
        let mut choice = Choice::none(units);
        let kept = groups.iter().enumerate().filter(|(n, _)| which(*n));
        kept.flat_map(|(_, group)| group.clone()).for_each(|unit| choice.keep(unit));
        choice
    };
    let mut choices = vec![keep(&|_| false), keep(&|_| true)];
    for n in groups.len().saturating_sub(effort.sample)..groups.len() {
        choices.push(keep(&|m| m == n));
        choices.push(keep(&|m| m != n));
    }
    for _ in 0..effort.sample {
        choices.push(random.choice(groups.iter().cloned(), units));
    }
    choices
}

/// The same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Few, half or most of the groups.
    fn choice(&mut self, groups: impl Iterator<Item = Range<usize>>, units: usize) -> Choice {
        let share = [1, 4, 7][(self.next() % 3) as usize];
        let mut choice = Choice::none(units);
        for group in groups {
            if self.next() % 8 < share {
                group.for_each(|unit| choice.keep(unit));
            }
        }
        choice
    }
}

/// 0 for zeroes, so that what is not there need not be known.
fn hash(file: usize, sector: u64, bytes: &[u8]) -> u64 {
    if bytes.iter().all(|b| *b == 0) {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    (file, sector).hash(&mut hasher);
    hasher.write(bytes);
    hasher.finish()
}

fn sum_of(files: &[SparseBytes]) -> u64 {
    let mut sum = 0u64;
    for (file, bytes) in files.iter().enumerate() {
        for (offset, page) in bytes.pages() {
            for (n, sector) in page.chunks(SECTOR as usize).enumerate() {
                let mut whole = [0; SECTOR as usize];
                whole[..sector.len()].copy_from_slice(sector);
                sum = sum.wrapping_add(hash(file, offset / SECTOR + n as u64, &whole));
            }
        }
    }
    sum
}

fn with_sizes(sum: u64, sizes: Vec<u64>) -> u64 {
    let mut hasher = DefaultHasher::new();
    (sum, sizes).hash(&mut hasher);
    hasher.finish()
}

/// As [`Cuts::fingerprint`] has it.
fn fingerprint(files: &[SparseBytes]) -> u64 {
    with_sizes(sum_of(files), files.iter().map(SparseBytes::len).collect())
}

#[cfg(test)]
mod tests;
