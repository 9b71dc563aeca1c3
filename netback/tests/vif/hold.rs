//! What a guest sends is held and let go by commands.

use std::time::Duration;

use netback::FrontOptions;
use serde_json::{Value, json};

use crate::opaque;
use crate::rig::{DEVID, Driver, Rig, until};

fn send(driver: &mut Driver, seeds: std::ops::Range<u64>, len: usize) {
    for seed in seeds {
        let frame = driver.frame(&opaque(seed, len));
        driver.sent.push_back(frame);
    }
    driver.turn();
}

/// The frames of these numbers come, in this order.
fn come(driver: &mut Driver, seeds: std::ops::Range<u64>, len: usize) {
    for seed in seeds {
        driver.until_got(1);
        let frame = driver.got.pop_front().unwrap();
        assert!(frame[..] == opaque(seed, len)[..], "frame {seed} is another one");
        driver.pool.give(frame);
    }
}

/// Nothing comes, though there is time for it.
fn is_quiet(driver: &mut Driver) {
    for _ in 0..10 {
        driver.sleep(Duration::from_millis(5));
        assert!(!driver.turn(), "something came");
    }
}

fn ask(rig: &Rig, command: &str) -> Value {
    rig.ask(&json!({"command": command}))
}

#[test]
fn what_is_held_goes_when_it_is_released_and_nowhere_when_it_is_dropped() {
    let rig = Rig::start("loopback", &[]);
    let front = rig.connect(&FrontOptions { max_queues: 2, ..FrontOptions::default() });
    let mut drivers: Vec<_> = (0..2).map(|n| Driver::new(front.queue(n).unwrap(), 64)).collect();
    assert_eq!(ask(&rig, "hold-output"), json!({"packets": 0, "bytes": 0}));
    for driver in &mut drivers {
        send(driver, 0..20, 1000);
    }
    until("all are held", || rig.counter(DEVID, "tx_held") == 40);
    drivers.iter_mut().for_each(is_quiet);
    let then_hold = |command: &str| rig.ask(&json!({"command": command, "then": "hold"}));
    assert_eq!(then_hold("release-output"), json!({"packets": 40, "bytes": 40_000}));
    for driver in &mut drivers {
        come(driver, 0..20, 1000);
        // These are the next checkpoint's.
        send(driver, 20..25, 1000);
    }
    until("they are held", || rig.counter(DEVID, "tx_held") == 10);
    drivers.iter_mut().for_each(is_quiet);
    assert_eq!(then_hold("drop-output"), json!({"packets": 10, "bytes": 10_000}));
    until("they are dropped", || rig.counter(DEVID, "tx_dropped_held") == 10);
    for driver in &mut drivers {
        send(driver, 25..30, 1000);
    }
    until("they are held", || rig.counter(DEVID, "tx_held") == 10);
    ask(&rig, "release-output");
    for driver in &mut drivers {
        send(driver, 30..40, 1000);
        come(driver, 25..40, 1000);
    }
    assert_eq!(rig.counter(DEVID, "tx_held"), 0);
    assert!(ask(&rig, "hold-outputs")["error"].is_string());
}

#[test]
fn a_full_hold_stops_the_guest_and_loses_nothing() {
    let rig = Rig::start("loopback", &[("mtu", "65535")]);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 400);
    ask(&rig, "hold-output");
    send(&mut driver, 0..400, 60_000);
    let (mut before, mut same) = (0, 0);
    until("no more is held", || {
        driver.turn();
        let now = rig.counter(DEVID, "tx_held");
        same = if now == before && now > 0 { same + 1 } else { 0 };
        before = now;
        same > 20
    });
    assert_eq!(before, (16 << 20) / 60_000);
    assert!(!driver.sent.is_empty(), "the guest was not stopped");
    assert_eq!(ask(&rig, "release-output")["packets"], json!(before));
    come(&mut driver, 0..400, 60_000);
}

#[test]
fn a_guest_that_connects_again_is_still_held() {
    let rig = Rig::start("loopback", &[]);
    rig.connect(&FrontOptions::default()).close().unwrap();
    ask(&rig, "hold-output");
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    send(&mut driver, 0..5, 100);
    until("they are held", || rig.counter(DEVID, "tx_held") == 5);
    is_quiet(&mut driver);
    ask(&rig, "release-output");
    come(&mut driver, 0..5, 100);
}

#[test]
fn what_is_released_over_a_link_that_is_down_goes_nowhere() {
    let rig = Rig::start("loopback", &[]);
    let front = rig.connect(&FrontOptions::default());
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    ask(&rig, "hold-output");
    send(&mut driver, 0..5, 100);
    until("they are held", || rig.counter(DEVID, "tx_held") == 5);
    rig.set("carrier", "down");
    ask(&rig, "release-output");
    until("they are dropped", || rig.counter(DEVID, "tx_dropped_link") == 5);
    rig.set("carrier", "up");
    send(&mut driver, 5..10, 100);
    come(&mut driver, 5..10, 100);
}
