//! guest.toml.

use blkback::proto::vdev::Vdev;
use serde::Deserialize;

use super::super::Result;
use super::image::Image;
use super::plan::{CELL, DiskPlan, Grants, Task};
use super::vif::VifSettings;
use crate::cli::Run;

/// A guest, its disks and its vifs. Without a file it has one of each.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    pub guest: GuestSettings,
    #[serde(rename = "disk")]
    pub disks: Vec<DiskSettings>,
    #[serde(rename = "vif")]
    pub vifs: Vec<VifSettings>,
}

/// `[guest]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestSettings {
    pub name: String,
    /// Processors of the guest's threads, in turn.
    pub cpus: Vec<u32>,
    /// Processors of the backend's queues, in turn.
    pub backend_cpus: Vec<u32>,
}

impl Default for GuestSettings {
    fn default() -> Self {
        GuestSettings { name: "guest".into(), cpus: Vec::new(), backend_cpus: Vec::new() }
    }
}

/// `[[disk]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskSettings {
    /// As the guest names it.
    pub vdev: String,
    /// FORMAT:PATH; without it an image is made.
    pub target: Option<String>,
    pub queues: u32,
    pub ring_page_order: u32,
    pub grants: Grants,
    /// Requests in flight a queue.
    pub depth: u32,
    /// Size of an image that is made; how much of a named one is used.
    pub size_mib: u64,
    /// Random I/O.
    pub work_mib: u64,
    /// Ends the random I/O earlier.
    pub seconds: Option<f64>,
}

impl Default for DiskSettings {
    fn default() -> Self {
        DiskSettings {
            vdev: "xvda".into(),
            target: None,
            queues: 2,
            ring_page_order: 4,
            grants: Grants::Persistent,
            depth: 8,
            size_mib: 64,
            work_mib: 512,
            seconds: None,
        }
    }
}

impl Settings {
    /// Reads the file that was named, or the defaults, with `--disk` over them.
    pub fn read(options: &Run) -> Result<Settings> {
        let mut settings: Settings = match &options.file {
            None => Settings { vifs: vec![VifSettings::default()], ..Settings::default() },
            Some(path) => {
                let told = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
                let text = std::fs::read_to_string(path).map_err(|e| told(&e))?;
                toml::from_str(&text).map_err(|e| told(&e))?
            }
        };
        if settings.disks.is_empty() {
            settings.disks.push(DiskSettings::default());
        }
        if let (Some(target), Some(first)) = (&options.disk, settings.disks.first_mut()) {
            first.target = Some(target.clone());
        }
        for (number, disk) in settings.disks.iter().enumerate() {
            disk.check().map_err(|e| format!("disk {}: {e}", disk.vdev))?;
            let same = |other: &DiskSettings| Vdev::parse(&other.vdev) == Vdev::parse(&disk.vdev);
            if settings.disks[..number].iter().any(same) {
                return Err(format!("disk {}: there are two of that name", disk.vdev).into());
            }
        }
        if options.nbd.is_some() {
            // The disks are served; nothing is done with the vifs.
            settings.vifs.clear();
        }
        for (number, vif) in settings.vifs.iter().enumerate() {
            vif.check().map_err(|e| format!("vif {number}: {e}"))?;
        }
        Ok(settings)
    }
}

impl DiskSettings {
    fn check(&self) -> Result<()> {
        let within = |name: &str, value: u64, low: u64, high: u64| match value {
            value if (low..=high).contains(&value) => Ok(()),
            value => Err(format!("{name} is {value}; it must be {low} to {high}")),
        };
        if Vdev::parse(&self.vdev).is_none() {
            return Err("vdev is no virtual device: name it like xvda, sda1 or hdc".into());
        }
        within("queues", self.queues.into(), 1, blkback::config::MAX_QUEUES.into())?;
        within("ring_page_order", self.ring_page_order.into(), 0, 4)?;
        within("depth", self.depth.into(), 1, 256)?;
        within("size_mib", self.size_mib, 1, 1 << 20)?;
        within("work_mib", self.work_mib, 0, 1 << 30)?;
        match self.seconds {
            Some(s) if !(0.0..=86_400.0).contains(&s) => {
                Err(format!("seconds is {s}; it must be 0 to 86400").into())
            }
            _ => Ok(()),
        }
    }

    /// What the guest has to do with it.
    pub fn plan(&self, image: &Image, seed: u64, cpus: &[u32]) -> DiskPlan {
        let span = image.size().min(self.size_mib << 20);
        DiskPlan {
            vdev: self.vdev.clone(),
            devid: Vdev::parse(&self.vdev).map_or(0, |v| v.0),
            task: if image.is_read_only() { Task::Read } else { Task::Write },
            queues: self.queues,
            ring_page_order: self.ring_page_order,
            grants: self.grants,
            depth: self.depth,
            span: span - span % CELL as u64,
            work: self.work_mib << 20,
            seconds: self.seconds,
            seed,
            cpus: cpus.to_vec(),
        }
    }
}
