use std::collections::BTreeMap;

use super::*;

const OFFER: Offer = Offer {
    scatter: true,
    tso4: true,
    tso6: true,
    checksum6: true,
    split: true,
    multicast: true,
    ctrl_ring: true,
    xdp_headroom: true,
    max_queues: 4,
    max_ring_page_order: 2,
};

/// What Linux 6.1's netfront writes with one queue.
const LINUX: &str = "tx-ring-ref=8 rx-ring-ref=9 event-channel-tx=3 event-channel-rx=4 \
    request-rx-copy=1 feature-rx-notify=1 feature-sg=1 feature-gso-tcpv4=1 feature-gso-tcpv6=1 \
    feature-ipv6-csum-offload=1 xdp-headroom=0";

fn keys(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn read(offer: &Offer, text: &str) -> Result<Accepted, Refused> {
    let keys = keys(text);
    Accepted::read(offer, |key| keys.get(key).cloned())
}

fn refused(text: &str) -> String {
    read(&OFFER, text).unwrap_err().to_string()
}

#[test]
fn linux_with_one_queue() {
    let all = Accepts { scatter: true, checksum4: true, checksum6: true, tso4: true, tso6: true };
    let want = Accepted {
        accepts: all,
        rx_notify: RxNotify::Yes,
        multicast: Multicast::Flood,
        xdp_headroom: 0,
        ctrl: None,
        queues: vec![QueueKeys {
            tx_refs: vec![8],
            rx_refs: vec![9],
            ports: Ports::Split { tx: 3, rx: 4 },
        }],
    };
    assert_eq!(read(&OFFER, LINUX), Ok(want));
}

#[test]
fn several_queues_lie_below_their_names() {
    let text = "request-rx-copy=1 multi-queue-num-queues=2 \
        queue-0/tx-ring-ref=8 queue-0/rx-ring-ref=9 queue-0/event-channel=3 \
        queue-1/tx-ring-ref=10 queue-1/rx-ring-ref=11 queue-1/event-channel-tx=4 \
        queue-1/event-channel-rx=5 ctrl-ring-ref=12 event-channel-ctrl=6 \
        request-multicast-control=1 xdp-headroom=256";
    let got = read(&OFFER, text).unwrap();
    assert_eq!(got.queues[0].ports, Ports::Shared(3));
    assert_eq!(got.queues[1].ports, Ports::Split { tx: 4, rx: 5 });
    assert_eq!(got.queues[1].rx_refs, [11]);
    assert_eq!(got.ctrl, Some(CtrlKeys { ring_ref: 12, port: 6 }));
    assert_eq!((got.multicast, got.xdp_headroom), (Multicast::Listed, 256));
    assert_eq!(got.rx_notify, RxNotify::No);
    // Nothing but IPv4's checksum is taken for granted.
    assert_eq!(got.accepts, Accepts { checksum4: true, ..Accepts::default() });
}

#[test]
fn what_was_not_offered_is_not_accepted() {
    let offer = Offer { split: false, multicast: false, ctrl_ring: false, max_queues: 1, ..OFFER };
    let text = format!(
        "{LINUX} event-channel=7 ctrl-ring-ref=12 event-channel-ctrl=6 request-multicast-control=1"
    );
    let got = read(&offer, &text).unwrap();
    assert_eq!(got.queues[0].ports, Ports::Shared(7));
    assert_eq!((got.ctrl, got.multicast), (None, Multicast::Flood));
}

#[test]
fn unsegmented_packets_need_what_they_are_made_of() {
    let accepts = |more: &str| read(&OFFER, &format!("{LINUX} {more}")).unwrap().accepts;
    assert!(!accepts("feature-sg=0").tso4);
    assert!(!accepts("feature-sg=0").tso6);
    assert!(!accepts("feature-no-csum-offload=1").tso4);
    assert!(accepts("feature-no-csum-offload=1").tso6);
    assert!(!accepts("feature-ipv6-csum-offload=0").tso6);
}

#[test]
fn rings_of_several_pages() {
    let text = "request-rx-copy=1 ring-page-order=1 event-channel=3 \
        tx-ring-ref0=8 tx-ring-ref1=9 rx-ring-ref0=10 rx-ring-ref1=11";
    let got = read(&OFFER, text).unwrap();
    assert_eq!(
        (&got.queues[0].tx_refs[..], &got.queues[0].rx_refs[..]),
        (&[8, 9][..], &[10, 11][..])
    );
    let bad = refused(&text.replace("order=1", "order=3"));
    assert_eq!(bad, "frontend key ring-page-order is 3; 0 to 2 were offered");
}

#[test]
fn rx_flip_is_refused_by_name() {
    let want = "frontend key request-rx-copy is not 1: rx-flip is not supported";
    assert_eq!(refused(&LINUX.replace("request-rx-copy=1", "")), want);
    assert_eq!(refused(&LINUX.replace("request-rx-copy=1", "request-rx-copy=0")), want);
}

#[test]
fn what_is_refused() {
    for (from, to, want) in [
        ("tx-ring-ref=8", "", "frontend key tx-ring-ref is missing"),
        (
            "rx-ring-ref=9",
            "rx-ring-ref=8",
            "frontend key tx-ring-ref or rx-ring-ref names a page of another ring",
        ),
        (
            "rx-ring-ref=9",
            "rx-ring-ref=-9",
            "frontend key rx-ring-ref is \"-9\", which is not a number",
        ),
        ("event-channel-rx=4", "", "frontend key event-channel-rx is missing"),
        (
            "event-channel-rx=4",
            "event-channel-rx=3",
            "frontend key event-channel names the port of another ring",
        ),
        (
            "event-channel-tx=3",
            "event-channel-tx=0",
            "frontend key event-channel-tx is 0, which is no port",
        ),
        ("event-channel-tx=3", "", "frontend key event-channel is missing"),
        (
            "xdp-headroom=0",
            "xdp-headroom=257",
            "frontend key xdp-headroom is 257; 0 to 256 were offered",
        ),
        (
            "xdp-headroom=0",
            "multi-queue-num-queues=5",
            "frontend key multi-queue-num-queues is 5; 1 to 4 were offered",
        ),
        (
            "xdp-headroom=0",
            "multi-queue-num-queues=2",
            "frontend key queue-0/event-channel is missing",
        ),
        ("xdp-headroom=0", "ctrl-ring-ref=12", "frontend key event-channel-ctrl is missing"),
        (
            "xdp-headroom=0",
            "ctrl-ring-ref=8 event-channel-ctrl=9",
            "frontend key ctrl-ring-ref names a page of another ring",
        ),
        (
            "xdp-headroom=0",
            "ctrl-ring-ref=12 event-channel-ctrl=4",
            "frontend key event-channel-ctrl names the port of another ring",
        ),
    ] {
        assert!(LINUX.contains(from), "{from}");
        assert_eq!(refused(&LINUX.replace(from, to)), want, "{from} -> {to}");
    }
}

#[test]
fn a_long_value_is_not_repeated() {
    let text = LINUX.replace("tx-ring-ref=8", &format!("tx-ring-ref={}", "x".repeat(5000)));
    assert!(refused(&text).len() < 120);
}

#[test]
fn the_offer_says_what_is_not_there_too() {
    let none = Offer {
        scatter: false,
        tso4: false,
        tso6: false,
        checksum6: false,
        split: false,
        multicast: false,
        ctrl_ring: false,
        xdp_headroom: false,
        max_queues: 1,
        max_ring_page_order: 0,
    };
    let (some, none) = (OFFER.keys(), none.keys());
    assert_eq!(
        some.iter().map(|(k, _)| k).collect::<Vec<_>>(),
        none.iter().map(|(k, _)| k).collect::<Vec<_>>()
    );
    let on = none.iter().filter(|(_, v)| v != "0").map(|(k, _)| k.as_str());
    assert_eq!(on.collect::<Vec<_>>(), ["feature-rx-copy", "multi-queue-max-queues"]);
    assert!(some.iter().all(|(k, v)| (v == "0") == (k == "feature-rx-flip")));
}
