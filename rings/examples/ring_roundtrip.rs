//! How long a request takes through the ring and its response back, beside Xen's own C macros
//! compiled by the same machine's cc: both ends in one thread, so that nothing but the ring is
//! measured. The two alternate; each figure is a median, each ratio the median of the pairs'.
//!
//! `cargo run --release -p ringback-rings --example ring_roundtrip -- [--json] [--pairs N]`
// Calls into C by address, and this is a command: it prints.
#![allow(unsafe_code, clippy::print_stdout, missing_docs)]

#[path = "../tests/c_ring/mod.rs"]
mod c_ring;
#[path = "../tests/c_ring/roundtrip.rs"]
mod roundtrip;

use std::sync::Arc;
use std::time::Instant;

use c_ring::CRing;
use rings::Table;
use rings::inflight::Forget;
use rings::mem::{HeapPages, SharedMem};
use roundtrip::rust_roundtrips;

/// Requests of one measurement.
const REQUESTS: u64 = 200_000;

struct Row {
    pages: usize,
    batch: u32,
    c_ns: f64,
    table_ns: f64,
    table_ratio: f64,
    bare_ns: f64,
    bare_ratio: f64,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nanoseconds a request, and the check value of `run`.
fn timed(run: impl FnOnce() -> u64) -> (f64, u64) {
    let start = Instant::now();
    let sum = run();
    (start.elapsed().as_nanos() as f64 / REQUESTS as f64, sum)
}

fn measure(c: &CRing, pages: usize, batch: u32, pairs: usize) -> Row {
    let page = Arc::new(HeapPages::new(pages));
    let slots = rings::slot_count::<c_ring::Toy>(pages);
    let rounds = REQUESTS / u64::from(batch);
    let (mut c_all, mut table_all, mut bare_all) = (vec![], vec![], vec![]);
    // One pair more, first, for the caches and whatever else must get warm.
    for pair in 0..=pairs {
        // SAFETY: the page outlives the call, and nobody else uses it meanwhile.
        let (c_ns, expected) =
            timed(|| unsafe { (c.roundtrips)(page.base(), page.len(), rounds, batch) });
        let (table_ns, with_table) = timed(|| {
            rust_roundtrips(&page, Table::on_heap(slots), rounds, batch).expect("honest ends")
        });
        let (bare_ns, bare) = timed(|| {
            rust_roundtrips(&page, Forget::new(slots), rounds, batch).expect("honest ends")
        });
        assert_eq!([with_table, bare], [expected; 2], "the two did not do the same work");
        if pair == 0 {
            continue;
        }
        c_all.push(c_ns);
        table_all.push(table_ns);
        bare_all.push(bare_ns);
    }
    let ratio = |ours: &[f64]| median(ours.iter().zip(&c_all).map(|(r, c)| r / c).collect());
    let (table_ratio, bare_ratio) = (ratio(&table_all), ratio(&bare_all));
    Row {
        pages,
        batch,
        c_ns: median(c_all),
        table_ns: median(table_all),
        table_ratio,
        bare_ns: median(bare_all),
        bare_ratio,
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let pairs = args.iter().skip_while(|a| *a != "--pairs").nth(1);
    let pairs = pairs.map_or(31, |n| n.parse().expect("--pairs N"));
    let folder = tempfile::tempdir().expect("temporary folder");
    let c = CRing::load(folder.path()).unwrap_or_else(|why| panic!("{why}"));
    let cases = [(1, 1), (1, 4), (1, 32), (16, 32), (16, 512)];
    let rows: Vec<Row> = cases.iter().map(|(p, b)| measure(&c, *p, *b, pairs)).collect();
    if args.iter().any(|a| a == "--json") {
        let rows: Vec<_> = rows.iter().map(json).collect();
        println!("{}", serde_json::json!({ "schema": 1, "pairs": pairs, "rows": rows }));
        return;
    }
    println!("ns a request (112 bytes) and its response (16), median of {pairs} pairs");
    println!("pages batch      C  in-flight table  ratio  no table  ratio");
    for Row { pages, batch, c_ns, table_ns, table_ratio, bare_ns, bare_ratio } in &rows {
        println!(
            "{pages:5} {batch:5} {c_ns:6.1} {table_ns:16.1} {table_ratio:6.2} {bare_ns:9.1} {bare_ratio:6.2}"
        );
    }
}

fn json(row: &Row) -> serde_json::Value {
    let Row { pages, batch, c_ns, table_ns, table_ratio, bare_ns, bare_ratio } = row;
    serde_json::json!({
        "pages": pages, "batch": batch, "c_ns": c_ns,
        "table_ns": table_ns, "table_ratio": table_ratio,
        "no_table_ns": bare_ns, "no_table_ratio": bare_ratio,
    })
}
