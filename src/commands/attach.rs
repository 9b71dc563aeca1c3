//! `ringback attach`, `detach` and `cd`: the toolstack's part, without one.

use std::process::ExitCode;
use std::time::Duration;

use blkback::proto::vdev::Vdev;
use hypervisor::DomId;
use hypervisor::store::Client;
use hypervisor::xenbus::keys::key;
use hypervisor::xenbus::toolstack::{self, Detached, Force};
use hypervisor::xenbus::{DeviceId, Key};

use super::{Context, Result, backend};
use crate::cli::{Cd, Drive};

/// How long a guest may take to let go of a device (libxl's own limit).
const PATIENCE: Duration = Duration::from_secs(10);

/// A disk to attach.
pub struct Disk {
    pub domid: DomId,
    pub vdev: String,
    pub target: String,
    pub read_only: bool,
    pub drive: Drive,
    pub set: Vec<String>,
    pub backend: Option<DomId>,
}

fn device_id(domid: DomId, vdev: &str) -> Result<DeviceId> {
    let devid = Vdev::parse(vdev).map(|v| v.0).ok_or_else(|| {
        format!("{vdev} is not a virtual device: name it like xvda, sda1 or hdc, or by its number")
    })?;
    Ok(DeviceId { kind: "vbd", domid, devid })
}

fn keys(disk: &Disk) -> (Vec<Key>, Vec<Key>) {
    let cdrom = matches!(disk.drive, Drive::Cdrom);
    let device_type = if cdrom { "cdrom" } else { "disk" };
    let mode = if disk.read_only || cdrom { "r" } else { "w" };
    let backend = vec![
        key("params", &disk.target),
        key("script", blkback::SCRIPT),
        key("type", "phy"),
        key("dev", &disk.vdev),
        key("mode", mode),
        key("device-type", device_type),
        key("removable", u8::from(cdrom)),
        key("bootable", 1),
        key("options", disk.set.join(",")),
        // No script runs: the backend itself opens the target, and says so if it cannot.
        key("hotplug-status", "connected"),
    ];
    (backend, vec![key("device-type", device_type)])
}

/// `ringback attach blk`.
pub fn attach(context: &Context, disk: &Disk) -> Result {
    backend::config::<blkback::Config>(&disk.set)?;
    let hypervisor = context.hypervisor()?;
    let id = device_id(disk.domid, &disk.vdev)?;
    let (backend_keys, mut frontend_keys) = keys(disk);
    frontend_keys.push(key("virtual-device", id.devid));
    let backend = disk.backend.unwrap_or(hypervisor.domid());
    let device = toolstack::Device { id, backend, backend_keys, frontend_keys };
    toolstack::attach(&hypervisor.store()?, &device)?;
    Ok(ExitCode::SUCCESS)
}

/// `ringback detach blk`.
pub fn detach(
    context: &Context,
    domid: DomId,
    vdev: &str,
    force: bool,
    backend: Option<DomId>,
) -> Result {
    let hypervisor = context.hypervisor()?;
    let backend = backend.unwrap_or(hypervisor.domid());
    let force = if force { Force::Yes } else { Force::No };
    remove(&hypervisor.store()?, &device_id(domid, vdev)?, backend, force)?;
    Ok(ExitCode::SUCCESS)
}

fn remove(store: &Client, id: &DeviceId, backend: DomId, force: Force) -> Result<()> {
    match toolstack::detach(store, id, backend, PATIENCE, force)? {
        Detached::Closed => Ok(()),
        Detached::Refused => Err(format!(
            "{id}: the guest does not let go of the device within {} s: it is in use there; \
             unmount it, or take it with --force",
            PATIENCE.as_secs()
        )
        .into()),
    }
}

/// `ringback cd`: a frontend does not look for a new medium while it is connected, so the drive
/// goes and comes back.
pub fn cd(context: &Context, cd: &Cd) -> Result {
    let hypervisor = context.hypervisor()?;
    let store = hypervisor.store()?;
    let (domid, vdev) = match cd {
        Cd::Eject { domid, vdev } | Cd::Insert { domid, vdev, .. } => (*domid, vdev),
    };
    let id = device_id(domid, vdev)?;
    let back = format!("{}/backend/{id}", store.domain_path(hypervisor.domid())?);
    let there = store.get(&format!("{back}/state"))?.is_some();
    if there && store.get(&format!("{back}/device-type"))?.as_deref() != Some("cdrom") {
        return Err(format!("{id} is not a CD-ROM drive").into());
    }
    if there {
        remove(&store, &id, hypervisor.domid(), Force::No)?;
    } else if matches!(cd, Cd::Eject { .. }) {
        return Err(format!("{id}: there is no disc in the drive").into());
    }
    let Cd::Insert { target, .. } = cd else { return Ok(ExitCode::SUCCESS) };
    let disk = Disk {
        domid,
        vdev: vdev.clone(),
        target: target.clone(),
        read_only: true,
        drive: Drive::Cdrom,
        set: Vec::new(),
        backend: None,
    };
    attach(context, &disk)
}
