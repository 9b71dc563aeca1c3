//! The figures as lines of text.

use super::blk::{Row, Side};
use super::load::{Measured, Op};
use super::peer::Waiting;
use crate::cli::BenchBlk;

/// What the columns are.
pub fn heading(options: &BenchBlk, peer: Option<&str>) {
    outln!(
        "random 4 KiB requests, one queue; medians of {} rounds of {} s",
        options.rounds.max(1),
        options.seconds
    );
    if let Some(peer) = peer {
        outln!("beside {peer} with vhost-user-blk and the blkio crate's client");
        outln!("(alone: a file's reads by the backend's engine in one thread, without a ring)");
    }
    outln!(
        "{:14} {:5} {:>5} {:9} {:>11} {:>13} {:>13} {:>13} {:>13}  ratio",
        "disk",
        "op",
        "depth",
        "",
        "IOPS",
        "CPU s/M guest",
        "backend",
        "calls guest",
        "backend"
    );
}

fn calls(n: Option<f64>) -> String {
    n.map_or_else(|| "-".to_owned(), |n| format!("{n:.4}"))
}

fn side(name: &str, side: &Side) -> String {
    format!(
        "{name:9} {:11.0} {:13.3} {:13.3} {:>13} {:>13}",
        side.iops,
        side.guest_cpu_s_per_million,
        side.backend_cpu_s_per_million,
        calls(side.guest_calls),
        calls(side.backend_calls)
    )
}

/// One case.
pub fn row(row: &Row) {
    let op = match row.op {
        Op::Read => "read",
        Op::Write => "write",
    };
    outln!("{:14} {op:5} {:5} {}", row.disk, row.depth, side("ringback", &row.ringback));
    let aim = row.aim.map_or(String::new(), |aim| format!(" (aim {aim})"));
    for peer in &row.qemu {
        let client = match peer.client {
            Waiting::Polling => "polling",
            Waiting::Sleeping => "sleeping",
        };
        let ratio = peer.ratio;
        outln!("{:26} {} {ratio:6.2}{aim}, client {client}", "", side("qemu", &peer.side));
    }
    if let Some(alone) = row.alone_iops {
        outln!("{:26} {:9} {alone:11.0}", "", "alone");
    }
}

/// The idle device.
pub fn idle(m: &Measured) {
    outln!("a connected device without work, for {} s:", m.seconds);
    for (name, usage, calls) in
        [("guest", m.guest, m.guest_calls), ("backend", m.backend, m.backend_calls)]
    {
        outln!(
            "{name:8} {:8.3} ms of CPU, {} sleeps, {} data path calls",
            usage.cpu_ns as f64 / 1e6,
            usage.sleeps,
            calls.unwrap_or(0)
        );
    }
}
