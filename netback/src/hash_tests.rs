use std::net::{Ipv4Addr, Ipv6Addr};

use super::*;

/// Key and results of Microsoft's "Verifying the RSS Hash Calculation".
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// Source, destination, hash of the addresses, hash with TCP's ports.
type Known = (End, End, u32, u32);
/// Address and port.
type End = (&'static str, u16);

const V4: [Known; 5] = [
    (("66.9.149.187", 2794), ("161.142.100.80", 1766), 0x323e_8fc2, 0x51cc_c178),
    (("199.92.111.2", 14230), ("65.69.140.83", 4739), 0xd718_262a, 0xc626_b0ea),
    (("24.19.198.95", 12898), ("12.22.207.184", 38024), 0xd2d0_a5de, 0x5c2b_394a),
    (("38.27.205.30", 48228), ("209.142.163.6", 2217), 0x8298_9176, 0xafc7_327f),
    (("153.39.163.191", 44251), ("202.188.127.2", 1303), 0x5d18_09c5, 0x10e8_28a2),
];
const V6: [Known; 3] = [
    (("3ffe:2501:200:1fff::7", 2794), ("3ffe:2501:200:3::1", 1766), 0x2cc1_8cd5, 0x4020_7d3d),
    (("3ffe:501:8::260:97ff:fe40:efab", 14230), ("ff02::1", 4739), 0x0f0c_461c, 0xdde5_1bbf),
    (
        ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251),
        ("fe80::200:f8ff:fe21:67cf", 38024),
        0x4b61_e985,
        0x02d1_feef,
    ),
];

fn spread(types: u32) -> Spread {
    let mut spread = Spread::default();
    (spread.algorithm, spread.types) = (Algorithm::Toeplitz, types);
    spread.set_key(&KEY);
    spread
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    let mut tcp = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    tcp.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
    tcp
}

fn v4(protocol: u8, (source, from): (&str, u16), (destination, to): (&str, u16)) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend_from_slice(&[8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0]);
    frame.extend(source.parse::<Ipv4Addr>().expect("an address").octets());
    frame.extend(destination.parse::<Ipv4Addr>().expect("an address").octets());
    frame.extend(ports(from, to));
    frame
}

fn v6(protocol: u8, (source, from): (&str, u16), (destination, to): (&str, u16)) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 64]);
    frame.extend(source.parse::<Ipv6Addr>().expect("an address").octets());
    frame.extend(destination.parse::<Ipv6Addr>().expect("an address").octets());
    frame.extend(ports(from, to));
    frame
}

fn found(spread: &Spread, frame: &[u8]) -> Option<(u32, u32)> {
    spread.hash(frame).map(|hash| (hash.kind(), hash.value))
}

#[test]
fn microsofts_results_over_ipv4() {
    let all = spread(HASH_TYPES);
    for (source, destination, plain, tcp) in V4 {
        let frame = v4(6, source, destination);
        assert_eq!(found(&all, &frame), Some((HASH_TYPE_IPV4_TCP, tcp)), "{source:?}");
        assert_eq!(found(&spread(HASH_TYPE_IPV4), &frame), Some((HASH_TYPE_IPV4, plain)));
        // UDP has ports too, but netif has no such kind.
        assert_eq!(found(&all, &v4(17, source, destination)), Some((HASH_TYPE_IPV4, plain)));
        assert_eq!(found(&spread(HASH_TYPE_IPV6 | HASH_TYPE_IPV6_TCP), &frame), None);
        assert_eq!(found(&spread(HASH_TYPE_IPV4_TCP), &v4(17, source, destination)), None);
    }
}

#[test]
fn microsofts_results_over_ipv6() {
    let all = spread(HASH_TYPES);
    for (source, destination, plain, tcp) in V6 {
        let frame = v6(6, source, destination);
        assert_eq!(found(&all, &frame), Some((HASH_TYPE_IPV6_TCP, tcp)), "{source:?}");
        assert_eq!(found(&spread(HASH_TYPE_IPV6), &frame), Some((HASH_TYPE_IPV6, plain)));
        assert_eq!(found(&all, &v6(17, source, destination)), Some((HASH_TYPE_IPV6, plain)));
        assert_eq!(found(&spread(HASH_TYPE_IPV4 | HASH_TYPE_IPV4_TCP), &frame), None);
    }
}

#[test]
fn a_fragment_is_hashed_over_its_addresses_and_a_tag_is_looked_behind() {
    let (source, destination, plain, tcp) = V4[0];
    let mut fragment = v4(6, source, destination);
    fragment[20] = 0x20;
    assert_eq!(found(&spread(HASH_TYPES), &fragment), Some((HASH_TYPE_IPV4, plain)));
    let mut tagged = v4(6, source, destination);
    tagged.splice(12..12, [0x81, 0, 0, 5]);
    assert_eq!(found(&spread(HASH_TYPES), &tagged), Some((HASH_TYPE_IPV4_TCP, tcp)));
}

#[test]
fn what_is_no_ip_or_cut_short_has_no_hash() {
    let all = spread(HASH_TYPES);
    for frame in [v4(6, V4[0].0, V4[0].1), v6(6, V6[0].0, V6[0].1)] {
        for len in 0..frame.len() {
            // No panic; and without the addresses nothing.
            let cut = found(&all, &frame[..len]);
            assert_eq!(cut.is_none(), len < frame.len() - 20, "{len} bytes");
        }
    }
    let mut arp = v4(6, V4[0].0, V4[0].1);
    arp[12..14].copy_from_slice(&[8, 6]);
    assert_eq!(found(&all, &arp), None);
    let mut wrong = v4(6, V4[0].0, V4[0].1);
    wrong[14] = 0x65;
    assert_eq!(found(&all, &wrong), None);
}

#[test]
fn a_short_key_is_followed_by_zeros() {
    let mut padded = [0; MAX_KEY];
    padded[..7].copy_from_slice(&KEY[..7]);
    let input: Vec<u8> = (1..=36).collect();
    assert_eq!(Toeplitz::new(&KEY[..7]).hash(&input), Toeplitz::new(&padded).hash(&input));
    assert_eq!(Toeplitz::new(&[]).hash(&input), 0);
    let mut long = KEY.to_vec();
    long.push(0xff);
    assert_eq!(Toeplitz::new(&long).hash(&input), Toeplitz::new(&KEY).hash(&input));
    // A new key leaves nothing of the one before.
    let mut spread = spread(HASH_TYPES);
    spread.set_key(&KEY[..7]);
    assert_eq!(spread.key(), &padded);
}

#[test]
fn queues_by_table_and_by_number() {
    let mut spread = spread(HASH_TYPES);
    let hash = |value| Some(Hash { kind: 0, value });
    assert_eq!(spread.queue(hash(7), 4), 3);
    assert_eq!((spread.queue(None, 4), spread.queue(hash(9), 0)), (0, 0));
    spread.mapping = vec![2, 0, 3];
    assert_eq!((0..4).map(|n| spread.queue(hash(n), 4)).collect::<Vec<_>>(), [2, 0, 3, 2]);
    assert_eq!(spread.queue(None, 4), 2);
    // Never beyond the queues that there are.
    assert_eq!(spread.queue(hash(2), 3), 0);
}

#[test]
fn an_extra_info_of_another_kind_is_no_hash() {
    let hash = Hash { kind: 3, value: 0x1234_5678 };
    assert_eq!(Hash::of_extra(&hash.into()), Some(hash));
    for (kind, algorithm) in [(4, 1), (255, 1), (0, 0), (0, 2)] {
        assert_eq!(Hash::of_extra(&Extra::Hash { kind, algorithm, value: 1 }), None);
    }
    assert_eq!(Hash::of_extra(&Extra::McastAdd([1; 6])), None);
}
