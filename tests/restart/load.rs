//! Nothing is lost, and nothing done twice where that shows.

use std::time::{Duration, Instant};

use crate::plan::{CELL, DiskReport, Grants};
use crate::rig::{DEVID, Rig, Running, SIZE, Scene, text, until};
use crate::stamp;

const RAW: Scene = Scene {
    format: "raw",
    grants: Grants::Persistent,
    queues: 3,
    order: 2,
    set: "poll_us=0",
    seed: 1,
    seconds: 6.0,
};

/// Each cell of the image is what the guest has written last, and was read right at the end.
fn judge(rig: &Rig, report: &DiskReport) {
    let log = rig.log();
    let DiskReport { errors, complaints, fault, .. } = report;
    assert!(*errors == 0 && fault.is_none(), "{errors}: {complaints:?} {fault:?}\n{log}");
    assert_eq!(report.queues, rig.scene.queues as usize);
    assert!(report.verified >= 2 * SIZE && report.flushes > 0, "{report:?}");
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
    let mut image = rig.path("disk");
    if rig.scene.format != "raw" {
        let raw = rig.path("raw");
        let format = ["-f", rig.scene.format, text(&image)];
        let run = |args: &[&str], good: &[i32]| {
            let output = std::process::Command::new(crate::rig::RINGBACK).args(args).output();
            let output = output.expect("ringback");
            let code = output.status.code().expect("an end of its own");
            assert!(good.contains(&code), "{args:?}: {output:?}");
        };
        // Clusters that nobody uses are left where a backend was killed.
        run(&[&["disk", "check"], &format[..]].concat(), &[0, 3]);
        let files = [text(&image), text(&raw)];
        run(&[&["disk", "convert", "-O", "raw"], &format[..2], &files].concat(), &[0]);
        image = raw;
    }
    let bytes = std::fs::read(image).expect("the image");
    let mut expected = [0; CELL];
    assert_eq!(report.cells.len(), bytes.len() / CELL);
    for ((number, cell), generation) in (0..).zip(bytes.chunks(CELL)).zip(&report.cells) {
        let (seed, generation) = (rig.scene.seed, *generation);
        stamp::expected(&mut expected, seed, number, generation);
        assert!(
            cell == expected,
            "in the image: {}",
            stamp::describe(cell, &expected, seed, number, generation)
        );
    }
}

/// Twenty backends, each killed some time after it has begun, or while it begins.
fn twenty_kills(scene: Scene) {
    let mut rig = Rig::start(scene);
    let mut random = scene.seed;
    let mut next = |most: u64| {
        random = stamp::mix(random.wrapping_add(0x9e37_79b9_7f4a_7c15));
        random % most
    };
    for kill in 0..20 {
        let mut backend = rig.backend();
        // Now and then before it serves anything.
        if kill % 5 != 4 {
            until("a backend serves the guest", || (rig.begins() + kill / 5 > kill).then_some(()));
        }
        std::thread::sleep(Duration::from_micros(next(150_000)));
        backend.kill();
        assert!(rig.guest_runs(), "the guest has ended before kill {kill}\n{}", rig.log());
    }
    let mut backend = rig.backend();
    let report = rig.report();
    until("the backend ends with its guest", || backend.0.try_wait().expect("its state"));
    eprintln!("{} requests, {} of them served again", report.requests, rig.replays());
    assert!(rig.replays() > 20, "{} were served again\n{}", rig.replays(), rig.log());
    assert!(!rig.table().exists(), "a clean close leaves nothing");
    judge(&rig, &report);
}

#[test]
fn raw_with_persistent_grants() {
    twenty_kills(RAW);
}

#[test]
fn qcow2_with_copied_grants() {
    let scene = Scene { format: "qcow2", grants: Grants::Copy, queues: 2, order: 0, ..RAW };
    twenty_kills(Scene { seed: 2, ..scene });
}

#[test]
fn vhd_that_grows() {
    twenty_kills(Scene { format: "vhd", queues: 2, seed: 7, ..RAW });
}

/// The control of the two before: where tables wait for a flush, the guest misses what it wrote.
#[test]
fn tables_that_wait_for_a_flush_are_lost() {
    let set = "poll_us=0,metadata=flush";
    let mut rig = Rig::start(Scene { format: "qcow2", set, seed: 8, seconds: 2.0, ..RAW });
    // On a busy machine the first ones may come before anything is answered. A guest that has found
    // enough gives up.
    for kill in 0..8 {
        let mut backend = rig.backend();
        let ends = |rig: &mut Rig| (rig.begins() > kill || !rig.guest_runs()).then_some(());
        until("a backend serves the guest", || ends(&mut rig));
        std::thread::sleep(Duration::from_millis(20 * (kill as u64 + 1)));
        backend.kill();
    }
    let _backend = rig.backend();
    assert!(rig.report().errors > 0, "a loss was not noticed");
}

/// A barrier that is served again still stands between what was taken before it and after it.
#[test]
fn barriers_keep_their_place() {
    twenty_kills(Scene { set: "poll_us=0,ordering=barrier", queues: 2, seed: 3, ..RAW });
}

/// The same by the page cache, in which few requests are in flight, with a queue that polls.
#[test]
fn in_the_page_cache() {
    twenty_kills(Scene { set: "cache=writeback,poll_us=50", queues: 1, order: 4, seed: 4, ..RAW });
}

/// A backend that ends at a SIGTERM leaves what it has not taken, and says that nothing is open.
#[test]
fn ends_in_order_and_kills_in_turns() {
    use rustix::process::{Pid, Signal, kill_process};
    let mut rig = Rig::start(Scene { seed: 5, seconds: 3.0, ..RAW });
    for turn in 0..8 {
        let mut backend = rig.backend();
        until("a backend serves the guest", || (rig.begins() > turn).then_some(()));
        std::thread::sleep(Duration::from_millis(60));
        match turn % 2 {
            0 => {
                kill_process(Pid::from_child(&backend.0), Signal::TERM).expect("SIGTERM");
                let status = backend.0.wait().expect("an end");
                assert!(status.success(), "{status}");
                assert!(rig.table().exists());
            }
            _ => backend.kill(),
        }
    }
    let mut backend = rig.backend();
    let report = rig.report();
    until("the backend ends with its guest", || backend.0.try_wait().expect("its state"));
    judge(&rig, &report);
}

/// The daemon's backend, or none.
fn child(daemon: &Running) -> Option<u32> {
    let pid = daemon.0.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    children.ok()?.split_whitespace().next()?.parse().ok()
}

#[test]
fn the_daemon_starts_the_next_one_at_once() {
    use rustix::process::{Pid, Signal, kill_process};
    let mut rig = Rig::start(Scene { seed: 6, seconds: 4.0, ..RAW });
    let daemon = rig.daemon();
    for kill in 0..4 {
        until("a backend serves the guest", || (rig.begins() > kill).then_some(()));
        // It has lived long enough for its end to be no failure.
        std::thread::sleep(Duration::from_millis(600));
        let backend = child(&daemon).expect("a backend");
        let begun = Instant::now();
        let pid = Pid::from_raw(backend as i32).expect("a process");
        kill_process(pid, Signal::KILL).expect("SIGKILL");
        until("the next one", || child(&daemon).filter(|next| *next != backend));
        eprintln!("the next one after {:?}", begun.elapsed());
    }
    let report = rig.report();
    until("its tables are gone", || (!rig.table().exists()).then_some(()));
    judge(&rig, &report);
    assert!(rig.replays() > 0, "{DEVID}: {}", rig.log());
}
