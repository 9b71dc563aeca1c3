//! No data is lost: by power cuts at any point, errors at any call, requests given up at any
//! step; and what random requests leave is what a model says.
//!
//! `RINGBACK_TEST_EFFORT=10 cargo test -p ringback-blktap --test crash` does ten times as much,
//! `RINGBACK_TEST_CASE=vhd` only what is about VHD.
mod bitmaps;
mod case;
mod cases;
mod differential;
mod direct;
mod dropping;
mod failing;
mod history;
#[path = "../../examples/own_format.rs"]
#[allow(dead_code, unreachable_pub)]
mod own_format;
mod power;
mod qemu;
mod run;

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use blktap::faults::{StorageFault, StorageFaults, Strikes};
use blktap::storage::record::Effort;

use case::{Case, Way};
use power::{Plan, Tally, cut_all};
use run::{Run, new_image, steps};

/// How many times as much as usual is to be done.
fn effort() -> u64 {
    let asked = std::env::var("RINGBACK_TEST_EFFORT").ok();
    asked.map_or(1, |n| n.parse().expect("RINGBACK_TEST_EFFORT: a number"))
}

/// A line that is seen although the test passes.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

const PLAN: Plan = Plan {
    effort: Effort { all: 64, sample: 12 },
    seed: 0,
    used: 16,
    again: 64,
    qemu: 250,
    stop: false,
};

/// A run of `n` steps, cut everywhere.
fn cut_run(case: &dyn Case, n: usize, seed: u64, way: Way) -> Tally {
    let journal = new_image(case);
    let mut run = Run::new(case, &journal, journal.storages(), way);
    for (at, step) in steps(case, n, seed).iter().enumerate() {
        if let Err(e) = run.step(step) {
            panic!("{} (seed {seed}): step {at} {step:?}: {e}", case.name());
        }
    }
    let plan = Plan { seed, ..PLAN };
    cut_all(case, &journal.recording(), &run.history, plan)
}

/// Both processors' worth of `work`, in order of numbers.
fn on_all_processors(n: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(n) {
            scope.spawn(|| {
                loop {
                    let mine = next.fetch_add(1, Ordering::Relaxed);
                    if mine >= n {
                        return;
                    }
                    work(mine);
                }
            });
        }
    });
}

#[test]
fn power_cuts_lose_nothing() {
    let cases = cases::all();
    let rounds = cases::ROUNDS * effort() as usize;
    let tallies: Vec<_> = cases.iter().map(|_| Mutex::new(Tally::default())).collect();
    on_all_processors(cases.len() * rounds, |job| {
        let (n, round) = (job % cases.len(), job / cases.len());
        let way = if round % 2 == 0 { Way::Direct } else { Way::Disk };
        let tally = cut_run(&*cases[n], 60, round as u64 + 1, way);
        tallies[n].lock().expect("a tally").add(&tally);
    });
    let mut total = Tally::default();
    for (case, tally) in cases.iter().zip(tallies) {
        let tally = tally.into_inner().expect("a tally");
        say(&format!("{:24} {tally}", case.name()));
        total.add(&tally);
    }
    say(&format!("{:24} {total}", "all"));
    assert!(total.lost == 0, "{}", total.why.join("\n"));
    let enough = if cases::are_all() { cases::CUTS * effort() } else { 1 };
    assert!(total.cuts >= enough, "only {} cuts", total.cuts);
}

/// What turns a proof red must do so: `fault`, at the first of its calls that shows.
fn is_seen(case: &dyn Case, fault: impl Fn(u64) -> StorageFault) -> (u64, u64) {
    let (mut struck, mut red) = (0, 0);
    for nth in 0..24 {
        let journal = new_image(case);
        let faults = StorageFaults::new(journal.storages());
        let mut run = Run::new(case, &journal, faults.storages(), Way::Direct);
        faults.set(Some(fault(nth)));
        for step in &steps(case, 30, 7) {
            run.step(step).expect("it is not seen while the power is on");
        }
        let plan = Plan { used: 0, again: 0, qemu: 0, stop: true, ..PLAN };
        let tally = cut_all(case, &journal.recording(), &run.history, plan);
        struck += u64::from(faults.struck() > 0);
        red += u64::from(tally.lost > 0);
    }
    (struck, red)
}

#[test]
fn a_dropped_flush_turns_it_red() {
    for case in cases::all() {
        let (struck, red) =
            is_seen(&*case, |nth| StorageFault::DropSync { nth, strikes: Strikes::Once });
        say(&format!("{:24} dropped syncs: {struck}, seen: {red}", case.name()));
        assert!(red > 0, "{}: no dropped sync is seen", case.name());
    }
}

#[test]
fn a_write_out_of_order_turns_it_red() {
    for case in cases::all().iter().filter(|c| c.cluster() > 1) {
        let (struck, red) = is_seen(&**case, |nth| StorageFault::HoldWrite { nth });
        say(&format!("{:24} late writes: {struck}, seen: {red}", case.name()));
        assert!(red > 0, "{}: no late write is seen", case.name());
    }
}
