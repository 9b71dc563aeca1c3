//! What a disk may hold after a power cut: for each sector what it held at the last flush that
//! was answered, or anything that was written since.
use std::ops::Range;
use std::sync::Arc;

pub const SECTOR: usize = 512;
/// The tag of what a backing image holds.
pub const BASE: u32 = u32::MAX;

/// A sector's bytes: a write's number, the sector's own, and words that follow from both. Tag 0
/// is zeroes.
pub fn fill(tag: u32, sector: u64, out: &mut [u8]) {
    if tag == 0 {
        return out.fill(0);
    }
    let mut word = u64::from(tag) << 32 | (sector & 0xffff_ffff);
    for bytes in out.chunks_exact_mut(8) {
        bytes.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) ^ u64::from(tag);
    }
}

/// The bytes of `sectors` with one tag.
pub fn bytes_of(tag: u32, sectors: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (sectors.end - sectors.start) as usize * SECTOR];
    bytes.chunks_exact_mut(SECTOR).zip(sectors).for_each(|(out, s)| fill(tag, s, out));
    bytes
}

/// The tag of a sector's bytes; `None` where they are no sector that was ever written there.
pub fn tag_of(bytes: &[u8], sector: u64) -> Option<u32> {
    if bytes == [0; SECTOR] {
        return Some(0);
    }
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    let tag = (u64::from_le_bytes(word) >> 32) as u32;
    let mut expected = [0; SECTOR];
    fill(tag, sector, &mut expected);
    (bytes == expected).then_some(tag)
}

#[derive(Clone, Debug)]
struct Version {
    tag: u32,
    bytes: Arc<[u8; SECTOR]>,
    /// The journal's length when it began.
    from: usize,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    versions: Vec<Version>,
    /// The last version that is certain: a flush makes it the first that is allowed.
    certain: u32,
}

#[derive(Debug)]
struct Flushed {
    /// The journal's length when it was answered.
    done: usize,
    first: Vec<u32>,
    size: usize,
}

/// A snapshot's life, in lengths of the journal.
#[derive(Debug)]
struct Snapshot {
    name: String,
    tags: Vec<u32>,
    created: usize,
    /// Flushed after it was created.
    certain: Option<usize>,
    deleted: Option<usize>,
    /// Flushed after it was deleted.
    gone: Option<usize>,
    /// Its creation or deletion failed: it may be there or not.
    unsure: bool,
}

/// All that was done to a disk. Times are lengths of the journal.
#[derive(Debug)]
pub struct History {
    zeroes: Arc<[u8; SECTOR]>,
    sectors: Vec<Sector>,
    live: Vec<u32>,
    sizes: Vec<(u64, usize)>,
    flushes: Vec<Flushed>,
    snapshots: Vec<Snapshot>,
}

impl History {
    /// A durable disk of `size` sectors, each with its tag; it may grow to `room` sectors.
    pub fn new(size: u64, room: u64, tag: impl Fn(u64) -> u32) -> Self {
        let live: Vec<_> = (0..room).map(|s| if s < size { tag(s) } else { 0 }).collect();
        let mut history = History {
            zeroes: Arc::new([0; SECTOR]),
            sectors: vec![Sector::default(); live.len()],
            live: Vec::new(),
            sizes: vec![(size, 0)],
            flushes: Vec::new(),
            snapshots: Vec::new(),
        };
        (0..).zip(&live).for_each(|(sector, tag)| history.push(sector, *tag, 0));
        history.live = live;
        history
    }

    fn push(&mut self, sector: u64, tag: u32, from: usize) {
        let mut bytes = Arc::clone(&self.zeroes);
        if tag != 0 {
            fill(tag, sector, &mut Arc::make_mut(&mut bytes)[..]);
        }
        self.sectors[sector as usize].versions.push(Version { tag, bytes, from });
    }

    /// What is there now is durable; time begins anew.
    pub fn forget(&mut self) {
        let size = self.size();
        for sector in &mut self.sectors {
            sector.versions.drain(..sector.versions.len() - 1);
            sector.versions[0].from = 0;
            sector.certain = 0;
        }
        self.sizes = vec![(size, 0)];
        self.flushes.clear();
        self.snapshots.retain(|s| s.deleted.is_none());
        self.snapshots.iter_mut().for_each(|s| (s.created, s.certain) = (0, Some(0)));
    }
    /// Sectors as of now.
    pub fn size(&self) -> u64 {
        self.sizes.last().map_or(0, |s| s.0)
    }
    /// What a read is to find now.
    pub fn live(&self, sector: u64) -> u32 {
        self.live[sector as usize]
    }
    /// A change of size failed: it may have any of the last two.
    pub fn resize_failed(&mut self, now: u64, from: usize) {
        self.sizes.push((now, from));
    }

    /// `sectors` may hold `tag` from now on.
    pub fn may_hold(&mut self, sectors: Range<u64>, tag: u32, from: usize) {
        sectors.for_each(|sector| self.push(sector, tag, from));
    }
    /// Whether a read may find `tag` now, as far as is known.
    pub fn may_be(&self, sector: u64, tag: u32) -> bool {
        let sector = &self.sectors[sector as usize];
        sector.versions[sector.certain as usize..].iter().any(|v| v.tag == tag)
    }
    /// `sector` reads as `tag`.
    pub fn holds(&mut self, sector: u64, tag: u32, from: usize) {
        self.live[sector as usize] = tag;
        if self.sectors[sector as usize].versions.last().is_none_or(|v| v.tag != tag) {
            self.push(sector, tag, from);
        }
        let sector = &mut self.sectors[sector as usize];
        sector.certain = sector.versions.len() as u32 - 1;
    }
    /// A flush was answered.
    pub fn flushed(&mut self, done: usize) {
        let first = self.sectors.iter().map(|s| s.certain).collect();
        self.flushes.push(Flushed { done, first, size: self.sizes.len() - 1 });
        for s in &mut self.snapshots {
            s.certain = s.certain.or(Some(done));
            s.gone = s.gone.or(s.deleted.map(|_| done));
        }
    }
    /// The image was let go of with an error: what was not flushed may be there or not.
    pub fn not_flushed(&mut self) {
        let last = self.flushes.last().map(|f| &f.first[..]).unwrap_or_default();
        for (number, sector) in self.sectors.iter_mut().enumerate() {
            sector.certain = last.get(number).copied().unwrap_or(0);
        }
    }
    /// The disk has so many sectors; those beyond read as zeroes if it ever grows again.
    pub fn resized(&mut self, size: u64, from: usize) {
        let old = self.size();
        for sector in size.min(old)..old {
            self.holds(sector, 0, from);
        }
        self.sizes.push((size, from));
    }

    pub fn snapshot_created(&mut self, name: &str, created: usize) {
        let tags = self.live[..self.size() as usize].to_vec();
        let (name, unsure) = (name.to_owned(), false);
        let (certain, deleted, gone) = (None, None, None);
        self.snapshots.push(Snapshot { name, tags, created, certain, deleted, gone, unsure });
    }
    pub fn snapshot_deleted(&mut self, name: &str, deleted: usize) {
        if let Some(s) = self.snapshots.iter_mut().find(|s| s.name == name && s.deleted.is_none()) {
            s.deleted = Some(deleted);
        }
    }
    /// The creation or deletion of a snapshot failed.
    pub fn snapshot_unsure(&mut self, name: &str) {
        self.snapshots.iter_mut().filter(|s| s.name == name).for_each(|s| s.unsure = true);
    }
    /// A snapshot's sectors.
    pub fn snapshot(&self, name: &str) -> Option<&[u32]> {
        let found = self.snapshots.iter().find(|s| s.name == name && s.deleted.is_none());
        found.map(|s| &s.tags[..])
    }

    /// What is allowed when the power is cut at `at`.
    pub fn cut(&self, at: usize) -> Allowed<'_> {
        let flush = self.flushes.iter().rposition(|f| f.done <= at);
        Allowed { history: self, at, flush }
    }
}

/// What a disk may hold after a cut.
#[derive(Clone, Copy, Debug)]
pub struct Allowed<'a> {
    history: &'a History,
    at: usize,
    flush: Option<usize>,
}

impl Allowed<'_> {
    /// How many flushes were answered: what was allowed stays so until the next.
    pub fn flushes(&self) -> usize {
        self.flush.map_or(0, |f| f + 1)
    }
    fn flushed(&self) -> Option<&Flushed> {
        self.flush.map(|f| &self.history.flushes[f])
    }

    fn versions(&self, sector: u64) -> &[Version] {
        let first = self.flushed().map_or(0, |f| f.first[sector as usize]) as usize;
        let versions = &self.history.sectors[sector as usize].versions[first..];
        let begun = versions.iter().skip(1).take_while(|v| v.from < self.at).count();
        &versions[..begun + 1]
    }

    /// Whether the disk may have so many sectors.
    pub fn size(&self, size: u64) -> Result<(), String> {
        let first = self.flushed().map_or(0, |f| f.size);
        let sizes = &self.history.sizes[first..];
        let begun = sizes.iter().skip(1).take_while(|s| s.1 < self.at).count();
        if sizes[..begun + 1].iter().any(|s| s.0 == size) {
            return Ok(());
        }
        Err(format!("{size} sectors, not one of {:?}", &sizes[..begun + 1]))
    }

    /// Whether the sectors from `first` on may hold `bytes`.
    pub fn bytes(&self, first: u64, bytes: &[u8]) -> Result<(), String> {
        for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            let versions = self.versions(sector);
            if versions.iter().rev().all(|v| v.bytes[..] != *bytes) {
                let tags: Vec<_> = versions.iter().map(|v| v.tag).collect();
                let tag = tag_of(bytes, sector);
                let found = tag.map_or_else(|| describe(bytes), |t| format!("write {t}"));
                return Err(format!("sector {sector} holds {found}, not one of {tags:?}"));
            }
        }
        Ok(())
    }

    /// Whether these may be the snapshots; gives what each of them must hold.
    pub fn snapshots(&self, names: &[String]) -> Result<Vec<(String, &[u32])>, String> {
        let mut found = Vec::new();
        for s in &self.history.snapshots {
            let must = !s.unsure
                && s.certain.is_some_and(|at| at <= self.at)
                && s.deleted.is_none_or(|deleted| deleted >= self.at);
            let may = s.created < self.at && (s.unsure || s.gone.is_none_or(|gone| gone > self.at));
            match names.contains(&s.name) {
                true if may => found.push((s.name.clone(), &s.tags[..])),
                false if must => return Err(format!("snapshot {} is lost", s.name)),
                _ => {}
            }
        }
        for name in names {
            if !found.iter().any(|(n, _)| n == name) {
                return Err(format!("snapshot {name} ought not to be there"));
            }
        }
        Ok(found)
    }
}

fn describe(bytes: &[u8]) -> String {
    let mut words = [0; 8];
    words.copy_from_slice(&bytes[..8]);
    let word = u64::from_le_bytes(words);
    let (tag, sector) = ((word >> 32) as u32, word as u32);
    let mut expected = [0; SECTOR];
    fill(tag, u64::from(sector), &mut expected);
    match bytes == expected {
        true => format!("sector {sector} of write {tag}"),
        false => format!("rubbish {:02x?}", &bytes[..16]),
    }
}

#[test]
fn a_sector_is_what_was_flushed_or_written_since() {
    let mut history = History::new(4, 8, |_| BASE);
    let holds = |h: &History, at, sector, tag: u32| {
        h.cut(at).bytes(sector, &bytes_of(tag, sector..sector + 1)).is_ok()
    };
    history.holds(1, 1, 0);
    history.holds(1, 2, 3);
    history.flushed(5);
    history.may_hold(1..2, 3, 6);
    history.flushed(8);
    let seen = |h: &History, at| {
        [BASE, 0, 1, 2, 3].map(|tag| u8::from(holds(h, at, 1, tag))).map(|b| b.to_string()).concat()
    };
    assert_eq!(seen(&history, 0), "10000");
    assert_eq!(seen(&history, 1), "10100");
    assert_eq!(seen(&history, 4), "10110");
    assert_eq!(seen(&history, 5), "00010");
    assert_eq!(seen(&history, 7), "00011");
    assert_eq!(seen(&history, 8), "00011", "an uncertain write stays so");
    assert!(!holds(&history, 8, 0, 0) && holds(&history, 8, 0, BASE));
    let elsewhere = bytes_of(BASE, 1..2);
    let error = history.cut(0).bytes(0, &elsewhere).expect_err("another sector's bytes");
    assert!(error.contains("sector 1 of write"), "{error}");
    assert!(history.cut(0).bytes(0, &[7; 512]).expect_err("rubbish").contains("rubbish"));
}

#[test]
fn snapshots_and_sizes_live_from_flush_to_flush() {
    let mut history = History::new(2, 4, |_| 0);
    let names = ["a".to_owned()];
    history.snapshot_created("a", 10);
    history.resized(4, 12);
    history.flushed(20);
    history.snapshot_deleted("a", 30);
    history.flushed(40);
    let may =
        |at| (history.cut(at).snapshots(&[]).is_ok(), history.cut(at).snapshots(&names).is_ok());
    assert_eq!(
        [5, 15, 25, 35, 45].map(may).map(|(no, yes)| u8::from(no) * 2 + u8::from(yes)),
        [2, 3, 1, 3, 2]
    );
    assert_eq!(
        [5, 15, 25].map(|at| [2, 4].map(|s| history.cut(at).size(s).is_ok())),
        [[true, false], [true, true], [false, true]]
    );
}
