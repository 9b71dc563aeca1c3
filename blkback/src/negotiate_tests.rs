use super::*;

const OFFER: Offer = Offer {
    flush: true,
    barrier: true,
    persistent: true,
    max_indirect_segments: 256,
    max_ring_page_order: 4,
    max_queues: 4,
};

fn read(keys: &[(&str, &str)]) -> Result<Accepted, Refused> {
    Accepted::read(&OFFER, |name| {
        keys.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    })
}

fn refusal(keys: &[(&str, &str)]) -> String {
    read(keys).unwrap_err().to_string()
}

#[test]
fn a_frontend_that_knows_no_optional_key() {
    let accepted = read(&[("ring-ref", "8"), ("event-channel", "5")]).unwrap();
    assert_eq!(accepted.protocol, Protocol::X86_64);
    assert!(!accepted.persistent);
    assert_eq!(accepted.queues, [QueueKeys { ring_refs: vec![8], port: 5 }]);
}

#[test]
fn a_single_page_under_either_name() {
    let want = [QueueKeys { ring_refs: vec![8], port: 5 }];
    for keys in [
        &[("ring-ref0", "8"), ("event-channel", "5")][..],
        &[("ring-ref", "8"), ("event-channel", "5"), ("ring-ref0", "9")],
        &[("ring-page-order", "0"), ("ring-ref", "8"), ("event-channel", "5")],
        &[("ring-page-order", "0"), ("ring-ref0", "8"), ("event-channel", "5")],
        &[
            ("ring-page-order", "0"),
            ("num-ring-pages", "1"),
            ("ring-ref", "8"),
            ("event-channel", "5"),
        ],
    ] {
        assert_eq!(read(keys).unwrap().queues, want, "{keys:?}");
    }
}

#[test]
fn the_keys_that_linux_writes() {
    let mut keys = vec![
        ("protocol".to_owned(), "x86_64-abi".to_owned()),
        ("feature-persistent".to_owned(), "1".to_owned()),
        ("ring-page-order".to_owned(), "4".to_owned()),
        ("multi-queue-num-queues".to_owned(), "2".to_owned()),
    ];
    for queue in 0..2 {
        keys.push((format!("queue-{queue}/event-channel"), (30 + queue).to_string()));
        for page in 0..16 {
            let gref = 100 * (queue + 1) + page;
            keys.push((format!("queue-{queue}/ring-ref{page}"), gref.to_string()));
        }
    }
    let find = |name: &str| keys.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
    let accepted = Accepted::read(&OFFER, find).unwrap();
    assert!(accepted.persistent);
    assert_eq!(accepted.queues.len(), 2);
    assert_eq!(accepted.queues[1].ring_refs, (200..216).collect::<Vec<u32>>());
    assert_eq!(accepted.queues[1].port, 31);
}

#[test]
fn the_older_names_of_ring_pages() {
    let keys = [
        ("num-ring-pages", "2"),
        ("ring-ref0", "8"),
        ("ring-ref1", "9"),
        ("event-channel", "5"),
        ("protocol", "x86_32-abi"),
    ];
    let accepted = read(&keys).unwrap();
    assert_eq!(accepted.queues[0].ring_refs, [8, 9]);
    assert_eq!(accepted.protocol, Protocol::X86_32);
}

#[test]
fn exact_texts_of_refusals() {
    let table: &[(&[(&str, &str)], &str)] = &[
        (&[], "frontend key ring-ref is missing"),
        (&[("ring-ref", "8")], "frontend key event-channel is missing"),
        (
            &[("ring-ref", "-1"), ("event-channel", "5")],
            "frontend key ring-ref is \"-1\", which is not a number",
        ),
        (
            &[("ring-ref", ""), ("event-channel", "5")],
            "frontend key ring-ref is \"\", which is not a number",
        ),
        (&[("ring-page-order", "5")], "frontend key ring-page-order is 5; 0 to 4 were offered"),
        (
            &[("ring-page-order", "4294967295")],
            "frontend key ring-page-order is 4294967295; 0 to 4 were offered",
        ),
        (
            &[("num-ring-pages", "3")],
            "frontend key num-ring-pages is 3, which is not a power of two",
        ),
        (&[("num-ring-pages", "32")], "frontend key num-ring-pages is 32; 1 to 16 were offered"),
        (
            &[("multi-queue-num-queues", "0")],
            "frontend key multi-queue-num-queues is 0; 1 to 4 were offered",
        ),
        (
            &[("multi-queue-num-queues", "5")],
            "frontend key multi-queue-num-queues is 5; 1 to 4 were offered",
        ),
        (
            &[("ring-ref", "8"), ("event-channel", "0")],
            "frontend key event-channel is 0, which is no port",
        ),
        (
            &[("ring-ref", "+8"), ("event-channel", "5")],
            "frontend key ring-ref is \"+8\", which is not a number",
        ),
        (
            &[("ring-page-order", "1"), ("num-ring-pages", "4")],
            "frontend keys ring-page-order (1) and num-ring-pages (4) disagree",
        ),
        (
            &[("protocol", "ia64-abi")],
            "frontend key protocol is \"ia64-abi\"; x86_64-abi and x86_32-abi are supported",
        ),
        (
            &[("ring-page-order", "1"), ("ring-ref0", "8"), ("event-channel", "5")],
            "frontend key ring-ref1 is missing",
        ),
    ];
    for (keys, text) in table {
        assert_eq!(refusal(keys), *text);
    }
    let long = "9".repeat(5000);
    assert!(refusal(&[("ring-ref", &long), ("event-channel", "5")]).len() < 120);
}

#[test]
fn exact_texts_where_rings_share() {
    let table: &[(&[(&str, &str)], &str)] = &[
        (
            &[
                ("ring-page-order", "1"),
                ("ring-ref0", "8"),
                ("ring-ref1", "8"),
                ("event-channel", "5"),
            ],
            "frontend key ring-ref names a page of another ring",
        ),
        (
            &[
                ("multi-queue-num-queues", "2"),
                ("queue-0/ring-ref", "8"),
                ("queue-0/event-channel", "5"),
                ("queue-1/ring-ref", "9"),
                ("queue-1/event-channel", "5"),
            ],
            "frontend key queue-1/event-channel names the port of another queue",
        ),
        (
            &[
                ("multi-queue-num-queues", "2"),
                ("queue-0/ring-ref", "8"),
                ("queue-0/event-channel", "5"),
                ("queue-1/ring-ref", "8"),
                ("queue-1/event-channel", "6"),
            ],
            "frontend key queue-1/ring-ref names a page of another ring",
        ),
    ];
    for (keys, text) in table {
        assert_eq!(refusal(keys), *text);
    }
}

#[test]
fn barrier_alone_has_no_indirect() {
    let offer = Offer { flush: false, max_indirect_segments: 0, ..OFFER };
    let early = offer.early_keys();
    assert!(early.contains(&("feature-max-indirect-segments".into(), "0".into())));
    assert!(OFFER.early_keys().contains(&("feature-max-indirect-segments".into(), "256".into())));
}

#[test]
fn sectors_are_units_of_512_whatever_the_block_size() {
    let disk = DiskKeys {
        size: 1 << 20,
        logical_block: 4096,
        physical_block: 4096,
        read_only: true,
        cdrom: true,
        removable: true,
        discard: None,
        secure_discard: false,
    };
    let keys = OFFER.disk_keys(&disk);
    for (name, value) in [("sectors", "2048"), ("info", "7"), ("sector-size", "4096")] {
        assert!(keys.contains(&(name.into(), value.into())), "{name}");
    }
    // Written as 0: a predecessor's 1 must not stay.
    assert!(keys.contains(&("feature-discard".into(), "0".into())));
    assert!(keys.iter().all(|(key, _)| !key.starts_with("discard-")));
    let keys = OFFER.disk_keys(&DiskKeys { discard: Some(4096), ..disk });
    assert!(keys.contains(&("discard-granularity".into(), "4096".into())));
}

#[test]
fn each_end_reads_what_the_other_writes() {
    for (pages, count) in [(1u32, 1u32), (1, 2), (16, 1), (4, 4)] {
        let queue = |n| QueueKeys { ring_refs: (n * 100..n * 100 + pages).collect(), port: n };
        let accepted = Accepted {
            protocol: Protocol::X86_32,
            persistent: pages > 1,
            queues: (1..=count).map(queue).collect(),
        };
        let keys = accepted.front_keys();
        let find = |name: &str| keys.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
        assert_eq!(Accepted::read(&OFFER, find), Ok(accepted));
    }
    let disk = DiskKeys {
        size: 1 << 20,
        logical_block: 4096,
        physical_block: 8192,
        read_only: true,
        cdrom: true,
        removable: false,
        discard: Some(65536),
        secure_discard: true,
    };
    for disk in [disk, DiskKeys { discard: None, secure_discard: false, ..disk }] {
        let mut keys = OFFER.early_keys();
        keys.extend(OFFER.disk_keys(&disk));
        let find = |name: &str| keys.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
        assert_eq!(Offer::read(find), Ok(OFFER));
        assert_eq!(DiskKeys::read(find), Ok(disk));
    }
}

#[test]
fn a_backend_that_says_little() {
    let offer = Offer::read(|_| None).unwrap();
    let none = Offer {
        flush: false,
        barrier: false,
        persistent: false,
        max_indirect_segments: 0,
        max_ring_page_order: 0,
        max_queues: 1,
    };
    assert_eq!(offer, none);
    let pages = |key: &str| (key == "max-ring-pages").then(|| "8".to_owned());
    assert_eq!(Offer::read(pages), Ok(Offer { max_ring_page_order: 3, ..none }));
    let disk = DiskKeys::read(|key| (key == "sectors").then(|| "8".to_owned())).unwrap();
    assert_eq!((disk.size, disk.logical_block, disk.physical_block), (4096, 512, 512));
    assert_eq!((disk.read_only, disk.discard), (false, None));
}

#[test]
fn a_backend_that_talks_nonsense() {
    assert_eq!(DiskKeys::read(|_| None).unwrap_err().to_string(), "backend key sectors is missing");
    let not_a_number = |value| format!("{value:?}, which is not a number");
    for (key, value, why) in [
        ("sectors", "36028797018963968", "36028797018963968; 0 to 36028797018963967 make sense"),
        ("sectors", "-1", &not_a_number("-1")),
        ("sector-size", "256", "256; 512 to 2147483648 make sense"),
        ("sector-size", "513", "513, which is not a power of two"),
        ("physical-sector-size", "0", "0; 512 to 2147483648 make sense"),
        ("discard-granularity", "0", "0; 1 to 4294967295 make sense"),
        ("feature-discard", "yes", &not_a_number("yes")),
        ("info", "4294967296", &not_a_number("4294967296")),
    ] {
        let read = |k: &str| match k {
            _ if k == key => Some(value.to_owned()),
            "sectors" => Some("8".to_owned()),
            _ => None,
        };
        let text = format!("backend key {key} is {why}");
        assert_eq!(DiskKeys::read(read).unwrap_err().to_string(), text);
    }
    for (key, value) in [("max-ring-pages", "0"), ("multi-queue-max-queues", "0")] {
        let read = |k: &str| (k == key).then(|| value.to_owned());
        let text = format!("backend key {key} is 0; 1 to 4294967295 make sense");
        assert_eq!(Offer::read(read).unwrap_err().to_string(), text);
    }
}
