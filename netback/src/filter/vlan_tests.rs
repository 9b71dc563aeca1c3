use super::*;
use crate::frame::Pool;

/// A frame: addresses, then these bytes, then a payload.
fn frame(pool: &mut Pool, behind: &[u8]) -> Frame {
    let mut frame = pool.take().expect("a frame");
    frame.set_len(AT + behind.len() + 50);
    for (n, byte) in frame.iter_mut().enumerate() {
        *byte = n as u8;
    }
    frame[AT..AT + behind.len()].copy_from_slice(behind);
    frame.offload.checksum = Checksum::Blank { start: 34, offset: 16 };
    frame
}

#[test]
fn a_frame_is_tagged_and_comes_back_as_it_was_with_its_offsets() {
    let mut pool = Pool::private(4);
    let vlan = Vlan::new(100).expect("a VLAN");
    let mut one = frame(&mut pool, &[8, 0]);
    let before = (one.to_vec(), one.offload, one.headroom());
    assert!(vlan.tag(&mut one));
    assert_eq!(one[..AT], before.0[..AT]);
    assert_eq!(one[AT..AT + 6], [0x81, 0, 0, 100, 8, 0]);
    assert_eq!(one[AT + 6..], before.0[AT + 2..]);
    assert_eq!(one.offload.checksum, Checksum::Blank { start: 38, offset: 16 });
    assert!(vlan.untag(&mut one));
    assert_eq!((one.to_vec(), one.offload, one.headroom()), before);
}

#[test]
fn a_priority_stays_and_a_tag_of_the_guests_own_is_refused() {
    let mut pool = Pool::private(8);
    let vlan = Vlan::new(100).expect("a VLAN");
    let mut priority = frame(&mut pool, &[0x81, 0, 0xa0, 0, 8, 0]);
    assert!(vlan.tag(&mut priority));
    assert_eq!(priority[AT..AT + 6], [0x81, 0, 0xa0, 100, 8, 0]);
    assert_eq!(priority.offload.checksum, Checksum::Blank { start: 34, offset: 16 });
    assert!(vlan.untag(&mut priority), "the priority is no part of the VLAN's number");
    for own in [
        // Another VLAN, its own one, a provider's, and another one behind a priority.
        &[0x81, 0, 0, 5, 8, 0][..],
        &[0x81, 0, 0, 100, 8, 0],
        &[0x88, 0xa8, 0, 0, 8, 0],
        &[0x81, 0, 0, 0, 0x81, 0, 0, 5, 8, 0],
        &[0x81, 0, 0, 0, 0x88, 0xa8, 0, 5, 8, 0],
    ] {
        let mut one = frame(&mut pool, own);
        let before = one.to_vec();
        assert!(!vlan.tag(&mut one), "{own:x?}");
        assert_eq!(one.to_vec(), before);
        pool.give(one);
    }
}

#[test]
fn only_this_vlans_frames_come_in() {
    let mut pool = Pool::private(8);
    let vlan = Vlan::new(100).expect("a VLAN");
    for other in [
        &[8, 0][..],
        &[0x81, 0, 0, 0, 8, 0],
        &[0x81, 0, 0, 101, 8, 0],
        &[0x88, 0xa8, 0, 100, 8, 0],
        &[0x81, 0, 0, 100, 0x81, 0, 0, 5, 8, 0],
    ] {
        let mut one = frame(&mut pool, other);
        assert!(!vlan.untag(&mut one), "{other:x?}");
        pool.give(one);
    }
    // Cut off within a tag, and with a checksum that begins within it.
    for len in [0, 11, 12, 13, 14, 15] {
        let mut one = frame(&mut pool, &[0x81, 0, 0, 100, 8, 0]);
        one.set_len(len);
        assert!(!vlan.untag(&mut one), "{len}");
        assert!(len == 12 || len == 13 || !vlan.tag(&mut one), "{len}");
        pool.give(one);
    }
    let mut odd = frame(&mut pool, &[0x81, 0, 0, 100, 8, 0]);
    odd.offload.checksum = Checksum::Blank { start: 15, offset: 0 };
    assert!(!vlan.untag(&mut odd));
    odd.offload.checksum = Checksum::Blank { start: 65_533, offset: 0 };
    assert!(!push(&mut odd, ETHERTYPE_VLAN, 1));
}

#[test]
fn numbers_that_name_no_vlan() {
    for number in [0, 4095, 65_537, u32::MAX] {
        assert_eq!(Vlan::new(number), None);
    }
}
