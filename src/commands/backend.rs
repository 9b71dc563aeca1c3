//! `ringback backend`: serves devices of one kind in this process.

#[cfg(feature = "test-faults")]
mod faulty;

use std::process::ExitCode;

use blkback::{BlkBackend, Config};
use hypervisor::DomId;
use hypervisor::xenbus::{self, Nodesets, Options, Scope};

use super::{Context, Result};
use crate::cli::Serve;
use crate::signals;

/// Knobs from `--set`.
pub fn config(serve: &Serve) -> Result<Config> {
    let mut config = Config::default();
    serve.set.iter().try_for_each(|list| config.set_all(list))?;
    Ok(config)
}

/// Serves block devices until a signal, the end of the guest, or of xenstored.
pub fn blk(context: &Context, domid: Option<DomId>, serve: &Serve) -> Result {
    let stop = signals::stop()?;
    let hypervisor = context.hypervisor()?;
    let run_dir = context.run_dir.clone();
    let backend = BlkBackend::new(hypervisor.clone(), config(serve)?, run_dir.clone(), open());
    let options = Options {
        scope: domid.map_or(Scope::All, Scope::Domain),
        nodes: if serve.any { Nodesets::Any } else { Nodesets::Ours },
        run_dir,
    };
    xenbus::serve(&*hypervisor, &backend, &options, &stop)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(feature = "test-faults")]
use faulty::open;

/// How disks are opened.
#[cfg(not(feature = "test-faults"))]
fn open() -> std::sync::Arc<blkback::Open> {
    std::sync::Arc::new(blkback::open_target)
}
