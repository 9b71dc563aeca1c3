//! Tables that are gone, or not those of this guest's rings: the disk ends with a word about why,
//! and nothing is written that the guest does not know of.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::plan::Grants;
use crate::rig::{Rig, Scene, until};

const SCENE: Scene = Scene {
    format: "raw",
    grants: Grants::Persistent,
    queues: 2,
    order: 1,
    set: "poll_us=0",
    seed: 9,
    seconds: 20.0,
};

/// Kills a backend under load until something was in flight, spoils what it has left, and waits
/// for what the next one says of it.
fn spoilt(spoil: impl Fn(&Path)) -> String {
    let mut rig = Rig::start(SCENE);
    let mut backend = rig.backend();
    until("a backend serves the guest", || rig.guest_works().then_some(()));
    std::thread::sleep(Duration::from_millis(200));
    backend.kill();
    spoil(&rig.table());
    let _next = rig.backend();
    let error = until("an error", || rig.error());
    // What the guest makes of it is its own affair: it is not to be told that all is well.
    rig.kill_guest();
    let log = rig.log();
    assert!(!log.contains("panicked"), "{log}");
    assert!(log.contains(&error), "{log}");
    error
}

/// This is also the control of the other tests: without its tables no backend passes them.
#[test]
fn without_its_table_a_busy_ring_is_refused() {
    let error = spoilt(|table| std::fs::remove_file(table).expect("the tables"));
    assert!(error.contains("requests are unanswered") && error.contains("is not there"), "{error}");
}

#[test]
fn a_table_of_other_rings_is_refused() {
    let error = spoilt(|table| {
        let file = std::fs::File::options().write(true).open(table).expect("the tables");
        file.write_all_at(b"vbd/2", 16).expect("written");
    });
    assert!(error.contains("is of another connection"), "{error}");
}

#[test]
fn a_torn_table_is_refused() {
    let error = spoilt(|table| {
        let file = std::fs::File::options().write(true).open(table).expect("the tables");
        file.set_len(4096 + 100).expect("cut");
    });
    assert!(error.contains("is of another size"), "{error}");
}

#[test]
fn a_table_that_names_what_is_not_there_is_refused() {
    let error = spoilt(|table| {
        let file = std::fs::File::options().write(true).open(table).expect("the tables");
        // The order, which says what is free.
        file.write_all_at(&[0xff; 256], 4096 + 64).expect("written");
    });
    assert!(error.contains("vbd-1-51712.0"), "{error}");
}

#[test]
fn a_table_from_another_time_is_refused() {
    let error = spoilt(|table| {
        let file = std::fs::File::options().write(true).open(table).expect("the tables");
        // How many requests were taken.
        file.write_all_at(&77_777_777u32.to_le_bytes(), 4096 + 24).expect("written");
    });
    assert!(error.contains("rsp_prod"), "{error}");
}
