//! Which hypervisor, which run directory.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypervisor::Hypervisor;

/// Xen, or the bundled hypervisor at `socket`.
pub fn connect(socket: Option<&Path>) -> io::Result<Arc<dyn Hypervisor>> {
    match socket {
        Some(socket) => Ok(Arc::new(hypervisor::embedded::Backend::connect(socket)?)),
        None => Ok(Arc::new(hypervisor::xen::Xen::open()?)),
    }
}

/// `$RINGBACK_RUN` and its defaults.
pub fn run_dir(given: Option<PathBuf>) -> io::Result<PathBuf> {
    if let Some(dir) = given {
        return Ok(dir);
    }
    if rustix::process::geteuid().is_root() {
        return Ok("/run/ringback".into());
    }
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(|dir| PathBuf::from(dir).join("ringback"))
        .ok_or_else(|| io::Error::other("XDG_RUNTIME_DIR is not set; name a folder with --run-dir"))
}
