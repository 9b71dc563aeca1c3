//! A backend of one's own: RAM disks for the guests of a hypervisor, in under 100 lines.
//!
//! The three parts are the same for any backend. A *hypervisor* is Xen, or the bundled one at a
//! socket. A *backend* is told of each device that a toolstack attaches; `BlkBackend` is the
//! block backend, and what a device's disk is, a closure decides. `xenbus::serve` runs the
//! handshake with each guest until it is told to stop.
//!
//! ```text
//! ringback hypervisor --run-dir /tmp/rb &        # or Xen
//! cargo run --example ramdisk -- --hypervisor /tmp/rb/hypervisor.sock /tmp/rb
//! ringback --hypervisor /tmp/rb/hypervisor.sock attach blk 1 xvda ram:64M
//! ```

use std::collections::HashMap;
use std::error::Error;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use blkback::{BlkBackend, Config, Open, Wanted};
use blktap::{Disk, MemDisk};
use hypervisor::Hypervisor;
use hypervisor::xenbus::{self, Fault, Nodesets, Options, Scope};

/// `ram:64M` or `ram:NAME=64M`: a size in MiB. What has a name keeps its content while this runs.
fn parse(params: &str) -> Option<(Option<&str>, usize)> {
    let rest = params.strip_prefix("ram:")?;
    let (name, size) = match rest.split_once('=') {
        Some((name, size)) => (Some(name), size),
        None => (None, rest),
    };
    let mib: usize = size.strip_suffix('M')?.parse().ok()?;
    (1..=4096).contains(&mib).then_some((name, mib << 20))
}

/// Decides what a device's disk is; the error's text reaches the guest's administrator.
fn open() -> Arc<Open> {
    let kept: Mutex<HashMap<String, Arc<MemDisk>>> = Mutex::default();
    Arc::new(move |wanted: &Wanted| {
        let (name, size) = parse(&wanted.params)
            .ok_or_else(|| Fault(format!("{}: write ram:64M or ram:NAME=64M", wanted.params)))?;
        let disk: Arc<dyn Disk> = match name {
            None => MemDisk::new(size),
            Some(name) => {
                let mut kept = kept.lock().map_err(|_| Fault("a thread panicked".into()))?;
                kept.entry(name.to_owned()).or_insert_with(|| MemDisk::new(size)).clone()
            }
        };
        Ok(disk)
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1).peekable();
    let hypervisor: Arc<dyn Hypervisor> = match args.next_if(|arg| arg == "--hypervisor") {
        Some(_) => {
            let socket = PathBuf::from(args.next().ok_or("--hypervisor needs a socket")?);
            Arc::new(hypervisor::embedded::Backend::connect(&socket)?)
        }
        None => Arc::new(hypervisor::xen::Xen::open()?),
    };
    // Where locks, control sockets and counters go, for `ringback list` and `ringback stats`.
    let run_dir = args.next().map_or_else(|| PathBuf::from("/run/ringback"), PathBuf::from);
    let backend = BlkBackend::new(hypervisor.clone(), Config::default(), run_dir.clone(), open());
    // Any node is taken, whatever its script: here there is no other backend.
    let options = Options { scope: Scope::All, nodes: Nodesets::Any, run_dir };
    // Nobody sends on it: serving ends with the hypervisor.
    let (_running, stop) = crossbeam::channel::bounded(0);
    xenbus::serve(&*hypervisor, &backend, &options, &stop)?;
    Ok(())
}
