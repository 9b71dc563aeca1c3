//! Queues that end, stall and come back while others work. Tests are named by the advisories of
//! other backends.

use std::time::{Duration, Instant};

use hypervisor::xenbus::State;
use netback::frame::{Gso, GsoKind};
use netback::proto::{
    Extra, ExtraInfo, RSP_NULL, RSP_OKAY, RX_EXTRA_INFO, TX_CSUM_BLANK, TX_EXTRA_INFO,
};
use netback::{FrontOptions, NetFront};
use rings::mem::SharedMem;
use zerocopy::IntoBytes;

use crate::raw::Raw;
use crate::rig::{DEVID, Driver, Rig, until};
use crate::watched::Watch;
use crate::xsa::{looped, spread};
use crate::{ALL, opaque, round_trip, tcp_packet};

/// The bad packet comes on each of the queues in turn while the others work, and the device is
/// destroyed at once.
#[test]
fn xsa_374_a_bad_packet_then_destroy() {
    let (rig, watch) = Watch::rig("loopback", &[("mtu", "65535")]);
    let front = rig.connect(&FrontOptions::default());
    let mut other = Driver::new(front.queue(0).unwrap(), 64);
    for round in 0..12 {
        rig.attach(DEVID + 1, "loopback", &[]);
        let mut raw = Raw::with_queues(&rig.guest(), DEVID + 1, ALL, 4);
        for (number, queue) in raw.queues.iter_mut().enumerate() {
            queue.post(0, 32);
            queue.tx_pages.write(0, &opaque(round, 1514));
            let mut slots = vec![queue.slot(0, 0, 1514, 0); 60];
            if number as u64 == round % 4 {
                slots.push(queue.slot(0, 4000, 4000, 0));
            }
            queue.send(&slots);
        }
        // Before, while and after the backend notices.
        std::thread::sleep(Duration::from_micros(round / 4 * 500));
        rig.remove(DEVID + 1);
        round_trip(&mut other, round, 50, 9000);
        until("the rings are let go", || watch.mapped() == 2);
    }
}

/// One free page is no free page for an unsegmented packet, whose length fits one but which has
/// to be told of in a second.
#[test]
fn xsa_392_one_free_page_and_an_unsegmented_packet() {
    let (_rig, mut raw) = looped();
    let (bytes, start) = tcp_packet(GsoKind::TcpV4, 3000);
    let mut slots = spread(&raw, &bytes, &[bytes.len()]);
    slots[0].flags |= TX_CSUM_BLANK | TX_EXTRA_INFO;
    slots.push(ExtraInfo::from(Extra::Gso(Gso { kind: GsoKind::TcpV4, size: 1448 })).into());
    raw.post(0, 1);
    for _ in 0..40 {
        raw.send(&slots);
        let answers = raw.answers(2);
        assert_eq!((answers[0].status, answers[1].status), (RSP_OKAY, RSP_NULL));
    }
    assert!(raw.is_quiet(), "half a packet has come");
    assert_eq!(raw.backend_state(), State::Connected);
    // With another page it goes on.
    raw.post(1, 1);
    let received = raw.received(2);
    assert!(received[0].0.has(RX_EXTRA_INFO) && received[0].1[start + 20..] == bytes[start + 20..]);
    assert_eq!(received[1].0.as_extra().as_bytes(), &slots[1].as_bytes()[..8]);
    raw.close();
}

/// What a guest without pages is owed stays within the queue's frames, and is dropped when it has
/// waited for `rx_stall_s`; its own packets go on all the time.
#[test]
fn xsa_392_424_packets_are_dropped_under_load_and_the_queue_goes_on() {
    let keys = [("mtu", "65535"), ("options", "rx_stall_s=1")];
    let rig = Rig::start("loopback", &keys);
    let mut raw = Raw::connect(&rig.guest(), DEVID, ALL);
    let bytes = opaque(8, 9000);
    let slots = spread(&raw, &bytes, &[4096, 4096, 808]);
    let mut page = 1;
    raw.post(0, 1);
    for stall in 1..=2 {
        let (begun, mut sent) = (Instant::now(), 0);
        let before = rig.counter(DEVID, "rx_dropped_stalled");
        // Twice as long as it takes.
        while begun.elapsed() < Duration::from_secs(2) || sent < 1000 {
            raw.send(&slots);
            assert!(raw.answers(3).iter().all(|answer| answer.status == RSP_OKAY));
            sent += 1;
            if sent % 100 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(rig.counter(DEVID, "rx_stalls") >= stall);
        let dropped = rig.counter(DEVID, "rx_dropped_stalled") - before;
        let lost = rig.counter(DEVID, "tx_dropped_host");
        assert!(dropped > 0, "{sent} were sent, {dropped} dropped, {lost} lost");
        // With a page more nothing has changed; with two the next packet comes whole.
        raw.post(page, 1);
        assert!(raw.is_quiet(), "half a packet has come");
        raw.post(page + 1, 1);
        page += 2;
        until("a packet, once the stall is over", || {
            raw.send(&slots);
            raw.answers(3);
            raw.rx.poll().unwrap() == rings::Pending::Work
        });
        let got: Vec<u8> = raw.received(3).into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert!(got == bytes);
        raw.post(page, 1);
        page += 1;
    }
    assert_eq!(raw.backend_state(), State::Connected);
    raw.close();
}

/// A guest that raises its event as fast as it can: its queue looks once a millisecond, and a
/// second vif loses nothing.
#[test]
fn xsa_332_a_storm_of_events_while_a_second_vif_works() {
    let (rig, mut raw) = looped();
    rig.attach(DEVID + 1, "loopback", &[]);
    let front = NetFront::connect(&*rig.guest(), DEVID + 1, &FrontOptions::default());
    let front = front.unwrap();
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    let before = rig.counter(DEVID, "sleeps");
    let begun = Instant::now();
    let other = std::thread::spawn(move || {
        round_trip(&mut driver, 9, 5000, 1514);
        driver
    });
    let mut raised = 0u64;
    while !other.is_finished() || raised < 20_000 {
        raw.channel.notify().unwrap();
        raised += 1;
    }
    let (sleeps, ms) = (rig.counter(DEVID, "sleeps") - before, begun.elapsed().as_millis() as u64);
    assert!(sleeps <= 100 + ms, "{sleeps} sleeps in {ms} ms for {raised} events");
    let driver = other.join().unwrap();
    assert_eq!(driver.queue.totals().rx_errors, 0);
    drop(driver);
    front.close().unwrap();
    // The storm over, it works as before.
    let mut page = 0;
    crate::xsa::comes_back(&mut raw, &opaque(1, 60), &[60], &mut page);
    raw.close();
}

/// A frontend that was connected starts anew, as after suspend, and the toolstack takes the device
/// away meanwhile: it connects or says why not, and the next device is as good as the first.
#[test]
fn xsa_465_a_device_goes_while_its_frontend_resumes() {
    let rig = Rig::start("loopback", &[]);
    let options = FrontOptions { max_queues: 4, ..FrontOptions::default() };
    let hasty = FrontOptions { patience: Duration::from_secs(1), ..options.clone() };
    let mut connected = 0;
    for round in 0..12u64 {
        let front = rig.connect(&options);
        let mut driver = Driver::new(front.queue(0).unwrap(), 64);
        round_trip(&mut driver, round, 20, 1514);
        drop(driver);
        front.abandon();
        std::thread::scope(|scope| {
            let resuming = scope.spawn(|| NetFront::connect(&*rig.guest(), DEVID, &hasty));
            std::thread::sleep(Duration::from_millis(round * 2));
            rig.remove(DEVID);
            if let Ok(front) = resuming.join().expect("no panic") {
                connected += 1;
                until("the frontend notices", || front.fault().is_some());
                assert!(front.close().is_ok() || rig.back_key("state").is_none());
            }
        });
        rig.attach(DEVID, "loopback", &[]);
    }
    eprintln!("{connected} of 12 had connected");
    let front = rig.connect(&options);
    let mut driver = Driver::new(front.queue(3).unwrap(), 64);
    round_trip(&mut driver, 1, 20, 1514);
}
