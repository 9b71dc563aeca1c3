//! Commands that speak to a live device over its control socket.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use netback::hold::Then;
use serde_json::{Value, json};

use super::{Context, Result, control};
use crate::cli::Output;

/// How long a device may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The name of a device's files: of a disk `xvda` or a vif `vif0`.
fn stem(device: &str) -> Option<String> {
    match device.strip_prefix("vif").map(str::parse::<u32>) {
        Some(Ok(devid)) => Some(format!("vif-{devid}")),
        _ => blkback::proto::vdev::Vdev::parse(device).map(|vdev| format!("vbd-{}", vdev.0)),
    }
}

/// The control socket of `DOMID/VDEV` or `DOMID/vifN`, or the path that was given.
fn socket(context: &Context, device: &str) -> Result<PathBuf> {
    if let Some((domid, device)) = device.split_once('/')
        && let (Ok(domid), Some(stem)) = (domid.parse::<u16>(), stem(device))
    {
        return Ok(context.run_dir.join(domid.to_string()).join(format!("{stem}.sock")));
    }
    let path = PathBuf::from(device);
    if path.exists() {
        Ok(path)
    } else {
        Err(format!("{device}: no such device; name it as DOMID/VDEV or DOMID/vifN").into())
    }
}

/// Asks a device; its answer is an object without `error`.
pub fn ask(context: &Context, device: &str, request: &Value) -> Result<Value> {
    let path = socket(context, device)?;
    control::ask(&path, PATIENCE, request).map_err(|e| format!("{device}: {e}").into())
}

/// `ringback resize`.
pub fn resize(context: &Context, device: &str) -> Result {
    let answer = ask(context, device, &json!({"command": "resize"}))?;
    outln!("{device}: {} bytes", answer.get("size").and_then(Value::as_u64).unwrap_or(0));
    Ok(ExitCode::SUCCESS)
}

/// `ringback set`.
pub fn set(context: &Context, device: &str, knob: &str, value: &str) -> Result {
    ask(context, device, &json!({"command": "set", "knob": knob, "value": value}))?;
    Ok(ExitCode::SUCCESS)
}

/// `ringback output`: what a vif's guest sends is held, let go or dropped.
pub fn output(context: &Context, device: &str, action: Output, then: Then) -> Result {
    let request = match action {
        Output::Hold => json!({"command": "hold-output"}),
        Output::Release => json!({"command": "release-output", "then": then}),
        Output::Drop => json!({"command": "drop-output", "then": then}),
    };
    let answer = ask(context, device, &request)?;
    let number = |key| answer.get(key).and_then(Value::as_u64).unwrap_or(0);
    outln!("{device}: {} packets, {} bytes", number("packets"), number("bytes"));
    Ok(ExitCode::SUCCESS)
}
