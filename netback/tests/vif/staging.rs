//! Pages that the guest has its vif keep mapped: the same bytes through them as without, and whatever
//! a guest does with them costs that guest's packets at most.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hypervisor::{Access, GrantedPages, Guest};
use netback::frontend::{CtrlUse, StagingUse};
use netback::proto::{
    CTRL_ADD_GREF_MAPPING, CTRL_DEL_GREF_MAPPING, CTRL_GET_GREF_MAPPING_SIZE,
    CTRL_STATUS_INVALID_PARAMETER, CTRL_STATUS_NOT_SUPPORTED, CTRL_STATUS_SUCCESS, CtrlRequest,
    GREF_READONLY, GrefEntry, RSP_ERROR, RSP_OKAY, RxRequest,
};
use netback::{FrontOptions, NetFront};
use rings::Notify;
use zerocopy::IntoBytes;

use crate::raw::{Raw, RawCtrl};
use crate::rig::{DEVID, Driver, Rig, until};
use crate::watched::{NOT_GRANTED, Watch};
use crate::xsa::MORE;
use crate::{ALL, opaque, round_trip};

const MTU: [(&str, &str); 1] = [("mtu", "65535")];
const OKAY: u32 = CTRL_STATUS_SUCCESS;
const INVALID: u32 = CTRL_STATUS_INVALID_PARAMETER;

/// With the knob at `most`.
fn keeping(most: u32) -> [(&'static str, String); 2] {
    [("mtu", "65535".into()), ("options", format!("max_queues=4,staging_grants={most}"))]
}

fn rig(most: u32) -> (Rig, Arc<Watch>) {
    let keys = keeping(most);
    Watch::rig("loopback", &keys.each_ref().map(|(key, value)| (*key, value.as_str())))
}

fn offered(queues: u32) -> FrontOptions {
    FrontOptions { max_queues: queues, staging: StagingUse::Offered, ..FrontOptions::default() }
}

/// A page for lists, and requests about them.
struct Lists<'a> {
    front: &'a NetFront,
    page: Arc<dyn GrantedPages>,
}

impl Lists<'_> {
    fn new<'a>(rig: &Rig, front: &'a NetFront) -> Lists<'a> {
        Lists { front, page: rig.guest().grant(0, 1, Access::ReadWrite).unwrap() }
    }
    fn ask(&self, kind: u16, queue: u32, entries: &[(u32, u16)]) -> (u32, u32) {
        let entries: Vec<_> = entries
            .iter()
            .map(|(gref, flags)| GrefEntry { gref: *gref, flags: *flags, status: 99 })
            .collect();
        self.page.write(0, entries.as_bytes());
        let data = [queue, self.page.refs()[0], entries.len() as u32];
        let answer = self.front.control(kind, data).unwrap();
        (answer.status, answer.data)
    }
    fn add(&self, queue: u32, entries: &[(u32, u16)]) -> u32 {
        self.ask(CTRL_ADD_GREF_MAPPING, queue, entries).0
    }
    /// Status, how many, and the entries' statuses.
    fn remove(&self, queue: u32, refs: &[u32]) -> (u32, u32, Vec<u16>) {
        let entries: Vec<_> = refs.iter().map(|gref| (*gref, 0)).collect();
        let (status, count) = self.ask(CTRL_DEL_GREF_MAPPING, queue, &entries);
        let mut entries = vec![GrefEntry::default(); refs.len()];
        self.page.read(0, entries.as_mut_bytes());
        (status, count, entries.iter().map(|entry| entry.status).collect())
    }
}

/// The rings of so many queues and a control ring, each of a page.
fn rings(queues: u64) -> u64 {
    2 * queues + 1
}

fn counters(rig: &Rig) -> [u64; 6] {
    ["tx_staged", "rx_staged", "tx_copied", "rx_copied", "tx_batches", "rx_batches"]
        .map(|name| rig.counter(DEVID, name))
}

#[test]
fn all_pages_kept_and_the_hypervisor_copies_nothing() {
    let (rig, watch) = rig(512);
    for order in [0, 2] {
        let options = FrontOptions { max_ring_page_order: order, ..offered(1) };
        let front = rig.connect(&options);
        assert_eq!(front.staged(0).len(), 512);
        assert_eq!(watch.mapped(), 2 * (1 << order) + 1 + 512);
        let mut driver = Driver::new(front.queue(0).unwrap(), 128);
        // Only once the copies are counted that were made before all pages were there: none were.
        round_trip(&mut driver, 1, 1000, 65_535);
        let [tx, rx, other @ ..] = counters(&rig);
        assert!(tx > 1000 && rx > 1000, "{tx} {rx}");
        assert_eq!(other, [0; 4], "the hypervisor was asked");
        drop(driver);
        front.close().unwrap();
        until("all is let go", || watch.mapped() == 0);
    }
}

#[test]
fn some_pages_kept_and_four_queues_each_with_their_own() {
    let (rig, watch) = rig(100);
    let front = rig.connect(&offered(4));
    assert!((0..4).all(|queue| front.staged(queue).len() == 100));
    assert_eq!(watch.mapped(), rings(4) + 400);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let queue = front.queue(number).unwrap();
            scope.spawn(move || {
                let mut driver = Driver::new(queue, 128);
                round_trip(&mut driver, number as u64 + 7, 500, 65_535);
            });
        }
    });
    assert!(counters(&rig).iter().all(|n| *n > 0), "{:?}", counters(&rig));
    assert_eq!(rig.counter(DEVID, "tx_dropped_copy") + rig.counter(DEVID, "rx_dropped_copy"), 0);
    front.close().unwrap();
    until("all is let go", || watch.mapped() == 0);
}

#[test]
fn headroom_and_unsegmented_packets_go_the_same_way() {
    let (rig, _) = rig(512);
    let mut front = rig.connect(&offered(1));
    let mut driver = Driver::new(front.queue(0).unwrap(), 128);
    for (round, bytes) in [256, 0, 64].into_iter().enumerate() {
        front.set_headroom(bytes).unwrap();
        round_trip(&mut driver, round as u64, 200, 65_535);
    }
    drop(driver);
    front.close().unwrap();
    for kind in [crate::GsoKind::TcpV4, crate::GsoKind::TcpV6] {
        let (bytes, start) = crate::tcp_packet(kind, 30_000);
        let front = rig.connect(&offered(1));
        let mut driver = Driver::new(front.queue(0).unwrap(), 64);
        let mut frame = driver.frame(&bytes);
        frame.offload.checksum =
            netback::frame::Checksum::Blank { start: start as u16, offset: 16 };
        frame.offload.gso = Some(netback::frame::Gso { kind, size: 1428 });
        driver.sent.push_back(frame);
        driver.until_got(1);
        assert!(driver.got[0][start + 20..] == bytes[start + 20..]);
        drop(driver);
        front.close().unwrap();
    }
}

#[test]
fn who_offers_none_keeps_none() {
    let (rig, watch) = rig(0);
    let front = rig.connect(&offered(1));
    assert_eq!((front.staged(0).len(), watch.mapped()), (0, rings(1)));
    let lists = Lists::new(&rig, &front);
    assert_eq!(lists.add(0, &[]), CTRL_STATUS_NOT_SUPPORTED);
    assert_eq!(lists.remove(0, &[]).0, CTRL_STATUS_NOT_SUPPORTED);
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    round_trip(&mut driver, 1, 50, 9000);
    let [tx, rx, tx_copied, rx_copied, ..] = counters(&rig);
    assert!((tx, rx) == (0, 0) && tx_copied > 0 && rx_copied > 0);
}

fn ask(ctrl: &mut RawCtrl, kind: u16, data: [u32; 3]) -> u32 {
    ctrl.ring.push(&CtrlRequest { id: 1, kind, data }).unwrap();
    if ctrl.ring.publish() == Notify::Send {
        ctrl.channel.notify().unwrap();
    }
    let mut answer = None;
    until("an answer", || {
        answer = ctrl.ring.take().unwrap();
        answer.is_some()
    });
    answer.unwrap().status
}

/// Three slots each way, by all choices of which of them are in pages that are kept.
#[test]
fn a_packet_may_have_both_kinds_of_pages() {
    let (rig, _) = rig(512);
    let mut raw = Raw::with_ctrl(&rig.guest(), DEVID, ALL);
    let mut ctrl = raw.ctrl.take().unwrap();
    let list = rig.guest().grant(0, 1, Access::ReadWrite).unwrap();
    let mut wanted = [0; 4];
    for choice in 0..8usize {
        let first = 3 * choice;
        let kept = (0..3).filter(|n| choice & (1 << n) != 0).map(|n| first + n);
        let entries = kept.flat_map(|page| {
            let refs = [raw.tx_pages.refs()[page], raw.rx_pages.refs()[page]];
            refs.map(|gref| GrefEntry { gref, flags: 0, status: 0 })
        });
        let entries: Vec<_> = entries.collect();
        list.write(0, entries.as_bytes());
        let data = [0, list.refs()[0], entries.len() as u32];
        assert_eq!(ask(&mut ctrl, CTRL_ADD_GREF_MAPPING, data), OKAY);
        let bytes = opaque(choice as u64, 9000);
        raw.tx_pages.write(first * 4096, &bytes);
        let sizes = [(0, 9000, MORE), (1, 4096, MORE), (2, 808, 0)];
        let slots = sizes.map(|(n, size, flags)| raw.slot(first + n, 0, size, flags));
        raw.post(first, 3);
        raw.send(&slots);
        assert!(raw.answers(3).iter().all(|answer| answer.status == RSP_OKAY));
        let got: Vec<u8> = raw.received(3).into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert!(got == bytes, "choice {choice:b}");
        let staged = u64::from(choice.count_ones());
        for (sum, more) in wanted.iter_mut().zip([staged, staged, 3 - staged, 3 - staged]) {
            *sum += more;
        }
        let [tx, rx, tx_copied, rx_copied, ..] = counters(&rig);
        assert_eq!([tx, rx, tx_copied, rx_copied], wanted, "choice {choice:b}");
    }
    // The last slot names nothing: the packet is lost, although its other bytes are here.
    let mut slots = [(21, 5000, MORE), (22, 904, 0)].map(|(n, size, f)| raw.slot(n, 0, size, f));
    slots[1].gref = NOT_GRANTED;
    raw.send(&slots);
    assert!(raw.answers(2).iter().all(|answer| answer.status == RSP_ERROR));
    // And to the guest: the second page is nobody's.
    let slots = [(21, 5000, MORE), (22, 904, 0)].map(|(n, size, f)| raw.slot(n, 0, size, f));
    let good = raw.rx_pages.refs()[21];
    raw.rx.push(&RxRequest { id: 21, pad: 0, gref: good }).unwrap();
    raw.rx.push(&RxRequest { id: 22, pad: 0, gref: NOT_GRANTED }).unwrap();
    raw.send(&slots);
    assert!(raw.answers(2).iter().all(|answer| answer.status == RSP_OKAY));
    assert!(raw.received(2).iter().all(|(answer, _)| answer.status == RSP_ERROR));
    // Its channel closes before the device does.
    drop(ctrl);
    raw.assert_ended();
}

#[test]
fn hostile_lists_get_their_status_and_change_nothing() {
    let (rig, watch) = rig(600);
    let front = rig.connect(&FrontOptions { ctrl: CtrlUse::Offered, ..FrontOptions::default() });
    let (before, lists) = (watch.mapped(), Lists::new(&rig, &front));
    let guest = rig.guest();
    let pages = guest.grant(0, 1000, Access::ReadWrite).unwrap();
    let readable = guest.grant(0, 2, Access::ReadOnly).unwrap();
    let refs = pages.refs();
    let all = |range: std::ops::Range<usize>| -> Vec<_> {
        refs[range].iter().map(|gref| (*gref, 0)).collect()
    };
    assert_eq!(lists.ask(CTRL_GET_GREF_MAPPING_SIZE, 0, &[]), (OKAY, 600));
    let gone = guest.grant(0, 1, Access::ReadWrite).unwrap();
    let revoked = gone.refs()[0];
    drop(gone);
    for (why, entries) in [
        ("twice in the list", vec![(refs[0], 0), (refs[1], 0), (refs[0], 0)]),
        ("twice with other flags", vec![(refs[0], 0), (refs[0], GREF_READONLY)]),
        ("not granted", vec![(refs[0], 0), (NOT_GRANTED, 0)]),
        ("revoked", vec![(revoked, 0), (refs[0], 0)]),
        ("to be read only", vec![(refs[0], 0), (readable.refs()[0], 0)]),
        ("a flag that nobody knows", vec![(refs[0], 4)]),
    ] {
        assert_eq!(lists.add(0, &entries), INVALID, "{why}");
        assert_eq!(watch.mapped(), before, "{why}");
    }
    for queue in [1, u32::MAX] {
        assert_eq!(lists.ask(CTRL_GET_GREF_MAPPING_SIZE, queue, &[]).0, INVALID);
        assert_eq!(lists.add(queue, &all(0..1)), INVALID);
        assert_eq!(lists.remove(queue, &refs[..1]).0, INVALID);
    }
    let list = lists.page.refs()[0];
    for kind in [CTRL_ADD_GREF_MAPPING, CTRL_DEL_GREF_MAPPING] {
        for (page, len) in [(list, 513), (list, u32::MAX), (NOT_GRANTED, 1), (revoked, 512)] {
            assert_eq!(front.control(kind, [0, page, len]).unwrap().status, INVALID);
        }
    }
    // Too many, by one; and what is mapped is not mapped again.
    assert_eq!(lists.add(0, &all(0..512)), OKAY);
    assert_eq!(lists.add(0, &all(512..601)), INVALID);
    assert_eq!(lists.add(0, &all(511..512)), INVALID);
    assert_eq!(lists.add(0, &all(512..600)), OKAY);
    assert_eq!(watch.mapped(), before + 600);
    // Those that are not there say so; a list that cannot be written to changes nothing.
    let (status, count, statuses) = lists.remove(0, &[refs[3], NOT_GRANTED, refs[3], refs[700]]);
    assert_eq!((status, count, statuses), (OKAY, 1, vec![0, 2, 2, 2]));
    assert_eq!(watch.mapped(), before + 599);
    let only = front.control_page().unwrap();
    only.write(0, GrefEntry { gref: refs[4], flags: 0, status: 0 }.as_bytes());
    let answer = front.control(CTRL_DEL_GREF_MAPPING, [0, only.refs()[0], 1]).unwrap();
    assert_eq!((answer.status, watch.mapped()), (INVALID, before + 599));
    // The hypervisor will not, halfway through a list of both kinds.
    for k in [1, 2] {
        watch.fail_map(k);
        let entries = [(readable.refs()[0], GREF_READONLY), (refs[3], 0)];
        assert_eq!((lists.add(0, &entries), watch.mapped()), (INVALID, before + 599));
    }
    // Nor map the neighbours of who leaves again: then they are copied.
    watch.fail_map(1);
    assert_eq!(lists.remove(0, &[refs[512]]).1, 1);
    assert_eq!((lists.remove(0, &refs[513..514]).2, watch.mapped()), (vec![2], before + 511));
    let mut driver = Driver::new(front.queue(0).unwrap(), 64);
    round_trip(&mut driver, 1, 50, 9000);
    drop(driver);
    front.close().unwrap();
    until("all is let go", || watch.mapped() == 0);
}

/// A page that is granted for writing and kept for reading is written by grant copy; one that the guest
/// has taken back costs the packet.
#[test]
fn what_a_page_is_used_for_beyond_its_list_is_the_grants_to_decide() {
    let (rig, _) = rig(512);
    let mut raw = Raw::with_ctrl(&rig.guest(), DEVID, ALL);
    let mut ctrl = raw.ctrl.take().unwrap();
    let guest = rig.guest();
    let list = guest.grant(0, 1, Access::ReadWrite).unwrap();
    let readable = guest.grant(0, 1, Access::ReadOnly).unwrap();
    let mut tell = |kind, gref, flags| {
        list.write(0, GrefEntry { gref, flags, status: 0 }.as_bytes());
        ask(&mut ctrl, kind, [0, list.refs()[0], 1])
    };
    let bytes = opaque(1, 60);
    raw.tx_pages.write(0, &bytes);
    let slot = raw.slot(0, 0, 60, 0);
    let to = raw.rx_pages.refs()[0];
    for (gref, status) in [(to, 60), (readable.refs()[0], RSP_ERROR)] {
        assert_eq!(tell(CTRL_ADD_GREF_MAPPING, gref, GREF_READONLY), OKAY);
        raw.rx.push(&RxRequest { id: 0, pad: 0, gref }).unwrap();
        raw.send(&[slot]);
        assert_eq!(raw.answers(1)[0].status, RSP_OKAY);
        assert_eq!(raw.received(1)[0].0.status, status);
    }
    assert_eq!(counters(&rig)[..4], [0, 0, 2, 2]);
    // Taken back while it is in a slot.
    let page = guest.grant(0, 1, Access::ReadWrite).unwrap();
    let gref = page.refs()[0];
    page.write(0, &bytes);
    assert_eq!(tell(CTRL_ADD_GREF_MAPPING, gref, 0), OKAY);
    let slot = netback::proto::TxRequest { gref, ..slot };
    raw.send(&[slot]);
    assert_eq!(raw.answers(1)[0].status, RSP_OKAY);
    assert_eq!(tell(CTRL_DEL_GREF_MAPPING, gref, 0), OKAY);
    drop(page);
    raw.send(&[slot]);
    assert_eq!(raw.answers(1)[0].status, RSP_ERROR);
    assert_eq!(rig.counter(DEVID, "tx_dropped_copy"), 1);
    drop(ctrl);
    raw.assert_ended();
}

/// Pages go and come while packets are copied through them; each request is answered, and when it is,
/// nobody uses the page.
#[test]
fn pages_leave_and_come_back_while_packets_pass() {
    let (rig, watch) = rig(512);
    let front = rig.connect(&offered(1));
    assert_eq!(watch.mapped(), rings(1) + 512);
    let mut driver = Driver::new(front.queue(0).unwrap(), 128);
    let pages: Vec<_> = front.staged(0).to_vec();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let lists = Lists::new(&rig, &front);
        let (pages, done) = (&pages, &done);
        let coming = scope.spawn(move || {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) || rounds < 20 {
                let some: Vec<_> = pages.iter().skip(rounds % 7).step_by(1 + rounds % 5).collect();
                let refs: Vec<_> = some.iter().map(|entry| entry.gref).collect();
                let (status, count, statuses) = lists.remove(0, &refs);
                assert_eq!((status, count as usize), (OKAY, refs.len()));
                assert!(statuses.iter().all(|status| *status == 0));
                let again: Vec<_> = some.iter().map(|entry| (entry.gref, entry.flags)).collect();
                assert_eq!(lists.add(0, &again), OKAY);
                rounds += 1;
            }
        });
        round_trip(&mut driver, 3, 3000, 30_000);
        done.store(true, Ordering::Relaxed);
        coming.join().unwrap();
    });
    assert!(counters(&rig).iter().all(|n| *n > 0), "{:?}", counters(&rig));
    assert_eq!(rig.counter(DEVID, "tx_dropped_copy") + rig.counter(DEVID, "rx_dropped_copy"), 0);
    assert_eq!(watch.mapped(), rings(1) + 512);
    drop(driver);
    front.close().unwrap();
    until("all is let go", || watch.mapped() == 0);
}

#[test]
fn xsa_332_lists_without_end_while_another_vif_works() {
    let (rig, watch) = rig(512);
    rig.attach(DEVID + 1, "loopback", &MTU);
    let other = NetFront::connect(&*rig.guest(), DEVID + 1, &FrontOptions::default()).unwrap();
    let mut driver = Driver::new(other.queue(0).unwrap(), 128);
    let mut raw = Raw::with_ctrl(&rig.guest(), DEVID, ALL);
    let mut ctrl = raw.ctrl.take().unwrap();
    let list = rig.guest().grant(0, 1, Access::ReadWrite).unwrap();
    let pages = rig.guest().grant(0, 512, Access::ReadWrite).unwrap();
    let entries: Vec<_> =
        pages.refs().iter().map(|gref| GrefEntry { gref: *gref, flags: 0, status: 0 }).collect();
    list.write(0, entries.as_bytes());
    let slots = ctrl.ring.slots() as u16;
    for id in 0..slots {
        let kind = if id % 2 == 0 { CTRL_ADD_GREF_MAPPING } else { CTRL_DEL_GREF_MAPPING };
        ctrl.ring.push(&CtrlRequest { id, kind, data: [0, list.refs()[0], 512] }).unwrap();
    }
    let _ = ctrl.ring.publish();
    ctrl.channel.notify().unwrap();
    round_trip(&mut driver, 1, 500, 9000);
    for id in 0..slots {
        let mut answer = None;
        until("an answer", || {
            answer = ctrl.ring.take().unwrap();
            answer.is_some()
        });
        let answer = answer.unwrap();
        let count = if id % 2 == 0 { 0 } else { 512 };
        assert_eq!((answer.id, answer.status, answer.data), (id, OKAY, count));
    }
    drop(driver);
    other.close().unwrap();
    drop(ctrl);
    raw.assert_ended();
    until("all is let go", || watch.mapped() == 0);
}

#[test]
fn xsa_371_after_teardown_none_is_mapped() {
    let (rig, watch) = rig(512);
    for end in ["close", "nonsense", "abandon", "destroy"] {
        let mut raw = Raw::with_ctrl(&rig.guest(), DEVID, ALL);
        let mut ctrl = raw.ctrl.take().unwrap();
        let list = rig.guest().grant(0, 1, Access::ReadWrite).unwrap();
        let entry = |gref: &u32| GrefEntry { gref: *gref, flags: 0, status: 0 };
        let entries: Vec<_> = raw.tx_pages.refs().iter().map(entry).collect();
        list.write(0, entries.as_bytes());
        let data = [0, list.refs()[0], entries.len() as u32];
        assert_eq!(ask(&mut ctrl, CTRL_ADD_GREF_MAPPING, data), OKAY);
        assert_eq!(watch.mapped(), rings(1) + entries.len() as u64, "{end}");
        raw.ctrl = Some(ctrl);
        match end {
            "close" => raw.close(),
            "nonsense" => {
                let slot = raw.slot(0, 4000, 4000, 0);
                raw.send(&[slot]);
                raw.assert_ended();
                raw.close();
            }
            "abandon" => rig.connect(&offered(1)).close().unwrap(),
            _ => rig.remove(DEVID),
        }
        until("all is let go", || watch.mapped() == 0);
        if end != "destroy" {
            rig.begin_anew(DEVID);
        }
    }
}

#[test]
fn a_successor_maps_again_what_the_guest_has_named() {
    let (mut rig, watch) = rig(600);
    let front = rig.connect(&offered(2));
    let all = rings(2) + 2 * 512;
    assert_eq!(watch.mapped(), all);
    // One has left; another has come.
    let lists = Lists::new(&rig, &front);
    let left = front.staged(1)[300].gref;
    assert_eq!(lists.remove(1, &[left]).1, 1);
    let more = rig.guest().grant(0, 2, Access::ReadOnly).unwrap();
    assert_eq!(lists.add(0, &[(more.refs()[0], GREF_READONLY)]), OKAY);
    let mut drivers: Vec<_> = (0..2).map(|n| Driver::new(front.queue(n).unwrap(), 128)).collect();
    for restart in 0..2 {
        rig.restart();
        until("they are mapped", || watch.mapped() == all);
        // The first queue's are in its table before the second's are mapped.
        round_trip(&mut drivers[0], restart, 300, 65_535);
        let [tx, rx, tx_copied, rx_copied, ..] = counters(&rig);
        assert!(tx > 300 && rx > 300, "{tx} {rx}");
        assert_eq!((tx_copied, rx_copied), (0, 0));
        round_trip(&mut drivers[1], restart, 300, 65_535);
    }
    assert_eq!(lists.remove(1, &[left]).2, [2], "it has come back by itself");
    assert_eq!(lists.remove(0, &[more.refs()[0]]).2, [0]);
    drop(drivers);
    front.close().unwrap();
    until("all is let go", || watch.mapped() == 0);
}

#[test]
fn a_successor_that_knows_nothing_starts_over() {
    let (mut rig, watch) = rig(512);
    let front = rig.connect(&offered(1));
    let mut driver = Driver::new(front.queue(0).unwrap(), 128);
    rig.lose_what_is_left();
    rig.restart();
    until("it is there", || watch.mapped() == rings(1));
    round_trip(&mut driver, 1, 100, 65_535);
    let [tx, rx, tx_copied, rx_copied, ..] = counters(&rig);
    assert!((tx, rx) == (0, 0) && tx_copied > 0 && rx_copied > 0);
    let lists = Lists::new(&rig, &front);
    let again: Vec<_> = front.staged(0).iter().map(|entry| (entry.gref, entry.flags)).collect();
    assert_eq!(lists.remove(0, &[again[0].0]).2, [2], "it is not there to be removed");
    assert_eq!(lists.add(0, &again), OKAY);
    round_trip(&mut driver, 2, 100, 65_535);
    assert!(counters(&rig)[..2].iter().all(|staged| *staged > 0));
    drop(driver);
    front.close().unwrap();
}
