use super::*;

const ALL: Accepts =
    Accepts { scatter: true, checksum4: true, checksum6: true, tso4: true, tso6: true };

/// An unfragmented IPv4 TCP packet with 3 bytes of payload, whose checksum is 0.
fn packet(pool: &mut Pool) -> Frame {
    let mut frame = pool.take().expect("a frame");
    frame.set_len(14 + 20 + 20 + 3);
    frame.fill(0);
    frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    frame[16..18].copy_from_slice(&43u16.to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 6]);
    frame[26..34].copy_from_slice(&[10, 0, 2, 15, 10, 0, 2, 2]);
    frame[46] = 0x50;
    frame[54..].copy_from_slice(&[1, 2, 3]);
    frame
}

#[test]
fn a_checksum_is_left_only_to_those_who_take_it() {
    let mut pool = Pool::private(2);
    let mut frame = packet(&mut pool);
    finish(&mut frame, Accepts { checksum4: false, ..ALL }, PacketMeta::default());
    assert_eq!(frame.offload.checksum, Checksum::Valid);
    frame.offload.checksum = Checksum::Unknown;
    assert!(is_right(&frame));
    frame[56] ^= 1;
    assert!(!is_right(&frame), "a wrong byte is not seen");
    frame.offload.checksum = Checksum::Valid;
    assert!(is_right(&frame), "what was checked is checked again");

    let mut frame = packet(&mut pool);
    finish(&mut frame, ALL, PacketMeta::default());
    let Checksum::Blank { start, offset } = frame.offload.checksum else {
        panic!("{:?}", frame.offload);
    };
    assert_eq!((start, offset), (34, 16));
    // Whoever sums all from `start` on gets the right one.
    assert!(checksum::complete(&mut frame, 34, 16));
    frame.offload.checksum = Checksum::Unknown;
    assert!(is_right(&frame));
}

#[test]
fn what_has_no_header_of_its_own_is_left_alone() {
    let mut pool = Pool::private(1);
    let whole = packet(&mut pool);
    assert!(Layers::of(&whole).is_some());
    for cut in 0..whole.len() {
        assert!(Layers::of(&whole[..cut]).is_none(), "{cut} bytes");
    }
    let mut fragment = whole.to_vec();
    fragment[20] = 0x20;
    assert!(Layers::of(&fragment).is_none(), "a fragment");
}

proptest::proptest! {
    #[test]
    fn no_bytes_are_too_strange(
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        kind in 0..4usize,
    ) {
        let mut bytes = bytes;
        if let Some(at) = bytes.get_mut(12..15) {
            at.copy_from_slice(&[[8, 0, 0x45], [0x86, 0xdd, 0x60], [8, 6, 0], [0x81, 0, 0]][kind]);
        }
        let mut pool = Pool::private(1);
        let mut frame = pool.take().expect("a frame");
        frame.set_len(bytes.len());
        frame.copy_from_slice(&bytes);
        let _ = is_right(&frame);
        finish(&mut frame, ALL, PacketMeta::default());
        finish(&mut frame, Accepts::default(), PacketMeta::default());
    }
}
