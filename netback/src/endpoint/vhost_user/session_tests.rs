use super::*;

const ALL: Accepts =
    Accepts { scatter: true, checksum4: true, checksum6: true, tso4: true, tso6: true };

fn bits(features: &[u32]) -> u64 {
    features.iter().map(|feature| bit(*feature)).sum()
}

#[test]
fn of_what_is_offered_what_the_guest_takes_is_chosen() {
    let always = bits(&[
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
    ]) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let sum = bits(&[VIRTIO_NET_F_GUEST_CSUM]);
    let ecn = bits(&[VIRTIO_NET_F_GUEST_ECN]);
    let (tso4, tso6) = (bits(&[VIRTIO_NET_F_GUEST_TSO4]), bits(&[VIRTIO_NET_F_GUEST_TSO6]));
    let plain = Accepts { checksum4: false, checksum6: false, ..ALL };
    for (accepts, wanted) in [
        (ALL, sum | tso4 | tso6 | ecn),
        (Accepts { tso6: false, ..ALL }, sum | tso4 | ecn),
        (Accepts { tso4: false, tso6: false, ..ALL }, sum),
        (Accepts { checksum6: false, tso6: false, ..ALL }, sum | tso4 | ecn),
        // Segments need checksums.
        (plain, 0),
    ] {
        assert_eq!(choose(u64::MAX, accepts, 1), always | wanted, "{accepts:?}");
    }
    assert_eq!(choose(u64::MAX, ALL, 2) & !choose(u64::MAX, ALL, 1), bits(&[VIRTIO_NET_F_MQ]));
    // Nothing that is not offered, nor what needs it.
    assert_eq!(choose(0, ALL, 2), 0);
    let without = choose(!bits(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]), ALL, 1);
    assert_eq!(without & bits(&[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6]), 0);
    assert_eq!(without & (tso4 | tso6 | ecn), 0);
    let no_segments = choose(!(tso4 | tso6), ALL, 1);
    assert_eq!(no_segments & ecn, 0, "of segments alone");
}

#[test]
fn the_switch_does_what_was_agreed_on() {
    let can = abilities(bits(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO6]));
    assert_eq!((can.checksum, can.tso4, can.tso6), (true, false, true));
    assert_eq!(abilities(0), Abilities::default());
}

#[test]
fn rings_and_buffers_of_pairs_do_not_overlap() {
    let memory = Memory::new(3).unwrap();
    let mut parts = Vec::new();
    for pair in 0..3 {
        for way in [Way::Receive, Way::Transmit] {
            let place = place(pair, way);
            assert!(place.ring.is_multiple_of(rings::PAGE_SIZE), "{place:?}");
            let buffers = place.buffers..place.buffers + place.stride * usize::from(SIZE);
            assert!(place.stride >= LONGEST);
            parts.push(place.ring..place.ring + crate::endpoint::vhost_user::ring::BYTES);
            parts.push(buffers);
        }
    }
    parts.sort_by_key(|part| part.start);
    assert!(parts.windows(2).all(|two| two[0].end <= two[1].start), "{parts:?}");
    assert!(parts.last().unwrap().end <= rings::mem::SharedMem::len(&memory));
}
