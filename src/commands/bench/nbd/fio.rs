//! fio as the client.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::servers::Served;
use crate::commands::bench::usage;

/// What fio is to do.
#[derive(Clone, Debug)]
pub struct Job {
    pub rw: &'static str,
    pub bs: u64,
    pub depth: u32,
    pub size: u64,
    /// How long; `None`: once over the image.
    pub seconds: Option<f64>,
    /// And at most so long, all the same.
    pub limit: f64,
}

/// What it has measured.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub iops: f64,
    /// Microseconds of processor time of the server, a request; NaN without one.
    pub server_cpu_us: f64,
}

/// IOPS, and how many requests there were.
fn run(job: &Job, more: &[String]) -> io::Result<(f64, f64)> {
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--output-format=json", "--randrepeat=1", "--norandommap=0"]);
    command.arg(format!("--rw={}", job.rw)).arg(format!("--bs={}", job.bs));
    command.arg(format!("--iodepth={}", job.depth)).arg(format!("--size={}", job.size));
    command.arg(format!("--runtime={}ms", (job.limit * 1e3).ceil()));
    command.args(job.seconds.map(|_| "--time_based")).args(more);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| io::Error::new(e.kind(), format!("fio: {e}: install the package fio")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let told = || {
        let error = String::from_utf8_lossy(&output.stderr);
        io::Error::other(format!("fio has failed ({}): {}", output.status, error.trim()))
    };
    if !output.status.success() {
        return Err(told());
    }
    // Words of the engine come before the document.
    let start = text.find("\n{").map_or(0, |at| at + 1);
    let document: Value = serde_json::from_str(&text[start..]).map_err(|_| told())?;
    let figure = |side: &str, name: &str| document["jobs"][0][side][name].as_f64();
    let sum = |name| Some(figure("read", name)? + figure("write", name)?);
    sum("iops").zip(sum("total_ios")).filter(|(iops, _)| *iops > 0.0).ok_or_else(told)
}

/// On a server.
pub fn on_server(served: &Served, job: &Job) -> io::Result<Measured> {
    let before = usage::whole(&served.pid())?;
    let more = ["--ioengine=nbd".to_owned(), format!("--uri={}", served.uri())];
    let (iops, requests) = run(job, &more)?;
    let used = usage::whole(&served.pid())?.saturating_sub(before);
    Ok(Measured { iops, server_cpu_us: used as f64 / 1e3 / requests })
}

/// On a file, by io_uring.
pub fn on_file(path: &Path, job: &Job, direct: bool) -> io::Result<Measured> {
    let more = [
        "--ioengine=io_uring".to_owned(),
        format!("--filename={}", path.display()),
        format!("--direct={}", u8::from(direct)),
        // Otherwise fio first throws the file out of the page cache in which the servers have it.
        "--invalidate=0".to_owned(),
    ];
    Ok(Measured { iops: run(job, &more)?.0, server_cpu_us: f64::NAN })
}
