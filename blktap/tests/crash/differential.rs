//! Random requests against a model, on images that QEMU or we made, judged by QEMU in the end.
use std::sync::atomic::{AtomicU64, Ordering};

use blktap::storage::record::{Journal, SparseBytes};

use crate::case::{Case, Way};
use crate::run::{Run, Step, new_image, steps};
use crate::{cases, effort, on_all_processors, qemu, say};

/// Requests over all images.
const STEPS: usize = 100_000;

/// Runs `n` steps; the image afterwards, closed, and the bytes that it must have.
fn run(case: &dyn Case, n: usize, seed: u64, way: Way) -> (Vec<SparseBytes>, Vec<u8>) {
    let mut bytes = new_image(case).now();
    let mut expected = Vec::new();
    let steps = steps(case, n, seed);
    let mut run = None;
    // A journal holds all that is written: a new one now and then.
    for (part, some) in steps.chunks(500).enumerate() {
        let journal = Journal::new(bytes);
        let mut now = match run.take() {
            None => Run::new(case, &journal, journal.storages(), way),
            Some(run) => Run::after(run, &journal, journal.storages()),
        };
        for (at, step) in some.iter().enumerate() {
            if let Err(e) = now.step(step) {
                panic!("{} {way:?}: step {} {step:?}: {e}", case.name(), part * 500 + at);
            }
        }
        if let Err(e) = now.step(&Step::Reopen) {
            panic!("{} {way:?}: opened again: {e}", case.name());
        }
        expected = now.expected();
        now.close();
        bytes = journal.now();
        run = Some(now);
    }
    (bytes, expected)
}

/// QEMU finds nothing wrong, and reads the same.
fn judged(case: &dyn Case, files: &[SparseBytes], expected: &[u8]) -> bool {
    let journal = Journal::new(files.to_vec());
    let health = case.check(&journal.storages(), crate::case::Mend::Nothing).expect("a check");
    // A VHD keeps the space of blocks that were freed, for new ones.
    let leaks = if case.name().starts_with("vhd") { 0 } else { health.leaks };
    assert!(health.corruptions + leaks == 0, "{}: {health:?}", case.name());
    let Some(format) = case.qemu() else { return false };
    let folder = qemu::folder();
    let path = folder.path().join("image");
    qemu::write_out(&files[0], &path);
    if case.checked_by_qemu() {
        assert_eq!(qemu::check(format, &path), Ok((0, 0)), "{}", case.name());
    }
    let read = qemu::read(format, &path).expect("qemu-img convert");
    assert!(read == expected, "{}: QEMU reads something else", case.name());
    true
}

#[test]
fn random_requests_leave_what_the_model_says() {
    let cases = cases::matrix();
    let n = (STEPS * effort() as usize).div_ceil(cases.len());
    let (total, rows) = (AtomicU64::new(0), AtomicU64::new(0));
    on_all_processors(cases.len(), |row| {
        let case = &*cases[row];
        let way = if row % 3 == 0 { Way::Disk } else { Way::Direct };
        let start = std::time::Instant::now();
        let (files, expected) = run(case, n, row as u64 + 1, way);
        rows.fetch_add(u64::from(judged(case, &files, &expected)), Ordering::Relaxed);
        total.fetch_add(n as u64, Ordering::Relaxed);
        say(&format!("{:40} {n} steps, {} ms", case.name(), start.elapsed().as_millis()));
    });
    let [total, rows] = [total, rows].map(AtomicU64::into_inner);
    let all = cases.len();
    say(&format!("matrix: {all} rows ({rows} judged by QEMU), {total} steps, differing: 0"));
    assert!(total >= STEPS as u64 && rows > 0);
}
