use super::*;

#[test]
fn buckets_are_powers_of_two() {
    assert_eq!(bucket_of(0), 0);
    assert_eq!(bucket_of(1), 0);
    for k in 1..64 {
        assert_eq!(bucket_of(1 << k), k);
        assert_eq!(bucket_of(bucket_top(k)), k);
        assert_eq!(bucket_of(bucket_top(k - 1)), k - 1);
    }
    assert_eq!(bucket_of(u64::MAX), 63);
    assert_eq!(bucket_top(0), 1);
    assert_eq!(bucket_top(63), u64::MAX);
}

#[test]
fn quantiles_stay_within_the_bucket_of_the_exact_value() {
    let h = Histogram::default();
    for v in 1..=1000u64 {
        h.record(v);
    }
    let s = h.snapshot();
    assert_eq!((s.count, s.sum), (1000, 500_500));
    for (q, exact) in [(0.5, 500), (0.9, 900), (0.99, 990), (1.0, 1000)] {
        assert_eq!(bucket_of(s.quantile(q)), bucket_of(exact), "q={q}");
    }
    assert_eq!(s.mean(), 500.5);
}

#[test]
fn an_empty_histogram_answers_zero() {
    let s = Histogram::default().snapshot();
    assert_eq!(s.quantile(0.5), 0);
    assert_eq!(s.mean(), 0.0);
}

#[test]
fn the_extremes_neither_overflow_nor_panic() {
    let h = Histogram::default();
    h.record_n(u64::MAX, u64::MAX);
    let s = h.snapshot();
    assert!(s.quantile(1.0) >= 1 << 63);
    let _ = s.quantile(f64::NAN);
}

#[test]
fn since_gives_the_interval_and_survives_a_restart() {
    let h = Histogram::default();
    h.record_n(8, 3);
    let old = h.snapshot();
    h.record_n(32, 2);
    let new = h.snapshot();
    let d = new.since(&old);
    assert_eq!((d.count, d.sum, d.buckets[3], d.buckets[5]), (2, 64, 0, 2));
    assert_eq!(old.since(&new), old);
}
