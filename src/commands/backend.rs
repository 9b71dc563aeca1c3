//! `ringback backend`: serves devices of one kind in this process.

#[cfg(feature = "test-faults")]
mod faulty;

use std::process::ExitCode;
use std::sync::Arc;

use blkback::{BlkBackend, Open, Wanted};
use blktap::NullDisk;
use blktap::image::BackingPolicy;
use hypervisor::DomId;
use hypervisor::xenbus::knobs::Knobs;
use hypervisor::xenbus::{self, Nodesets, Options, Scope};
use netback::NetBackend;

use super::{Context, Result};
use crate::cli::{Serve, ServeNet};
use crate::signals;

/// Knobs from `--set`.
pub fn config<C: Knobs + Default>(set: &[String]) -> Result<C> {
    let mut config = C::default();
    set.iter().try_for_each(|list| config.set_all(list))?;
    Ok(config)
}

/// What a node may name as its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// What keeps data.
    Real,
    /// Also `null:BYTES`, which loses writes and leaves the buffers of reads as they are. Only a
    /// bench asks for it, on its own backend's command line: no node can.
    WithNull,
}

/// Serves block devices until a signal, the end of the guest, or of xenstored.
pub fn blk(context: &Context, domid: Option<DomId>, disks: Disks, serve: &Serve) -> Result {
    let stop = signals::stop()?;
    let hypervisor = context.hypervisor()?;
    let run_dir = context.run_dir.clone();
    let open = open(disks, BackingPolicy::Allow(serve.allow_backing.clone()));
    let backend = BlkBackend::new(hypervisor.clone(), config(&serve.set)?, run_dir.clone(), open);
    let options = Options {
        scope: domid.map_or(Scope::All, Scope::Domain),
        nodes: if serve.any { Nodesets::Any } else { Nodesets::Ours },
        run_dir,
    };
    xenbus::serve(&*hypervisor, &backend, &options, &stop)?;
    Ok(ExitCode::SUCCESS)
}

/// Serves network devices until a signal, the end of the guest, or of xenstored.
pub fn net(context: &Context, domid: Option<DomId>, serve: &ServeNet) -> Result {
    let stop = signals::stop()?;
    let hypervisor = context.hypervisor()?;
    let run_dir = context.run_dir.clone();
    let config = config(&serve.set)?;
    let open = netback::opener();
    let backend = NetBackend::new(hypervisor.clone(), config, run_dir.clone(), open);
    let options = Options {
        scope: domid.map_or(Scope::All, Scope::Domain),
        nodes: if serve.any { Nodesets::Any } else { Nodesets::Ours },
        run_dir,
    };
    xenbus::serve(&*hypervisor, &backend, &options, &stop)?;
    Ok(ExitCode::SUCCESS)
}

/// How disks are opened.
fn open(disks: Disks, backing: BackingPolicy) -> Arc<Open> {
    #[cfg(feature = "test-faults")]
    let real = faulty::open(backing);
    #[cfg(not(feature = "test-faults"))]
    let real = blkback::opener(backing);
    match disks {
        Disks::Real => real,
        Disks::WithNull => Arc::new(move |wanted: &Wanted| match null_of(wanted) {
            Some(size) => Ok(NullDisk::new(size)),
            None => real(wanted),
        }),
    }
}

/// Bytes of the null disk that is wanted.
fn null_of(wanted: &Wanted) -> Option<u64> {
    wanted.params.strip_prefix("null:")?.parse().ok()
}
