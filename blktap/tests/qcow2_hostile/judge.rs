//! What every image, however broken, must stand.
use std::sync::Arc;
use std::time::{Duration, Instant};

use blktap::formats::qcow2::check::{
    CHECK_MEMORY, Fault, Finding, Repair, check, repair, unwatched,
};
use blktap::formats::{Format, ImageError};
use blktap::storage::Access;

use crate::bytes::Bytes;
use crate::disk::Disk;
use crate::model::{Cell, Model, Verdict};

/// Clusters that are compared at most; the larger disks are looked at in places.
const LOOKED_AT: u64 = 600;

/// What became of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub opened: bool,
    pub faults: u64,
    pub clean: bool,
    pub repaired: bool,
}

/// The clusters of a disk that are looked at.
fn places(model: &Model<'_>) -> impl Iterator<Item = u64> {
    let all = model.clusters();
    let step = (all / LOOKED_AT).max(1);
    (0..all).step_by(step as usize).chain(all.checked_sub(1))
}

/// Whether the tables are as the model saw them, so that data in the midst of them are too.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Found,
    Repaired,
}

/// Reads the disk and compares it with the model. Gives the clusters that cannot be read.
fn compare(disk: &Disk, model: &Model<'_>, what: &str, stage: Stage) -> u64 {
    let mut faults = 0;
    let tables = model.tables();
    assert_eq!(disk.format.size(), model.size, "{what}");
    for cluster in places(model) {
        if stage == Stage::Repaired && model.is_tangled(cluster, &tables) {
            continue;
        }
        let at = cluster * model.cluster_size();
        let len = model.cluster_size().min(model.size - at);
        match (disk.read(at, len), model.read(cluster)) {
            (Ok(ours), Cell::Bytes(right) | Cell::Doubtful(right)) => {
                assert!(ours[..] == right[..len as usize], "{what}: cluster {cluster}");
            }
            (Err(_), Cell::Fault | Cell::Doubtful(_)) => faults += 1,
            // Only a part of the cluster is asked for, where the fault may not be.
            (Ok(_), Cell::Fault) if len < model.cluster_size() => {}
            (ours, right) => panic!("{what}: cluster {cluster}: {ours:?} for {right:?}"),
        }
    }
    faults
}

/// Opens, reads, checks, repairs and writes the image.
pub fn judge(bytes: &[u8], what: &str) -> Outcome {
    let start = Instant::now();
    let (verdict, model) = Model::of(bytes);
    let memory = Arc::new(Bytes::new(bytes, Access::ReadOnly));
    let mut outcome = Outcome::default();
    match (Disk::open(&memory), verdict, &model) {
        (Ok(disk), Verdict::Accept | Verdict::Either, Some(model)) => {
            outcome.opened = true;
            outcome.faults = compare(&disk, model, what, Stage::Found);
        }
        (Err(e), Verdict::Refuse | Verdict::Either, _) => {
            assert!(is_about_image(&e), "{what}: {e}")
        }
        (Ok(_), ..) => panic!("{what}: opened, and must be refused"),
        (Err(e), ..) => panic!("{what}: refused, and must be opened: {e}"),
    }
    let checked = check(&*memory, CHECK_MEMORY, &unwatched);
    assert!(memory.bytes() == bytes, "{what}: reading or checking has changed the image");
    outcome.clean = checked.as_ref().is_ok_and(|report| report.is_clean());
    // Tables that name each other in circles cost no more than honest ones.
    let fair = (bytes.len() as u64 + LOOKED_AT * (8 << 10)) * 40 + (64 << 20);
    assert!(memory.work() <= fair, "{what}: {} bytes were read of {}", memory.work(), bytes.len());
    write_broken(bytes);
    if let (true, Some(model)) = (outcome.opened, &model) {
        outcome.repaired = repair_and_write(bytes, model, outcome, what);
    }
    assert!(!outcome.clean || outcome.repaired, "{what}: clean, and not after a repair");
    assert!(start.elapsed() < Duration::from_secs(60), "{what}: {:?}", start.elapsed());
    outcome
}

/// "cluster 5 has refcount 2 and is used 1 times".
fn leaked_cluster(finding: &Finding) -> u64 {
    let number = finding.text.split(' ').nth(1).and_then(|n| n.parse().ok());
    number.unwrap_or_else(|| panic!("no leaked cluster: {finding:?}"))
}

/// Errors that say what is wrong with the image.
fn is_about_image(e: &ImageError) -> bool {
    !matches!(e, ImageError::Io { .. } | ImageError::Open(_)) && !e.to_string().is_empty()
}

/// Writes it as it is. Only that it ends is asked for.
fn write_broken(bytes: &[u8]) {
    let memory = Arc::new(Bytes::new(bytes, Access::ReadWrite));
    let Ok(disk) = Disk::open(&memory) else { return };
    let size = disk.format.size();
    for (i, offset) in [0, size / 3, size.saturating_sub(512)].into_iter().enumerate() {
        if offset + 512 <= size {
            let _ = disk.write(offset - offset % 512, &[i as u8 + 1; 512]);
        }
    }
    let _ = disk.format.flush();
    let _ = disk.format.close();
}

/// Repairs it; nothing of what can be read may change. If it is clean then, it is written, and
/// must be clean and right again.
fn repair_and_write(bytes: &[u8], before: &Model<'_>, found: Outcome, what: &str) -> bool {
    let memory = Arc::new(Bytes::new(bytes, Access::ReadWrite));
    let Ok(report) = repair(&*memory, Repair::All, CHECK_MEMORY, &unwatched) else { return false };
    let repaired = memory.bytes();
    let reader = Arc::new(Bytes::new(&repaired, Access::ReadOnly));
    match Disk::open(&reader) {
        Ok(disk) => _ = compare(&disk, before, &format!("{what}, repaired"), Stage::Repaired),
        Err(e) => panic!("{what}: cannot be opened after the repair: {e}"),
    }
    if !report.is_clean() {
        return false;
    }
    let again = check(&*memory, CHECK_MEMORY, &unwatched).expect("a check");
    assert!(again.is_clean(), "{what}: not clean after a repair that said so: {again:?}");
    let disk = match Disk::open(&memory) {
        Ok(disk) => disk,
        Err(e) => panic!("{what}: cannot be written after the repair: {e}"),
    };
    let size = disk.format.size();
    let places: Vec<u64> = [0, size / 3, size / 2, size.saturating_sub(1024)]
        .into_iter()
        .map(|at| at - at % 512)
        .filter(|at| at + 1024 <= size)
        .collect();
    let mut written = true;
    for (i, at) in places.iter().enumerate() {
        written &= disk.write(*at, &[i as u8 + 7; 1024]).is_ok();
    }
    written &= disk.format.flush().is_ok();
    if written && !places.is_empty() {
        let last = places.len() - 1;
        let read = disk.read(places[last], 1024).expect("what was written");
        assert!(read == [last as u8 + 7; 1024], "{what}: written and not read");
    }
    if disk.format.close().is_ok() {
        let after = check(&*memory, CHECK_MEMORY, &unwatched).expect("a check");
        // Of two users of a cluster in one table, the one that is left has no copied flag.
        let flag = |f: &Finding| f.fault != Fault::Corruption || f.text.contains("copied flag");
        assert!(after.findings.iter().all(flag), "{what}: corrupt after writing: {after:#?}");
        // Counts of clusters behind the end, which a check does not look at, are seen once the
        // file is longer.
        let end = (repaired.len() as u64).div_ceil(before.cluster_size());
        let leaks = after.findings.iter().filter(|f| f.fault == Fault::Leak);
        let new = leaks.filter(|f| leaked_cluster(f) < end).count();
        assert!(
            !written || !found.clean || new == 0 && after.corruptions == 0,
            "{what}: leaks after writing: {after:#?}"
        );
    }
    true
}
