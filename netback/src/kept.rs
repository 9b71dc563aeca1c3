//! What a guest has said through its rings, for a successor of this process: nobody says it again.
//! It lies in a page that outlives the process, twice: a process that is killed while it writes one
//! has left the other whole.

use std::sync::Arc;

use hypervisor::xenbus::inflight::TableMemory;
use rings::PAGE_SIZE;
use rings::mem::SharedMem;

use crate::hash::{Algorithm, HASH_TYPES, MAX_KEY, MAX_MAPPING, Spread};
use crate::live::{MAX_GROUPS, Wishes};
use crate::proto::{HASH_ALGORITHM_NONE, HASH_ALGORITHM_TOEPLITZ};

/// Bytes of the memory.
pub(crate) const BYTES: usize = PAGE_SIZE;
/// Which of the two counts; alone in its word.
const SELECTOR: usize = 0;
const FIRST: usize = 64;
const SECOND: usize = PAGE_SIZE / 2;
/// Algorithm, types, key, entries of the table, the table, groups, their addresses.
const LEN: usize = 8 + MAX_KEY + 4 + 4 * MAX_MAPPING + 4 + 6 * MAX_GROUPS;
const _: () = assert!(FIRST + LEN <= SECOND && SECOND + LEN <= PAGE_SIZE);

/// See the module.
pub(crate) struct Kept(TableMemory);

impl Kept {
    pub(crate) fn new(memory: TableMemory) -> Kept {
        Kept(memory)
    }

    /// Writes it down.
    pub(crate) fn save(&self, wishes: &Wishes) {
        let mut bytes = Vec::with_capacity(LEN);
        let spread = &wishes.spread;
        let algorithm = match spread.algorithm {
            Algorithm::None => HASH_ALGORITHM_NONE,
            Algorithm::Toeplitz => HASH_ALGORITHM_TOEPLITZ,
        };
        bytes.extend(algorithm.to_le_bytes());
        bytes.extend(spread.types.to_le_bytes());
        bytes.extend(spread.key());
        bytes.extend((spread.mapping.len() as u32).to_le_bytes());
        bytes.extend(spread.mapping.iter().flat_map(|queue| queue.to_le_bytes()));
        bytes.resize(LEN - 6 * MAX_GROUPS - 4, 0);
        bytes.extend((wishes.groups.len() as u32).to_le_bytes());
        bytes.extend(wishes.groups.iter().flatten());
        let next = if self.selected() == 1 { 2 } else { 1 };
        self.0.write(if next == 1 { FIRST } else { SECOND }, &bytes);
        self.0.word(SELECTOR).store(next, std::sync::atomic::Ordering::Release);
    }

    /// Reads into `wishes` what a predecessor has written, for a guest with so many queues. What
    /// makes no sense is left as it is.
    pub(crate) fn load(&self, queues: usize, wishes: &mut Wishes) {
        let from = match self.selected() {
            1 => FIRST,
            2 => SECOND,
            _ => return,
        };
        let mut bytes = [0; LEN];
        self.0.read(from, &mut bytes);
        if let Some((spread, groups)) = parse(&bytes, queues) {
            (wishes.spread, wishes.groups) = (Arc::new(spread), groups);
        }
    }

    fn selected(&self) -> u32 {
        self.0.word(SELECTOR).load(std::sync::atomic::Ordering::Acquire)
    }
}

fn parse(bytes: &[u8], queues: usize) -> Option<(Spread, Vec<[u8; 6]>)> {
    let mut rest = bytes;
    let mut take = |len: usize| {
        let (part, behind) = rest.split_at_checked(len)?;
        rest = behind;
        Some(part)
    };
    let number = |part: &[u8]| part.try_into().ok().map(u32::from_le_bytes);
    let algorithm = Algorithm::of(number(take(4)?)?)?;
    let types = number(take(4)?).filter(|types| types & !HASH_TYPES == 0)?;
    let mut spread = Spread::default();
    (spread.algorithm, spread.types) = (algorithm, types);
    spread.set_key(take(MAX_KEY)?);
    let entries = number(take(4)?).filter(|n| *n as usize <= MAX_MAPPING)?;
    let table = take(4 * MAX_MAPPING)?.get(..4 * entries as usize)?;
    spread.mapping = table.as_chunks().0.iter().map(|queue| u32::from_le_bytes(*queue)).collect();
    let count = number(take(4)?).filter(|n| *n as usize <= MAX_GROUPS)?;
    let groups = take(6 * count as usize)?.as_chunks().0.to_vec();
    spread.mapping.iter().all(|queue| (*queue as usize) < queues).then_some((spread, groups))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rings::mem::HeapPages;

    use super::*;

    fn wishes(groups: usize, entries: usize) -> Wishes {
        let mut spread = Spread::default();
        (spread.algorithm, spread.types) = (Algorithm::Toeplitz, 5);
        spread.set_key(&[7; 33]);
        spread.mapping = (0..entries as u32).map(|n| n % 3).collect();
        let groups = (0..groups).map(|n| [1, 0, 0, 0, 0, n as u8]).collect();
        Wishes { spread: Arc::new(spread), groups, ..Wishes::default() }
    }

    fn same(a: &Wishes, b: &Wishes) -> bool {
        let of = |w: &Wishes| {
            let spread = &w.spread;
            let mapping = spread.mapping.clone();
            (spread.algorithm, spread.types, *spread.key(), mapping, w.groups.clone())
        };
        of(a) == of(b)
    }

    #[test]
    fn what_was_said_last_is_found() {
        let memory: TableMemory = Arc::new(HeapPages::new(1));
        let kept = Kept::new(memory.clone());
        let mut found = wishes(3, 3);
        kept.load(3, &mut found);
        assert!(same(&found, &wishes(3, 3)), "there was nothing to find");
        for (groups, entries) in [(0, 0), (1, 128), (64, 0), (64, 128), (2, 5)] {
            kept.save(&wishes(groups, entries));
            let mut found = Wishes::default();
            Kept::new(memory.clone()).load(3, &mut found);
            assert!(same(&found, &wishes(groups, entries)), "{groups} {entries}");
        }
    }

    #[test]
    fn a_half_written_one_does_not_count() {
        let memory: TableMemory = Arc::new(HeapPages::new(1));
        let kept = Kept::new(memory.clone());
        kept.save(&wishes(1, 4));
        kept.save(&wishes(2, 8));
        // The next one goes over the first.
        memory.write(FIRST, &[0xff; LEN]);
        let mut found = Wishes::default();
        kept.load(3, &mut found);
        assert!(same(&found, &wishes(2, 8)));
    }

    #[test]
    fn what_makes_no_sense_is_not_taken() {
        for bad in 0..5 {
            let memory: TableMemory = Arc::new(HeapPages::new(1));
            let kept = Kept::new(memory.clone());
            kept.save(&wishes(2, 8));
            let place = match bad {
                0 => FIRST,
                1 => FIRST + 4,
                2 => FIRST + 8 + MAX_KEY,
                3 => FIRST + LEN - 6 * MAX_GROUPS - 4,
                _ => FIRST + 8 + MAX_KEY + 4,
            };
            memory.write(place, &200u32.to_le_bytes());
            let mut found = Wishes::default();
            kept.load(3, &mut found);
            assert!(same(&found, &Wishes::default()), "{bad}");
        }
        // A table for more queues than there are now.
        let kept = Kept::new(Arc::new(HeapPages::new(1)));
        kept.save(&wishes(2, 8));
        let mut found = Wishes::default();
        kept.load(2, &mut found);
        assert!(same(&found, &Wishes::default()));
    }
}
