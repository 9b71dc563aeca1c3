//! A guest that serves its disks by NBD: what clients do goes through ring and backend.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use blkback::BlkFront;
use blktap::Disk;
use blktap::export::nbd::{Clients, Export, Limits, Server};
use hypervisor::embedded::Frontend;

use super::super::Result;
use super::super::export::stop_descriptor;
use super::super::run::plan::{DiskPlan, GuestReport, Line};
use crate::signals;

/// Serves all disks at `socket` until a signal, and closes them.
pub fn serve(guest: &Arc<Frontend>, plans: &[DiskPlan], socket: &Path) -> Result {
    let stop = stop_descriptor(signals::stop()?, || {})?;
    let mut fronts = Vec::new();
    let mut exports = Vec::new();
    for plan in plans {
        let front = Arc::new(super::connect(guest.clone(), plan)?);
        let names: &[&str] = if fronts.is_empty() { &["", &plan.vdev] } else { &[&plan.vdev] };
        for name in names {
            let mut export = Export::new(*name, front.clone() as Arc<dyn Disk>);
            // A client has a ring of its own, and the next one waits for it.
            export.clients = Clients::One;
            exports.push(export);
        }
        fronts.push(front);
    }
    let mut server = Server::new(exports, None, Limits::default())?;
    server.listen_unix(socket)?;
    super::say(&Line::Serving)?;
    server.serve(stop.as_fd())?;
    drop(server);
    for front in fronts.into_iter().filter_map(Arc::into_inner) {
        BlkFront::close(front)?;
    }
    super::say(&Line::Report(GuestReport::default()))?;
    Ok(ExitCode::SUCCESS)
}
