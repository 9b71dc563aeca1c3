//! A run of random steps on an image, with its history.
use std::ops::Range;
use std::sync::Arc;

use blktap::formats::{Change, ImageError};
use blktap::storage::Storage;
use blktap::storage::record::Journal;

use crate::case::{Case, Driver, Special, Way};
use crate::direct::Stop;
use crate::history::{BASE, History, SECTOR, bytes_of, tag_of};

/// One step. Ranges are sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Change(Change, Range<u64>),
    Flush,
    /// Closes the image and opens it again.
    Reopen,
    Special(Special),
}

/// The same numbers for the same seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// `n` random steps for a case.
pub fn steps(case: &dyn Case, n: usize, seed: u64) -> Vec<Step> {
    let mut random = Random(seed);
    let (mut size, mut snapshots, mut made) = (case.sectors(), Vec::<(String, u64)>::new(), 0);
    let special = case.specials();
    let mut steps = Vec::new();
    while steps.len() < n {
        let any = random.below(snapshots.len() as u64) as usize;
        let step = match random.below(40) {
            0..20 => Step::Change(Change::Write, range(&mut random, size, case.cluster())),
            20..24 => Step::Change(Change::Zero, range(&mut random, size, case.cluster())),
            24..28 => Step::Change(Change::Discard, range(&mut random, size, case.cluster())),
            28..34 => Step::Flush,
            34 => Step::Reopen,
            35 | 36 if special.snapshots && snapshots.len() < 3 => {
                made += 1;
                snapshots.push((format!("s{made}"), size));
                Step::Special(Special::Snapshot(format!("s{made}")))
            }
            37 if special.snapshots && !snapshots.is_empty() => {
                size = snapshots[any].1;
                Step::Special(Special::Apply(snapshots[any].0.clone()))
            }
            38 if !snapshots.is_empty() => {
                Step::Special(Special::Delete(snapshots.swap_remove(any).0))
            }
            39 => {
                let Some(most) = special.grow else { continue };
                let least = if special.shrinks { most / 3 } else { size };
                size = least + random.below(most - least + 1);
                Step::Special(Special::Resize(size * 512))
            }
            _ => continue,
        };
        steps.push(step);
    }
    steps
}

/// Whole clusters, parts of one, and what lies across some.
fn range(random: &mut Random, size: u64, cluster: u64) -> Range<u64> {
    let clusters = size.div_ceil(cluster);
    let start = random.below(clusters) * cluster;
    let (start, len) = match random.below(4) {
        0 => (start, cluster * (1 + random.below(3))),
        1 => (start + random.below(cluster), 1 + random.below(cluster * 2)),
        _ => (start + random.below(cluster), 1 + random.below(cluster.min(8))),
    };
    let start = start.min(size - 1);
    start..(start + len).min(size)
}

/// Whether the files under an image do what they are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    Working,
    Failing,
}

/// An image in use, and all that was done to it.
pub struct Run<'a> {
    case: &'a dyn Case,
    files: Vec<Arc<dyn Storage>>,
    way: Way,
    pub journal: Arc<Journal>,
    pub history: History,
    driver: Option<Driver>,
    tag: u32,
    /// Whether calls may fail.
    pub trust: Trust,
    /// Requests that failed or were given up.
    pub stopped: u64,
}

impl<'a> Run<'a> {
    /// Opens the image in `files`, which are or hide the journal's.
    pub fn new(
        case: &'a dyn Case,
        journal: &Arc<Journal>,
        files: Vec<Arc<dyn Storage>>,
        way: Way,
    ) -> Self {
        let room = case.specials().grow.unwrap_or(0).max(case.sectors());
        let tag = |s| if s < case.base() { BASE } else { 0 };
        let history = History::new(case.sectors(), room, tag);
        let mut run = Run {
            case,
            files,
            way,
            journal: Arc::clone(journal),
            history,
            driver: None,
            tag: 0,
            trust: Trust::Working,
            stopped: 0,
        };
        run.driver = Some(run.open().expect("the new image opens"));
        run
    }

    /// Goes on with the image of another run, which was closed, in other files.
    pub fn after(run: Run<'a>, journal: &Arc<Journal>, files: Vec<Arc<dyn Storage>>) -> Self {
        let journal = Arc::clone(journal);
        let mut run = Run { files, journal, ..run };
        run.history.forget();
        run.driver = Some(run.open().expect("it opens again"));
        run
    }

    /// The bytes that the disk has.
    pub fn expected(&self) -> Vec<u8> {
        let sectors = 0..self.history.size();
        sectors.flat_map(|s| bytes_of(self.history.live(s), s..s + 1)).collect()
    }

    fn open(&self) -> Result<Driver, ImageError> {
        Driver::new(self.case.open(&self.files)?, self.way)
    }

    fn driver(&self) -> &Driver {
        self.driver.as_ref().expect("open")
    }

    /// As [`Driver::give_up_after`].
    pub fn give_up_after(&self, steps: Option<u32>) {
        self.driver().give_up_after(steps);
    }

    /// Carries out a step; `Err`: the image does not read as it must, or does not open again.
    pub fn step(&mut self, step: &Step) -> Result<(), String> {
        let from = self.journal.len();
        match step {
            Step::Change(change, sectors) => self.change(*change, sectors.clone(), from),
            Step::Flush => {
                match self.driver().flush() {
                    Ok(()) => self.history.flushed(self.journal.len()),
                    Err(_) => self.stopped += 1,
                }
                Ok(())
            }
            Step::Reopen => self.reopen(),
            Step::Special(special) => self.special(special),
        }
    }

    fn change(&mut self, change: Change, sectors: Range<u64>, from: usize) -> Result<(), String> {
        self.tag += 1;
        let tag = if change == Change::Write { self.tag } else { 0 };
        let data = match change {
            Change::Write => bytes_of(tag, sectors.clone()),
            _ => Vec::new(),
        };
        self.history.may_hold(sectors.clone(), tag, from);
        let result = self.driver().change(sectors.clone(), change, &data);
        self.driver().give_up_after(None);
        if result.is_err() {
            self.stopped += 1;
        }
        let Ok(bytes) = self.driver().read(sectors.clone()) else {
            // A failed read says nothing.
            if result.is_ok() && change != Change::Discard {
                sectors.for_each(|sector| self.history.holds(sector, tag, from));
            }
            return Ok(());
        };
        for (sector, bytes) in sectors.zip(bytes.chunks_exact(SECTOR)) {
            let found = tag_of(bytes, sector);
            let done = result.is_ok() && change != Change::Discard;
            let live = self.history.live(sector);
            match found {
                Some(found) if found == tag || (!done && self.history.may_be(sector, found)) => {
                    self.history.holds(sector, found, from);
                }
                _ => {
                    let why = match &result {
                        Err(Stop::Failed(e)) => e.to_string(),
                        Err(Stop::Cancelled) => "given up".to_owned(),
                        Ok(()) => "done".to_owned(),
                    };
                    return Err(format!(
                        "after {change:?} {tag} ({why}) sector {sector} reads as {found:?}, not \
                         {tag}, before {live}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Closes the image. Whether nothing is left that was not flushed.
    pub fn close(&mut self) -> bool {
        match self.driver.take().map(Driver::close) {
            Some(Ok(())) => self.history.flushed(self.journal.len()),
            Some(Err(_)) => {
                self.stopped += 1;
                self.history.not_flushed();
                return false;
            }
            None => {}
        }
        true
    }

    fn reopen(&mut self) -> Result<(), String> {
        self.close();
        match (self.open(), self.trust) {
            (Ok(driver), _) => self.driver = Some(driver),
            (Err(e), Trust::Working) => return Err(format!("it does not open again: {e}")),
            (Err(_), Trust::Failing) => self.stopped += 1,
        }
        self.verify()
    }

    /// Whether it could be opened again.
    pub fn is_open(&self) -> bool {
        self.driver.is_some()
    }

    fn special(&mut self, special: &Special) -> Result<(), String> {
        if !self.close() {
            // What the file has now is not known: a snapshot of it would be of anything.
            return self.reopen();
        }
        let from = self.journal.len();
        let tags = match special {
            Special::Apply(name) => self.history.snapshot(name).map(<[u32]>::to_vec),
            _ => None,
        };
        match special {
            Special::Snapshot(name) => self.history.snapshot_created(name, from),
            Special::Delete(name) => self.history.snapshot_deleted(name, from),
            Special::Apply(_) => {
                let tags = tags.iter().flatten();
                (0..).zip(tags).for_each(|(s, tag)| self.history.may_hold(s..s + 1, *tag, from));
            }
            Special::Resize(_) => {}
        }
        let done = self.case.special(&self.files, special);
        match (&done, special) {
            (Ok(()), Special::Resize(size)) => self.history.resized(size / 512, from),
            (Ok(()), Special::Apply(_)) => {
                let tags = tags.unwrap_or_default();
                self.history.resized(tags.len() as u64, from);
                (0..).zip(&tags).for_each(|(s, tag)| self.history.holds(s, *tag, from));
            }
            _ => {}
        }
        match done {
            Ok(()) => {
                self.history.flushed(self.journal.len());
                self.reopen()
            }
            Err(e) if self.trust == Trust::Working => Err(e.to_string()),
            Err(_) => {
                self.stopped += 1;
                self.reopen()?;
                if self.is_open() { self.special_failed(special, from) } else { Ok(()) }
            }
        }
    }

    /// What is there now is what was before, or what was to be.
    fn special_failed(&mut self, special: &Special, from: usize) -> Result<(), String> {
        match special {
            Special::Snapshot(name) | Special::Delete(name) => self.history.snapshot_unsure(name),
            Special::Resize(size) => {
                self.history.resized(size / 512, from);
                self.history.resize_failed(self.driver().size(), from);
            }
            Special::Apply(_) => {
                let Ok(bytes) = self.driver().read(0..self.history.size()) else { return Ok(()) };
                for (sector, bytes) in (0..).zip(bytes.chunks_exact(SECTOR)) {
                    let tag = tag_of(bytes, sector).ok_or(format!("rubbish in {sector}"))?;
                    self.history.holds(sector, tag, from);
                }
            }
        }
        Ok(())
    }

    /// Reads all.
    pub fn verify(&self) -> Result<(), String> {
        if self.trust == Trust::Failing {
            return Ok(());
        }
        let size = self.history.size();
        if self.driver().size() != size {
            return Err(format!("{} sectors, not {size}", self.driver().size()));
        }
        let bytes = self.driver().read(0..size).map_err(|e| format!("it cannot be read: {e}"))?;
        for (sector, bytes) in (0..).zip(bytes.chunks_exact(SECTOR)) {
            let (found, live) = (tag_of(bytes, sector), self.history.live(sector));
            if found != Some(live) {
                return Err(format!("sector {sector} reads as {found:?}, not {live}"));
            }
        }
        Ok(())
    }

    /// Lets go of the image without closing it.
    pub fn crash(&mut self) {
        self.driver = None;
    }
}

/// A new image of a case, with the journal that has it as durable.
pub fn new_image(case: &dyn Case) -> Arc<Journal> {
    let journal = Journal::new(vec![Default::default(); case.files()]);
    case.create(&journal.storages()).expect("an image is made");
    Journal::new(journal.now())
}
