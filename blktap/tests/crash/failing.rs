//! Errors at each call in turn, and requests given up at each step.
use std::sync::atomic::{AtomicU64, Ordering};

use blktap::faults::{Call, Carried, StorageFault, StorageFaults, Strikes};
use blktap::storage::record::Effort;

use crate::case::{Case, Way};
use crate::power::{Plan, Tally, cut_last};
use crate::run::{Random, Run, Step, Trust, new_image, steps};
use crate::{PLAN, cases, effort, on_all_processors, say};

/// What a run with something failing left.
const LOOK: Plan =
    Plan { effort: Effort { all: 8, sample: 3 }, used: 3, again: 0, qemu: 500, ..PLAN };

/// Runs `steps` with a fault from the start on; afterwards the power is cut. `None`: the fault
/// struck nothing.
fn run_with(case: &dyn Case, steps: &[Step], fault: StorageFault, way: Way) -> Option<Tally> {
    let journal = new_image(case);
    let faults = StorageFaults::new(journal.storages());
    let mut run = Run::new(case, &journal, faults.storages(), way);
    run.trust = Trust::Failing;
    faults.set(Some(fault));
    for (at, step) in steps.iter().enumerate() {
        if let Err(e) = run.step(step) {
            panic!("{} {way:?}, {fault:?}: step {at} {step:?}: {e}", case.name());
        }
        if !run.is_open() {
            break;
        }
    }
    let struck = faults.struck() > 0;
    faults.set(None);
    run.crash();
    let tally = cut_last(case, &journal.recording(), &run.history, LOOK);
    assert!(tally.lost == 0, "{way:?}, {fault:?}: {}", tally.why.join("\n"));
    struck.then_some(tally)
}

/// Each call of a kind in turn, up to so many.
fn each_call(case: &dyn Case, call: Call, most: u64, way: Way) -> (u64, Tally) {
    let steps = steps(case, 25, 11);
    let (mut struck, mut total) = (0, Tally::default());
    for nth in 0..most {
        let strikes = if nth % 3 == 2 { Strikes::FromThenOn } else { Strikes::Once };
        let carried = [Carried::Nothing, Carried::Half, Carried::All][(nth / 3 % 3) as usize];
        let errno = if nth % 2 == 0 { libc::EIO } else { libc::ENOSPC };
        let fault = StorageFault::Fail { call, nth, errno, strikes, carried };
        let Some(tally) = run_with(case, &steps, fault, way) else { break };
        struck += 1;
        total.add(&tally);
    }
    (struck, total)
}

#[test]
fn errors_at_any_call_leave_a_sound_image() {
    let cases = cases::all();
    let (total, cuts) = (AtomicU64::new(0), AtomicU64::new(0));
    on_all_processors(cases.len(), |n| {
        let case = &*cases[n];
        for (call, most) in [(Call::Read, 40), (Call::Write, 120), (Call::Sync, 40)] {
            let mut struck = 0;
            for way in [Way::Direct, Way::Disk] {
                let (n, tally) = each_call(case, call, most * effort(), way);
                struck += n;
                cuts.fetch_add(tally.cuts, Ordering::Relaxed);
            }
            say(&format!("{:24} errors of {call:?}: {struck}, lost: 0", case.name()));
            assert!(struck > 0 || call == Call::Read, "{}: no {call:?} failed", case.name());
            total.fetch_add(struck, Ordering::Relaxed);
        }
    });
    let [total, cuts] = [total, cuts].map(AtomicU64::into_inner);
    say(&format!("{:24} errors: {total}, then cuts: {cuts}, lost: 0", "all"));
}

#[test]
fn requests_given_up_at_any_step_leave_a_sound_image() {
    let cases = cases::all();
    let (total, cuts) = (AtomicU64::new(0), AtomicU64::new(0));
    on_all_processors(cases.len(), |n| {
        let case = &*cases[n];
        let (mut given_up, mut tally) = (0, Tally::default());
        for round in 0..20 * effort() {
            let (journal, mut random) = (new_image(case), Random(round));
            let mut run = Run::new(case, &journal, journal.storages(), Way::Direct);
            for step in &steps(case, 40, round + 100) {
                if matches!(step, Step::Change(..)) && random.one_in(2) {
                    run.give_up_after(Some(random.below(8) as u32));
                }
                if let Err(e) = run.step(step) {
                    panic!("{}, round {round}: {step:?}: {e}", case.name());
                }
            }
            given_up += run.stopped;
            run.crash();
            tally.add(&cut_last(case, &journal.recording(), &run.history, LOOK));
        }
        say(&format!("{:24} given up: {given_up}, lost: {}", case.name(), tally.lost));
        assert!(tally.lost == 0, "{}", tally.why.join("\n"));
        assert!(given_up > 20, "{}: only {given_up} requests were given up", case.name());
        total.fetch_add(given_up, Ordering::Relaxed);
        cuts.fetch_add(tally.cuts, Ordering::Relaxed);
    });
    let [total, cuts] = [total, cuts].map(AtomicU64::into_inner);
    say(&format!("{:24} given up: {total}, then cuts: {cuts}, lost: 0", "all"));
}
