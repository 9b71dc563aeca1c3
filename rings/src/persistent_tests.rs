use super::*;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use proptest::prelude::*;

fn pool(entries: u32, idle: u64) -> PersistentPool<u32> {
    PersistentPool::new(Limits { entries, idle, seed: 7 }, Handle::default())
}

fn keep(pool: &mut PersistentPool<u32>, gref: GrantRef, handle: u32) -> (Pin, Option<u32>) {
    match pool.insert(gref, Access::ReadWrite, handle) {
        Inserted::Kept { pin, out } => (pin, out),
        Inserted::Refused(_) => panic!("refused"),
    }
}

#[test]
fn the_least_recently_used_falls_out_and_a_pinned_one_never() {
    let mut p = pool(3, 100);
    let pinned = keep(&mut p, 1, 11).0;
    for gref in [2, 3] {
        let pin = keep(&mut p, gref, gref + 10).0;
        assert_eq!(p.unpin(pin, u64::from(gref)), None);
    }
    // 2 is used again, so 3 is the oldest that nobody uses.
    let pin = p.get(2, Access::ReadWrite).expect("hit");
    assert_eq!(p.handle(&pin), Some(&12));
    assert_eq!(p.unpin(pin, 4), None);
    let (pin4, out) = keep(&mut p, 4, 14);
    assert_eq!(out, Some(13));
    let (pin5, out) = keep(&mut p, 5, 15);
    assert_eq!(out, Some(12));
    assert!(matches!(p.insert(6, Access::ReadOnly, 16), Inserted::Refused(16)));
    assert_eq!(p.counters().refused.get(), 1);
    assert_eq!(p.counters().evictions.get(), 2);
    for pin in [pinned, pin4, pin5] {
        assert_eq!(p.unpin(pin, 9), None);
    }
    let mut all = Vec::new();
    p.close(|h| all.push(h));
    all.sort_unstable();
    assert_eq!(all, [11, 14, 15]);
}

#[test]
fn what_was_idle_for_long_goes_and_what_is_in_use_stays() {
    let mut p = pool(8, 60);
    let used = keep(&mut p, 1, 1).0;
    for (gref, now) in [(2, 10), (3, 20)] {
        let pin = keep(&mut p, gref, gref).0;
        assert_eq!(p.unpin(pin, now), None);
    }
    let mut gone = Vec::new();
    p.expire(69, |h| gone.push(h));
    assert!(gone.is_empty());
    p.expire(70, |h| gone.push(h));
    assert_eq!(gone, [2]);
    p.expire(u64::MAX, |h| gone.push(h));
    assert_eq!((gone.len(), p.len()), (2, 1));
    assert_eq!(p.unpin(used, 5), None);
    // A clock that steps back drops nothing.
    p.expire(0, |_| panic!("dropped"));
}

#[test]
fn read_only_is_a_miss_for_a_write_and_is_replaced_when_its_last_use_ends() {
    let mut p = pool(4, 60);
    let Inserted::Kept { pin: first, out: None } = p.insert(9, Access::ReadOnly, 90) else {
        panic!("not kept")
    };
    let second = p.get(9, Access::ReadOnly).expect("a read is a hit");
    assert_eq!(p.get(9, Access::ReadWrite), None);
    let (write, out) = keep(&mut p, 9, 91);
    assert_eq!(out, None, "still in use");
    assert_eq!(p.handle(&first), Some(&90));
    assert_eq!(p.unpin(first, 1), None);
    assert_eq!(p.unpin(second, 1), Some(90));
    assert_eq!(p.unpin(write, 1), None);
    let hit = p.get(9, Access::ReadOnly).expect("a mapping for writing serves reads");
    assert_eq!(p.handle(&hit), Some(&91));
    assert_eq!((p.counters().hits.get(), p.counters().misses.get(), p.len()), (2, 1, 1));
    assert_eq!(p.unpin(hit, 2), None);
    // An unused one is replaced at once.
    assert_eq!(keep(&mut p, 9, 92).1, Some(91));
}

#[test]
fn an_empty_pool_refuses_and_a_lowered_limit_evicts() {
    let mut none = pool(0, 1);
    assert_eq!(none.get(1, Access::ReadOnly), None);
    assert!(matches!(none.insert(1, Access::ReadOnly, 1), Inserted::Refused(1)));
    let mut p = pool(4, 60);
    for gref in 0..4 {
        let pin = keep(&mut p, gref, gref).0;
        assert_eq!(p.unpin(pin, 0), None);
    }
    let mut gone = Vec::new();
    p.set_limits(1, 60, |h| gone.push(h));
    assert_eq!((gone, p.len()), (Vec::from([0, 1, 2]), 1));
}

#[test]
fn the_index_survives_collisions() {
    for seed in 0..50 {
        let mut index = Index::new(16, seed);
        let mut model = BTreeMap::new();
        for step in 0..400u32 {
            let gref = step.wrapping_mul(2_654_435_761) % 24;
            if model.contains_key(&gref) {
                index.remove(gref);
                model.remove(&gref);
            } else if model.len() < 16 {
                index.insert(gref, step);
                model.insert(gref, step);
            }
            for g in 0..24 {
                assert_eq!(index.find(g), model.get(&g).copied(), "seed {seed} step {step}");
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Use { gref: GrantRef, write: bool },
    Done { which: usize },
    Expire,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u32..20, any::<bool>()).prop_map(|(gref, write)| Step::Use { gref, write }),
        4 => (0usize..64).prop_map(|which| Step::Done { which }),
        1 => Just(Step::Expire),
    ];
    prop::collection::vec(step, 1..200)
}

/// What the pool should do, in the plainest form: unused handles by age, and who uses what.
#[derive(Default)]
struct Model {
    listed: BTreeMap<GrantRef, (u32, Access)>,
    unused: VecDeque<(u32, u64)>,
    uses: BTreeMap<u32, u32>,
    mapped: BTreeSet<u32>,
}

impl Model {
    fn unmap(&mut self, handle: u32) {
        assert!(self.mapped.remove(&handle), "{handle} unmapped twice");
        assert_eq!(self.uses.get(&handle), None, "{handle} is in use");
        self.unused.retain(|(h, _)| *h != handle);
        self.listed.retain(|_, (h, _)| *h != handle);
    }
    fn begin(&mut self, handle: u32) {
        *self.uses.entry(handle).or_default() += 1;
        self.unused.retain(|(h, _)| *h != handle);
    }
    fn end(&mut self, handle: u32, now: u64) {
        let uses = self.uses.get_mut(&handle).expect("in use");
        *uses -= 1;
        if *uses == 0 {
            self.uses.remove(&handle);
            if self.listed.values().any(|(h, _)| *h == handle) {
                self.unused.push_back((handle, now));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn the_pool_does_what_the_model_does(steps in steps(), limit in 0u32..12, seed in any::<u64>()) {
        let mut pool = PersistentPool::new(Limits { entries: limit, idle: 30, seed }, Handle::default());
        let mut model = Model::default();
        let mut pins: Vec<(Pin, u32)> = Vec::new();
        let mut next = 0;
        for (now, step) in (0u64..).zip(steps) {
            match step {
                Step::Use { gref, write } => {
                    let access = if write { Access::ReadWrite } else { Access::ReadOnly };
                    let expected = model.listed.get(&gref).filter(|(_, a)| *a >= access).map(|(h, _)| *h);
                    if let Some(pin) = pool.get(gref, access) {
                        prop_assert_eq!(pool.handle(&pin).copied(), expected);
                        model.begin(expected.expect("a hit"));
                        pins.push((pin, expected.expect("a hit")));
                        continue;
                    }
                    prop_assert_eq!(expected, None);
                    next += 1;
                    model.mapped.insert(next);
                    let replaced = model.listed.remove(&gref).map(|(h, _)| h);
                    let replaced = replaced.filter(|h| !model.uses.contains_key(h));
                    let oldest = model.unused.iter().map(|(h, _)| *h).find(|h| Some(*h) != replaced);
                    let full = model.mapped.len() - 1 - replaced.iter().count() >= limit as usize;
                    match pool.insert(gref, access, next) {
                        Inserted::Kept { pin, out } => {
                            prop_assert_eq!(out, replaced.or(oldest.filter(|_| full)));
                            out.into_iter().for_each(|h| model.unmap(h));
                            model.listed.insert(gref, (next, access));
                            model.begin(next);
                            pins.push((pin, next));
                        }
                        Inserted::Refused(handle) => {
                            prop_assert!(full && oldest.is_none() && handle == next);
                            model.unmap(handle);
                        }
                    }
                }
                Step::Done { which } if !pins.is_empty() => {
                    let (pin, handle) = pins.swap_remove(which % pins.len());
                    let out = pool.unpin(pin, now);
                    model.end(handle, now);
                    let gone = !model.uses.contains_key(&handle) && !model.listed.values().any(|(h, _)| *h == handle);
                    prop_assert_eq!(out, gone.then_some(handle));
                    out.into_iter().for_each(|h| model.unmap(h));
                }
                Step::Done { .. } => {}
                Step::Expire => {
                    let expected: Vec<u32> = model.unused.iter().filter(|(_, used)| now - used >= 30).map(|(h, _)| *h).collect();
                    let mut gone = Vec::new();
                    pool.expire(now, |h| gone.push(h));
                    prop_assert_eq!(&gone, &expected);
                    gone.into_iter().for_each(|h| model.unmap(h));
                }
            }
            prop_assert_eq!(pool.len(), model.mapped.len());
        }
        let mut left = BTreeSet::new();
        pool.close(|h| assert!(left.insert(h)));
        prop_assert_eq!(left, model.mapped);
    }
}
