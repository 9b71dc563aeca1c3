//! Where guest bytes are: no lock on a block that is full, a shard's on another.
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::bitmap::{Bitmap, Changes};
use super::{ALLOCATE, FULL, Table, UNUSED, sector_of};
use crate::formats::{
    Change, Extent, Fresh, Guard, Leases, Miss, Outcome, Piece, Place, Target, Waiter,
};

/// The part of a range that lies in one block.
struct Part {
    block: u32,
    /// Guest bytes.
    start: u64,
    end: u64,
    /// First byte in the block.
    skip: u64,
    /// Where the block's data begin in the file.
    data: u64,
}

impl Part {
    fn len(&self) -> u64 {
        self.end - self.start
    }
    fn offset(&self) -> u64 {
        self.data + self.skip
    }
    /// The sectors that it touches.
    fn sectors(&self) -> Range<u32> {
        (self.skip / 512) as u32..(self.skip + self.len()).div_ceil(512) as u32
    }
    /// Bytes from its start up to `sector`.
    fn up_to(&self, sector: u32) -> u64 {
        (u64::from(sector) * 512 - self.skip).min(self.len())
    }
    /// The same, shorter.
    fn cut(&self, sector: u32) -> Part {
        Part { end: self.start + self.up_to(sector), ..*self }
    }
}

/// What resolving a part of a write gives.
enum Step {
    /// Pieces without a guard were told, so many bytes.
    Told(u64),
    /// A piece with a guard was told.
    Guarded(Guard),
    Busy,
    Miss,
}

fn push(out: &mut Vec<Extent>, first: usize, len: u64, place: Place) {
    match out.last_mut() {
        Some(last) if last.place == place && !matches!(place, Place::Data { .. }) && first > 0 => {
            last.len += len;
        }
        _ => out.push(Extent { len, place }),
    }
}

impl Table {
    fn part(&self, range: &Range<u64>, at: u64, word: u64) -> Part {
        let block = at >> self.shift;
        let end = range.end.min((block + 1) << self.shift);
        let skip = at - (block << self.shift);
        let data = u64::from(sector_of(word)) * 512 + self.bitmap_bytes;
        Part { block: block as u32, start: at, end, skip, data }
    }

    pub(super) fn read(&self, range: Range<u64>, out: &mut Vec<Extent>) -> Outcome<()> {
        let (mut at, first) = (range.start, out.len());
        while at < range.end {
            let block = (at >> self.shift) as u32;
            let word = self.word(block);
            let part = self.part(&range, at, word);
            let told = out.len() - first;
            if sector_of(word) == UNUSED {
                push(out, told, part.len(), self.below());
            } else if word & FULL != 0 {
                let place = Place::Data { file: 0, offset: part.offset() };
                push(out, told, part.len(), place);
            } else if self.bitmaps.with(block, |b| self.read_sectors(b, &part, out)).is_none() {
                return match at == range.start {
                    true => Outcome::Miss(Miss(u64::from(block))),
                    false => Outcome::Ready(()),
                };
            }
            at = part.end;
        }
        Outcome::Ready(())
    }

    fn read_sectors(&self, bitmap: &Bitmap, part: &Part, out: &mut Vec<Extent>) {
        let sectors = part.sectors();
        let (mut at, mut done) = (sectors.start, 0);
        while at < sectors.end {
            let (set, end) = bitmap.run(at..sectors.end);
            let upto = part.up_to(end);
            let place = match set {
                true => Place::Data { file: 0, offset: part.offset() + done },
                false => self.below(),
            };
            out.push(Extent { len: upto - done, place });
            (at, done) = (end, upto);
        }
    }

    pub(super) fn write(
        &self,
        range: Range<u64>,
        change: Change,
        waiter: &Waiter,
        leases: &Leases,
        size: u64,
        out: &mut Vec<Piece>,
    ) -> Outcome<Option<Guard>> {
        let mut at = range.start;
        while at < range.end {
            let block = (at >> self.shift) as u32;
            let word = self.word(block);
            let part = self.part(&range, at, word);
            let step = if sector_of(word) == UNUSED {
                match self.needs_block(change) {
                    true if at > range.start => break,
                    true => return Outcome::Miss(Miss(u64::from(block) | ALLOCATE)),
                    false => tell(out, part.len(), Target::Nothing),
                }
            } else if word & FULL != 0 {
                let all = part.skip == 0 && part.end == size.min(part.start + (1 << self.shift));
                let target = match all && self.may_free(change) && self.free(block, word, leases) {
                    true => Target::Nothing,
                    false => Target::InPlace { file: 0, offset: part.offset() },
                };
                tell(out, part.len(), target)
            } else if !self.needs_block(change) {
                let told = self.bitmaps.with(block, |b| give_up_sectors(b, &part, out));
                told.map_or(Step::Miss, Step::Told)
            } else {
                let again = at > range.start;
                let told =
                    self.bitmaps.with(block, |b| write_sectors(b, &part, again, waiter, out));
                told.unwrap_or(Step::Miss)
            };
            match step {
                Step::Told(len) => at += len,
                Step::Guarded(guard) => return Outcome::Ready(Some(guard)),
                _ if at > range.start => break,
                Step::Busy => return Outcome::Busy,
                Step::Miss => return Outcome::Miss(Miss(u64::from(block))),
            }
        }
        Outcome::Ready(None)
    }

    /// Whether a change of what has no block needs one.
    fn needs_block(&self, change: Change) -> bool {
        match change {
            Change::Write => true,
            Change::Zero => self.below() == Place::Absent,
            Change::Discard => false,
        }
    }

    /// Whether a change of a whole block may give it up: not where the parent would show.
    fn may_free(&self, change: Change) -> bool {
        change != Change::Write && self.below() == Place::Zero
    }

    /// Frees a block that is full, if it still is what it was.
    fn free(&self, block: u32, word: u64, leases: &Leases) -> bool {
        let mut changes = self.dirty.changes();
        let slot = &self.blocks[block as usize];
        let unused = u64::from(UNUSED);
        if slot.compare_exchange(word, unused, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return false;
        }
        changes.table.insert(block, UNUSED);
        changes.freed.push((sector_of(word), leases.stamp()));
        true
    }

    pub(super) fn commit(&self, guard: &Guard) {
        let (block, id) = ((guard.0 >> 32) as u32, guard.0 as u32);
        let Some(bitmap) = self.bitmaps.get(block) else { return };
        let mut changes = bitmap.changes();
        let Some((sectors, waiters)) = changes.end(id) else { return };
        bitmap.set(sectors);
        self.dirty.changes().bitmaps.insert(block);
        if bitmap.is_full() {
            self.blocks[block as usize].fetch_or(FULL, Ordering::AcqRel);
        }
        drop(changes);
        waiters.into_iter().for_each(|w| w.wake());
    }

    pub(super) fn abort(&self, guard: &Guard) {
        let (block, id) = ((guard.0 >> 32) as u32, guard.0 as u32);
        let Some(bitmap) = self.bitmaps.get(block) else { return };
        let mut changes = bitmap.changes();
        // Some of it may have been written.
        bitmap.spoil();
        let Some((_, waiters)) = changes.end(id) else { return };
        drop(changes);
        waiters.into_iter().for_each(|w| w.wake());
    }
}

fn tell(out: &mut Vec<Piece>, len: u64, target: Target) -> Step {
    out.push(Piece { len, target });
    Step::Told(len)
}

/// What need not be kept: what is set becomes a hole, the rest stays.
fn give_up_sectors(bitmap: &Bitmap, part: &Part, out: &mut Vec<Piece>) -> u64 {
    let sectors = part.sectors();
    let (mut at, mut done) = (sectors.start, 0);
    while at < sectors.end {
        let (set, end) = bitmap.run(at..sectors.end);
        let upto = part.up_to(end);
        let target = match set {
            true => Target::InPlace { file: 0, offset: part.offset() + done },
            false => Target::Nothing,
        };
        tell(out, upto - done, target);
        (at, done) = (end, upto);
    }
    part.len()
}

/// New data for sectors. All set: in place. Otherwise a guard over those up to the first that
/// somebody else is changing; not if something was `told` before, as a guard goes with one piece.
fn write_sectors(
    bitmap: &Bitmap,
    part: &Part,
    told: bool,
    waiter: &Waiter,
    out: &mut Vec<Piece>,
) -> Step {
    let in_place = Target::InPlace { file: 0, offset: part.offset() };
    let sectors = part.sectors();
    if bitmap.all_set(sectors.clone()) {
        return tell(out, part.len(), in_place);
    }
    if told {
        return Step::Busy;
    }
    let mut changes = bitmap.changes();
    if changes.gone {
        return Step::Miss;
    }
    // Bits are set and changes end under this lock.
    let Some(end) = changes.free(sectors.clone(), waiter) else { return Step::Busy };
    let part = part.cut(end);
    let sectors = sectors.start..end;
    let (set, run) = bitmap.run(sectors.clone());
    // An edge that is not a whole sector is brought along, which must not be done to one that
    // others write to in place.
    let odd_start = !part.skip.is_multiple_of(512);
    let odd_end = !(part.skip + part.len()).is_multiple_of(512);
    if set && (odd_start || run == end) {
        return tell(out, part.up_to(run), in_place);
    }
    let part = match odd_end && end - sectors.start > 1 && bitmap.is_set(end - 1) {
        true => part.cut(end - 1),
        false => part,
    };
    guarded(bitmap, &mut changes, &part, out)
}

fn guarded(bitmap: &Bitmap, changes: &mut Changes, part: &Part, out: &mut Vec<Piece>) -> Step {
    let sectors = part.sectors();
    let head = (part.skip % 512) as u32;
    let tail = ((512 - (part.skip + part.len()) % 512) % 512) as u32;
    let unset = bitmap.run(sectors.clone()) == (false, sectors.end);
    let fresh = match unset && bitmap.is_virgin() {
        true => Fresh::Zeroes,
        false => Fresh::Unknown,
    };
    let target = Target::New { file: 0, offset: part.offset(), head, tail, fresh };
    out.push(Piece { len: part.len(), target });
    let id = changes.take(sectors);
    Step::Guarded(Guard(u64::from(part.block) << 32 | u64::from(id)))
}
