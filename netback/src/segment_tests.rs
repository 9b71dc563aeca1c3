use super::*;
use crate::checksum::tests::{frame, is_right};

const MSS: usize = 1000;

fn gso(ip: Ip) -> Gso {
    let kind = if ip == Ip::V4 { GsoKind::TcpV4 } else { GsoKind::TcpV6 };
    Gso { kind, size: MSS as u16 }
}

#[test]
fn segments_carry_the_packets_bytes_in_order() {
    for ip in [Ip::V4, Ip::V6] {
        for vlans in 0..3 {
            let mut packet = frame(ip, Transport::Tcp, vlans, 4500);
            let whole = Layers::of(&packet).unwrap();
            // CWR, ACK, PSH, FIN.
            packet[whole.start + 13] = 0x99;
            let (mut pool, mut out) = (Pool::on_heap(8), VecDeque::new());
            assert!(cut(&packet, gso(ip), &mut pool, &mut out));
            assert_eq!(out.len(), 5);
            let mut bytes: Vec<u8> = Vec::new();
            for (n, segment) in out.iter().enumerate() {
                let layers = Layers::of(segment).unwrap();
                assert_eq!(layers.end, segment.len());
                assert!(is_right(segment), "{ip:?} {vlans} segment {n}");
                if ip == Ip::V4 {
                    assert_eq!(fold(sum(&segment[layers.network..layers.start])), 0xffff);
                    assert_eq!(get16(segment, layers.network + 4), 9 + n as u16);
                }
                let at = layers.start + 4;
                let sequence = u32::from_be_bytes(segment[at..at + 4].try_into().unwrap());
                assert_eq!(sequence, 0x100 + (n * MSS) as u32);
                let want = if n == 0 { 0x90 } else { 0x10 } | if n == 4 { 0x09 } else { 0 };
                assert_eq!(segment[layers.start + 13], want, "flags of segment {n}");
                assert_eq!(segment.offload.checksum, Checksum::Valid);
                bytes.extend(&segment[layers.payload..]);
            }
            assert!(bytes == packet[whole.payload..], "the payload is another");
        }
    }
}

#[test]
fn what_cannot_be_cut_is_left() {
    let packet = frame(Ip::V4, Transport::Tcp, 0, 4500);
    let mut out = VecDeque::new();
    let mut pool = Pool::on_heap(4);
    assert!(!cut(&packet, gso(Ip::V4), &mut pool, &mut out), "too few frames");
    assert!(!cut(&packet, gso(Ip::V6), &mut pool, &mut out), "another IP");
    let udp = frame(Ip::V4, Transport::Udp, 0, 2000);
    assert!(!cut(&udp, gso(Ip::V4), &mut pool, &mut out), "another protocol");
    assert!(out.is_empty() && pool.free() == 4);
}
