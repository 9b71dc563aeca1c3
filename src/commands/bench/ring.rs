//! `ringback bench ring`: how long a request takes through the ring and its response back,
//! beside Xen's own C macros, compiled by this machine's cc from libxen-dev's header. Both ends
//! are in one thread, so that nothing but the ring is measured; the two alternate.
// Calls into C by address.
#![allow(unsafe_code)]

#[path = "../../../rings/tests/c_ring/mod.rs"]
mod c_ring;
#[path = "../../../rings/tests/c_ring/roundtrip.rs"]
mod roundtrip;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use rings::inflight::Forget;
use rings::mem::{HeapPages, SharedMem};
use rings::{InFlight, Table};
use serde::Serialize;

use super::{Result, Scratch, machine, median};
use crate::cli::BenchRing;
use c_ring::{CRing, Toy};
use roundtrip::rust_roundtrips;

/// Requests of one measurement.
const REQUESTS: u64 = 200_000;
/// The ratio that is aimed at, at most.
const AIM: f64 = 1.1;
/// Pages of the ring, requests of a batch.
const CASES: [(usize, u32); 5] = [(1, 1), (1, 4), (1, 32), (16, 32), (16, 512)];

#[derive(Serialize)]
struct Row {
    ring_pages: usize,
    batch: u32,
    /// Nanoseconds a request, medians.
    c_ns: f64,
    ringback_ns: f64,
    without_table_ns: f64,
    /// Medians of the pairs' ratios.
    ratio: f64,
    ratio_without_table: f64,
}

/// Nanoseconds a request, and the check value of `run`.
fn timed(run: impl FnOnce() -> u64) -> (f64, u64) {
    let start = Instant::now();
    let sum = run();
    (start.elapsed().as_nanos() as f64 / REQUESTS as f64, sum)
}

fn ours<T: InFlight<[u64; 14]>>(page: &Arc<HeapPages>, table: T, batch: u32) -> (f64, u64) {
    // Both ends are honest, so no index is corrupt; a wrong sum is noticed.
    timed(|| rust_roundtrips(page, table, REQUESTS / u64::from(batch), batch).unwrap_or(0))
}

fn measure(c: &CRing, pages: usize, batch: u32, pairs: u32) -> Result<Row> {
    let page = Arc::new(HeapPages::new(pages));
    let slots = rings::slot_count::<Toy>(pages);
    let rounds = REQUESTS / u64::from(batch);
    let (mut c_all, mut table_all, mut bare_all) = (vec![], vec![], vec![]);
    // One pair more, first, for the caches and whatever else must get warm.
    for pair in 0..=pairs {
        // SAFETY: the page outlives the call, and nobody else uses it meanwhile.
        let (c_ns, expected) =
            timed(|| unsafe { (c.roundtrips)(page.base(), page.len(), rounds, batch) });
        let (table_ns, with_table) = ours(&page, Table::on_heap(slots), batch);
        let (bare_ns, bare) = ours(&page, Forget::new(slots), batch);
        if [with_table, bare] != [expected; 2] {
            return Err("the rings did not do the same work as the C macros".into());
        }
        if pair == 0 {
            continue;
        }
        c_all.push(c_ns);
        table_all.push(table_ns);
        bare_all.push(bare_ns);
    }
    let ratio = |ours: &[f64]| median(ours.iter().zip(&c_all).map(|(r, c)| r / c).collect());
    let (with_table, bare) = (ratio(&table_all), ratio(&bare_all));
    Ok(Row {
        ring_pages: pages,
        batch,
        c_ns: median(c_all),
        ringback_ns: median(table_all),
        without_table_ns: median(bare_all),
        ratio: with_table,
        ratio_without_table: bare,
    })
}

/// Runs all cases.
pub fn run(options: &BenchRing) -> Result {
    let folder = Scratch::new(None)?;
    let c = CRing::load(folder.path())?;
    let pairs = options.rounds.max(1);
    let rows = CASES.iter().map(|(pages, batch)| measure(&c, *pages, *batch, pairs));
    let rows = rows.collect::<Result<Vec<Row>>>()?;
    if options.json {
        let document = serde_json::json!({
            "schema": 1, "bench": "ring", "machine": machine(), "rounds": pairs,
            "aim": AIM, "rows": rows,
        });
        outln!("{document}");
        return Ok(ExitCode::SUCCESS);
    }
    outln!("ns a request (112 bytes) and its response (16), median of {pairs} pairs");
    outln!("pages batch  C macros  ringback  ratio (aim {AIM})  without in-flight table  ratio");
    for r in &rows {
        outln!(
            "{:5} {:5} {:9.1} {:9.1} {:6.2} {:35.1} {:6.2}",
            r.ring_pages,
            r.batch,
            r.c_ns,
            r.ringback_ns,
            r.ratio,
            r.without_table_ns,
            r.ratio_without_table
        );
    }
    Ok(ExitCode::SUCCESS)
}
