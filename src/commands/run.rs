//! `ringback run`: a guest's process, a backend's process and the bundled hypervisor, verified
//! I/O between them, and a comparison of the image with what the guest says.

mod image;
pub mod plan;
mod processes;
mod report;
mod settings;
pub mod stamp;
pub mod vif;
pub mod workload;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hypervisor::store::Client;
use hypervisor::xenbus::toolstack;
use hypervisor::xenbus::{DeviceId, Key};

use super::Result;
use super::hypervisor::Folder;
use crate::cli::Run;
use crate::signals;
use image::Image;
use plan::{GuestPlan, GuestReport, Line};
use processes::{Processes, Said};
use report::{Checked, Outcome};
use settings::{DiskSettings, Settings};

/// How long the processes may take to start, and to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the I/O is done on.
struct Scene {
    settings: Settings,
    images: Vec<Image>,
    plan: GuestPlan,
}

/// `ringback run`.
pub fn run(options: &Run) -> Result {
    let stop = signals::stop()?;
    let settings = Settings::read(options)?;
    let seed = options.seed.unwrap_or_else(random_seed);
    let folder = tempfile::Builder::new().prefix("ringback-run-").tempdir()?;
    // Removed at the end; if this process is killed, by the hypervisor's.
    let folder = Folder(folder.keep());
    let make = |disk: &DiskSettings| Image::make(disk, options, &folder.0);
    let images = settings.disks.iter().map(make).collect::<Result<Vec<_>>>()?;
    let disks = settings.disks.iter().zip(&images);
    let disks = disks.map(|(d, image)| d.plan(image, seed, &settings.guest.cpus));
    let nbd = options.nbd.as_deref().map(std::path::absolute).transpose()?;
    let vifs = (0..).zip(&settings.vifs).map(|(number, vif)| vif.plan(number, seed));
    let plan = GuestPlan { disks: disks.collect(), vifs: vifs.collect(), nbd };
    let scene = Scene { settings, images, plan };
    let start = Instant::now();
    let mut processes = Processes::start(&folder.0, stop)?;
    let report = perform(&mut processes, &scene, options)?;
    processes.end_guest()?;
    if scene.plan.nbd.is_some() {
        // What the clients wrote, they know.
        processes.end_hypervisor()?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut checked = Checked::default();
    for ((image, plan), report) in scene.images.iter().zip(&scene.plan.disks).zip(&report.disks) {
        checked.add(image.compare(plan, report)?);
    }
    processes.end_hypervisor()?;
    drop(folder);
    let outcome = Outcome { seed, seconds: start.elapsed().as_secs_f64(), report, checked };
    outcome.print(options.json);
    Ok(if outcome.errors() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn random_seed() -> u64 {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    stamp::mix(now.as_nanos() as u64 ^ u64::from(std::process::id()))
}

/// Starts backends and guest, and waits for the guest's report.
fn perform(processes: &mut Processes, scene: &Scene, options: &Run) -> Result<GuestReport> {
    let guest = &scene.settings.guest;
    let (domid, identity) = processes.create_domain(&guest.name)?;
    // While the disks are served to others somebody can make room on a full file system and resume
    // them; in a run that verifies itself nobody does, and it is an error.
    let knobs: &[&str] = if scene.plan.nbd.is_some() { &[] } else { &["on_enospc=report"] };
    processes.start_blk(domid, scene.images.iter().filter_map(Image::backing_folder), knobs)?;
    if !scene.settings.vifs.is_empty() {
        processes.start_net(domid)?;
    }
    let store = processes.store()?;
    for ((settings, image), plan) in
        scene.settings.disks.iter().zip(&scene.images).zip(&scene.plan.disks)
    {
        attach(&store, domid, plan.devid, settings, image, &guest.backend_cpus)?;
    }
    for (number, vif) in (0..).zip(&scene.settings.vifs) {
        vif.attach(&store, domid, number)?;
    }
    processes.start_guest(identity, &serde_json::to_string(&scene.plan)?)?;
    let total = scene.plan.total();
    let shows = !options.json && (options.progress || std::io::stderr().is_terminal());
    let report = loop {
        match processes.next_line()? {
            Said::Line(Line::Progress(moved)) if shows => show(moved, total),
            Said::Line(Line::Progress(_)) => {}
            Said::Line(Line::Report(report)) => break report,
            Said::Line(Line::Serving) => {
                for uri in uris(&scene.plan) {
                    outln!("{uri}");
                }
            }
            Said::Interrupted if scene.plan.nbd.is_some() => processes.stop_guest()?,
            Said::Interrupted => return Err("interrupted".into()),
        }
    };
    if shows {
        err!("\r\x1b[K");
    }
    // The guest has closed its devices and ends; its nodes go with it, and its backends too.
    Ok(report)
}

/// Where the disks of a guest that serves them are.
fn uris(plan: &GuestPlan) -> Vec<String> {
    let Some(socket) = &plan.nbd else { return Vec::new() };
    let of =
        |disk: &plan::DiskPlan| format!("nbd+unix:///{}?socket={}", disk.vdev, socket.display());
    plan.disks.iter().map(of).collect()
}

fn show(moved: u64, total: u64) {
    let percent = (moved * 100).checked_div(total).unwrap_or(100).min(100);
    err!("\r\x1b[K{percent:3} %  {} of about {} MiB", moved >> 20, total >> 20);
}

fn attach(
    store: &Client,
    domid: u16,
    devid: u32,
    settings: &DiskSettings,
    image: &Image,
    cpus: &[u32],
) -> Result<()> {
    let key = |name: &str, value: &str| -> Key { (name.to_owned(), value.to_owned()) };
    let mode = if image.is_read_only() { "r" } else { "w" };
    let id = DeviceId { kind: "vbd", domid, devid };
    let mut knobs = format!("max_queues={}", settings.queues);
    if !cpus.is_empty() {
        let list: Vec<String> = cpus.iter().map(u32::to_string).collect();
        knobs = format!("{knobs},cpus={}", list.join("+"));
    }
    let device = toolstack::Device {
        id,
        backend: 0,
        backend_keys: vec![
            key("params", &image.target()?),
            key("script", blkback::SCRIPT),
            key("type", "phy"),
            key("dev", &settings.vdev),
            key("mode", mode),
            key("device-type", "disk"),
            key("options", &knobs),
            key("hotplug-status", "connected"),
        ],
        frontend_keys: vec![key("virtual-device", &devid.to_string())],
    };
    Ok(toolstack::attach(store, &device)?)
}
