use proptest::prelude::*;

use super::*;

/// A frame with its headers and `payload` bytes of payload; no checksum is set.
pub(crate) fn frame(ip: Ip, transport: Transport, vlans: usize, payload: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for tag in 0..vlans {
        frame.extend([0x81, 0, 0, tag as u8 + 1]);
    }
    let transport_len = payload + if transport == Transport::Tcp { 20 } else { 8 };
    let protocol = if transport == Transport::Tcp { TCP } else { UDP };
    match ip {
        Ip::V4 => {
            let total = (20 + transport_len) as u16;
            frame.extend([8, 0, 0x45, 0]);
            frame.extend(total.to_be_bytes());
            frame.extend([0, 9, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        Ip::V6 => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((transport_len as u16).to_be_bytes());
            frame.extend([protocol, 64]);
            frame.extend((0..32).map(|n| 0xf0 ^ n));
        }
    }
    frame.extend([0x12, 0x34, 0x56, 0x78]);
    match transport {
        Transport::Tcp => {
            frame.extend([0, 0, 1, 0, 0, 0, 2, 0, 0x50, 0x18, 0x20, 0, 0, 0, 0, 0]);
        }
        Transport::Udp => {
            frame.extend((transport_len as u16).to_be_bytes());
            frame.extend([0, 0]);
        }
    }
    frame.extend((0..payload).map(|n| (n * 7 + 3) as u8));
    frame
}

/// The sum as RFC 1071 says it, word by word.
fn by_the_book(bytes: &[u8]) -> u16 {
    let mut total = 0u32;
    for pair in bytes.chunks(2) {
        let word = u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        total += word;
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Whether the TCP or UDP checksum of a frame is right, by the book.
pub(crate) fn is_right(frame: &[u8]) -> bool {
    let layers = Layers::of(frame).expect("TCP or UDP");
    let mut all = match layers.ip {
        Ip::V4 => frame[layers.network + 12..layers.network + 20].to_vec(),
        Ip::V6 => frame[layers.network + 8..layers.network + 40].to_vec(),
    };
    let protocol = if layers.transport == Transport::Tcp { TCP } else { UDP };
    all.extend([0, protocol]);
    all.extend(((layers.end - layers.start) as u16).to_be_bytes());
    all.extend(&frame[layers.start..layers.end]);
    by_the_book(&all) == 0xffff
}

pub(crate) const ALL: [(Ip, Transport); 4] = [
    (Ip::V4, Transport::Tcp),
    (Ip::V4, Transport::Udp),
    (Ip::V6, Transport::Tcp),
    (Ip::V6, Transport::Udp),
];

#[test]
fn a_known_sum() {
    // RFC 1071, section 3.
    let sum = fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]));
    assert_eq!(sum.to_ne_bytes(), [0xdd, 0xf2]);
}

#[test]
fn filled_checksums_are_right() {
    for (ip, transport) in ALL {
        for vlans in 0..3 {
            for payload in [0, 1, 2, 3, 7, 1400, 1401] {
                let mut frame = frame(ip, transport, vlans, payload);
                assert!(!is_right(&frame));
                Layers::of(&frame).unwrap().fill(&mut frame);
                assert!(is_right(&frame), "{ip:?} {transport:?} {vlans} {payload}");
                frame[20 + 4 * vlans] ^= 0x10;
            }
        }
    }
}

#[test]
fn padding_is_not_summed() {
    let mut frame = frame(Ip::V4, Transport::Udp, 0, 3);
    frame.extend([0xaa; 20]);
    Layers::of(&frame).unwrap().fill(&mut frame);
    assert!(is_right(&frame));
}

#[test]
fn a_sum_of_0_is_written_as_ffff() {
    let mut frame = frame(Ip::V4, Transport::Udp, 0, 2);
    let layers = Layers::of(&frame).unwrap();
    layers.fill(&mut frame);
    // A payload that brings the sum to 0.
    let at = layers.start + 6;
    let payload: [u8; 2] = [frame[layers.payload], frame[layers.payload + 1]];
    let wanted = u32::from(u16::from_ne_bytes(payload))
        + u32::from(u16::from_ne_bytes([frame[at], frame[at + 1]]));
    let folded = fold(wanted.into());
    frame[layers.payload..layers.payload + 2].copy_from_slice(&folded.to_ne_bytes());
    layers.fill(&mut frame);
    assert_eq!(frame[at..at + 2], [0xff, 0xff]);
    assert!(is_right(&frame));
}

#[test]
fn extension_headers_are_looked_through_and_fragments_are_not() {
    let plain = frame(Ip::V6, Transport::Udp, 0, 5);
    let with = |kind: u8, header: [u8; 8]| {
        let mut frame = plain[..54].to_vec();
        frame.extend(header);
        frame.extend(&plain[54..]);
        frame[20] = kind;
        frame[19] += 8;
        Layers::of(&frame)
    };
    let found = with(DESTINATION, [UDP, 0, 1, 4, 0, 0, 0, 0]).unwrap();
    assert_eq!((found.start, found.transport), (62, Transport::Udp));
    assert_eq!(with(44, [UDP, 0, 0, 0, 0, 0, 0, 1]), None);
    // One that points at itself ends.
    assert_eq!(with(HOP_BY_HOP, [HOP_BY_HOP, 0, 0, 0, 0, 0, 0, 0]), None);
    let mut fragment = frame(Ip::V4, Transport::Udp, 0, 5);
    fragment[20] = 0x20;
    assert_eq!(Layers::of(&fragment), None);
}

#[test]
fn lengths_that_lie_are_found() {
    for (ip, transport) in ALL {
        let whole = frame(ip, transport, 1, 40);
        assert!(Layers::of(&whole).is_some());
        for len in 0..whole.len() {
            assert_eq!(Layers::of(&whole[..len]), None, "{ip:?} {transport:?} cut to {len}");
        }
    }
}

proptest! {
    #[test]
    fn the_sum_is_the_books(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        prop_assert_eq!(u16::from_be_bytes(fold(sum(&bytes)).to_ne_bytes()), by_the_book(&bytes));
    }

    /// Nothing panics, and what is found lies within the frame.
    #[test]
    fn headers_of_any_bytes(
        which in 0usize..4, vlans in 0usize..4, changes in prop::collection::vec((0usize..90, any::<u8>()), 0..6),
        cut in 0usize..90,
    ) {
        let (ip, transport) = ALL[which];
        let mut bytes = frame(ip, transport, vlans, 20);
        for (at, value) in changes {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(bytes.len().saturating_sub(cut));
        if let Some(layers) = Layers::of(&bytes) {
            prop_assert!(layers.start < layers.payload && layers.payload <= layers.end);
            prop_assert!(layers.end <= bytes.len());
            layers.fill(&mut bytes);
            prop_assert!(is_right(&bytes));
        }
    }
}
