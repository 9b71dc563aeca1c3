use super::*;
use crate::checksum::Transport;
use crate::checksum::tests::{ALL, frame, is_right};

const GSO: Gso = Gso { kind: GsoKind::TcpV4, size: 1000 };

fn passed(bytes: &[u8], claim: Claim, gso: Option<Gso>, next: Leaves) -> Vec<Vec<u8>> {
    let mut pool = Pool::on_heap(16);
    let mut out = VecDeque::new();
    let mut frame = pool.take().unwrap();
    frame.set_len(bytes.len());
    frame.copy_from_slice(bytes);
    frame.offload = claimed(&mut frame, claim, gso).unwrap();
    assert!(pass(frame, &next, &mut pool, &mut out));
    let sent = out.iter().map(|f| f.to_vec()).collect();
    out.drain(..).for_each(|f| pool.give(f));
    assert_eq!(pool.free(), 16, "each frame is sent or back");
    sent
}

#[test]
fn a_blank_checksum_leaves_right_where_nobody_else_computes_it() {
    for (ip, transport) in ALL {
        let bytes = frame(ip, transport, 0, 777);
        let sent = passed(&bytes, Claim::Blank, None, Leaves::default());
        assert!(is_right(&sent[0]), "{ip:?} {transport:?}");
        // Whatever the guest has left in its place.
        let mut wrong = bytes.clone();
        let layers = Layers::of(&bytes).unwrap();
        wrong[layers.start + layers.offset()] = 0x5a;
        assert_eq!(passed(&wrong, Claim::Blank, None, Leaves::default()), sent);
    }
}

#[test]
fn each_ip_is_judged_by_itself() {
    let only4 = Leaves { checksum4: true, ..Leaves::default() };
    for (ip, transport) in ALL {
        let bytes = frame(ip, transport, 0, 100);
        let sent = passed(&bytes, Claim::Blank, None, only4);
        assert_eq!(is_right(&sent[0]), ip == Ip::V6, "{ip:?} {transport:?}");
    }
}

#[test]
fn what_is_left_to_the_next_has_the_pseudo_headers_sum() {
    let all = Leaves { checksum4: true, checksum6: true, tso4: true, tso6: true };
    let mut bytes =
        passed(&frame(Ip::V6, Transport::Tcp, 1, 50), Claim::Blank, None, all).remove(0);
    let layers = Layers::of(&bytes).unwrap();
    assert!(complete(&mut bytes, layers.start, layers.offset()));
    assert!(is_right(&bytes));
}

#[test]
fn an_unsegmented_packet_is_cut_where_the_next_cannot() {
    let bytes = frame(Ip::V4, Transport::Tcp, 0, 2500);
    let cuts = Leaves { checksum4: true, ..Leaves::default() };
    let sent = passed(&bytes, Claim::Blank, Some(GSO), cuts);
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [1054, 1054, 554]);
    let whole = Leaves { tso4: true, ..cuts };
    assert_eq!(passed(&bytes, Claim::Nothing, Some(GSO), whole).len(), 1);
    // One segment's worth is an ordinary packet.
    let mut short = frame(Ip::V4, Transport::Tcp, 0, 900);
    let offload = claimed(&mut short, Claim::Blank, Some(GSO)).unwrap();
    assert_eq!(offload.gso, None);
}

#[test]
fn what_has_no_such_checksum_is_impossible() {
    let mut arp = vec![0xff; 42];
    arp[12..14].copy_from_slice(&[8, 6]);
    assert_eq!(claimed(&mut arp, Claim::Blank, None), Err(Impossible));
    assert!(claimed(&mut arp, Claim::Nothing, None).is_ok());
    let mut udp = frame(Ip::V4, Transport::Udp, 0, 2500);
    assert_eq!(claimed(&mut udp, Claim::Blank, Some(GSO)), Err(Impossible));
    let mut padded = frame(Ip::V4, Transport::Tcp, 0, 2500);
    padded.push(0);
    assert_eq!(claimed(&mut padded, Claim::Blank, Some(GSO)), Err(Impossible));
}
