//! Persistent dirty bitmaps of QCOW2: after a power cut a bitmap that can be trusted has every
//! write since it was made or cleared; what cannot be trusted says so.
use std::ops::Range;
use std::sync::Arc;

use blktap::faults::{Call, Carried, StorageFault, StorageFaults, Strikes};
use blktap::formats::qcow2::bitmaps::directory::{Entry, IN_USE};
use blktap::formats::qcow2::bitmaps::{self, Recording};
use blktap::formats::qcow2::header::Header;
use blktap::formats::qcow2::offline::Offline;
use blktap::formats::{Change, ImageError};
use blktap::storage::Storage;
use blktap::storage::record::{Effort, Journal};

use crate::case::{Case, Mend, Special};
use crate::direct::Direct;
use crate::run::{Random, Trust, new_image};
use crate::{cases, effort, on_all_processors, say};

/// A bitmap as it must be. Times are lengths of the journal.
#[derive(Debug)]
struct Life {
    name: String,
    /// Its making began.
    from: usize,
    /// Its removal began.
    removed: Option<usize>,
    recording: bool,
    /// It was stored when the image was last let go of.
    trusted: bool,
    /// Each clearing began.
    cleared: Vec<usize>,
    /// Sectors that were changed while it recorded, and when that began.
    changes: Vec<(Range<u64>, usize)>,
}

/// Whose bitmaps are there to be trusted for certain.
#[derive(Debug)]
struct Sure {
    at: usize,
    trusted: Vec<String>,
    /// All that are there.
    all: Vec<String>,
}

/// An image with bitmaps, used for a while.
struct Use {
    files: Vec<Arc<dyn Storage>>,
    journal: Arc<Journal>,
    lives: Vec<Life>,
    sure: Vec<Sure>,
    sectors: u64,
    trust: Trust,
}

fn failed<T: std::fmt::Debug>(what: &str) -> impl FnOnce(T) -> String + '_ {
    move |e| format!("{what}: {e:?}")
}

impl Use {
    fn alive(&mut self) -> Vec<usize> {
        (0..self.lives.len()).filter(|n| self.lives[*n].removed.is_none()).collect()
    }

    /// What is in the file now is certain.
    fn note(&mut self) {
        if self.trust == Trust::Failing {
            return;
        }
        let there = || self.lives.iter().filter(|l| l.removed.is_none());
        let trusted = there().filter(|l| l.trusted).map(|l| l.name.clone()).collect();
        let all = there().map(|l| l.name.clone()).collect();
        self.sure.push(Sure { at: self.journal.len(), trusted, all });
    }

    /// Adds, removes, switches or clears a bitmap, or makes the disk larger.
    fn edit(&mut self, case: &dyn Case, random: &mut Random) -> Result<(), String> {
        let alive = self.alive();
        let any = alive.get(random.below(alive.len() as u64) as usize).copied();
        match (self.edit_one(case, random, any), self.trust) {
            (Ok(()), _) => self.note(),
            (Err(e), Trust::Working) => return Err(format!("a change of bitmaps: {e}")),
            (Err(_), Trust::Failing) => {
                // Which of them it was about is not worth knowing.
                self.alive().into_iter().for_each(|n| self.lives[n].trusted = false);
                let header = Header::read(&*self.files[0]);
                self.sectors = header.map_or(self.sectors, |h| h.disk_size() / 512);
            }
        }
        Ok(())
    }

    fn edit_one(
        &mut self,
        case: &dyn Case,
        random: &mut Random,
        any: Option<usize>,
    ) -> Result<(), ImageError> {
        let (few, from) = (self.alive().len() < 4, self.journal.len());
        let file = Arc::clone(&self.files[0]);
        let open = || Offline::open(&*file);
        if Header::read(&*file)?.is_dirty() {
            case.check(&self.files, Mend::All)?;
        }
        match (random.below(7), any) {
            (0 | 1, _) | (_, None) if few => {
                let name = format!("b{}", self.lives.len());
                let recording = !random.one_in(4);
                let how = if recording { Recording::On } else { Recording::Off };
                let (cleared, changes, made) = (Vec::new(), Vec::new(), name.clone());
                let (removed, trusted) = (None, true);
                self.lives.push(Life { name, from, removed, recording, trusted, cleared, changes });
                bitmaps::create(&mut open()?, &made, 512 << random.below(4), how)?;
            }
            (2, Some(n)) => {
                bitmaps::remove(&mut open()?, &self.lives[n].name)?;
                self.lives[n].removed = Some(from);
            }
            (3, Some(n)) if self.lives[n].trusted => {
                let life = &mut self.lives[n];
                let how = if life.recording { Recording::Off } else { Recording::On };
                bitmaps::set_recording(&mut open()?, &life.name, how)?;
                life.recording = !life.recording;
            }
            (4, Some(n)) => {
                let life = &mut self.lives[n];
                life.cleared.push(from);
                bitmaps::clear(&mut open()?, &life.name)?;
                life.trusted = true;
            }
            (5, Some(_)) => {
                let larger = self.sectors + 1 + random.below(self.sectors / 4);
                case.special(&self.files, &Special::Resize(larger * 512))?;
                self.sectors = larger;
            }
            _ => {}
        }
        Ok(())
    }

    /// Opens the image, changes some and closes it, or does not.
    fn session(&mut self, case: &dyn Case, random: &mut Random) -> Result<(), String> {
        let recorded = |life: &Life| life.removed.is_none() && life.recording && life.trusted;
        let failing = self.trust == Trust::Failing;
        let disk = match case.open(&self.files) {
            Ok(layers) => Direct::new(layers),
            Err(_) if failing => return Ok(()),
            Err(e) => return Err(format!("open: {e}")),
        };
        for _ in 0..1 + random.below(6) {
            let start = random.below(self.sectors);
            let end = (start + 1 + random.below(40)).min(self.sectors);
            let change = [Change::Write, Change::Write, Change::Zero, Change::Discard];
            let change = change[random.below(4) as usize];
            let from = self.journal.len();
            let data = vec![7; (end - start) as usize * 512];
            match disk.change(start * 512..end * 512, change, &data) {
                Ok(()) => {
                    let lives = self.lives.iter_mut().filter(|l| recorded(l));
                    lives.for_each(|life| life.changes.push((start..end, from)));
                }
                Err(_) if failing => {}
                Err(e) => return Err(format!("change: {e:?}")),
            }
            if random.one_in(3) && disk.flush().is_err() && !failing {
                return Err("flush".into());
            }
        }
        let ended = if random.one_in(4) { None } else { Some(disk.top().close()) };
        match ended {
            Some(Ok(())) => self.note(),
            Some(Err(e)) if !failing => return Err(format!("close: {e}")),
            // It ended without being closed.
            _ => {
                let lives = self.lives.iter_mut().filter(|l| recorded(l));
                lives.for_each(|l| l.trusted = false);
            }
        }
        Ok(())
    }

    /// What is not right about the bitmaps in `file` after a cut at `at`.
    fn judge(&self, file: &dyn Storage, at: usize) -> Result<(), String> {
        let header = Header::read(file).map_err(failed("the header"))?;
        let list = bitmaps::list(file, &header).map_err(failed("the directory"))?;
        let is_trusted = |entry: &&Entry| entry.flags & IN_USE == 0;
        for entry in list.iter().filter(is_trusted) {
            let bits = bitmaps::read(file, &header, &entry.name).map_err(failed("a bitmap"))?;
            let life = self.lives.iter().find(|l| l.name == entry.name && l.from < at);
            let life = life.ok_or_else(|| format!("bitmap {} from nowhere", entry.name))?;
            let cleared = life.cleared.iter().rev().find(|c| **c < at).copied().unwrap_or(0);
            let due = life.changes.iter().filter(|(_, from)| (cleared..at).contains(from));
            for (sectors, from) in due {
                let granule = |sector: u64| (sector * 512) >> entry.granularity_bits;
                if !bits.all_set(granule(sectors.start)..granule(sectors.end - 1) + 1) {
                    return Err(format!(
                        "{} is trusted and has not the change of {sectors:?} at {from}",
                        entry.name
                    ));
                }
            }
        }
        let Some(sure) = self.sure.iter().find(|s| s.at == at) else { return Ok(()) };
        let names = |list: Vec<&Entry>| -> Vec<_> { list.iter().map(|e| e.name.clone()).collect() };
        let trusted = names(list.iter().filter(is_trusted).collect());
        match names(list.iter().collect()) == sure.all && trusted == sure.trusted {
            true => Ok(()),
            false => Err(format!("{trusted:?} are trusted, not {sure:?}")),
        }
    }
}

/// Uses a new image; what was done to it.
fn use_image(case: &dyn Case, seed: u64, fault: Option<StorageFault>) -> (Use, u64) {
    let journal = new_image(case);
    let faults = StorageFaults::new(journal.storages());
    let files = faults.storages();
    faults.set(fault);
    let (lives, sure, sectors) = (Vec::new(), Vec::new(), case.sectors());
    let trust = match fault {
        Some(StorageFault::Fail { .. }) => Trust::Failing,
        _ => Trust::Working,
    };
    let mut using = Use { files, journal, lives, sure, sectors, trust };
    let mut random = Random(seed);
    for _ in 0..14 {
        let mut went = using.edit(case, &mut random);
        if random.one_in(2) {
            went = went.and_then(|()| using.session(case, &mut random));
        }
        went.unwrap_or_else(|e| panic!("{}, seed {seed}, {fault:?}: {e}", case.name()));
    }
    (using, faults.struck())
}

/// Which cuts are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    All,
    Last,
}

/// (cuts, bitmaps that were marked in use, faults in words) of all cuts.
fn cut(case: &dyn Case, using: &Use, seed: u64, which: Which) -> (u64, u64, Vec<String>) {
    let recording = using.journal.recording();
    let (mut cuts, mut seen) = (recording.cuts(), std::collections::HashSet::new());
    let (mut tried, mut marked, mut why) = (0, 0, Vec::new());
    while cuts.step() {
        if which == Which::Last && cuts.position() < recording.entries.len() {
            continue;
        }
        for choice in cuts.choices(Effort { all: 32, sample: 6 }, seed) {
            tried += 1;
            if !seen.insert((cuts.position(), cuts.fingerprint(&choice))) {
                continue;
            }
            let files = Journal::new(cuts.state(&choice)).storages();
            let health = case.check(&files, Mend::Nothing);
            let sound = match &health {
                Ok(health) if health.corruptions == 0 => Ok(()),
                _ => Err(format!("check: {health:?}")),
            };
            if let Err(e) = sound.and_then(|()| using.judge(&*files[0], cuts.position())) {
                why.push(format!("{}: cut at {}: {e}", case.name(), cuts.position()));
            }
            let listed = Header::read(&*files[0]).and_then(|h| bitmaps::list(&*files[0], &h));
            let in_use = |e: &Entry| e.flags & IN_USE != 0;
            marked += u64::from(listed.is_ok_and(|l| l.iter().any(in_use)));
        }
    }
    (tried, marked, why)
}

#[test]
fn bitmaps_after_power_cuts_are_right_or_not_trusted() {
    let cases = cases::with_bitmaps();
    let rounds = 3 * effort() as usize;
    on_all_processors(cases.len() * rounds, |job| {
        let (case, seed) = (&*cases[job % cases.len()], (job / cases.len()) as u64);
        let (using, _) = use_image(case, seed, None);
        let (tried, marked, why) = cut(case, &using, seed, Which::All);
        let sure = using.sure.iter().filter(|s| !s.trusted.is_empty()).count();
        say(&format!(
            "{:24} bitmaps, cuts: {tried} ({marked} with marks), certain at {sure}, wrong: {}",
            case.name(),
            why.len()
        ));
        assert!(why.is_empty(), "seed {seed}: {}", why[..why.len().min(3)].join("\n"));
        assert!(tried > 100 && marked > 0 && sure > 0, "seed {seed}: hardly anything was tried");
    });
}

/// Without the sync that makes the mark durable, and with a write out of order, it is seen.
#[test]
fn bitmaps_without_order_turn_it_red() {
    let case = &*cases::with_bitmaps()[0];
    let fault = |nth, kind| match kind {
        0 => StorageFault::DropSync { nth, strikes: Strikes::Once },
        _ => StorageFault::HoldWrite { nth },
    };
    for kind in 0..2 {
        let seen = (0..60).find_map(|nth| {
            let (using, _) = use_image(case, 1, Some(fault(nth, kind)));
            let why = cut(case, &using, 1, Which::All).2;
            why.into_iter().find(|why| why.contains("is trusted and has not"))
        });
        assert!(seen.is_some(), "{:?} is never seen", fault(0, kind));
    }
}

#[test]
fn errors_at_any_call_leave_bitmaps_right_or_not_trusted() {
    let cases = cases::with_bitmaps();
    on_all_processors(cases.len() * 3, |job| {
        let case = &*cases[job % cases.len()];
        let call = [Call::Read, Call::Write, Call::Sync][job / cases.len()];
        let (mut struck, mut tried) = (0, 0);
        for nth in 0..40 * effort() {
            let carried = [Carried::Nothing, Carried::Half, Carried::All][(nth % 3) as usize];
            let (errno, strikes) = (libc::EIO, Strikes::Once);
            let fault = StorageFault::Fail { call, nth, errno, strikes, carried };
            let (using, hits) = use_image(case, nth % 4, Some(fault));
            let (cuts, _, why) = cut(case, &using, nth, Which::Last);
            assert!(why.is_empty(), "{fault:?}: {}", why[0]);
            (struck, tried) = (struck + hits, tried + cuts);
        }
        say(&format!(
            "{:24} bitmaps, errors of {call:?}: {struck}, then cuts: {tried}, wrong: 0",
            case.name()
        ));
        assert!(struck > 10, "{}: hardly any {call:?} failed", case.name());
    });
}
