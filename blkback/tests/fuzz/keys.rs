//! A frontend's keys through [`Accepted::read`].

use std::collections::BTreeMap;

use blkback::negotiate::{Accepted, Offer, Protocol};

use crate::{Source, bytes};

type Keys = BTreeMap<String, String>;

/// What a frontend may choose: layout, persistence, and each queue's pages and port. `None`: the
/// keys make no sense.
#[derive(Debug, PartialEq, Eq)]
struct Chosen {
    packed: bool,
    persistent: bool,
    queues: Vec<(Vec<u32>, u32)>,
}

/// A number below 2^32 in digits alone, blanks around it allowed; `Err` for anything else.
fn number(keys: &Keys, key: &str) -> Result<Option<u32>, ()> {
    let Some(value) = keys.get(key) else { return Ok(None) };
    let digits = value.trim();
    if digits.is_empty() || digits.chars().any(|c| !c.is_ascii_digit()) {
        return Err(());
    }
    let significant = digits.trim_start_matches('0');
    if significant.len() > 10 {
        return Err(());
    }
    let n = significant.bytes().fold(0u64, |n, d| n * 10 + u64::from(d - b'0'));
    u32::try_from(n).map(Some).map_err(|_| ())
}

/// The model.
fn model(offer: &Offer, keys: &Keys) -> Result<Chosen, ()> {
    let packed = match keys.get("protocol").map(|p| p.trim()) {
        None | Some("x86_64-abi") => false,
        Some("x86_32-abi") => true,
        Some(_) => return Err(()),
    };
    let persistent = number(keys, "feature-persistent")? == Some(1);
    let count = number(keys, "multi-queue-num-queues")?.unwrap_or(1);
    let order = number(keys, "ring-page-order")?;
    let pages = number(keys, "num-ring-pages")?;
    let most = offer.max_ring_page_order;
    let allowed: Vec<u32> = (0..=most).map(|order| 1 << order).collect();
    if count < 1
        || count > offer.max_queues
        || order.is_some_and(|o| o > most)
        || pages.is_some_and(|p| !allowed.contains(&p))
        || order.zip(pages).is_some_and(|(o, p)| p != 1 << o)
    {
        return Err(());
    }
    let size = pages.or(order.map(|o| 1 << o));
    let mut queues: Vec<(Vec<u32>, u32)> = Vec::new();
    for n in 0..count {
        let name = |key: &str| match count {
            1 => key.to_owned(),
            _ => format!("queue-{n}/{key}"),
        };
        let has = |key: &str| keys.contains_key(&name(key));
        let required = |key: &str| number(keys, &name(key))?.ok_or(());
        let refs: Vec<u32> = match size {
            Some(1) | None if has("ring-ref") => vec![required("ring-ref")?],
            None if has("ring-ref0") => vec![required("ring-ref0")?],
            None => return Err(()),
            Some(size) => {
                (0..size).map(|i| required(&format!("ring-ref{i}"))).collect::<Result<_, _>>()?
            }
        };
        let port = required("event-channel")?;
        let mut all: Vec<u32> =
            queues.iter().flat_map(|q| q.0.clone()).chain(refs.clone()).collect();
        let pages = all.len();
        all.sort();
        all.dedup();
        if port == 0 || all.len() != pages || queues.iter().any(|q| q.1 == port) {
            return Err(());
        }
        queues.push((refs, port));
    }
    Ok(Chosen { packed, persistent, queues })
}

fn value(s: &mut Source<'_>) -> String {
    let n = s.byte();
    match n % 32 {
        0 => String::new(),
        1 => "-1".to_owned(),
        2 => "+1".to_owned(),
        3 => "4294967295".to_owned(),
        4 => "4294967296".to_owned(),
        5 => "99999999999999999999".to_owned(),
        6 => format!(" {} ", n / 32),
        7 => "007".to_owned(),
        8 => "1e1".to_owned(),
        9 => "\u{664}".to_owned(),
        10 => s.word().to_string(),
        11..=20 => (n / 32).to_string(),
        _ => s.byte().to_string(),
    }
}

fn name(s: &mut Source<'_>) -> String {
    let n = s.byte();
    let key = match n % 16 {
        0 => return "protocol".to_owned(),
        1 => return "feature-persistent".to_owned(),
        2 => return "multi-queue-num-queues".to_owned(),
        3 => return "ring-page-order".to_owned(),
        4 => return "num-ring-pages".to_owned(),
        5..=8 => "ring-ref".to_owned(),
        9..=11 => "event-channel".to_owned(),
        _ => format!("ring-ref{}", s.byte() % 5),
    };
    match n / 16 {
        0..=9 => key,
        n => format!("queue-{}/{key}", n % 3),
    }
}

/// Keys that make sense, with a few of them changed, missing or added.
fn keys(s: &mut Source<'_>) -> Keys {
    let mut keys = Keys::new();
    let mut set = |key: String, value: u32| drop(keys.insert(key, value.to_string()));
    let (queues, order) = (s.pick(&[1, 1, 2, 3]), s.pick(&[0, 0, 1, 2]));
    if queues > 1 {
        set("multi-queue-num-queues".to_owned(), queues);
    }
    if order > 0 {
        set("ring-page-order".to_owned(), order);
    }
    for queue in 0..queues {
        let prefix = if queues > 1 { format!("queue-{queue}/") } else { String::new() };
        set(format!("{prefix}event-channel"), 10 + queue);
        for page in 0..1 << order {
            let index = if order > 0 { page.to_string() } else { String::new() };
            set(format!("{prefix}ring-ref{index}"), 100 + queue * 16 + page);
        }
    }
    for _ in 0..s.byte() % 5 {
        let key = name(s);
        match s.byte() % 4 {
            0 => drop(keys.remove(&key)),
            1 if key == "protocol" => {
                let value = s.pick(&["x86_64-abi", "x86_32-abi", " x86_32-abi\n", "ia64-abi", ""]);
                keys.insert(key, value.to_owned());
            }
            _ => drop(keys.insert(key, value(s))),
        }
    }
    keys
}

/// Whether the keys were accepted.
fn run(input: &[u8]) -> bool {
    let mut s = Source(input);
    let offer = Offer {
        flush: true,
        barrier: true,
        persistent: true,
        max_indirect_segments: 256,
        max_ring_page_order: s.pick(&[0, 1, 4, 4]),
        max_queues: s.pick(&[1, 2, 4, 64]),
    };
    let keys = keys(&mut s);
    let found = Accepted::read(&offer, |key| keys.get(key).cloned());
    if let Err(refused) = &found {
        assert!(refused.to_string().len() < 700, "{refused}");
    }
    let found = found.map_err(|_| ()).map(|a| Chosen {
        packed: a.protocol == Protocol::X86_32,
        persistent: a.persistent,
        queues: a.queues.into_iter().map(|q| (q.ring_refs, q.port)).collect(),
    });
    let accepted = found.is_ok();
    assert_eq!(found, model(&offer, &keys), "{keys:?} for {offer:?}");
    accepted
}

#[test]
fn keys_of_a_frontend() {
    bolero::check!()
        .with_max_len(200)
        .with_iterations(2000)
        .for_each(|input: &[u8]| _ = run(input));
}

#[test]
fn keys_that_are_the_same_each_time() {
    let accepted = (0..20_000).filter(|n| run(&bytes(n + 1, 100))).count();
    assert!((2000..18_000).contains(&accepted), "accepted {accepted} of 20000");
}
