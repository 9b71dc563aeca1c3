//! Power cuts: the states after each of them are opened, read, checked, mended and used.
use std::collections::HashSet;
use std::sync::Arc;

use blktap::formats::Change;
use blktap::storage::Storage;
use blktap::storage::record::{Effort, Journal, Recording, SparseBytes};

use crate::case::{Case, Driver, Health, Mend, Special, Way};
use crate::history::{Allowed, History, SECTOR, bytes_of};
use crate::qemu;
use crate::run::Random;

/// What was tried and found.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Cuts: a point in time with a choice of what is kept.
    pub cuts: u64,
    /// States of which no other has the same bytes between the same flushes.
    pub distinct: u64,
    /// Cuts in the middle of mending.
    pub again: u64,
    /// States that QEMU checked.
    pub qemu: u64,
    /// What went wrong, the first few in words.
    pub lost: u64,
    pub why: Vec<String>,
}

impl Tally {
    pub fn add(&mut self, other: &Tally) {
        self.cuts += other.cuts;
        self.distinct += other.distinct;
        self.again += other.again;
        self.qemu += other.qemu;
        self.lost += other.lost;
        self.why.extend(other.why.iter().take(3).cloned());
    }
    fn loses(&mut self, why: String) {
        self.lost += 1;
        if self.why.len() < 3 {
            self.why.push(why);
        }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Tally { cuts, distinct, again, qemu, lost, .. } = self;
        write!(
            f,
            "cuts: {cuts} (distinct {distinct}, {again} of them while mending, {qemu} checked by \
             qemu-img), lost: {lost}"
        )
    }
}

/// How much is done with the states.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub effort: Effort,
    pub seed: u64,
    /// One in so many states is used further, mended and mended again.
    pub used: u64,
    /// One in so many states has its mending cut.
    pub again: u64,
    /// One in so many states is checked by qemu-img; 0: none.
    pub qemu: u64,
    /// Ends at the first loss.
    pub stop: bool,
}

/// Cuts a recording at each entry and looks at what is left.
pub fn cut_all(case: &dyn Case, recording: &Recording, history: &History, plan: Plan) -> Tally {
    let mut tally = Tally::default();
    let mut seen = HashSet::new();
    let mut random = Random(plan.seed);
    let mut cuts = recording.cuts();
    loop {
        let allowed = history.cut(cuts.position());
        for choice in cuts.choices(plan.effort, plan.seed) {
            tally.cuts += 1;
            if !seen.insert((allowed.flushes(), cuts.fingerprint(&choice))) {
                continue;
            }
            tally.distinct += 1;
            let state = cuts.state(&choice);
            if let Err(why) = look(case, state, allowed, plan, &mut random, &mut tally) {
                tally.loses(format!("{}: cut at {}: {why}", case.name(), cuts.position()));
                if plan.stop {
                    return tally;
                }
            }
        }
        if !cuts.step() {
            return tally;
        }
    }
}

/// Cuts a recording at its end alone.
pub fn cut_last(case: &dyn Case, recording: &Recording, history: &History, plan: Plan) -> Tally {
    let (mut tally, mut random) = (Tally::default(), Random(plan.seed));
    let mut cuts = recording.cuts();
    while cuts.step() {}
    let allowed = history.cut(cuts.position());
    let mut seen = HashSet::new();
    for choice in cuts.choices(plan.effort, plan.seed) {
        tally.cuts += 1;
        if seen.insert(cuts.fingerprint(&choice)) {
            tally.distinct += 1;
            let looked = look(case, cuts.state(&choice), allowed, plan, &mut random, &mut tally);
            if let Err(why) = looked {
                tally.loses(format!("{}: {why}", case.name()));
            }
        }
    }
    tally
}

/// Looks at one state.
fn look(
    case: &dyn Case,
    state: Vec<SparseBytes>,
    allowed: Allowed<'_>,
    plan: Plan,
    random: &mut Random,
    tally: &mut Tally,
) -> Result<(), String> {
    if plan.qemu > 0 && case.qemu().is_some() && random.one_in(plan.qemu) {
        tally.qemu += 1;
        qemu::second_opinion(case, &state, allowed)?;
    }
    let journal = Journal::new(state.clone());
    let files = journal.storages();
    sound(case, &files)?;
    let names = readable(case, &files, allowed)?;
    let snapshots = allowed.snapshots(&names)?;
    for (name, tags) in &snapshots {
        snapshot_whole(case, &state, name, tags)?;
    }
    if plan.used > 0 && random.one_in(plan.used) {
        let used = usable(case, &state, random)?;
        for (name, tags) in &snapshots {
            let whole = snapshot_whole(case, &used, name, tags);
            whole.map_err(|e| format!("further use: {e}"))?;
        }
        if case.mends() {
            mended(case, &state, allowed)?;
        }
    }
    if plan.again > 0 && case.mends() && random.one_in(plan.again) {
        again(case, &state, allowed, plan, tally)?;
    }
    Ok(())
}

/// Clusters may leak; nothing else may be wrong.
fn sound(case: &dyn Case, files: &[Arc<dyn Storage>]) -> Result<Health, String> {
    let health = case.check(files, Mend::Nothing).map_err(|e| format!("check: {e}"))?;
    match health.corruptions {
        0 => Ok(health),
        _ => Err(format!("check: {health:?}")),
    }
}

/// Everything reads as it may; gives the snapshots' names.
fn readable(
    case: &dyn Case,
    files: &[Arc<dyn Storage>],
    allowed: Allowed<'_>,
) -> Result<Vec<String>, String> {
    let image = case.open(files).map_err(|e| format!("open: {e}"))?;
    let driver = Driver::new(image, Way::Direct).map_err(|e| format!("open: {e}"))?;
    let size = driver.size();
    allowed.size(size)?;
    let bytes = driver.read(0..size).map_err(|e| format!("read: {e}"))?;
    allowed.bytes(0, &bytes)?;
    drop(driver);
    case.snapshots(files).map_err(|e| format!("list the snapshots: {e}"))
}

/// A snapshot, applied to a copy, reads as the disk did.
fn snapshot_whole(
    case: &dyn Case,
    state: &[SparseBytes],
    name: &str,
    tags: &[u32],
) -> Result<(), String> {
    let journal = Journal::new(state.to_vec());
    let files = journal.storages();
    let failed = |e| format!("snapshot {name}: {e}");
    // Opening mends what was not closed.
    drop(case.open(&files).map_err(failed)?);
    case.special(&files, &Special::Apply(name.to_owned())).map_err(failed)?;
    let image = case.open(&files).map_err(failed)?;
    let driver = Driver::new(image, Way::Direct).map_err(failed)?;
    if driver.size() != tags.len() as u64 {
        return Err(format!("snapshot {name}: {} sectors, not {}", driver.size(), tags.len()));
    }
    let bytes = driver.read(0..tags.len() as u64).map_err(failed)?;
    for ((sector, bytes), tag) in (0..).zip(bytes.chunks_exact(SECTOR)).zip(tags) {
        if bytes != bytes_of(*tag, sector..sector + 1) {
            return Err(format!("snapshot {name}: sector {sector} is not that of write {tag}"));
        }
    }
    Ok(())
}

/// Writes to it harm nothing: what is used is not handed out as free. Gives the image then.
fn usable(
    case: &dyn Case,
    state: &[SparseBytes],
    random: &mut Random,
) -> Result<Vec<SparseBytes>, String> {
    const FIRST: u32 = 0x4000_0000;
    let journal = Journal::new(state.to_vec());
    let files = journal.storages();
    let failed = |e| format!("further use: {e}");
    let open = || Driver::new(case.open(&files)?, Way::Direct);
    let driver = open().map_err(failed)?;
    let size = driver.size();
    let mut expected = driver.read(0..size).map_err(failed)?;
    for n in 0..8 {
        let start = random.below(size);
        let sectors = start..(start + 1 + random.below(2 * case.cluster())).min(size);
        let data = bytes_of(FIRST + n, sectors.clone());
        expected[sectors.start as usize * SECTOR..sectors.end as usize * SECTOR]
            .copy_from_slice(&data);
        let change = driver.change(sectors, Change::Write, &data);
        change.map_err(|e| format!("further use: {e:?}"))?;
    }
    driver.flush().map_err(failed)?;
    if driver.read(0..size).map_err(failed)? != expected {
        return Err("further use: a write damaged something else".into());
    }
    driver.close().map_err(failed)?;
    sound(case, &files).map_err(|e| format!("further use: {e}"))?;
    let driver = open().map_err(failed)?;
    match driver.read(0..size).map_err(failed)? == expected {
        true => Ok(journal.now()),
        false => Err("further use: opened again it reads differently".into()),
    }
}

/// Mending leaves nothing wrong, not even leaks, and the data as they were.
fn mended(case: &dyn Case, state: &[SparseBytes], allowed: Allowed<'_>) -> Result<(), String> {
    let journal = Journal::new(state.to_vec());
    let files = journal.storages();
    case.check(&files, Mend::All).map_err(|e| format!("mend: {e}"))?;
    let health = case.check(&files, Mend::Nothing).map_err(|e| format!("mended: {e}"))?;
    if health.corruptions + health.leaks > 0 {
        return Err(format!("mended: {health:?}"));
    }
    let names = readable(case, &files, allowed).map_err(|e| format!("mended: {e}"))?;
    allowed.snapshots(&names).map_err(|e| format!("mended: {e}"))?;
    Ok(())
}

/// The power is cut again while the image is mended.
fn again(
    case: &dyn Case,
    state: &[SparseBytes],
    allowed: Allowed<'_>,
    plan: Plan,
    tally: &mut Tally,
) -> Result<(), String> {
    let journal = Journal::new(state.to_vec());
    case.check(&journal.storages(), Mend::All).map_err(|e| format!("mend: {e}"))?;
    let recording = journal.recording();
    let mut cuts = recording.cuts();
    let mut seen = HashSet::new();
    let effort = Effort { all: 16, sample: 3 };
    while cuts.step() {
        for choice in cuts.choices(effort, plan.seed) {
            tally.cuts += 1;
            tally.again += 1;
            if !seen.insert(cuts.fingerprint(&choice)) {
                continue;
            }
            tally.distinct += 1;
            let failed = |e| format!("cut again at {} of mending: {e}", cuts.position());
            let files = Journal::new(cuts.state(&choice)).storages();
            sound(case, &files).map_err(failed)?;
            readable(case, &files, allowed).map_err(failed)?;
            case.check(&files, Mend::All).map_err(|e| failed(e.to_string()))?;
            readable(case, &files, allowed).map_err(failed)?;
        }
    }
    Ok(())
}
