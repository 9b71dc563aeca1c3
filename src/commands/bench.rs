//! `ringback bench`: measurements as commands, each beside somebody else's code under the same
//! load.

mod alone;
mod blk;
mod front;
mod host;
mod load;
mod nbd;
mod net;
mod peer;
mod qemu;
mod ring;
mod table;
mod usage;
mod vhost;

use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Value, json};

use super::Result;
use super::hypervisor::Folder;
use crate::cli::Bench;

/// Carries out one bench, or a part of one.
pub fn run(bench: &Bench) -> Result {
    match bench {
        Bench::Ring(options) => ring::run(options),
        Bench::Blk(options) => blk::run(options),
        Bench::Nbd(options) => nbd::run(options),
        Bench::Vhost(options) => vhost::run(options),
        Bench::Net(options) => net::run(options),
        Bench::Guest { plan } => tell(&front::run(&serde_json::from_str(plan)?)?),
        Bench::NetGuest { plan } => tell(&net::guest::run(&serde_json::from_str(plan)?)?),
        Bench::Client { plan } => tell(&peer::run(&serde_json::from_str(plan)?)?),
    }
}

fn tell(measured: &impl Serialize) -> Result {
    outln!("{}", serde_json::to_string(measured)?);
    Ok(ExitCode::SUCCESS)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A folder of this process's own, removed at the end; by the hypervisor's process, if it has
/// one, where this process is killed.
struct Scratch(Folder);

impl Scratch {
    /// In `place`, or where temporary files go.
    fn new(place: Option<&Path>) -> std::io::Result<Scratch> {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("ringback-bench-");
        let made = match place {
            Some(place) => builder.tempdir_in(place)?,
            None => builder.tempdir()?,
        };
        Ok(Scratch(Folder(made.keep())))
    }
    fn path(&self) -> &Path {
        &self.0.0
    }
}

/// What the figures depend on.
fn machine() -> Value {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name"));
    let model = model.map(|m| m.trim_start_matches([' ', '\t', ':']).to_owned());
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    json!({ "cpus": cpus, "model": model, "kernel": kernel })
}
