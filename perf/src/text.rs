//! Snapshots, rates and descriptions as text for a terminal.

use std::fmt::Write;

use crate::Kind;
use crate::page::Device;
use crate::snapshot::{Description, Distribution, Number, RateNumber, Rates, Snapshot, Writer};

/// All values of a page, a line each.
pub fn values(snapshot: &Snapshot) -> String {
    let mut out = title(&snapshot.device, snapshot.writer);
    if snapshot.unshown > 0 {
        let _ = writeln!(out, "  ({} blocks found no room in the page)", snapshot.unshown);
    }
    for block in &snapshot.blocks {
        let _ = writeln!(out, "  {} ({})", block.name, block.kind);
        for v in &block.values {
            match &v.number {
                Number::Value { value } => line(&mut out, &v.name, &value.to_string(), &v.unit),
                Number::Distribution(d) => line(&mut out, &v.name, &spread(d), &v.unit),
            }
        }
    }
    out
}

/// The rates of a page, a line each; counters that stood still are left out.
pub fn rates(rates: &Rates) -> String {
    let mut out = title(&rates.device, rates.writer);
    for block in &rates.blocks {
        let _ = writeln!(out, "  {} ({})", block.name, block.kind);
        for v in &block.values {
            match &v.number {
                RateNumber::PerSecond { per_s } if *per_s == 0.0 => {}
                RateNumber::PerSecond { per_s } => {
                    line(&mut out, &v.name, &format!("{per_s:.0}"), &format!("{}/s", v.unit));
                }
                RateNumber::Level { value } => {
                    line(&mut out, &v.name, &value.to_string(), &v.unit);
                }
                RateNumber::Distribution(d) if d.count == 0 => {}
                RateNumber::Distribution(d) => line(&mut out, &v.name, &spread(d), &v.unit),
            }
        }
    }
    out
}

/// What each counter means, a line each.
pub fn describe(all: &[Description]) -> String {
    let mut out = String::new();
    let mut block = "";
    for d in all {
        if d.block != block {
            block = &d.block;
            let _ = writeln!(out, "{block}");
        }
        let kind = match d.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = writeln!(out, "  {:<24} {kind:<9} {:<10} {}", d.name, d.unit, d.help);
    }
    out
}

fn title(device: &Device, writer: Writer) -> String {
    let dead = match writer {
        Writer::Alive => "",
        Writer::Dead => " - its backend is gone, these are its last values",
    };
    let Device { kind, name, domid, devid } = device;
    format!("domain {domid} {kind}-{devid} {name}{dead}\n")
}

fn line(out: &mut String, name: &str, number: &str, unit: &str) {
    let _ = writeln!(out, "    {name:<24} {number:>14} {unit}");
}

fn spread(d: &Distribution) -> String {
    format!(
        "n={} mean={:.1} p50={} p90={} p99={} p99.9={}",
        d.count, d.mean, d.p50, d.p90, d.p99, d.p999
    )
}
