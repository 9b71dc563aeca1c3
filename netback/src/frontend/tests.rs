//! Both directions of a queue, with a backend's ends of the rings that do as the tests like.
// The tests' own memory stands for granted pages.
#![allow(unsafe_code)]

use std::collections::VecDeque;

use hypervisor::GrantRef;
use rings::mem::{HeapPages, SharedMem};
use rings::{BackRing, PAGE_SIZE, Slot, Table};

use super::transmit::Pushed;
use super::*;
use crate::frame::{Checksum, Frame, Gso, GsoKind, Pool};
use crate::hash::Hash;
use crate::proto::{
    Extra, ExtraInfo, MAX_TX_SIZE, RSP_DROPPED, RSP_ERROR, RSP_NULL, RSP_OKAY, RX_CSUM_BLANK,
    RX_DATA_VALIDATED, RX_EXTRA_INFO, RX_MORE_DATA, Rx, RxRequest, RxResponse, TX_CSUM_BLANK,
    TX_DATA_VALIDATED, TX_EXTRA_INFO, TX_MORE_DATA, Tx, TxRequest, TxResponse,
};

const ALL: Accepts =
    Accepts { scatter: true, checksum4: true, checksum6: true, tso4: true, tso6: true };

struct Granted(Arc<HeapPages>, Vec<GrantRef>);

// SAFETY: it is the heap pages' own memory, kept by the Arc.
unsafe impl SharedMem for Granted {
    fn base(&self) -> *mut u8 {
        self.0.base()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
}

impl GrantedPages for Granted {
    fn refs(&self) -> &[GrantRef] {
        &self.1
    }
}

/// Pages whose references begin at `first`.
fn granted(pages: usize, first: u32) -> (Arc<HeapPages>, Arc<dyn GrantedPages>) {
    let memory = Arc::new(HeapPages::new(pages));
    (memory.clone(), Arc::new(Granted(memory, (first..first + pages as u32).collect())))
}

struct Sent {
    front: Transmit,
    back: BackRing<Tx, Arc<HeapPages>, Table<TxRequest>>,
    pages: Arc<HeapPages>,
    totals: Totals,
    pool: Pool,
}

fn sender(pages: usize, takes: Accepts) -> Sent {
    let (ring, granted_ring) = granted(1, 0);
    let (memory, granted_pages) = granted(pages, 1000);
    let front = Transmit::new(granted_ring, granted_pages, takes, Handle::default());
    let front = front.expect("a ring");
    let table = Table::on_heap(front.ring.slots());
    let (back, _) = BackRing::attach(ring, table, Handle::default()).expect("a ring");
    Sent { front, back, pages: memory, totals: Totals::default(), pool: Pool::private(8) }
}

impl Sent {
    fn frame(&mut self, len: usize) -> Frame {
        let mut frame = self.pool.take().expect("a frame");
        frame.set_len(len);
        for (n, byte) in frame.iter_mut().enumerate() {
            *byte = (n % 251) as u8;
        }
        frame
    }
    fn push(&mut self, frame: &Frame) -> Pushed {
        let pushed = self.front.push(frame);
        let _ = self.front.ring.publish();
        pushed
    }
    fn take(&mut self) -> Vec<(Slot, TxRequest)> {
        let mut all = Vec::new();
        while let Some(taken) = self.back.take().expect("a ring") {
            all.push((taken.slot, taken.req));
        }
        all
    }
    fn respond(&mut self, slot: Slot, id: u16, status: i16) {
        self.back.respond(slot, &TxResponse { id, status });
        let _ = self.back.publish();
    }
    /// The bytes of a packet's slots, as a backend reads them.
    fn bytes(&self, slots: &[TxRequest]) -> Vec<u8> {
        let rest: usize = slots[1..].iter().map(|slot| usize::from(slot.size)).sum();
        let mut all = Vec::new();
        for (n, slot) in slots.iter().enumerate() {
            let size = usize::from(slot.size) - if n == 0 { rest } else { 0 };
            let mut bytes = vec![0; size];
            let page = (slot.gref - 1000) as usize;
            self.pages.read(page * PAGE_SIZE + usize::from(slot.offset), &mut bytes);
            all.extend(bytes);
        }
        all
    }
}

#[test]
fn a_frame_becomes_the_slots_that_netif_wants() {
    for len in [14, 60, 4096, 4097, 9014, 65_535] {
        let mut sent = sender(32, ALL);
        let mut frame = sent.frame(len);
        frame.offload.checksum = Checksum::Valid;
        assert_eq!(sent.push(&frame), Pushed::Yes);
        let taken = sent.take();
        let slots: Vec<TxRequest> = taken.iter().map(|(_, req)| *req).collect();
        assert_eq!(slots.len(), len.div_ceil(PAGE_SIZE));
        assert_eq!(usize::from(slots[0].size), len);
        assert!(sent.bytes(&slots) == frame[..], "{len} bytes");
        for (n, slot) in slots.iter().enumerate() {
            assert_eq!(slot.has(TX_MORE_DATA), n + 1 < slots.len());
            assert_eq!(slot.has(TX_DATA_VALIDATED), n == 0);
            assert!(!slot.has(TX_EXTRA_INFO) && !slot.has(TX_CSUM_BLANK));
        }
        for (slot, req) in taken {
            sent.respond(slot, req.id, RSP_OKAY);
        }
        assert!(!sent.front.is_idle());
        sent.front.reap(&mut sent.totals).expect("right answers");
        assert!(sent.front.is_idle());
        assert_eq!(sent.totals, Totals::default());
    }
}

#[test]
fn an_unsegmented_packet_says_so_behind_its_first_slot() {
    let mut sent = sender(8, ALL);
    let mut frame = sent.frame(9014);
    let gso = Gso { kind: GsoKind::TcpV4, size: 1448 };
    frame.offload.checksum = Checksum::Blank { start: 34, offset: 16 };
    frame.offload.gso = Some(gso);
    assert_eq!(sent.push(&frame), Pushed::Yes);
    let taken = sent.take();
    let slots: Vec<TxRequest> = taken.iter().map(|(_, req)| *req).collect();
    assert!(slots[0].has(TX_EXTRA_INFO) && slots[0].has(TX_CSUM_BLANK | TX_MORE_DATA));
    assert_eq!(slots[1].as_extra().parse(), Ok(Extra::Gso(gso)));
    assert!(!slots[1].as_extra().more());
    assert!(sent.bytes(&[slots[0], slots[2], slots[3]]) == frame[..]);
    for (n, (slot, req)) in taken.into_iter().enumerate() {
        let (id, status) = if n == 1 { (0, RSP_NULL) } else { (req.id, RSP_OKAY) };
        sent.respond(slot, id, status);
    }
    sent.front.reap(&mut sent.totals).expect("right answers");
    assert!(sent.front.is_idle());
}

#[test]
fn a_hash_is_told_to_who_takes_it_behind_what_else_there_is() {
    let said = Extra::Hash { kind: 1, algorithm: 1, value: 0x8765_4321 };
    let gso = Gso { kind: GsoKind::TcpV4, size: 1448 };
    for (with_gso, takes) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut sent = sender(8, ALL);
        sent.front.takes_hash = takes;
        let mut frame = sent.frame(5000);
        frame.hash = Hash::of_extra(&said);
        frame.offload.gso = with_gso.then_some(gso);
        assert_eq!(sent.push(&frame), Pushed::Yes);
        let slots: Vec<TxRequest> = sent.take().iter().map(|(_, req)| *req).collect();
        let wanted: Vec<Extra> = [with_gso.then_some(Extra::Gso(gso)), takes.then_some(said)]
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(slots[0].has(TX_EXTRA_INFO), !wanted.is_empty());
        let infos: Vec<ExtraInfo> =
            slots[1..=wanted.len()].iter().map(TxRequest::as_extra).collect();
        assert_eq!(infos.iter().map(|i| i.parse().unwrap()).collect::<Vec<_>>(), wanted);
        assert!(infos.iter().rev().skip(1).all(ExtraInfo::more));
        assert!(infos.last().is_none_or(|last| !last.more()));
        assert!(sent.bytes(&[slots[0], slots[wanted.len() + 1]]) == frame[..]);
        assert_eq!(slots.len(), wanted.len() + 2);
    }
}

#[test]
fn what_the_backend_takes_not_is_not_sent() {
    let mut sent = sender(32, Accepts::default());
    let long = sent.frame(4097);
    assert_eq!(sent.push(&long), Pushed::Never, "several slots without feature-sg");
    let mut gso = sent.frame(100);
    gso.offload.gso = Some(Gso { kind: GsoKind::TcpV6, size: 50 });
    assert_eq!(sent.push(&gso), Pushed::Never);
    let mut sent = sender(32, ALL);
    for len in [0, 13, usize::from(MAX_TX_SIZE) + 1] {
        let frame = sent.frame(len);
        assert_eq!(sent.push(&frame), Pushed::Never, "{len} bytes");
    }
    assert!(sent.front.is_idle());
}

#[test]
fn without_room_a_frame_stays_whole() {
    let mut sent = sender(3, ALL);
    let (short, long) = (sent.frame(60), sent.frame(9014));
    assert_eq!(sent.push(&short), Pushed::Yes);
    assert_eq!(sent.push(&long), Pushed::Later);
    let mut taken = sent.take();
    assert_eq!(taken.len(), 1, "a part of it is in the ring");
    let (slot, req) = taken.remove(0);
    sent.respond(slot, req.id, RSP_ERROR);
    sent.front.reap(&mut sent.totals).expect("a right answer");
    assert_eq!(sent.push(&long), Pushed::Yes);
    for (n, (slot, req)) in sent.take().into_iter().enumerate() {
        sent.respond(slot, req.id, if n == 0 { RSP_DROPPED } else { RSP_OKAY });
    }
    sent.front.reap(&mut sent.totals).expect("right answers");
    assert_eq!((sent.totals.tx_errors, sent.totals.tx_dropped), (1, 1));
}

#[test]
fn an_answer_to_nothing_breaks_the_device() {
    for id in [1, 7, 8, u16::MAX] {
        let mut sent = sender(8, ALL);
        let frame = sent.frame(60);
        assert_eq!(sent.push(&frame), Pushed::Yes);
        let (slot, req) = sent.take().remove(0);
        assert_eq!(req.id, 0);
        sent.respond(slot, id, RSP_OKAY);
        assert_eq!(sent.front.reap(&mut sent.totals), Err(Fault::TxId(id)));
    }
}

struct Received {
    front: Receive,
    back: BackRing<Rx, Arc<HeapPages>, Table<RxRequest>>,
    pages: Arc<HeapPages>,
    totals: Totals,
    pool: Pool,
    frames: VecDeque<Frame>,
}

fn receiver(pages: usize) -> Received {
    let (ring, granted_ring) = granted(1, 0);
    let (memory, granted_pages) = granted(pages, 1000);
    let mut front = Receive::new(granted_ring, granted_pages, Handle::default()).expect("a ring");
    front.post();
    let _ = front.ring.publish();
    let table = Table::on_heap(front.ring.slots());
    let (back, _) = BackRing::attach(ring, table, Handle::default()).expect("a ring");
    let (pool, frames) = (Pool::private(4), VecDeque::new());
    Received { front, back, pages: memory, totals: Totals::default(), pool, frames }
}

impl Received {
    /// Answers the next page with `rsp`, whose id is the page's unless `rsp` is an information.
    fn put(&mut self, rsp: RxResponse, bytes: &[u8]) {
        let taken = self.back.take().expect("a ring").expect("a page");
        let page = (taken.req.gref - 1000) as usize;
        assert_eq!(usize::from(taken.req.id), page);
        self.pages.write(page * PAGE_SIZE + usize::from(rsp.offset), bytes);
        self.back.respond(taken.slot, &RxResponse { id: taken.req.id, ..rsp });
    }
    fn put_extra(&mut self, extra: ExtraInfo) {
        let taken = self.back.take().expect("a ring").expect("a page");
        self.back.respond(taken.slot, &extra.into());
    }
    fn take(&mut self) -> Result<(), Fault> {
        let _ = self.back.publish();
        let Received { front, frames, pool, totals, .. } = self;
        front.take(frames, 10, pool, totals)?;
        front.post();
        let _ = front.ring.publish();
        Ok(())
    }
}

fn rsp(offset: u16, flags: u16, status: i16) -> RxResponse {
    RxResponse { id: 0, offset, flags, status }
}

/// An IPv4 TCP packet of `len` bytes.
fn tcp(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[12..15].copy_from_slice(&[8, 0, 0x45]);
    bytes[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
    bytes[22..24].copy_from_slice(&[64, 6]);
    bytes[26..34].copy_from_slice(&[10, 0, 2, 2, 10, 0, 2, 15]);
    bytes[46] = 0x50;
    bytes
}

#[test]
fn slots_become_a_frame_also_when_they_come_one_by_one() {
    let mut received = receiver(16);
    let bytes = tcp(5000);
    let gso = Gso { kind: GsoKind::TcpV4, size: 1448 };
    let flags = RX_CSUM_BLANK | RX_MORE_DATA | RX_EXTRA_INFO;
    received.put(rsp(256, flags, 3000), &bytes[..3000]);
    received.take().expect("a part");
    received.put_extra(ExtraInfo::from(Extra::Gso(gso)).and_more());
    received.put_extra(Extra::Hash { kind: 1, algorithm: 1, value: 0x1234_5678 }.into());
    received.take().expect("a part");
    assert!(received.frames.is_empty());
    received.put(rsp(0, 0, 2000), &bytes[3000..]);
    received.put(rsp(10, RX_DATA_VALIDATED, 60), &[9; 60]);
    received.take().expect("the rest");
    let [long, short] = received.frames.make_contiguous() else { panic!("two frames") };
    // The blank checksum has got the pseudo-header's sum.
    assert!(long[..50] == bytes[..50] && long[52..] == bytes[52..] && short[..] == [9; 60]);
    assert_eq!(long.offload.checksum, Checksum::Blank { start: 34, offset: 16 });
    assert_eq!((long.offload.gso, short.offload.checksum), (Some(gso), Checksum::Valid));
    assert_eq!((long.hash.map(|hash| hash.value), short.hash), (Some(0x1234_5678), None));
    assert_eq!((received.front.hash, received.totals.rx_frames), (Some(0x1234_5678), 2));
}

#[test]
fn a_packet_that_is_none_is_dropped_and_the_next_one_comes() {
    let blank = RX_CSUM_BLANK;
    for bad in 0..5 {
        let mut received = receiver(32);
        match bad {
            0 => received.put(rsp(0, 0, RSP_ERROR), &[]),
            1 => received.put(rsp(0, blank, 60), &[1; 60]),
            2 => {
                received.put(rsp(0, blank | RX_EXTRA_INFO, 60), &[1; 60]);
                received.put_extra(ExtraInfo { kind: 99, flags: 0, data: [0; 6] });
            }
            3 => (0..17).for_each(|n| {
                let more = if n < 16 { RX_MORE_DATA } else { 0 };
                received.put(rsp(0, more, 4096), &[1; 4096]);
            }),
            _ => received.put(rsp(0, 0, 0), &[]),
        }
        received.put(rsp(0, 0, 60), &[2; 60]);
        received.take().expect("no fault");
        assert_eq!((received.totals.rx_errors, received.frames.len()), (1, 1), "case {bad}");
        assert_eq!(received.frames[0][..], [2; 60]);
        assert_eq!(received.pool.free(), 3);
    }
}

#[test]
fn a_lying_backend_breaks_the_device() {
    let mut received = receiver(8);
    received.put(rsp(4000, 0, 97), &[1; 96]);
    assert_eq!(received.take(), Err(Fault::RxSpan { offset: 4000, len: 97 }));
    let mut received = receiver(8);
    let taken = received.back.take().expect("a ring").expect("a page");
    received.back.respond(taken.slot, &RxResponse { id: 5, ..rsp(0, 0, 60) });
    assert_eq!(received.take(), Err(Fault::RxId(5)));
}

#[test]
fn without_memory_packets_wait_in_the_ring() {
    let mut received = receiver(8);
    for n in 0..6 {
        received.put(rsp(0, 0, 60), &[n; 60]);
    }
    received.take().expect("no fault");
    assert_eq!((received.frames.len(), received.pool.free()), (4, 0));
    received.frames.drain(..).for_each(|frame| received.pool.give(frame));
    received.take().expect("no fault");
    assert_eq!(received.frames.iter().map(|f| f[0]).collect::<Vec<_>>(), [4, 5]);
}

#[test]
fn addresses_are_read() {
    assert_eq!(parse_mac("00:16:3e:5:ff:01"), Some([0, 0x16, 0x3e, 5, 0xff, 1]));
    for bad in ["", "00:16:3e:5:ff", "00:16:3e:5:ff:01:2", "0:0:0:0:0:100", "0:0:0:0:0:x"] {
        assert_eq!(parse_mac(bad), None, "{bad}");
    }
}
