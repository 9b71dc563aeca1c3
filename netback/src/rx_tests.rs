use proptest::prelude::*;

use super::*;
use crate::frame::GsoKind;

const GSO: Gso = Gso { kind: GsoKind::TcpV4, size: 1448 };
const BLANK: Checksum = Checksum::Blank { start: 34, offset: 16 };

/// Lays out one frame, lets `fail` judge each copy, and gives the answers and the copies.
fn lay_out(
    shape: Shape,
    len: usize,
    offload: Offload,
    fail: impl Fn(usize) -> bool,
) -> (Vec<RxResponse>, Vec<CopyOp>, u64) {
    let (mut batch, mut ops) = (Batch::default(), Vec::new());
    let slots = shape.slots(len, offload.gso, None);
    let pages = (0..slots).map(|n| RxRequest { id: n as u16, pad: 0, gref: 50 + n as u32 });
    batch.push(shape, (5000, len), (&offload, None), pages, &mut ops);
    for (n, op) in ops.iter_mut().enumerate() {
        op.status = if fail(n) { -3 } else { 0 };
    }
    let mut answers = Vec::new();
    let failed = batch.finish(&ops, |response| answers.push(response));
    assert_eq!(answers.len(), slots, "each page is answered");
    (answers, ops, failed)
}

#[test]
fn a_short_frame_takes_a_page() {
    let (answers, ops, _) = lay_out(Shape::default(), 60, Offload::default(), |_| false);
    assert_eq!(answers, [RxResponse { id: 0, offset: 0, flags: 0, status: 60 }]);
    assert_eq!((ops[0].gref, ops[0].at, ops[0].len), (50, 5000, 60));
}

#[test]
fn checksums_are_told_of_in_the_first_slot() {
    let flags = |checksum| {
        let offload = Offload { checksum, gso: None };
        let (answers, _, _) = lay_out(Shape::default(), 5000, offload, |_| false);
        answers.iter().map(|a| a.flags).collect::<Vec<_>>()
    };
    assert_eq!(flags(Checksum::Unknown), [RX_MORE_DATA, 0]);
    assert_eq!(flags(Checksum::Valid), [RX_DATA_VALIDATED | RX_MORE_DATA, 0]);
    assert_eq!(flags(BLANK), [RX_DATA_VALIDATED | RX_CSUM_BLANK | RX_MORE_DATA, 0]);
}

#[test]
fn an_unsegmented_frame_has_its_extra_info_behind_the_first_slot() {
    let offload = Offload { checksum: BLANK, gso: Some(GSO) };
    let (answers, ops, _) = lay_out(Shape::default(), 9000, offload, |_| false);
    assert_eq!(answers.len(), 4);
    assert!(answers[0].has(RX_EXTRA_INFO) && answers[0].has(RX_MORE_DATA));
    assert_eq!(answers[1].as_extra().parse(), Ok(Extra::Gso(GSO)));
    assert!(!answers[1].as_extra().more());
    assert_eq!((answers[2].id, answers[2].status, answers[2].flags), (2, 4096, RX_MORE_DATA));
    assert_eq!((answers[3].status, answers[3].flags), (808, 0));
    // The page of the extra info is not written.
    assert_eq!(ops.iter().map(|op| op.gref).collect::<Vec<_>>(), [50, 52, 53]);
}

#[test]
fn headroom_is_left_in_each_page_and_told_of() {
    let shape = Shape { headroom: 256 };
    let offload = Offload { checksum: BLANK, gso: Some(GSO) };
    let (answers, ops, _) = lay_out(shape, 3841, offload, |_| false);
    assert_eq!(answers.len(), 4);
    assert!(answers[1].as_extra().more());
    assert_eq!(answers[2].as_extra().parse(), Ok(Extra::Xdp { headroom: 256 }));
    assert!(ops.iter().all(|op| op.offset == 256));
    assert_eq!((answers[0].offset, answers[0].status), (256, 3840));
    assert_eq!((answers[3].offset, answers[3].status), (256, 1));
}

#[test]
fn xsa361_a_failed_copy_is_its_own_frames_alone_for_every_k() {
    for k in 0..9 {
        let (mut batch, mut ops) = (Batch::default(), Vec::new());
        for frame in 0..3u16 {
            let pages = (0..3).map(|n| RxRequest { id: frame * 3 + n, pad: 0, gref: u32::from(n) });
            batch.push(Shape::default(), (0, 9000), (&Offload::default(), None), pages, &mut ops);
        }
        ops[k].status = -1;
        let mut bad = Vec::new();
        let failed = batch.finish(&ops, |response| {
            if response.status == RSP_ERROR {
                bad.push(usize::from(response.id) / 3);
            }
        });
        assert_eq!((failed, bad), (1, vec![k / 3; 3]), "copy {k}");
    }
}

proptest! {
    /// XSA-405: no answer is malformed, whatever the frame and whichever copies fail.
    #[test]
    fn xsa405_every_answer_is_one_that_netfront_takes(
        len in 1usize..=65535,
        headroom in prop_oneof![Just(0u16), 1u16..=256],
        gso: bool,
        failing in prop::collection::vec(any::<bool>(), 20),
    ) {
        let gso = gso.then_some(GSO);
        let offload = Offload { checksum: if gso.is_some() { BLANK } else { Checksum::Valid }, gso };
        let shape = Shape { headroom };
        let (answers, ops, failed) =
            lay_out(shape, len, offload, |n| failing[n % failing.len()]);
        let mut left = answers.iter();
        let first = left.next().unwrap();
        let mut more = first.has(RX_EXTRA_INFO);
        while more {
            let extra = left.next().unwrap().as_extra();
            prop_assert!(extra.parse().is_ok());
            more = extra.more();
        }
        let data: Vec<_> = std::iter::once(first).chain(left).collect();
        for (n, slot) in data.iter().enumerate() {
            prop_assert_eq!(slot.has(RX_MORE_DATA), n + 1 < data.len());
            prop_assert!(n == 0 || !slot.has(RX_EXTRA_INFO));
            prop_assert_eq!(slot.offset, headroom);
            if failed > 0 {
                prop_assert_eq!(slot.status, RSP_ERROR);
            } else {
                prop_assert!(slot.status > 0);
                prop_assert!(usize::from(slot.offset) + slot.status as usize <= 4096);
            }
        }
        if failed == 0 {
            prop_assert_eq!(data.iter().map(|s| s.status as usize).sum::<usize>(), len);
        }
        prop_assert_eq!(ops.iter().map(|op| usize::from(op.len)).sum::<usize>(), len);
        prop_assert!(ops.iter().all(|op| op.offset + op.len <= 4096));
    }
}

#[test]
fn a_hash_is_told_behind_the_first_slot_last_of_three() {
    let shape = Shape { headroom: 256 };
    let offload = Offload { checksum: BLANK, gso: Some(GSO) };
    let extra = Extra::Hash { kind: 1, algorithm: 1, value: 0x8765_4321 };
    let hash = Hash::of_extra(&extra);
    let (mut batch, mut ops) = (Batch::default(), Vec::new());
    let slots = shape.slots(9000, offload.gso, hash);
    assert_eq!(slots, 3 + 3);
    let pages = (0..slots).map(|n| RxRequest { id: n as u16, pad: 0, gref: 50 + n as u32 });
    batch.push(shape, (0, 9000), (&offload, hash), pages, &mut ops);
    let mut answers = Vec::new();
    assert_eq!(batch.finish(&ops, |response| answers.push(response)), 0);
    let extras: Vec<_> = answers[1..4].iter().map(RxResponse::as_extra).collect();
    assert_eq!(extras.iter().map(ExtraInfo::more).collect::<Vec<_>>(), [true, true, false]);
    let said: Vec<_> = extras.iter().map(|extra| extra.parse().unwrap()).collect();
    assert_eq!(said, [Extra::Gso(GSO), Extra::Xdp { headroom: 256 }, extra]);
    assert_eq!(ops.iter().map(|op| op.gref).collect::<Vec<_>>(), [50, 54, 55]);
    // Alone it is the only one.
    assert_eq!(Shape::default().slots(60, None, hash), 2);
}
