use proptest::prelude::*;

use super::*;
use crate::frame::GsoKind;
use crate::proto::{EXTRA_TYPE_GSO, ExtraInfo, MAX_TX_SIZE};

fn slot(id: u16, size: u16, flags: u16) -> TxRequest {
    TxRequest { gref: 100 + u32::from(id), offset: 0, flags, id, size }
}

/// A packet of `total` bytes whose slots behind the first have the sizes `behind`.
fn chain(total: u16, behind: &[u16]) -> Vec<TxRequest> {
    let more = |last: bool| if last { 0 } else { TX_MORE_DATA };
    let mut slots = vec![slot(0, total, more(behind.is_empty()))];
    for (n, size) in behind.iter().enumerate() {
        slots.push(slot(n as u16 + 1, *size, more(n + 1 == behind.len())));
    }
    slots
}

fn gather(slots: &[TxRequest]) -> Result<Batch, Broken> {
    let mut batch = Batch::default();
    for (n, slot) in slots.iter().enumerate() {
        assert_eq!(batch.push(slot)?, n + 1 == slots.len(), "complete with its last slot");
    }
    Ok(batch)
}

fn verdict(slots: &[TxRequest]) -> Verdict {
    let batch = gather(slots).unwrap();
    assert_eq!(batch.packets().len(), 1);
    batch.packets()[0].verdict
}

fn statuses(batch: &Batch) -> Vec<(u16, i16)> {
    let answers = batch.packets().iter().flat_map(|p| batch.answers(p, true));
    answers.map(|a| (a.id, a.status)).collect()
}

fn lengths(batch: &Batch) -> Vec<(u32, usize, u16)> {
    let mut ops = Vec::new();
    batch.copies(&batch.packets()[0], 1000, 0..usize::MAX, &mut ops);
    ops.iter().map(|op| (op.gref, op.at, op.len)).collect()
}

#[test]
fn a_packet_of_one_slot() {
    let batch = gather(&chain(60, &[])).unwrap();
    assert_eq!(lengths(&batch), [(100, 1000, 60)]);
    assert_eq!(statuses(&batch), [(0, RSP_OKAY)]);
}

#[test]
fn no_piece_of_what_linux_sends_is_cut_by_a_local_page() {
    // Headers, then pages that lie behind each other in the guest.
    for (header, first) in [(66, 0), (66, 1000), (86, 4095), (54, 4042), (4096, 1), (1, 4095)] {
        let behind = [4096 - first, 4096, 4096, 500];
        let mut slots = chain(header + behind.iter().sum::<u16>(), &behind);
        slots[1].offset = first;
        let batch = gather(&slots).unwrap();
        let packet = &batch.packets()[0];
        let mut ops = Vec::new();
        batch.copies(packet, 7 * rings::PAGE_SIZE + batch.shift(packet), 0..usize::MAX, &mut ops);
        assert_eq!(ops.len(), 5);
        for op in &ops[1..] {
            assert_eq!(op.at % rings::PAGE_SIZE, usize::from(op.offset), "{header} {first}");
        }
    }
    assert_eq!(gather(&chain(60, &[])).map(|b| b.shift(&b.packets()[0])), Ok(0));
}

#[test]
fn xsa423_a_packet_split_at_every_byte_is_the_same_packet() {
    for at in 0..=60 {
        let batch = gather(&chain(60, &[60 - at])).unwrap();
        let pieces = lengths(&batch);
        assert_eq!(pieces.iter().map(|(_, _, len)| len).sum::<u16>(), 60);
        assert!(pieces.iter().all(|(_, _, len)| *len > 0), "no copy of nothing");
        assert_eq!(pieces[0].1, 1000);
        assert_eq!(statuses(&batch), [(0, RSP_OKAY), (1, RSP_OKAY)]);
    }
}

#[test]
fn xsa432_18_slots_of_1_byte_behind_the_first() {
    let batch = gather(&chain(18 + 14, &[1; 18])).unwrap();
    assert_eq!(batch.packets()[0].verdict, Verdict::Frame);
    assert_eq!(lengths(&batch).len(), 19);
    // And where all but the last bytes are behind.
    let batch = gather(&chain(18, &[1; 18])).unwrap();
    assert_eq!(lengths(&batch).len(), 18);
}

#[test]
fn xsa448_slots_of_0_bytes_first_middle_last_and_all() {
    for behind in [&[60][..], &[30, 0, 30], &[60, 0], &[0, 60, 0], &[0, 0, 0]] {
        let batch = gather(&chain(60, behind)).unwrap();
        assert_eq!(batch.packets()[0].verdict, Verdict::Frame, "{behind:?}");
        let copied = lengths(&batch);
        assert_eq!(copied.iter().map(|(_, _, len)| len).sum::<u16>(), 60);
        assert!(copied.iter().all(|(_, _, len)| *len > 0));
        assert_eq!(statuses(&batch).len(), behind.len() + 1);
    }
    assert_eq!(verdict(&chain(0, &[0, 0])), Verdict::Dropped(Dropped::Short));
}

#[test]
fn too_many_slots_cost_the_packet_and_then_the_vif() {
    for (behind, want) in [
        (18, Verdict::Frame),
        (19, Verdict::Dropped(Dropped::Slots)),
        (20, Verdict::Dropped(Dropped::Slots)),
    ] {
        let batch = gather(&chain(200, &vec![1; behind])).unwrap();
        assert_eq!(batch.packets()[0].verdict, want, "{behind} slots behind the first");
        let status = if want == Verdict::Frame { RSP_OKAY } else { RSP_ERROR };
        assert!(statuses(&batch).iter().all(|(_, s)| *s == status));
    }
    assert_eq!(gather(&chain(200, &[1; 21])).unwrap_err(), Broken::Slots);
}

#[test]
fn slots_that_hold_more_than_the_packet_cost_it() {
    assert_eq!(verdict(&chain(60, &[61])), Verdict::Dropped(Dropped::Size));
    assert_eq!(verdict(&chain(60, &[30, 31])), Verdict::Dropped(Dropped::Size));
    assert_eq!(verdict(&chain(13, &[])), Verdict::Dropped(Dropped::Short));
    assert_eq!(verdict(&chain(14, &[])), Verdict::Frame);
}

#[test]
fn a_slot_beyond_its_page_costs_the_vif() {
    let page = |offset, size| Broken::Page { offset, size };
    let mut first = chain(60, &[]);
    first[0].offset = 4096 - 59;
    assert_eq!(gather(&first).unwrap_err(), page(4037, 60));
    first[0].offset = 4096 - 60;
    assert!(gather(&first).is_ok());
    let mut second = chain(5000, &[1000]);
    second[1].offset = u16::MAX;
    assert_eq!(gather(&second).unwrap_err(), page(u16::MAX, 1000));
    // What is left for the first slot is more than a page.
    assert_eq!(gather(&chain(5097, &[1000])).unwrap_err(), page(0, 4097));
    assert_eq!(gather(&chain(MAX_TX_SIZE, &[])).unwrap_err(), page(0, MAX_TX_SIZE));
}

fn with_extras(extras: &[ExtraInfo], flags: u16) -> Vec<TxRequest> {
    let mut slots = vec![slot(7, 60, flags | TX_EXTRA_INFO)];
    slots.extend(extras.iter().map(|extra| TxRequest::from(*extra)));
    slots
}

#[test]
fn extra_infos_are_answered_as_such() {
    let gso = Gso { kind: GsoKind::TcpV6, size: 1428 };
    let hash = Extra::Hash { kind: 1, algorithm: 1, value: 5 };
    let mut slots =
        with_extras(&[ExtraInfo::from(Extra::Gso(gso)).and_more(), hash.into()], TX_MORE_DATA);
    slots.push(slot(8, 10, 0));
    let batch = gather(&slots).unwrap();
    assert_eq!(batch.packets()[0].gso, Some(gso));
    assert_eq!(statuses(&batch), [(7, 0), (0, RSP_NULL), (0, RSP_NULL), (8, 0)]);
    assert_eq!(lengths(&batch), [(107, 1000, 50), (108, 1050, 10)]);
}

#[test]
fn bad_extra_infos_cost_the_vif() {
    let bad = ExtraInfo { kind: 6, flags: 0, data: [0; 6] };
    assert_eq!(gather(&with_extras(&[bad], 0)).unwrap_err(), Broken::Extra(Malformed::Type(6)));
    let none = ExtraInfo { kind: EXTRA_TYPE_GSO, flags: 0, data: [0, 0, 1, 0, 0, 0] };
    assert_eq!(gather(&with_extras(&[none], 0)).unwrap_err(), Broken::Extra(Malformed::GsoSize));
    let hash = ExtraInfo::from(Extra::Xdp { headroom: 1 }).and_more();
    assert_eq!(gather(&with_extras(&[hash; 9], 0)).unwrap_err(), Broken::Extras);
}

#[test]
fn group_addresses_come_in_requests_of_their_own() {
    let address = [1, 0, 0x5e, 0, 0, 9];
    let add = ExtraInfo::from(Extra::McastAdd(address));
    let batch = gather(&with_extras(&[add], 0)).unwrap();
    let packet = &batch.packets()[0];
    assert_eq!(packet.verdict, Verdict::Multicast(Group::Add(address)));
    let answers = |accepted| batch.answers(packet, accepted).map(|a| a.status).collect::<Vec<_>>();
    assert_eq!(answers(true), [RSP_OKAY, RSP_NULL]);
    assert_eq!(answers(false), [RSP_ERROR, RSP_NULL]);
}

#[test]
fn a_packet_may_come_in_parts() {
    let slots = chain(60, &[20, 20]);
    let mut batch = gather(&chain(14, &[])).unwrap();
    assert!(!batch.push(&slots[0]).unwrap());
    assert_eq!(batch.packets().len(), 1);
    batch.clear();
    assert!(batch.packets().is_empty());
    assert!(!batch.push(&slots[1]).unwrap());
    assert!(batch.push(&slots[2]).unwrap());
    assert_eq!(lengths(&batch), [(100, 1000, 20), (101, 1020, 20), (102, 1040, 20)]);
    assert_eq!(statuses(&batch), [(0, 0), (1, 0), (2, 0)]);
    batch.clear();
    assert_eq!(batch.push(&chain(14, &[])[0]), Ok(true));
    assert_eq!(statuses(&batch), [(0, 0)]);
}

proptest! {
    /// Whatever comes: each slot is answered once, in order, no copy leaves its page, and a
    /// packet's copies are exactly its bytes, side by side.
    #[test]
    fn every_slot_is_answered_once_and_no_copy_leaves_its_page(
        slots in prop::collection::vec((any::<u32>(), 0u16..5000, 0u16..16, 0u16..5000), 1..300),
    ) {
        let mut batch = Batch::default();
        let (mut complete, mut pushed) = (0, 0);
        for (n, (gref, offset, flags, size)) in slots.into_iter().enumerate() {
            let request = TxRequest { gref, offset, flags, id: n as u16, size };
            match batch.push(&request) {
                Ok(done) => {
                    pushed += 1;
                    if done {
                        complete = pushed;
                    }
                }
                Err(_) => break,
            }
        }
        let answers: usize = batch.packets().iter().map(|p| batch.answers(p, false).count()).sum();
        prop_assert_eq!(answers, complete);
        for packet in batch.packets() {
            let mut ops = Vec::new();
            batch.copies(packet, 0, 0..usize::MAX, &mut ops);
            if packet.verdict == Verdict::Frame {
                let mut at = 0;
                for op in &ops {
                    prop_assert_eq!(op.at, at);
                    prop_assert!(usize::from(op.offset) + usize::from(op.len) <= 4096);
                    at += usize::from(op.len);
                }
                prop_assert_eq!(at, usize::from(packet.len));
                prop_assert!(at >= 14);
            }
        }
    }
}
