//! `ringback changed-log`: the log of a disk's changed blocks.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use blktap::filters::changed::{Frozen, Left};
use serde_json::json;

use super::{Context, Result, live};
use crate::cli::ChangedLog;

/// Stretches that are looked at in one go.
const STEP: u64 = 1 << 40;

/// Carries out the command.
pub fn run(context: &Context, command: &ChangedLog) -> Result {
    match command {
        ChangedLog::Start { device, path } => {
            let path = std::path::absolute(path)?;
            let request = json!({"command": "changed-log-start", "path": path});
            live::ask(context, device, &request)?;
        }
        ChangedLog::Stop { device } => {
            live::ask(context, device, &json!({"command": "changed-log-stop"}))?;
        }
        ChangedLog::Forget { device, name } => {
            let request = json!({"command": "changed-log-forget", "name": name});
            live::ask(context, device, &request)?;
        }
        ChangedLog::Show { path, json } => show(path, *json)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The changed stretches of a log, as (first byte, bytes).
fn changed(log: &Frozen) -> Vec<(u64, u64)> {
    let (mut all, mut at): (Vec<(u64, u64)>, u64) = (Vec::new(), 0);
    let mut stretches = Vec::new();
    while at < log.header.disk_size {
        stretches.clear();
        let end = log.header.disk_size.min(at.saturating_add(STEP));
        log.stretches(at..end, &mut stretches);
        for (len, dirty) in &stretches {
            match all.last_mut() {
                Some((start, bytes)) if *dirty && *start + *bytes == at => *bytes += len,
                _ if *dirty => all.push((at, *len)),
                _ => {}
            }
            at += len;
        }
    }
    all
}

fn show(path: &PathBuf, as_json: bool) -> Result<()> {
    let log = Frozen::read(Path::new(path))?;
    let (header, all) = (&log.header, changed(&log));
    let exact = header.left == Left::Exact;
    let bytes: u64 = all.iter().map(|(_, len)| len).sum();
    let granularity = 1u64 << header.granularity_bits;
    if as_json {
        let stretches: Vec<_> =
            all.iter().map(|(start, len)| json!({"start": start, "length": len})).collect();
        let document = json!({
            "schema": 1, "name": header.name, "disk-size": header.disk_size,
            "granularity": granularity, "exact": exact, "changed-bytes": bytes,
            "changed": stretches,
        });
        outln!("{document}");
        return Ok(());
    }
    outln!("name: {}", header.name);
    outln!("disk size: {}", header.disk_size);
    outln!("granularity: {granularity}");
    outln!("exact: {}", if exact { "yes" } else { "no (not closed: claims too much)" });
    outln!("changed: {bytes}");
    all.iter().for_each(|(start, len)| outln!("{start:>16} {len:>16}"));
    Ok(())
}
