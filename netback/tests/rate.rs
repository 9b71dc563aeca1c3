//! A vif's limit, changed while four queues are busy both ways. A program of its own: beside other tests
//! its threads would get too little of the processors.

#[allow(dead_code)]
#[path = "vif/rig.rs"]
mod rig;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netback::endpoint::named::Plain;
use netback::endpoint::{Abilities, Accepts, Waits};
use netback::{Endpoint, EndpointQueue, Frame, FrontOptions, Pool};

use rig::{DEVID, Driver, Rig};

/// Bytes of each frame.
const LEN: usize = 500;

/// An endpoint that always has frames, and takes all.
struct Flood;
struct FloodQueue(Instant);

impl Endpoint for Flood {
    fn abilities(&self) -> Abilities {
        Abilities { checksum: true, tso4: true, tso6: true, mtu: 1500 }
    }
    fn connect(&self, _: usize, _: Accepts) -> io::Result<()> {
        Ok(())
    }
    fn queue(&self, _: usize) -> io::Result<Box<dyn EndpointQueue>> {
        Ok(Box::new(FloodQueue(Instant::now())))
    }
    fn disconnect(&self) {}
}

impl EndpointQueue for FloodQueue {
    fn send(&mut self, frames: &mut VecDeque<Frame>, pool: &mut Pool) -> io::Result<()> {
        frames.drain(..).for_each(|frame| pool.give(frame));
        Ok(())
    }
    fn receive(
        &mut self,
        frames: &mut VecDeque<Frame>,
        room: usize,
        pool: &mut Pool,
    ) -> io::Result<()> {
        for _ in 0..room {
            let Some(mut frame) = pool.take() else { break };
            frame.set_len(LEN);
            frames.push_back(frame);
        }
        Ok(())
    }
    fn waits(&self) -> Waits<'_> {
        Waits { deadline: Some(self.0), ..Waits::default() }
    }
    fn take_dropped(&mut self) -> u64 {
        0
    }
}

/// Keeps a queue busy both ways.
fn busy(mut driver: Driver, stop: &AtomicBool) {
    // Of an experimental protocol (RFC 5342).
    let mut bytes = [0; LEN];
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    while !stop.load(Ordering::Relaxed) {
        while driver.sent.len() < 64 {
            let frame = driver.frame(&bytes);
            driver.sent.push_back(frame);
        }
        driver.turn();
        driver.got.drain(..).for_each(|frame| driver.pool.give(frame));
        driver.sleep(Duration::from_millis(2));
    }
}

/// What passes in a second, by two counters; never more than `wanted`, and no less where the machine has
/// time for it.
fn measure(rig: &Rig, names: [&str; 2], wanted: u64) {
    let mut found = Vec::new();
    for _ in 0..10 {
        let (start, before) = (Instant::now(), names.map(|name| rig.counter(DEVID, name)));
        std::thread::sleep(Duration::from_millis(2000));
        // The clock is read outside of the counters: who is interrupted between sees less, never more.
        let after = names.map(|name| rig.counter(DEVID, name));
        let time = start.elapsed().as_secs_f64();
        let rates = [0, 1].map(|n| (after[n] - before[n]) as f64 / time / wanted as f64);
        assert!(rates.iter().all(|rate| *rate < 1.05), "{names:?}: {rates:?} of {wanted}");
        if rates.iter().all(|rate| *rate > 0.95) {
            return;
        }
        found.push(rates);
    }
    panic!("{names:?}: {found:?} of {wanted}");
}

#[test]
fn a_limit_that_is_changed_live_holds_for_four_queues_together_each_way() {
    let rig = Rig::with(Arc::new(|_| Ok(Box::new(Plain(Flood)))), |seen| seen, "flood", &[]);
    let front = rig.connect(&FrontOptions { max_queues: 4, ..FrontOptions::default() });
    assert_eq!(front.queues(), 4);
    rig.set("rate_packets", "1000");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let driver = Driver::new(front.queue(number).unwrap(), 256);
            let stop = &stop;
            scope.spawn(move || busy(driver, stop));
        }
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            measure(&rig, ["tx_packets", "rx_packets"], 1000);
            rig.set("rate_packets", "3000");
            measure(&rig, ["tx_packets", "rx_packets"], 3000);
            rig.set("rate_packets", "0");
            rig.set("rate_bytes", "1000000");
            measure(&rig, ["tx_bytes", "rx_bytes"], 1_000_000);
        }));
        stop.store(true, Ordering::Relaxed);
        checked.unwrap_or_else(|e| std::panic::resume_unwind(e));
    });
    front.close().unwrap();
}
