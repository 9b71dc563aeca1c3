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
            &[("protocol", "ia64-abi")],
            "frontend key protocol is \"ia64-abi\"; x86_64-abi and x86_32-abi are supported",
        ),
        (
            &[("ring-page-order", "1"), ("ring-ref0", "8"), ("event-channel", "5")],
            "frontend key ring-ref1 is missing",
        ),
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
    let long = "9".repeat(5000);
    assert!(refusal(&[("ring-ref", &long), ("event-channel", "5")]).len() < 120);
}

#[test]
fn barrier_alone_has_no_indirect() {
    let offer = Offer { flush: false, max_indirect_segments: 0, ..OFFER };
    let early = offer.early_keys();
    assert!(early.iter().all(|(key, _)| key != "feature-max-indirect-segments"));
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
    assert!(keys.iter().all(|(key, _)| !key.contains("discard")));
    let keys = OFFER.disk_keys(&DiskKeys { discard: Some(4096), ..disk });
    assert!(keys.contains(&("discard-granularity".into(), "4096".into())));
}
