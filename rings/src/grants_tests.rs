use super::*;
use alloc::collections::BTreeSet;
use alloc::vec;
use proptest::prelude::*;

/// Runs a batch against a `map` that refuses the references in `bad`; gives what each reference
/// became and how many calls it took.
fn run(wanted: &[Wanted], bad: &BTreeSet<GrantRef>) -> (Vec<(Wanted, bool)>, usize) {
    let mut batch = GrantBatch::new(wanted.len());
    for w in wanted {
        batch.push(*w).expect("room");
    }
    let (mut calls, mut seen) = (0, Vec::new());
    batch.map(
        |refs, _| {
            calls += 1;
            if refs.iter().any(|r| bad.contains(r)) { Err(()) } else { Ok(refs.len()) }
        },
        |run, result| {
            if let Ok(pages) = result {
                assert_eq!(pages, run.len());
            }
            seen.extend(run.iter().map(|w| (*w, result.is_ok())));
        },
    );
    assert!(batch.is_empty());
    (seen, calls)
}

fn wanted(request: u32, gref: GrantRef, access: Access) -> Wanted {
    Wanted { request, gref, access }
}

#[test]
fn a_good_batch_takes_one_call_an_access() {
    let all: Vec<_> = (0..8)
        .map(|i| wanted(i / 2, i, if i % 2 == 0 { Access::ReadOnly } else { Access::ReadWrite }))
        .collect();
    let (seen, calls) = run(&all, &BTreeSet::new());
    assert_eq!((seen.len(), calls), (8, 2));
    assert!(seen.iter().all(|(_, ok)| *ok));
}

#[test]
fn the_kth_bad_reference_fails_alone_for_every_k() {
    let all: Vec<_> = (0..9).map(|i| wanted(i / 3, 100 + i, Access::ReadWrite)).collect();
    for k in 0..9 {
        let (seen, calls) = run(&all, &BTreeSet::from([100 + k]));
        let failed: Vec<_> = seen.iter().filter(|(_, ok)| !ok).map(|(w, _)| w.gref).collect();
        assert_eq!(failed, vec![100 + k]);
        assert_eq!((seen.len(), calls), (9, 1 + 3 + 3));
    }
}

#[test]
fn a_lone_reference_is_tried_once() {
    let (seen, calls) = run(&[wanted(0, 5, Access::ReadOnly)], &BTreeSet::from([5]));
    assert_eq!((seen, calls), (vec![(wanted(0, 5, Access::ReadOnly), false)], 1));
}

#[test]
fn a_full_batch_refuses_more() {
    let mut batch = GrantBatch::new(1);
    batch.push(wanted(0, 1, Access::ReadOnly)).expect("room");
    assert_eq!(batch.push(wanted(0, 2, Access::ReadWrite)), Err(BatchFull));
    assert_eq!(batch.len(), 1);
}

proptest! {
    #[test]
    fn every_reference_is_settled_once_and_only_bad_ones_fail(
        requests in prop::collection::vec((1usize..6, any::<bool>()), 1..8),
        bad in prop::collection::btree_set(0u32..30, 0..5),
    ) {
        let mut all = Vec::new();
        for (request, (segments, write)) in requests.iter().enumerate() {
            let access = if *write { Access::ReadWrite } else { Access::ReadOnly };
            for _ in 0..*segments {
                all.push(wanted(request as u32, all.len() as u32, access));
            }
        }
        let (mut seen, calls) = run(&all, &bad);
        prop_assert!(calls <= 2 + requests.len() + all.len());
        seen.sort_by_key(|(w, _)| w.gref);
        prop_assert_eq!(seen.iter().map(|(w, _)| *w).collect::<Vec<_>>(), all);
        for (w, ok) in seen {
            prop_assert_eq!(ok, !bad.contains(&w.gref));
        }
    }
}
