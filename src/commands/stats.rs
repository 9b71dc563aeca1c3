//! `ringback stats` and `ringback list`.

use std::process::ExitCode;
use std::time::Duration;

use perf::page::{Reader, find};
use perf::snapshot::{Number, Snapshot, Writer};
use serde_json::json;

use super::{Context, Result};
use crate::cli::{List, Stats};

fn wanted(snapshot: &Snapshot, device: Option<&str>) -> bool {
    let d = &snapshot.device;
    device.is_none_or(|name| {
        name == format!("{}/{}", d.domid, d.name) || name == format!("{}/{}", d.domid, d.devid)
    })
}

/// All pages that can be read and are asked for.
fn readers(context: &Context, device: Option<&str>) -> Result<Vec<(Reader, Snapshot)>> {
    let mut all = Vec::new();
    for path in find(&context.run_dir)? {
        match Reader::open(&path).and_then(|mut r| r.snapshot().map(|s| (r, s))) {
            Ok((reader, snapshot)) if wanted(&snapshot, device) => all.push((reader, snapshot)),
            Ok(_) => {}
            Err(e) => tracing::warn!("{}: {e}", path.display()),
        }
    }
    if all.is_empty() && device.is_some() {
        return Err(format!(
            "no device {} is served; `ringback list` shows what is",
            device.unwrap_or_default()
        )
        .into());
    }
    Ok(all)
}

/// `ringback stats`.
pub fn stats(context: &Context, options: &Stats) -> Result {
    let device = options.device.as_deref();
    if options.describe {
        describe(context, device, options.json)?;
    } else if let Some(seconds) = options.interval {
        if !(seconds > 0.0 && seconds <= 86_400.0) {
            return Err("--interval: between 0 and 86400 seconds".into());
        }
        watch(context, options, Duration::from_secs_f64(seconds))?;
    } else {
        let all: Vec<Snapshot> = readers(context, device)?.into_iter().map(|(_, s)| s).collect();
        if options.json {
            outln!("{}", json!({"schema": perf::snapshot::SCHEMA, "devices": all}));
        } else {
            all.iter().for_each(|s| out!("{}", perf::text::values(s)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(context: &Context, device: Option<&str>, as_json: bool) -> Result<()> {
    let all = readers(context, device)?;
    let described = match all.first() {
        Some((_, snapshot)) => snapshot.describe(),
        None => return Err("no device is served whose counters could be described".into()),
    };
    if as_json {
        outln!("{}", json!({"schema": perf::snapshot::SCHEMA, "counters": described}));
    } else {
        out!("{}", perf::text::describe(&described));
    }
    Ok(())
}

fn watch(context: &Context, options: &Stats, interval: Duration) -> Result<()> {
    let mut old = readers(context, options.device.as_deref())?;
    let mut left = options.count.unwrap_or(u64::MAX);
    while left > 0 && crate::out::is_heard() {
        left -= 1;
        std::thread::sleep(interval);
        let new = readers(context, options.device.as_deref())?;
        let rates: Vec<_> = new
            .iter()
            .filter_map(|(_, now)| {
                let then = old.iter().find(|(_, s)| s.device == now.device && s.pid == now.pid);
                then.map(|(_, then)| now.rates(then))
            })
            .collect();
        if options.json {
            outln!("{}", json!({"schema": perf::snapshot::SCHEMA, "devices": rates}));
        } else {
            rates.iter().for_each(|r| out!("{}", perf::text::rates(r)));
        }
        old = new;
    }
    Ok(())
}

/// A device's state in words.
fn state_of(s: &Snapshot) -> &'static str {
    let stalled = s.blocks.iter().flat_map(|block| &block.values).any(|value| {
        value.name == "stalled" && matches!(value.number, Number::Value { value } if value > 0)
    });
    match s.writer {
        Writer::Alive if stalled => "paused by an error",
        Writer::Alive => "served",
        Writer::Dead => "left behind",
    }
}

/// `ringback list`.
pub fn list(context: &Context, options: &List) -> Result {
    let all = readers(context, None)?;
    if options.json {
        let devices: Vec<_> = all
            .iter()
            .map(|(_, s)| {
                let state = state_of(s);
                json!({"device": s.device, "pid": s.pid, "writer": s.writer, "state": state})
            })
            .collect();
        outln!("{}", json!({"schema": 1, "devices": devices}));
        return Ok(ExitCode::SUCCESS);
    }
    outln!("{:>6} {:5} {:10} {:>8} {:>8} STATE", "DOMID", "KIND", "NAME", "DEVID", "PID");
    for (_, s) in all {
        let state = state_of(&s);
        let d = s.device;
        outln!("{:>6} {:5} {:10} {:>8} {:>8} {state}", d.domid, d.kind, d.name, d.devid, s.pid);
    }
    Ok(ExitCode::SUCCESS)
}
