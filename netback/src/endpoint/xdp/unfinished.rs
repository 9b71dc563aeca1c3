//! Checksums that the sender has left to a driver which is none. Pure.
//!
//! A packet that the stack at the other end of a veth sends has a blank checksum, which the kernel notes
//! beside it and finishes where the packet leaves the machine. To a program in the driver that note does
//! not reach. What is there then is exactly the pseudo-header's sum.

use crate::checksum::{Layers, complete, fold, sum};
use crate::frame::Checksum;

/// What is known of the checksum of a frame that came without a word on it. One in 65536 right checksums
/// is the pseudo-header's sum by chance, so such a packet is summed and is right or unfinished. A broken
/// packet is taken for an unfinished one no more often than a TCP checksum is right by chance.
pub(super) fn look(frame: &mut [u8]) -> Checksum {
    let Some(layers) = Layers::of(frame) else { return Checksum::Unknown };
    let at = layers.start + layers.offset();
    let pseudo = layers.pseudo(frame, layers.end - layers.start);
    if u16::from_ne_bytes([frame[at], frame[at + 1]]) != fold(pseudo) {
        return Checksum::Unknown;
    }
    if fold(pseudo + sum(&frame[layers.start..layers.end])) == u16::MAX {
        return Checksum::Valid;
    }
    if layers.end == frame.len() {
        return Checksum::Blank { start: layers.start as u16, offset: layers.offset() as u16 };
    }
    // Whoever finishes it sums to the frame's end: behind this packet there is padding.
    if complete(&mut frame[..layers.end], layers.start, layers.offset()) {
        Checksum::Valid
    } else {
        Checksum::Unknown
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checksum::tests::{frame, is_right};
    use crate::checksum::{Ip, Transport};

    fn kinds() -> impl Iterator<Item = (Ip, Transport)> {
        let both = |ip| [Transport::Tcp, Transport::Udp].map(|transport| (ip, transport));
        [Ip::V4, Ip::V6].into_iter().flat_map(both)
    }

    #[test]
    fn an_unfinished_checksum_is_found_and_finished() {
        for (ip, transport) in kinds() {
            for (vlans, payload) in [(0, 0), (0, 1), (1, 1001), (2, 1400)] {
                let mut bytes = frame(ip, transport, vlans, payload);
                let layers = Layers::of(&bytes).unwrap();
                layers.prepare(&mut bytes);
                let blank =
                    Checksum::Blank { start: layers.start as u16, offset: layers.offset() as u16 };
                assert_eq!(look(&mut bytes), blank, "{ip:?} {transport:?} {payload}");
                assert!(!is_right(&bytes), "looking changes nothing");
                // With padding there is nobody who could finish it.
                let len = bytes.len();
                bytes.extend([0xaa; 7]);
                assert_eq!(look(&mut bytes), Checksum::Valid);
                bytes.truncate(len);
                assert!(is_right(&bytes));
            }
        }
    }

    #[test]
    fn others_are_left_as_they_are() {
        for (ip, transport) in kinds() {
            let mut bytes = frame(ip, transport, 0, 600);
            Layers::of(&bytes).unwrap().fill(&mut bytes);
            let before = bytes.clone();
            assert_eq!(look(&mut bytes), Checksum::Unknown);
            // A wrong one stays wrong: the guest finds it.
            *bytes.last_mut().unwrap() ^= 1;
            assert_eq!(look(&mut bytes), Checksum::Unknown);
            *bytes.last_mut().unwrap() ^= 1;
            assert!(bytes == before);
        }
        assert_eq!(look(&mut []), Checksum::Unknown);
        // UDP without a checksum.
        let mut bytes = frame(Ip::V4, Transport::Udp, 0, 10);
        assert_eq!(look(&mut bytes), Checksum::Unknown);
    }

    #[test]
    fn a_right_checksum_may_be_the_pseudo_headers_sum() {
        for (ip, transport) in kinds() {
            let mut bytes = frame(ip, transport, 0, 600);
            let layers = Layers::of(&bytes).unwrap();
            layers.prepare(&mut bytes);
            // Payload that makes what stands there right.
            let (from, end) = (layers.payload, layers.payload + 2);
            bytes[from..end].fill(0);
            let pseudo = layers.pseudo(&bytes, layers.end - layers.start);
            let missing = !fold(pseudo + sum(&bytes[layers.start..]));
            // An even offset from the header's start: the same byte order as in the sum.
            assert_eq!((from - layers.start) % 2, 0);
            bytes[from..end].copy_from_slice(&missing.to_ne_bytes());
            assert!(is_right(&bytes));
            let before = bytes.clone();
            assert_eq!(look(&mut bytes), Checksum::Valid);
            assert!(bytes == before);
        }
    }

    proptest! {
        #[test]
        fn nonsense_is_looked_at_without_harm(mut bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            look(&mut bytes);
        }
    }
}
